"""Sphinx: `make docs` writes build/docs. API pages come from docstrings, the gallery from the mechanisms themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import gallery
from directives import PatternPicture, RoomReference, SweepResults
from docstrings import to_rst

import saccade

project = "saccade"
author = "The saccade authors"
copyright = "the saccade authors"
version = release = saccade.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_static"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # a method that says nothing of its own is not listed again
autodoc_preserve_defaults = True  # a path as the name that it has in the source, not as it is on this machine
autodoc_typehints = "none"  # the docstrings give shapes, which types do not
autodoc_default_options = {"members": True}
add_module_names = False
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 88
smartquotes = False

html_theme = "furo"
html_title = f"saccade {version}"
html_static_path = ["_static"]
html_css_files = ["saccade.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f4e79", "color-brand-content": "#1f4e79"},
    "dark_css_variables": {"color-brand-primary": "#8fb3d9", "color-brand-content": "#8fb3d9"},
}


def _docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)


def _skip(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """The fields of a NamedTuple say nothing of themselves."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", gallery.write_all)
    app.connect("autodoc-process-docstring", _docstring)
    app.connect("autodoc-skip-member", _skip)
    app.add_directive("pattern", PatternPicture)
    app.add_directive("room", RoomReference)
    app.add_directive("sweep", SweepResults)
    return {"parallel_read_safe": True}
