"""Turn equations into MathML when the site is built, so that pages need no script."""

import re
from html import unescape

from latex2mathml.converter import convert

EQUATION = re.compile(r"\\\((?P<inline>.+?)\\\)|\\\[(?P<block>.+?)\\\]", re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    """Called by mkdocs with the HTML of every page."""

    def equation(match: re.Match[str]) -> str:
        display = "inline" if match["inline"] else "block"
        return convert(unescape(match["inline"] or match["block"]), display=display)

    marked = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
    return marked.sub(lambda part: EQUATION.sub(equation, part[2]), html)
