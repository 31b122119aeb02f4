"""Which token of a corrupted prompt is the counterpart of each token of the clean prompt."""

from collections.abc import Iterator, Mapping, Sequence

from circuits.system.errors import InputError
from circuits.tasks.prompts import DoesNotFit

# Whether a span holds each token.
Spans = Mapping[str, Sequence[bool]]
Bounds = tuple[int, int]


def aligned(
    n_clean: int, n_corrupted: int, spans: Spans, corrupted_spans: Spans, *, n_shared: int = 0
) -> list[int]:
    """The position of each clean token's counterpart in the corrupted prompt.

    Both prompts are cut at the spans that `corrupted_spans` names. In the piece before all spans
    tokens are paired from the left, in the others from the right; clean tokens that are left over
    get the last corrupted one that has a partner.

    >>> clean, corrupted = [False, True, True, False], [False, True, False]
    >>> aligned(4, 3, {"NAME": clean}, {"NAME": corrupted})
    [0, 1, 1, 2]

    Args:
        n_shared: how many tokens both prompts begin with, such as BOS, that have no counterpart but
            each other.
    """
    unknown = [name for name in corrupted_spans if name not in spans]
    if unknown:
        raise InputError(f"corrupted_spans has {unknown[0]!r}, but spans has not; name it in both.")
    names = sorted(corrupted_spans, key=lambda name: _bounds(spans[name]))
    pieces = _pieces(spans, names, n_shared, n_clean)
    counterparts = _pieces(corrupted_spans, names, n_shared, n_corrupted)
    pairing = list(range(n_shared))
    for number, (bounds, others) in enumerate(zip(pieces, counterparts, strict=True)):
        (start, end), (first, last) = bounds, others
        if start < end and first == last:
            raise DoesNotFit(
                f"tokens {start} to {end - 1} of the clean prompt have no counterpart in the "
                "corrupted one; name spans that leave tokens around them in both.",
                "tokens without a counterpart",
            )
        # From the left in the first piece, so that tokens before all spans stay where they are
        offset = last - end if number else first - start
        counterpart = range(start + offset, end + offset)
        pairing += [min(max(first, position), last - 1) for position in counterpart]
    return pairing


def _bounds(is_inside: Sequence[bool]) -> Bounds:
    places = [place for place, inside in enumerate(is_inside) if inside]
    return places[0], places[-1] + 1


def _pieces(spans: Spans, names: Sequence[str], n_shared: int, n_tokens: int) -> Iterator[Bounds]:
    """The named spans and what is between them, in order, without the shared tokens."""
    done = n_shared
    for name in names:
        start, end = (max(n_shared, bound) for bound in _bounds(spans[name]))
        if start < done:
            raise InputError(
                f"span {name!r} begins before the span before it ends, in one of the two prompts; "
                "spans that align them come in one order and share no tokens."
            )
        yield done, start
        yield start, end
        done = end
    yield done, n_tokens
