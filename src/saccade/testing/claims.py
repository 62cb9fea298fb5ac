"""Does the paper's headline hold, at our scale?"""

from __future__ import annotations

from saccade.contract import Finding, Mechanism
from saccade.testing.registry import named


@named(over="claim")
def claim(cls: type[Mechanism], name: str) -> str:
    """What the paper claims is found, with a measured figure."""
    sentence, function = cls.claims()[name]
    finding = function()
    assert isinstance(finding, Finding), f"{name}: returned a {type(finding).__name__}; return Finding(holds, figure)"
    assert any(c.isdigit() for c in finding.figure), (
        f"{name}: the figure {finding.figure!r} holds no number; say what was measured"
    )
    assert finding.holds, f"{name}: {sentence} Found: {finding.figure}"
    return f"{sentence} Found: {finding.figure}"
