"""What a run of the checks found: one row a check, as a table, as JSON, or as one exception."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

STYLES = {"OK": "green", "FAILED": "bold red", "WAIVED": "yellow", "XPASS": "bold magenta"}


@dataclass(frozen=True)
class Row:
    """One check's outcome. status: OK, FAILED, WAIVED (failed, as the ledger says), XPASS (passed, though waived).

    message: what went wrong, or what a claim that holds has found.
    """

    mechanism: str
    check: str
    case: str
    status: str
    seconds: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.status in ("OK", "WAIVED")


@dataclass(frozen=True)
class Report:
    """The rows of a run; `print(report)` for text, `rich.print(report)` for a table."""

    outcomes: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """True when something ran, and every check passed or failed as the ledger says."""
        return bool(self.outcomes) and all(row.ok for row in self.outcomes)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.outcomes if not row.ok]

    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain dictionaries, for JSON."""
        return [asdict(row) for row in self.outcomes]

    def raise_for_failures(self) -> None:
        """One AssertionError that lists every failure; nothing when all is well."""
        if not self.ok:
            raise AssertionError(str(self))

    def __str__(self) -> str:
        lines = [f"{len(self.outcomes)} checks, {len(self.failures)} failures"]
        lines += [f"{row.mechanism}[{row.case}]-{row.check}: {row.status}: {row.message}" for row in self.failures]
        return "\n".join(lines)

    def __rich__(self) -> Group:
        """A row a mechanism and check, its cases counted; then what each claim found, and every failure in full."""
        from rich import box
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text

        seconds = sum(row.seconds for row in self.outcomes)
        title = f"{len(self.outcomes)} checks, {len(self.failures)} failures, {seconds:.1f} s"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("mechanism", "check", "status", "cases", "seconds"):
            table.add_column(column, justify="right" if column in ("cases", "seconds") else "left", no_wrap=True)
        kinds: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.outcomes:
            kinds.setdefault((row.mechanism, row.check, row.status), []).append(row)
        for (mechanism, check, status), rows in kinds.items():
            spent = sum(row.seconds for row in rows)
            table.add_row(mechanism, check, f"[{STYLES[status]}]{status}[/]", str(len(rows)), f"{spent:.2f}")
        found = [row for row in self.outcomes if row.status == "OK" and row.message]
        told = []
        for row in [*found, *self.failures]:
            head = f"[{STYLES[row.status]}]{row.status}[/] {row.mechanism} {row.check} {escape(row.case)}"
            told.append(Text.from_markup(f"{head}\n  {escape(row.message)}"))
        return Group(table, *told)
