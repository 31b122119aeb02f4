"""The READMEs have the tables that the results give."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"


def test_the_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("benchmark_tables", FOLDER / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tables
    spec.loader.exec_module(tables)
    for folder, text in ((FOLDER, tables.tables), (FOLDER.parents[1], tables.summary)):
        readme = (folder / "README.md").read_text()
        assert tables.updated(readme, text(FOLDER / "results")) == readme, (
            "run `python experiments/benchmarks/tables.py`"
        )
