"""Pieces of text that several error messages share, and warnings."""

import contextlib
import difflib
import re
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

# Control characters and halves of characters, which not every terminal or file takes.
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
LONGEST_LINE = 480  # characters; of these, the end is the remedy
LONGEST_END = 160
MOST_LISTED = 20
# Warnings of what will change in a library, which tell its callers' authors, not users.
FOR_AUTHORS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def one_line(text: str) -> str:
    """Write a message in one line, with all of it visible; of a long one, such as one with a long
    value, leave out the middle.
    """
    line = UNWRITABLE.sub(lambda each: repr(each[0])[1:-1], " ".join(text.splitlines()))
    if len(line) <= LONGEST_LINE:
        return line
    gap = " ... "
    start = LONGEST_LINE - LONGEST_END - len(gap)
    return f"{line[:start]}{gap}{line[-LONGEST_END:]}"


def shorten(text: str) -> str:
    """Quote a prompt; a long one is reduced to its beginning and its end."""
    return repr(text if len(text) <= 70 else f"{text[:40]} ... {text[-25:]}")


def quoted(words: Iterable[str]) -> str:
    """Quote words and join them with commas."""
    return ", ".join(map(repr, words))


def suggestion(word: object, known: Iterable[str], *, otherwise: str = "") -> str:
    """For an unknown word: the most similar known one, if any is, then all unless they are many.

    Args:
        otherwise: said instead of many words of which none is similar.
    """
    # Names are written in small letters, which is no reason to find "ACDC" unlike "acdc".
    known = {each.lower(): each for each in known}
    if not known:
        return "there is none."
    written = word.lower() if isinstance(word, str) else ""
    similar = difflib.get_close_matches(written, known, n=1)
    parts = [f"did you mean {known[each]!r}?" for each in similar]
    n_more = len(known) - MOST_LISTED
    if n_more > 0 and not similar and otherwise:
        return otherwise
    if n_more <= 0 or not similar:
        listed = ", ".join(list(known.values())[:MOST_LISTED])
        more = f" and {n_more} more" if n_more > 0 else ""
        parts.append(f"there are {listed}{more}.")
    return " ".join(parts)


@cache
def warn_once(message: str) -> None:
    """Warn, of each message once."""
    warnings.warn(message, stacklevel=4)


@contextlib.contextmanager
def warnings_passed_on() -> Iterator[None]:
    """Show what libraries warn users of at the end, so that no filter makes it their failure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        if issubclass(each.category, FOR_AUTHORS):
            continue
        told: Any = each.message, each.category, each.filename, each.lineno
        try:
            warnings.warn_explicit(*told)
        except Warning:
            # The filter is "error", and nothing failed.
            warnings.showwarning(*told)
