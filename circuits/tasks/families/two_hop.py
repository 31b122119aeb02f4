"""Two-hop facts, after Lindsey et al. 2025:
https://transformer-circuits.pub/2025/attribution-graphs/biology.html.

"The capital of the state containing Dallas is" -> " Austin". The prompt does not name Texas. Small
real models know countries better: "In the country where people speak Greek, the capital is"
-> " Athens".
"""

from dataclasses import dataclass
from random import Random
from typing import Literal

from circuits.tasks.family import TaskFamily
from circuits.tasks.prompts import PromptPair, fill_template

# State: its capital, other cities in it; next state. Every name is one word, no city occurs twice.
_TABLE = """
Alabama: Montgomery, Birmingham, Huntsville, Tuscaloosa; Alaska: Juneau, Anchorage, Fairbanks;
Arizona: Phoenix, Tucson, Mesa, Tempe; California: Sacramento, Oakland, Fresno, Berkeley, Anaheim;
Colorado: Denver, Boulder, Pueblo, Aspen; Connecticut: Hartford, Bridgeport, Stamford, Norwalk;
Florida: Tallahassee, Miami, Tampa, Orlando, Jacksonville;
Georgia: Atlanta, Savannah, Macon, Athens; Hawaii: Honolulu, Hilo, Kailua;
Idaho: Boise, Nampa, Pocatello; Illinois: Springfield, Chicago, Rockford, Naperville;
Indiana: Indianapolis, Bloomington, Evansville, Muncie; Kansas: Topeka, Wichita, Olathe;
Kentucky: Frankfort, Louisville, Lexington; Maryland: Annapolis, Baltimore, Rockville, Bethesda;
Massachusetts: Boston, Cambridge, Worcester, Lowell; Michigan: Lansing, Detroit, Flint, Dearborn;
Montana: Helena, Billings, Missoula, Bozeman; Nebraska: Lincoln, Omaha, Kearney;
Ohio: Columbus, Cleveland, Cincinnati, Dayton, Akron; Oregon: Salem, Portland, Eugene;
Pennsylvania: Harrisburg, Philadelphia, Pittsburgh, Scranton, Erie;
Tennessee: Nashville, Memphis, Knoxville, Chattanooga;
Texas: Austin, Dallas, Houston, Waco, Laredo; Virginia: Richmond, Norfolk, Alexandria, Roanoke;
Washington: Olympia, Seattle, Spokane, Tacoma; Wisconsin: Madison, Milwaukee, Kenosha, Racine;
Wyoming: Cheyenne, Laramie, Casper
"""
STATES: dict[str, tuple[str, tuple[str, ...]]] = {}
for _row in _TABLE.split(";"):
    _state, _cities = _row.strip().split(": ")
    _capital, *_others = _cities.split(", ")
    STATES[_state] = (_capital, tuple(_others))

TEMPLATES = (
    "The capital of the state containing {CITY} is",
    "The capital of the state that contains {CITY} is",
    "The capital of the state where {CITY} lies is",
    "The capital of the state around {CITY} is",
    "The state containing {CITY} has its capital in",
    "The state where {CITY} lies has its capital in",
    "People in {CITY} are governed from",
    "The city of {CITY} lies in a state whose capital is",
)


# The capital of the country that each language comes from
_CAPITALS = (
    "French Paris, Italian Rome, German Berlin, Spanish Madrid, Japanese Tokyo, Chinese "
    "Beijing, Russian Moscow, English London, Greek Athens, Portuguese Lisbon, Polish Warsaw, "
    "Swedish Stockholm, Korean Seoul, Dutch Amsterdam, Hungarian Budapest, Finnish Helsinki, "
    "Danish Copenhagen, Norwegian Oslo, Czech Prague, Hebrew Jerusalem, Persian Tehran"
)
CAPITALS: dict[str, str] = {}
LANGUAGES: dict[str, str] = {}
for _pair in _CAPITALS.split(", "):
    _language, _city = _pair.split()
    CAPITALS[_language], LANGUAGES[_city] = _city, _language
# Of some thirty forms, those that SmolLM2-135M completes more often than not.
TO_CAPITAL = (
    "The capital of the country where people speak {CUE} is",
    "The {CUE} language is spoken in a country whose capital is",
    "The capital of the country whose language is {CUE} is the city of",
    "People who speak {CUE} live in a country whose capital is",
    "The country where {CUE} is spoken has its capital in",
    "In the country where people speak {CUE}, the capital is",
    "The capital city of the country where {CUE} is spoken is",
)
TO_LANGUAGE = (
    "The main language of the country governed from {CUE} is",
    "The main language of the country around {CUE} is",
    "In the country whose capital is {CUE}, the official language is",
    "In the country whose capital is {CUE}, the main language is",
    "In the country governed from {CUE}, the official language is",
    "In the country around {CUE}, the official language is",
)


@dataclass(frozen=True)
class TwoHop(TaskFamily):
    """Two-hop facts: complete with the capital of the state that a city is in.

    The corrupted prompt has a city of another state, whose capital is the wrong answer.

    Attributes:
        about: "states" of the USA, or "countries", whose capital follows from their language or
            the other way round. The prompt names neither.
    """

    name = "two_hop"
    about: Literal["states", "countries"] = "states"

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans CITY (of countries CUE: a language, or a capital) and END."""
        if self.about == "countries":
            return _about_countries(random)
        template = random.choice(TEMPLATES)
        states = list(STATES.values())
        (capital, cities), (other_capital, other_cities) = random.sample(states, 2)
        clean = {"CITY": random.choice(cities)}
        corrupted = {"CITY": random.choice(other_cities)}
        return fill_template(template, clean, corrupted, f" {capital}", f" {other_capital}")


def _about_countries(random: Random) -> PromptPair:
    template = random.choice(TO_CAPITAL + TO_LANGUAGE)
    facts = CAPITALS if template in TO_CAPITAL else LANGUAGES
    cue, other = random.sample(list(facts), 2)
    answer, wrong = f" {facts[cue]}", f" {facts[other]}"
    clean, corrupted = {"CUE": cue}, {"CUE": other}
    return fill_template(template, clean, corrupted, answer, wrong)
