"""Rows of text files: JSON lines, a JSON list, or a table of comma- or tab-separated values."""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from circuits.system.errors import InputError
from circuits.system.files import path_of
from circuits.system.kinds import expect
from circuits.system.messages import shorten
from circuits.tasks.readers.cells import DECODER, TableRow, from_json, repeated

FORMATS = "one JSON object per line, a JSON list, or a table (.csv, .tsv)"
EXAMPLE = 'such as {"clean": ..., "corrupted": ..., "answer": ...}'
TABLES = (".csv", ".tsv")
DELIMITERS = (",", "\t", ";")
# Of Windows, of old Macs, of all others
LINE_END = re.compile(r"\r\n|\r|\n")
# Excel and Windows editors mark the encoding at the start of a file.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

# Where a row is, such as "line 3", and what it holds.
Row = tuple[str, Any]


def name_of(path: str | Path) -> str:
    """The name of a file without its suffix, as a task can be called."""
    return re.sub(r"[^\w.+-]+", "-", Path(path).stem).lstrip(".") or "data"


def file_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file, with where they are, such as "pairs.csv, line 3"."""
    expect(path, str | os.PathLike, "the path of a file", "give a text file with " + FORMATS)
    path = path_of(path)
    text = _text(path)
    if path.suffix.lower() in TABLES:
        read = _table(text)
    elif text.lstrip().startswith("["):
        read = _json_list(text)
    else:
        read = _json_lines(text)
    is_empty = True
    try:
        for where, content in read:
            is_empty = False
            yield f"{path}, {where}", _checked(content, where)
    except _DamagedError as error:
        raise InputError(f"{path}, {error}") from error
    if is_empty:
        raise InputError(f"{path} holds no prompt pair; write at least one line, {EXAMPLE}.")


def _checked(content: Any, where: str) -> TableRow:
    if isinstance(content, dict):
        return TableRow(content)
    kind = type(content).__name__
    raise _DamagedError(f"{where}: expected a JSON object, found {kind}; write one, {EXAMPLE}.")


class _DamagedError(Exception):
    """A row that cannot be read; the message begins with where it is."""


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    # Names with a zero byte or half of a character are no names.
    except (OSError, ValueError) as error:
        raise InputError(
            f"the task file {str(path)!r} cannot be read: {error}; give a text file with {FORMATS}."
        ) from error
    encodings = [name for mark, name in MARKS.items() if content.startswith(mark)]
    try:
        text = content.decode(encodings[0] if encodings else "utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8. Give "
            "data in other formats to Task.from_prompts, such as a frame that pandas has read."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{path}, line {line}: holds a zero byte; save the file as UTF-8 text.")
    return text


def _json_lines(text: str) -> Iterator[Row]:
    # str.splitlines would also break lines at characters that JSON allows inside strings.
    for number, line in enumerate(LINE_END.split(text), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", from_json(line)
        except (ValueError, RecursionError) as error:
            raise _DamagedError(
                f"line {number}: not JSON ({error}): {shorten(line)}; write one object per line, "
                f"{EXAMPLE}."
            ) from error


def _json_list(text: str) -> Iterator[Row]:
    try:
        # The whole list first, so that a damaged one is said to be so.
        n_entries = len(from_json(text))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise _DamagedError(
            f"line {line}: not a JSON list ({error}); write [...] around objects with commas "
            "between them."
        ) from error
    # Then entry by entry, to know their lines.
    position, line = text.index("[") + 1, 1
    counted = 0
    for number in range(1, n_entries + 1):
        start = _after_spaces(text, position)
        line += text.count("\n", counted, start)
        content, end = DECODER.raw_decode(text, start)
        yield f"line {line} (entry {number})", content
        # A comma stands before the next one.
        position, counted = _after_spaces(text, end) + 1, start


def _after_spaces(text: str, position: int) -> int:
    while text[position].isspace():
        position += 1
    return position


def _table(text: str) -> Iterator[Row]:
    header = next(filter(str.strip, LINE_END.split(text)), "")
    delimiter = next((each for each in DELIMITERS if _names(header, each)), ",")
    # Strict, so that a quotation mark in the wrong place is no silent change of the text.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise _DamagedError(f"line {line}: not a table ({error}); quote cells.") from error
        if cells is None:
            return
        if names is None and any(map(str.strip, cells)):
            names = _checked_names(cells, line)
        elif cells and names is not None:
            if len(cells) != len(names):
                raise _DamagedError(
                    f"line {line} has {len(cells)} cells, and the first line names {len(names)} "
                    f"columns; quote cells that hold {delimiter!r}."
                )
            yield f"line {line}", TableRow.of_cells(names, cells)
        # A cell may hold line breaks.
        line = reader.line_num + 1


def _names(header: str, delimiter: str) -> bool:
    """Whether a table's first line names a column for clean prompts, with this delimiter."""
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:  # such as cells that are too long
        return False
    return "clean" in names or "prompt" in names


def _checked_names(names: list[str], line: int) -> list[str]:
    # Row numbers of pandas have no name, however many there are.
    twice = repeated(filter(None, names))
    if twice:
        raise _DamagedError(f"line {line} names the column {twice[0]!r} twice; rename one.")
    return names
