"""What a run of the checks found: one row a check, as a table, as JSON, or as one exception."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {"OK": "green", "FAILED": "bold red", "WAIVED": "yellow", "XPASS": "bold magenta"}


@dataclass(frozen=True)
class Row:
    """One check's outcome. status: OK, FAILED, WAIVED (failed, as the ledger says), XPASS (passed, though waived)."""

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

    def __rich__(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        seconds = sum(row.seconds for row in self.outcomes)
        table = Table(title=f"{len(self.outcomes)} checks, {len(self.failures)} failures, {seconds:.1f} s")
        for column in ("mechanism", "check", "case", "status", "seconds", "message"):
            table.add_column(column, justify="right" if column == "seconds" else "left", no_wrap=column == "status")
        for row in self.outcomes:
            status = f"[{STYLES[row.status]}]{row.status}[/]"
            table.add_row(row.mechanism, row.check, escape(row.case), status, f"{row.seconds:.2f}", escape(row.message))
        return table
