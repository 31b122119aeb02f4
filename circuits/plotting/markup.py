"""HTML from the templates in `static/`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template

from circuits.system.kinds import expect

# Settings and results by label, as plain text.
Details = Mapping[str, str] | None


def static_file(name: str) -> str:
    """Return the text of a file in `static/`."""
    file = resources.files("circuits.plotting").joinpath("static", name)
    return file.read_text(encoding="utf-8")


def fill_template(name: str, **values: str) -> str:
    """Fill the placeholders of a template in `static/`. The values must be HTML already."""
    return Template(static_file(name)).substitute(values)


def details_list(details: Details) -> str:
    """Write settings and results, given as plain text, as a description list."""
    expect(details, Mapping | None, "a dictionary as details", "give names and texts")
    entries = [
        f"<div><dt>{escape(str(name))}</dt><dd>{escape(str(text))}</dd></div>"
        for name, text in (details or {}).items()
    ]
    return f"<dl>{''.join(entries)}</dl>" if entries else ""
