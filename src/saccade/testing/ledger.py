"""The one place where a known failure may be written down, with its reason; strict both ways.

`ledger.toml` holds entries

    [[waiver]]
    mechanism = "id of the mechanism"
    check = "name of the check"
    reason = "why it fails, and what would mend it"
    case = "the case, as the report prints it"      # left out: every case of the check

A waived check must fail: one that passes is an XPASS, which is a failure. An entry that matches no check is an error.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("ledger.toml")


@dataclass(frozen=True)
class Waiver:
    """One known failure. case: None waives every case of the check."""

    mechanism: str
    check: str
    reason: str
    case: str | None = None

    def covers(self, mechanism: str, check: str, case: str) -> bool:
        return (self.mechanism, self.check) == (mechanism, check) and self.case in (None, case)


@dataclass(frozen=True)
class Ledger:
    """The waivers in force."""

    waivers: tuple[Waiver, ...] = ()

    @classmethod
    def load(cls, path: Path = PATH) -> Ledger:
        """Read a ledger; an entry with a missing, unknown or empty field is refused."""
        return cls.parse(tomllib.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger of a parsed TOML document."""
        if set(data) - {"waiver"}:
            raise ValueError(f"ledger: got {sorted(set(data) - {'waiver'})}; it holds [[waiver]] entries only")
        waivers = []
        for entry in data.get("waiver", []):
            fields = set(entry)
            if not {"mechanism", "check", "reason"} <= fields <= {"mechanism", "check", "reason", "case"}:
                raise ValueError(
                    f"ledger: got an entry with {sorted(fields)}; it needs mechanism, check, reason, and may have case"
                )
            if not all(isinstance(text, str) and text.strip() for text in entry.values()):
                raise ValueError(f"ledger: got {entry}; every field must be a text that says something")
            waivers.append(Waiver(**entry))
        return cls(tuple(waivers))

    def find(self, mechanism: str, check: str, case: str) -> Waiver | None:
        """The waiver that covers this check, if there is one."""
        return next((w for w in self.waivers if w.covers(mechanism, check, case)), None)

    def stale(self, known: Iterable[tuple[str, str, str]]) -> list[Waiver]:
        """Entries that cover none of the `known` (mechanism, check, case)."""
        known = known if isinstance(known, Collection) else list(known)
        return [w for w in self.waivers if not any(w.covers(*row) for row in known)]

    def judge(self, mechanism: str, check: str, case: str, failure: str | None) -> tuple[str, str]:
        """(status, message) of a check that ended with `failure` (None: it passed)."""
        waiver = self.find(mechanism, check, case)
        if waiver is None:
            return ("OK", "") if failure is None else ("FAILED", failure)
        if failure is None:
            return "XPASS", f"passes, although the ledger waives it ({waiver.reason}); delete the entry"
        return "WAIVED", waiver.reason
