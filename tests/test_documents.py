"""The Python in the README and the documentation runs, and what they point at exists."""

import os
import re
import runpy
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
# Smaller than what a reader would run.
SMALLER = {"threshold=0.002": "threshold=0.1", "n=16": "n=2", "n=64": "n=4"}


def python_of(document: Path) -> str:
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    return "\n".join(blocks)


WITH_PYTHON = [document for document in DOCUMENTS if python_of(document)]


def texts_of(picture: Path) -> list[str]:
    """The names, scores and types in a picture, and its texts."""
    return re.findall(r"(?<=>)[^<>]*\S[^<>]*(?=<)", picture.read_text())


def run_program(folder: Path) -> None:
    """Run `program.py` in a folder, and write what it says there."""
    os.chdir(folder)
    for number, name in enumerate(("output", "errors"), start=1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), number)
    warnings.simplefilter("ignore")
    runpy.run_path("program.py", run_name="__main__")


@pytest.mark.parametrize("document", WITH_PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_python_of_a_document_runs(document, tmp_path, new_process):
    program = python_of(document)
    for whole, part in SMALLER.items():
        program = program.replace(whole, part)
    (tmp_path / "program.py").write_text(program)
    process = new_process(target=run_program, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "errors").read_text()
    assert ("print(" in program) == bool((tmp_path / "output").read_text())
    for picture in tmp_path.glob("*.svg"):
        shown = document.with_name(picture.name)
        # Places can differ in their last digit from machine to machine.
        assert texts_of(picture) == texts_of(shown), f"draw {shown.name} anew"


def test_most_documents_have_python_that_runs():
    assert {path.name for path in WITH_PYTHON} >= {"README.md", "prompts.md", "methods.md"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)", document.read_text())
    for link in links:
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7000


def test_public_names_have_examples_that_run():
    import doctest

    import circuits

    without = []
    for name in circuits.__all__:
        value = getattr(circuits, name)
        finder = doctest.DocTestFinder(recurse=True)
        if callable(value) and not any(test.examples for test in finder.find(value, name)):
            without.append(name)
    assert without == []
