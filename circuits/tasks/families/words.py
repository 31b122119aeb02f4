"""Words that several tasks share: common English, mostly single tokens in a large vocabulary."""

from typing import Any

from circuits.system.errors import InputError
from circuits.system.numbers import ordered_items, shown

# No name is also a city, a state or a capital of the two-hop task.
WOMEN = (
    "Mary Sarah Anna Emily Laura Rachel Jessica Lisa Jennifer Michelle Amy Kate Alice Emma Julia "
    "Rebecca Nicole Stephanie Melissa Amanda Samantha Kelly Erin Katherine Elizabeth Patricia "
    "Linda Barbara Susan Nancy Karen Helen Sandra Donna Carol Ruth Sharon Maria Jane Rose"
).split()
MEN = (
    "John James Robert Michael William David Richard Joseph Thomas Charles Daniel Matthew Anthony "
    "Mark Paul Steven Andrew Kenneth George Joshua Kevin Brian Edward Ronald Timothy Jason "
    "Jeffrey Ryan Jacob Gary Nicholas Eric Jonathan Stephen Larry Justin Scott Brandon Benjamin "
    "Samuel"
).split()

COMMON = (
    "apple arm arrow ball band bank bar base bed bell belt bird board boat bone book box boy "
    "bread bridge brush cake camp card cat chain chair city clay clock cloud coat coin cold corn "
    "cross crowd cup desk dish dog door dream dress drum dust ear egg eye face farm field film "
    "fire fish flag floor flower food foot frame fruit game gate glass gold grass hair hall hand "
    "hat heart hill home horse hour ice iron jar key king lake lamp land leaf leg letter light "
    "line list lock map mark meat metal milk mirror money moon mouth music name neck nest net "
    "night nose note ocean oil page paint pan paper park part path pen piece pipe plant plate "
    "port pot queen rain ring river road rock roof room root rope salt sand sea seat seed ship "
    "shirt shoe silk silver sky smoke snow soap soil song sound soup square star steel step stone "
    "street sugar sun table tail tea tent tool tooth top tower town toy track train tree truck "
    "voice wall watch water wave wheel wind window wine wing wire wood wool"
).split()


def as_words(given: Any, name: str, least: int) -> tuple[str, ...]:
    """Words that an option holds: a list of at least so many, or a text with spaces between."""
    words = given.split() if isinstance(given, str) else ordered_items(given, name)
    are_words = [isinstance(word, str) and word.split() == [word] for word in words]
    if not all(are_words) or len(set(words)) < max(least, len(words)):
        raise InputError(
            f"{name}={shown(given)}: give {least} or more different words, without spaces in them."
        )
    return tuple(words)
