"""Large text files read a part at a time: CSV, JSON objects, JSON lines. A corpus's labels may be larger than memory.

A CSV is read as text, cell by cell as it was written, and cells that repeat are held once.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import pandas as pd

from esr_utils.manifest_schema import ManifestError, Problem
from esr_utils.runs import atomic_path

CHUNK = 1 << 14  # rows in memory at a time, beside those that are kept


def in_parts(items: Iterable) -> Iterator[list]:
    """Lists of at most CHUNK items."""
    items = iter(items)
    while part := list(islice(items, CHUNK)):
        yield part


class Columns:
    """Columns of text, gathered row by row. A column in which cells repeat holds each distinct cell once."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self._parts: list[list[np.ndarray]] = [[] for _ in names]
        self._known: list[dict[str, str] | None] = [{} for _ in names]
        self._rows = 0

    def extend(self, rows: list[list[str]]) -> None:
        """Appends rows, each with a cell for every column."""
        self._rows += len(rows)
        for i, cells in enumerate(zip(*rows, strict=True)):
            known = self._known[i]
            if known is not None:
                cells = [known.setdefault(cell, cell) for cell in cells]
                if len(known) > self._rows / 2:
                    self._known[i] = None  # hardly any cell occurs twice
            self._parts[i].append(np.array(cells, dtype=object))

    def frame(self) -> pd.DataFrame:
        """The table, all text. The columns are let go one by one, so that they are not held twice."""
        self._known = []
        columns = {}
        for i, name in enumerate(self.names):
            parts, self._parts[i] = self._parts[i], []
            columns[name] = pd.array(np.concatenate(parts) if parts else [], dtype="str")
        return pd.DataFrame(columns)


def read_table(path: str | Path) -> pd.DataFrame:
    """A CSV (UTF-8, with or without a byte order mark) as text, cell by cell as it was written.

    Raises:
        FileNotFoundError: it is not there.
        ManifestError: not CSV, or cut short: no header, a name twice in it, a row with more or fewer cells.
    """
    header, problems = [], []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            columns = Columns(header)
            for part in in_parts(_whole_rows(reader, len(header), problems)):
                columns.extend(part)
        except (csv.Error, UnicodeDecodeError) as error:
            problems.append(Problem(reader.line_num + 1, "", "", f"is not UTF-8 CSV: {error}"))
    if not header:
        problems.insert(0, Problem(1, "", "", "has no header"))
    twice = sorted({name for name in header if header.count(name) > 1})
    problems += [Problem(1, "", name, "two columns have this name") for name in twice]
    if problems:
        raise ManifestError(problems, str(path))
    return columns.frame()


def _whole_rows(reader: Iterator[list[str]], width: int, problems: list[Problem]) -> Iterator[list[str]]:
    for row in reader:
        if len(row) == width:
            yield row
        else:
            identity = row[0] if row else ""
            problems.append(Problem(reader.line_num, identity, "", f"has {len(row)} cells of {width}"))


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Writes a CSV a part at a time, whole or not at all. Missing cells become empty; cells keep their line ends."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)  # ends lines with CR LF, and so quotes cells that hold either
        writer.writerow(table.columns)
        for start in range(0, len(table), CHUNK):
            part = table.iloc[start : start + CHUNK]
            writer.writerows(part.astype(object).where(part.notna(), "").itertuples(index=False))


def csv_rows(path: str | Path, header: bool = False) -> Iterator[tuple[str, dict[str, str] | None]]:
    """The rows of a foreign CSV, one in memory at a time: (line, cells by column), None for a row that has too few.

    UTF-8, or UTF-16 with a byte order mark. Bytes that are neither become U+FFFD, which a caption never holds.

    Args:
        header: give the header alone, each column's name for its cell.
    """
    with _open(path, newline="") as file:
        reader, last = csv.reader(file), 0
        names: list[str] | None = None
        while True:
            try:
                row = next(reader, None)
            except csv.Error:  # a cell of over 128 KB: a quote that nothing closes
                row = [""]
            if row is None:
                return
            place, last = _lines(last + 1, reader.line_num), reader.line_num
            if names is None:
                names = [name.strip() for name in row]
                if header:
                    yield place, dict(zip(names, names, strict=True))
                    return
            elif row:  # else a blank line
                yield place, dict(zip(names, row, strict=True)) if len(row) == len(names) else None


def text_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """("line 7", text) of each line that is not blank, one in memory at a time. Encodings: see `csv_rows`."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", line.rstrip("\n")


def _lines(first: int, last: int) -> str:
    return f"line {first}" if first >= last else f"lines {first}-{last}"


def _open(path: str | Path, newline: str | None = None) -> io.TextIOWrapper:
    with open(path, "rb") as file:
        start = file.read(2)
    utf16 = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return open(path, encoding="utf-16" if utf16 else "utf-8-sig", errors="replace", newline=newline)


class JsonError(ValueError):
    """What follows in a JSON file cannot be read; the message says why."""


def json_items(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The members of the JSON object that a file holds, (key, value), one in memory at a time; a key may come twice.

    An array is read too, ("item 1", value); and JSON lines, ("line 1", value), None where a line is not JSON.
    Encodings: see `csv_rows`.

    Raises:
        JsonError: where the file stops being JSON. What came before has been given, the last member perhaps not.
    """
    with _open(path) as file:
        first, lines = _first_line(file)
        file.seek(0)
        if lines and _is_json(first):
            yield from _json_lines(file)
            return
        data = _Utf8(file)
        try:
            if first.startswith("["):
                for number, value in enumerate(ijson.items(data, "item", use_float=True), start=1):
                    yield f"item {number}", value
            else:
                yield from ijson.kvitems(data, "", use_float=True)
        except (ijson.JSONError, ValueError) as error:
            raise JsonError(f"is not JSON from here on: {str(error).splitlines()[0]}") from None


def _first_line(file: io.TextIOBase) -> tuple[str, bool]:
    """The first line that is not blank, or its first 64 K, and whether more than blank lines follow."""
    parts = (line.strip() for line in iter(lambda: file.readline(1 << 16), ""))
    first = next(filter(None, parts), "")
    return first, next(filter(None, parts), "") != ""


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except ValueError:
        return False


def _json_lines(file: io.TextIOBase) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except ValueError:
            yield f"line {number}", None


class _Utf8:
    """A text file as the bytes that ijson reads: sound UTF-8, whatever the file holds."""

    def __init__(self, file: io.TextIOBase) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size).encode()
