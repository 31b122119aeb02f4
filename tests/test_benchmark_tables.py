"""The documents have the tables that the results give."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "benchmarks"


def test_the_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("benchmark_tables", FOLDER / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tables
    spec.loader.exec_module(tables)
    summary = FOLDER.parents[1] / "docs" / "benchmarks.md"
    for file, text in ((FOLDER / "README.md", tables.tables), (summary, tables.summary)):
        written = file.read_text()
        assert tables.updated(written, text(FOLDER / "results")) == written, (
            "run `python experiments/benchmarks/tables.py`"
        )
