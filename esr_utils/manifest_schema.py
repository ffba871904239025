"""The schema of a manifest row, in pandera, and what is said when a table does not keep to it.

`data_manifests/README.md` explains each column. Empty text cells are "", never NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pandera.pandas as pa

from esr_utils.styles import STYLES

SPLITS = ("train", "val", "test")
MAX_LISTED = 20  # problems in one message


def _text(*checks: pa.Check) -> pa.Column:
    return pa.Column(str, list(checks))


def _filled() -> pa.Check:
    return pa.Check(lambda cells: cells != "", error="is empty")


_ID = r"[^/\x00-\x1f]+/[^\x00-\x1f]+"
_STYLE = pa.Check.isin(["", *STYLES], error=f"is not one of the {len(STYLES)} styles, nor empty")
_AT_LEAST_0 = pa.Check.ge(0, error="is negative")

SCHEMA = pa.DataFrameSchema(
    {
        "utterance_id": pa.Column(
            str,
            pa.Check.str_matches(rf"^{_ID}\Z", error="is not of the form <corpus>/<id>"),
        ),  # and unique, which `table_problems` sees to: a part of the table cannot tell
        "path": _text(_filled()),
        "corpus": _text(_filled()),
        "split": _text(pa.Check.isin(SPLITS, error=f"is not one of {', '.join(SPLITS)}")),
        "speaker": _text(),
        "gender": _text(),
        "language": _text(),
        "style": _text(_STYLE),
        "style_raw": _text(),
        "intensity": _text(),
        "caption": _text(),
        "text": _text(),
        "start_s": pa.Column(float, _AT_LEAST_0, nullable=True),
        "end_s": pa.Column(float, _AT_LEAST_0, nullable=True),
        "channel": pa.Column("Int64", _AT_LEAST_0, nullable=True),
        "duration_s": pa.Column(float, pa.Check.gt(0, error="is not above 0")),
        "licence": _text(),
        "source": _text(),
    }
)
COLUMNS = tuple(SCHEMA.columns)
NUMERIC = ("start_s", "end_s", "channel", "duration_s")
# pandera's own name for a failure, in plain words
_REASONS = {"not_nullable": "is empty"}
_PART = 1 << 16  # rows that pandera, which copies what it checks, is given at a time


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a manifest. `row` is the line of its CSV, the header being 1; None: all of it."""

    row: int | None
    utterance_id: str
    column: str
    reason: str

    def __str__(self) -> str:
        places = [f"line {self.row}" if self.row else "", self.utterance_id, self.column]
        return f"{', '.join(place for place in places if place)}: {self.reason}"


class ManifestError(ValueError):
    """A manifest that cannot be used. `.problems` has every problem; the message lists the first 20."""

    def __init__(self, problems: Sequence[Problem], where: str) -> None:
        super().__init__(problems, where)
        self.problems = list(problems)
        self.where = where

    def __str__(self) -> str:
        count, more = len(self.problems), len(self.problems) - MAX_LISTED
        lines = [f"{self.where}: {count} problem{'s' if count > 1 else ''} in the manifest"]
        lines += [str(problem) for problem in self.problems[:MAX_LISTED]]
        return "\n  ".join(lines + ([f"... and {more} more"] if more > 0 else []))


Found = tuple[int | None, str, str]  # position of the row, column, reason


def typed(manifest: pd.DataFrame) -> tuple[pd.DataFrame, list[Found]]:
    """A copy whose known columns have their types; cells that do not fit become empty, and are reported."""
    manifest, found = manifest.reset_index(drop=True), []
    for column in manifest.columns.intersection(list(COLUMNS)):
        convert, empty, dtype, kind = _TYPES.get(column, _TEXT)
        if _sound(manifest[column], dtype):
            continue
        if column in NUMERIC and manifest[column].dtype == "str" and (manifest[column] == "").all():
            manifest[column] = pd.array([empty], dtype=dtype).take([0] * len(manifest))
            continue
        cells = []
        for position, cell in enumerate(manifest[column]):
            try:
                blank = cell is None or cell is pd.NA or cell == "" or cell != cell
                cells.append(empty if blank else convert(cell))
            except (TypeError, ValueError):
                cells.append(empty)
                found.append((position, column, f"{cell!r} is not {kind}"))
        manifest[column] = pd.array(cells, dtype=dtype)
    return manifest, found


