"""The few marks of SVG that a drawing is made of, as text. All text in them is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

PAPER, INK, QUIET, BAND, LINE = "#ffffff", "#1f2430", "#5c6370", "#f5f6f8", "#c9cdd4"
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

Length = float | int
"""In pixels."""


def document(width: Length, height: Length, label: str, parts: Sequence[str]) -> str:
    """A whole picture on a background of its own, so that it reads on light and dark pages alike."""
    size = f'width="{number(width)}" height="{number(height)}" viewBox="0 0 {number(width)} {number(height)}"'
    open_tag = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}" font-family="{SANS}">'
    paper = f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>'
    return "\n".join([open_tag, paper, *parts, "</svg>\n"])


def words(
    x: Length,
    y: Length,
    text: str,
    size: Length,
    colour: str,
    *,
    weight: int | None = None,
    middle: bool = False,
    font: str | None = None,
) -> str:
    """A line of text, from `x` on or around it."""
    looks = {
        "text-anchor": "middle" if middle else None,
        "font-weight": weight,
        "font-family": font,
    }
    extra = "".join(f' {name}="{value}"' for name, value in looks.items() if value is not None)
    return f'<text x="{number(x)}" y="{number(y)}" font-size="{size}" fill="{colour}"{extra}>{escape(text)}</text>'


def rect(
    x: Length,
    y: Length,
    width: Length,
    height: Length,
    *,
    radius: Length,
    fill: str,
    stroke: str | None = None,
) -> str:
    """A rectangle with round corners."""
    line = f' stroke="{stroke}" stroke-width="1.1"' if stroke else ""
    place = f'x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f'<rect {place} rx="{number(radius)}" fill="{fill}"{line}/>'


def number(value: Length) -> str:
    """A coordinate to a tenth of a pixel, in as few characters as that takes."""
    return f"{value:.1f}".removesuffix(".0")
