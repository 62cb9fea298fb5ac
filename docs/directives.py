"""`pattern`: what patterns admit, drawn; `sweep`: what trainings found, shown; `room`: the reference of a package."""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any, ClassVar

import measured
from docstrings import to_rst
from docutils import nodes
from docutils.parsers.rst import Directive, directives
from docutils.statemachine import StringList
from gallery import ink

from saccade.bench.draw import draw_pattern
from saccade.bench.expression import parse_pattern


class PatternPicture(Directive):
    """The arguments are expressions, one a line, such as `Causal() & Window(16)`; they are drawn side by side."""

    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"length": directives.positive_int}

    def run(self) -> list[nodes.Node]:
        figures = []
        for text in filter(None, map(str.strip, self.content)):
            pattern = parse_pattern(text)
            is_grid = getattr(pattern, "grid", None) is not None
            drawing = draw_pattern(pattern, None if is_grid else self.options.get("length", 64))
            figures.append(ink(drawing.images()[0][1], text, caption_is_code=True))
        return [nodes.raw("", f'<div class="pictures">{"".join(figures)}</div>', format="html")]


class SweepResults(Directive):
    """The argument is a sweep, `recall` or `images`: its charts and tables, from the rows that lie in `training/`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        sweep = self.arguments[0]
        show = {"recall": measured.recall, "images": measured.images}.get(sweep)
        if show is None:
            raise self.error(f"sweep: got {sweep!r}; choose recall or images")
        for path in measured.files(sweep):
            self.state.document.settings.record_dependencies.add(str(path))
        return [nodes.raw("", show(measured.found(sweep)), format="html")]


class RoomReference(Directive):
    """Everything that a package exports, file by file, functions before classes."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        room = importlib.import_module(self.arguments[0])
        lines = [f".. automodule:: {room.__name__}", "   :no-members:", ""]
        for home, names in self.files(room).items():
            lines += [f".. rubric:: {home.removeprefix(room.__name__ + '.')}", "   :heading-level: 2", ""]
            lines += [*to_rst((inspect.getdoc(importlib.import_module(home)) or "").split("\n")), ""]
            for name in sorted(names, key=lambda name: isinstance(getattr(room, name), type)):
                found = getattr(room, name)
                kind = "autoclass" if isinstance(found, type) else "autofunction" if callable(found) else "autodata"
                lines += [f".. {kind}:: {room.__name__}.{name}", ""]
        found = nodes.Element()
        self.state.nested_parse(StringList(lines, self.src), self.content_offset, found)
        return found.children

    @property
    def src(self) -> str:
        return self.state.document.current_source or ""

    @staticmethod
    def files(room: ModuleType) -> dict[str, list[str]]:
        """Exported names by the module that defines them, in the order of the package's imports."""
        found: dict[str, list[str]] = {}
        for name, value in vars(room).items():
            if name in room.__all__ and not isinstance(value, ModuleType):
                found.setdefault(value.__module__, []).append(name)
        return found
