"""What "works" means: named checks that any mechanism, ours or yours, must pass.

Three lines judge one:

    from saccade.testing import check

    report = check(MyAttention)
    report.raise_for_failures()
"""

from saccade.testing.budget import Verdict, assert_close, compare
from saccade.testing.ledger import Ledger, Waiver
from saccade.testing.oracles import dense_attention
from saccade.testing.report import Report, Row
from saccade.testing.runner import Check, check, check_names, checks, cli_table, parametrize_with_checks, perform
from saccade.testing.subject import Subject, randomise

__all__ = [
    "Check",
    "Ledger",
    "Report",
    "Row",
    "Subject",
    "Verdict",
    "Waiver",
    "assert_close",
    "check",
    "check_names",
    "checks",
    "cli_table",
    "compare",
    "dense_attention",
    "parametrize_with_checks",
    "perform",
    "randomise",
]
