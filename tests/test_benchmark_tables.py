"""The benchmarks' README has the tables that the results give."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"


def test_the_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("benchmark_tables", FOLDER / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tables
    spec.loader.exec_module(tables)
    readme = (FOLDER / "README.md").read_text()
    assert tables.updated(readme, FOLDER / "results") == readme, "run `python experiments/benchmarks/tables.py`"
