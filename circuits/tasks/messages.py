"""Pieces of text that several error messages share."""

import difflib
from collections.abc import Iterable


def shorten(text: str) -> str:
    """Quote a prompt; a long one is reduced to its beginning and its end."""
    return repr(text if len(text) <= 70 else f"{text[:40]} ... {text[-25:]}")


def quoted(words: Iterable[str]) -> str:
    """Quote words and join them with commas."""
    return ", ".join(map(repr, words))


def suggestion(word: str, known: Iterable[str]) -> str:
    """For an unknown word: the most similar known one, if any is similar, then all known ones."""
    known = list(known)
    if not known:
        return "there is none."
    listed = f"there are {', '.join(known)}."
    similar = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {similar[0]!r}? {listed}" if similar else listed