def _sound(column: pd.Series, dtype: str) -> bool:
    """Whether the column has its type already, and holds nothing that a cell may not."""
    if column.dtype != dtype:
        return False
    if dtype != "str":
        return dtype == "Int64" or not np.isinf(column).any()
    if column.isna().any():
        return False
    try:
        for start in range(0, len(column), _PART):
            "".join(column.iloc[start : start + _PART]).encode()
    except UnicodeEncodeError:
        return False
    return True


def _storable(cell: object) -> str:
    cell = str(cell)
    cell.encode()
    return cell


def _number(cell: object) -> float:
    if not math.isfinite(number := float(cell)):
        raise ValueError
    return number


def _whole(cell: object) -> int:
    if (number := int(_number(cell))) != _number(cell):
        raise ValueError
    return number


# how a cell is converted, what an empty one becomes, the column's dtype, and what a cell of it is called
_TEXT = (_storable, "", "str", "text that UTF-8 can hold")
_TYPES = dict.fromkeys(NUMERIC, (_number, math.nan, "float64", "a number"))
_TYPES["channel"] = (_whole, pd.NA, "Int64", "a whole number")


def table_problems(manifest: pd.DataFrame) -> list[Found]:
    """What in a typed table does not keep to the schema."""
    found: list[Found] = []
    known = manifest[manifest.columns.intersection(list(COLUMNS))]
    for start in range(0, max(len(manifest), 1), _PART):
        found += _part_problems(known.iloc[start : start + _PART])
    if "utterance_id" in manifest:
        ids = manifest["utterance_id"]
        again = ids.duplicated() & (ids != "")
        reason = "is the id of an earlier row too"
        found += [(i, "utterance_id", f"{ids[i]!r} {reason}") for i in again.to_numpy().nonzero()[0].tolist()]
    if {"utterance_id", "corpus"} <= set(manifest.columns):
        # not by str.split, which makes a list and two texts of every id and holds them all
        pairs = enumerate(zip(manifest["utterance_id"], manifest["corpus"], strict=True))
        for position in [i for i, (name, corpus) in pairs if name.partition("/")[0] != corpus]:
            found.append((position, "corpus", f"{manifest['corpus'][position]!r} does not begin the utterance_id"))
    return found


def _part_problems(part: pd.DataFrame) -> list[Found]:
    found: list[Found] = []
    try:
        SCHEMA.validate(part, lazy=True)
    except pa.errors.SchemaErrors as errors:
        for case in errors.failure_cases.to_dict("records"):
            if case["check"] == "column_in_dataframe":
                found.append((None, case["failure_case"], "this column is missing"))
                continue
            cell, reason = case["failure_case"], _REASONS.get(case["check"], case["check"])
            reason = "is empty" if cell == "" or pd.isna(cell) else f"{cell!r} {reason}"
            found.append((int(case["index"]), case["column"], reason))
    return found


def located(manifest: pd.DataFrame, found: list[Found]) -> list[Problem]:
    """In the order of the rows, one problem per cell; row positions become lines of the CSV.

    A cell with a line break in it makes its row longer than a line.
    """
    text = manifest.select_dtypes(include=["str", "object"])
    breaks = sum((text[c].astype(str).str.count(r"\r\n|\r|\n") for c in text), pd.Series(0, manifest.index))
    lines = (pd.Series(range(2, len(manifest) + 2), dtype=int) + breaks.cumsum().shift(fill_value=0)).tolist()
    ids = manifest["utterance_id"].tolist() if "utterance_id" in manifest else [""] * len(manifest)
    first: dict[tuple[int | None, str], str] = {}
    for at, column, reason in found:
        first.setdefault((at, column), reason)
    return [
        Problem(None, "", column, reason) if at is None else Problem(int(lines[at]), ids[at], column, reason)
        for (at, column), reason in sorted(first.items(), key=lambda item: -1 if item[0][0] is None else item[0][0])
    ]
