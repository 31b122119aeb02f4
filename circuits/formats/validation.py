"""Reading JSON files of a given schema, with errors that name the file, the field and the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from circuits.system.errors import InputError
from circuits.system.files import is_file

MOST_SHOWN = 60  # characters of a value in an error message
PLAIN_MESSAGES = {"missing": "it is required", "dict_type": "it should be an object"}
"""By pydantic's type of error, messages that fit JSON better than pydantic's own."""
PLAIN_BEGINNINGS = {"Value error, ": "", "Input ": "it ", "List ": "the list "}


def read_checked_json(
    path: Path,
    schema: TypeAdapter,  # type: ignore[type-arg]  # beartype knows no TypeAdapter[Any]
    kind: str,
) -> Any:
    """Read a JSON file and check it against a schema.

    Args:
        schema: what the file must hold. Numbers in strings are not accepted as numbers.
        kind: what the file is, for error messages.

    Raises:
        InputError: there is no such file, it is not JSON, or it breaks the schema.
    """
    if not is_file(path):
        raise InputError(f"there is no file {path}; check the path.")
    try:
        return schema.validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check it.") from error
    except ValidationError as error:
        raise InputError(f"{path} is not a valid {kind}: {_first_problem(error)}.") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    kind = problem["type"]
    if kind == "json_invalid":
        cause = problem["ctx"]["error"]
        return f"it is truncated or not JSON ({cause}); restore it or make it again"
    found = "missing" if kind == "missing" else repr(problem["input"])
    if len(found) > MOST_SHOWN:
        found = f"{found[:MOST_SHOWN]}..."
    field = ".".join(map(str, problem["loc"])) or "the file"
    message = PLAIN_MESSAGES.get(kind, problem["msg"])
    for beginning, plain in PLAIN_BEGINNINGS.items():
        message = message.replace(beginning, plain)
    return f"{field} is {found}; {message}"
