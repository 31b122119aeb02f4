"""Two-hop facts, after Lindsey et al. 2025:
https://transformer-circuits.pub/2025/attribution-graphs/biology.html.

"The capital of the state containing Dallas is" -> " Austin". The prompt does not name Texas.
"""

from dataclasses import dataclass
from random import Random

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


@dataclass(frozen=True)
class TwoHop(TaskFamily):
    """Two-hop facts: complete with the capital of the state that a city is in.

    The corrupted prompt has a city of another state, whose capital is the wrong answer.
    """

    name = "two_hop"

    def draw(self, random: Random) -> PromptPair:
        """Draw one pair, with spans CITY and END."""
        template = random.choice(TEMPLATES)
        states = list(STATES.values())
        (capital, cities), (other_capital, other_cities) = random.sample(states, 2)
        clean = {"CITY": random.choice(cities)}
        corrupted = {"CITY": random.choice(other_cities)}
        return fill_template(template, clean, corrupted, f" {capital}", f" {other_capital}")
