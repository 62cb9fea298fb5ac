"""Docstrings are plain text; this turns their few conventions into reStructuredText.

A block that is indented by four more and set off by blank lines is a formula (or code, when it is a Python statement);
lines `name: meaning` whose continuation is indented are a definition list; a `name:` that opens a sentence is set bold,
so that runs of them stay prose that can be searched by eye; `words` in backticks are literals, linked when they name
something documented; `>>>` examples stay. Everything else is escaped, for `S_` and `*` mean themselves.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator

LABEL = re.compile(r"(?:^|(?<=[^\s][.;]\s))([A-Za-z]\w*(?:, \w+)*):(?=\s)")
NAMED = re.compile(r"^(\*{0,2}[A-Za-z_][\w.]*(?:, \*{0,2}[A-Za-z_][\w.]*)*): ")
CODE = re.compile(r"``.+?``|`[^`]+`", re.S)
IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*")
SPECIAL = re.compile(r"([\\*|`]|_(?!\w)|(?<!\w)_)")


def to_rst(lines: list[str]) -> list[str]:
    """The docstring `lines`, dedented, as reStructuredText."""
    out: list[str] = []
    for block in _blocks(lines):
        out += _block(block)
    return out


def prose(text: str, *, links: bool = True) -> str:
    """A sentence in which only backticks are markup."""
    parts, at = [], 0
    for found in CODE.finditer(text):
        parts += [_escaped(text[at : found.start()]), _literal(found.group().strip("`"), links)]
        at = found.end()
    return "".join([*parts, _escaped(text[at:])])


def paragraph(text: str) -> str:
    """Prose with its labels in bold."""
    parts, at = [], 0
    for found in LABEL.finditer(text):
        parts += [prose(text[at : found.start()]), rf"**{_escaped(found[1])}**\ :"]
        at = found.end()
    return "".join([*parts, prose(text[at:])])


def labelled(text: str, labels: Iterable[str]) -> tuple[str, dict[str, str]]:
    """What a docstring says under each of `labels`, and the rest of it.

    A label opens a sentence and ends in a colon (`Paper: ...`), or is `Costs`; it holds until the next label or the end
    of the paragraph. Several names may share one (`lo, hi: ...`). Where one is given twice the last counts.
    """
    found: dict[str, str] = {}
    names = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    start = re.compile(rf"(?:^|(?<=[^\s][.;]\s))(?:((?:{names})(?:, (?:{names}))*):\s+|(Costs?)\s+)")
    rest = []
    for block in reversed(list(_blocks(text.split("\n")))):
        body = "\n".join(block)
        if not body.startswith((" ", ">>>")):
            for mark in reversed(list(start.finditer(body))):
                told = (mark[1] or mark[2]).split(", ")
                if any(name in found for name in told):  # said again further down
                    continue
                found |= dict.fromkeys(told, " ".join(body[mark.end() :].split()))
                body = body[: mark.start()].rstrip()
        if body:
            rest.append(body)
    return "\n\n".join(reversed(rest)), found


def _escaped(text: str) -> str:
    return SPECIAL.sub(r"\\\1", text)


def _literal(text: str, links: bool) -> str:
    """The backslash-space pairs let it touch letters: `Plan`s."""
    if links and IDENTIFIER.fullmatch(text):
        return rf"\ :py:obj:`{text}`\ "
    return rf"\ ``{' '.join(text.split())}``\ "


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines between blank ones; indented runs that follow one another are one block."""
    block: list[str] = []
    gap = False
    for line in lines:
        if not line.strip():
            gap = bool(block)
            continue
        if gap and block[0].startswith("    ") and line.startswith("    "):
            block.append("")
        elif gap:
            yield block
            block = []
        gap = False
        block.append(line)
    if block:
        yield block


def _block(block: list[str]) -> list[str]:
    if block[0].lstrip().startswith(">>>"):
        return [*textwrap.dedent("\n".join(block)).split("\n"), ""]
    if block[0].startswith("    "):
        return _set_off(textwrap.dedent("\n".join(block)))
    if any(line.startswith("    ") for line in block):
        return _definitions(block)
    text = "\n".join(block)
    if text.startswith("- "):
        items = re.split(r"\n(?=- )", text)
        return [f"- {prose(' '.join(item[2:].split()))}" for item in items] + [""]
    return [*paragraph(text).split("\n"), ""]


def _set_off(text: str) -> list[str]:
    language, kind = ("python", "example") if is_code(text) else ("text", "formula")
    return [f".. code-block:: {language}", f"   :class: {kind}", "", *textwrap.indent(text, "   ").split("\n"), ""]


def is_code(text: str) -> bool:
    """Python statements that do something, not an equation that happens to parse."""
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return False
    return any(not isinstance(node, ast.Assign | ast.Expr) for node in body) or any(
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) for node in body
    )


def _definitions(block: list[str]) -> list[str]:
    """Paragraphs with hanging indents: one item for each line that is not indented."""
    items: list[list[str]] = []
    for line in block:
        if line.startswith("    "):
            items[-1].append(line.strip())
        else:
            items.append([line])
    out = []
    for words in items:
        text = " ".join(words)
        found = NAMED.match(text)
        if found:
            out += [f"**{_escaped(found[1])}**", f"   {prose(text[found.end() :])}", ""]
        else:
            out += [prose(text), ""]
    return out
