"""Two-hop facts (after Lindsey et al. 2025, https://transformer-circuits.pub/2025/attribution-graphs/biology.html).

"The capital of the state containing Dallas is" -> " Austin", by way of Texas, which is not in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from circuits.tasks.family import TaskFamily
from circuits.tasks.task import PromptPair

# State: its capital, then other cities in it. Real ones; every name is one word, and no city is in the table twice.
STATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "Alabama": ("Montgomery", ("Birmingham", "Huntsville", "Tuscaloosa")),
    "Alaska": ("Juneau", ("Anchorage", "Fairbanks")),
    "Arizona": ("Phoenix", ("Tucson", "Mesa", "Tempe")),
    "California": ("Sacramento", ("Oakland", "Fresno", "Berkeley", "Anaheim")),
    "Colorado": ("Denver", ("Boulder", "Pueblo", "Aspen")),
    "Connecticut": ("Hartford", ("Bridgeport", "Stamford", "Norwalk")),
    "Florida": ("Tallahassee", ("Miami", "Tampa", "Orlando", "Jacksonville")),
    "Georgia": ("Atlanta", ("Savannah", "Macon", "Athens")),
    "Hawaii": ("Honolulu", ("Hilo", "Kailua")),
    "Idaho": ("Boise", ("Nampa", "Pocatello")),
    "Illinois": ("Springfield", ("Chicago", "Rockford", "Naperville")),
    "Indiana": ("Indianapolis", ("Bloomington", "Evansville", "Muncie")),
    "Kansas": ("Topeka", ("Wichita", "Olathe")),
    "Kentucky": ("Frankfort", ("Louisville", "Lexington")),
    "Maryland": ("Annapolis", ("Baltimore", "Rockville", "Bethesda")),
    "Massachusetts": ("Boston", ("Cambridge", "Worcester", "Lowell")),
    "Michigan": ("Lansing", ("Detroit", "Flint", "Dearborn")),
    "Montana": ("Helena", ("Billings", "Missoula", "Bozeman")),
    "Nebraska": ("Lincoln", ("Omaha", "Kearney")),
    "Ohio": ("Columbus", ("Cleveland", "Cincinnati", "Dayton", "Akron")),
    "Oregon": ("Salem", ("Portland", "Eugene")),
    "Pennsylvania": ("Harrisburg", ("Philadelphia", "Pittsburgh", "Scranton", "Erie")),
    "Tennessee": ("Nashville", ("Memphis", "Knoxville", "Chattanooga")),
    "Texas": ("Austin", ("Dallas", "Houston", "Waco", "Laredo")),
    "Virginia": ("Richmond", ("Norfolk", "Alexandria", "Roanoke")),
    "Washington": ("Olympia", ("Seattle", "Spokane", "Tacoma")),
    "Wisconsin": ("Madison", ("Milwaukee", "Kenosha", "Racine")),
    "Wyoming": ("Cheyenne", ("Laramie", "Casper")),
}

TEMPLATES = (
    "The capital of the state containing {city} is",
    "The capital of the state that contains {city} is",
    "The capital of the state where {city} lies is",
    "The capital of the state around {city} is",
    "The state containing {city} has its capital in",
    "The state where {city} lies has its capital in",
    "People in {city} are governed from",
    "The city of {city} lies in a state whose capital is",
)


@dataclass(frozen=True)
class TwoHop(TaskFamily):
    """Two-hop facts: complete with the capital of the state that a city lies in.

    The corrupted prompt has a city of another state, and that state's capital is the wrong answer.
    """

    name: ClassVar[str] = "two_hop"
    metric: ClassVar[str] = "logit_difference"

    def draw(self, random: Random) -> PromptPair:
        """One prompt pair, with spans CITY and END."""
        template = random.choice(TEMPLATES)
        (capital, cities), (other_capital, other_cities) = random.sample(list(STATES.values()), 2)
        city, other_city = random.choice(cities), random.choice(other_cities)
        clean = template.format(city=city)
        start = template.index("{city}")
        spans = {"CITY": (start, start + len(city)), "END": (len(clean) - 1, len(clean))}
        return PromptPair(
            clean, template.format(city=other_city), f" {capital}", f" {other_capital}", spans
        )
