"""Patterns as text: the constructors of `saccade.where`, joined by & and |, as one would write them in Python."""

from __future__ import annotations

import ast
from typing import Any

from saccade import where
from saccade.where import Pattern


def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` describes; nothing in it is executed but the constructors of patterns.

    Errors: ValueError for text that is no such expression, or for names that are no pattern; what a constructor raises.

    >>> parse_pattern("Sinks(4) | Window(16) & Causal()").dense(32).shape
    torch.Size([1, 32, 32])
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"pattern: got {text!r}, which is no expression; pass one like {EXAMPLE!r}") from error
    found = _value(tree.body, text)
    if not isinstance(found, Pattern):
        raise ValueError(f"pattern: got {text!r}, which is no pattern; pass one like {EXAMPLE!r}")
    return found


EXAMPLE = "Window(512) & Causal()"


def _patterns() -> dict[str, type[Pattern]]:
    members = {name: getattr(where, name) for name in where.__all__}
    return {
        n: m for n, m in members.items() if isinstance(m, type) and issubclass(m, Pattern) and n not in ("And", "Or")
    }


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _value(node.left, text), _value(node.right, text)
        return left & right if isinstance(node.op, ast.BitAnd) else left | right
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        choices = _patterns()
        if node.func.id not in choices:
            raise ValueError(f"pattern: got {node.func.id!r}; choose from {', '.join(sorted(choices))}")
        named = {word.arg: _value(word.value, text) for word in node.keywords if word.arg}
        return choices[node.func.id](*(_value(argument, text) for argument in node.args), **named)
    if isinstance(node, (ast.List, ast.Tuple)):
        return tuple(_value(one, text) for one in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        part = ast.unparse(node)
        raise ValueError(f"pattern: got {part!r} in {text!r}; use patterns, &, |, numbers and lists") from error
