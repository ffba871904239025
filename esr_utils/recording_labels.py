"""What is known of recordings besides their sound: columns of their moments, such as `speaker`, from a labels.csv.

It lies in the folder that is indexed (UTF-8), with a column `path`, relative to the folder. Any other column becomes
one of the moments of that file, to filter and show. Several rows may tell of one file: a row with start_s or end_s
(seconds) is about the moments whose middle lies in between, one with a channel (from 0) about those of that channel;
the first that fits counts. Where rows of a file name several channels, they say nothing of moments of all channels
together. A column whose values are all numbers, of up to 15 digits, is one of numbers.

What it no longer says of a file below the folder is no longer so, unless a labels.csv that is nearer to the file, and
was not read, may say it. A labels.csv that is gone says nothing: labels stay until one, perhaps of the header alone, is
there.

A folder without one that is a corpus, with a manifest.csv (see `manifest_schema`), has corpus, speaker, gender,
language and style from there.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from esr_utils.audio_folder import absolute_key, absolute_path
from esr_utils.index import Index
from esr_utils.index_rows import Embedded, File, unfit
from esr_utils.index_snapshot import Snapshot
from esr_utils.index_table import matrix
from esr_utils.manifest_schema import ManifestError
from esr_utils.text_tables import read_table

NAME, MANIFEST = "labels.csv", "manifest.csv"
_OF_MANIFEST = ("corpus", "speaker", "gender", "language", "style")
_PLACE = ("path", "start_s", "end_s", "channel", "duration_s")  # what a row is about, and no column of its own
_NUMBER = re.compile(r"-?(?=(\d\.?){1,15}$)(0|[1-9]\d*)(\.\d+)?")  # of up to 15 digits: more, and two would be one
_NO_LABEL = ("id", "file", "start_s", "end_s", "channel")  # columns of moments that no labels.csv fills


class LabelsError(ValueError):
    """A labels.csv that cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Row:
    """Of which moments of a file it is, and what it says of them: text by column, perhaps empty."""

    start_s: float
    end_s: float
    channel: float | None
    values: dict[str, str]


@dataclass
class Labels:
    """What is known of files.

    Attributes:
        rows: by the key of the file, in their order.
        folders: keys of those whose labels were read.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)

    def read(self, folder: Path) -> None:
        """Adds what the labels.csv of a folder says, or its manifest, if it has one.

        Raises:
            LabelsError: it is no CSV, has no column `path`, one that an index cannot take, or a time that is no number.
        """
        if (file := _file(folder)) is None:
            return
        self.folders.add(absolute_key(folder))
        try:
            table = read_table(file)
        except ManifestError as error:
            raise LabelsError(str(error)) from None
        if file.name == MANIFEST:
            table = table[[name for name in table.columns if name in (*_PLACE, *_OF_MANIFEST)]]
        if "path" not in table:
            raise LabelsError(f"{file} has no column 'path'; it has {', '.join(table.columns)}")
        if problem := unfit(name for name in table.columns if name not in _PLACE):
            raise LabelsError(f"{file}: {problem}")
        for line, row in enumerate(table.to_dict("records"), 2):
            channel = _number(row.get("channel", ""), file, line)
            limits = _number(row.get("start_s", ""), file, line), _number(row.get("end_s", ""), file, line)
            values = {name: text for name, text in row.items() if name not in _PLACE}
            key = absolute_key(folder / row["path"])
            self.rows.setdefault(key, []).append(
                Row(limits[0] or 0.0, math.inf if limits[1] is None else limits[1], channel, values)
            )

    def names(self) -> list[str]:
        """Columns that are named in a labels.csv."""
        return list(dict.fromkeys(name for rows in self.rows.values() for row in rows for name in row.values))

    def missing(self, files: Collection[str]) -> list[str]:
        """Keys that are named, are not among these files, and of which there is no file."""
        return [key for key in self.rows if key not in files and not _is_there(key)]

    def name_most(self, column: str, files: Collection[str]) -> bool:
        """Whether most of these files, by their keys, have a value in a column, if only for a part of them."""
        named = sum(any(row.values.get(column) for row in self.rows.get(key, ())) for key in files)
        return named > len(files) / 2

    def for_index(self, index: Index) -> Columns:
        """With values of the types of this index's columns; what it has not is of numbers if all values are.

        Raises:
            LabelsError: there is text for a column of numbers.
        """
        texts: dict[str, list[str]] = {}
        for rows in self.rows.values():
            for row in rows:
                for name, text in row.values.items():
                    texts.setdefault(name, []).extend([text] if text else [])
        there = {name: str(kind) for name, kind in index.columns().items() if name not in _NO_LABEL}
        kinds = dict.fromkeys(there, "str")  # what only the index has is empty, which is of any type
        for name, found in texts.items():
            numeric = all(_NUMBER.fullmatch(text) for text in found)
            if there.get(name, "string") != "string" and not numeric:
                raise LabelsError(f"column {name!r} of {index.uri} is of numbers, and {NAME} has text in it")
            if found:
                kinds[name] = "Float64" if numeric and there.get(name) != "string" else "str"
        return Columns(self.rows, self.folders, kinds)


@dataclass(frozen=True)
class Columns:
    """Labels for one index.

    Attributes:
        rows, folders: as those of `Labels`.
        kinds: dtype by column, of text or of numbers, also of those that only the index has.
    """

    rows: Mapping[str, list[Row]]
    folders: Collection[str]
    kinds: Mapping[str, str]

    def of(self, key: str, moments: pd.DataFrame) -> pd.DataFrame:
        """The columns of a file's moments (start_s, end_s, channel); none of a file of which no labels are known."""
        if not self.tell_of(key):
            return pd.DataFrame(index=moments.index)
        rows = self.rows.get(key, [])
        middles = (moments["start_s"] + moments["end_s"]) / 2
        apart = len({row.channel for row in rows} - {None}) > 1  # of a moment of all channels these say nothing
        said = [_said(rows, apart, *place) for place in zip(middles, moments["channel"], strict=True)]
        columns = {name: [values.get(name) or None for values in said] for name in self.kinds}
        for name, kind in self.kinds.items():
            if kind == "Float64":
                columns[name] = pd.array([None if text is None else float(text) for text in columns[name]], kind)
            else:
                columns[name] = np.array(columns[name], dtype=object)
        return pd.DataFrame(columns, index=moments.index)

    def tell_of(self, key: str) -> bool:
        """Whether labels were read that name this file, or that are the nearest above it and do not."""
        if key in self.rows:
            return True
        folder = key if self.folders else ""
        while folder := folder.rpartition("/")[0]:
            if folder in self.folders:
                return True
            if _file(absolute_path(folder)):
                return False
        return False

    def relabelled(self, index: Index, files: Mapping[str, Path]) -> Iterator[Embedded]:
        """Those of some files of an index of whose moments something else is said now, as what they should be.

        Args:
            files: key and path of those that are as they were.
        """
        told = {key for key in files if self.tell_of(key)}
        if not told:
            return
        there = [name for name in self.kinds if name in index.columns()]
        known, parts = index.files(), []
        for batch in index.batches(["file", "version", *_NO_LABEL[2:], *there], Snapshot(index).alive()):
            part = batch.to_pandas()
            labelled = part["file"].isin(self.rows) | part[there].notna().any(axis=1)  # of the rest nothing changes
            parts.append(part[part["file"].isin(told) & labelled])
        moments = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["file", "version"])
        for (key, version), part in moments.groupby(["file", "version"]):
            if all(_same(part.get(name), labels) for name, labels in self.of(key, part).items()):
                continue
            about, kept = known.loc[key], [name for name in _NO_LABEL if name != "file"]
            adapts = ["pooled", "adapted"] if index.about["pooled"] else []
            rows = index.of_version(version, [*kept, "vector", *adapts])
            if not len(rows):  # another process has replaced it meanwhile
                continue
            table = rows.select(kept).to_pandas()
            table = pd.concat([table, self.of(key, table)], axis=1)
            pooled, adapted = None, None
            if adapts:
                pooled, adapted = matrix(rows["pooled"], index.about["pooled"]), rows["adapted"].to_pylist()
            file = File(key, files[key], int(about["size"]), int(about["mtime_ns"]), about["sha256"])
            vectors = matrix(rows["vector"], index.about["dim"])
            yield Embedded(file, table, vectors, pooled, about["problem"], adapted)


def _said(rows: list[Row], apart: bool, middle: float, channel: Any) -> dict[str, str]:
    """What the first row that fits says of a moment; `apart`: a row of one channel fits no moment of all."""
    every = pd.isna(channel)
    for row in rows:
        of_channel = row.channel is None or (not apart if every else row.channel == channel)
        if row.start_s <= middle < row.end_s and of_channel:
            return row.values
    return {}


def _is_there(key: str) -> bool:
    try:
        return os.path.exists(absolute_path(key))  # pathlib's raises on a name that is too long
    except ValueError:  # no file has such a name
        return False


def _file(folder: Path) -> Path | None:
    """What has the labels of a folder, if anything has."""
    if (file := folder / NAME).is_file():
        return file
    return file if _is_manifest(file := folder / MANIFEST) else None


def _is_manifest(file: Path) -> bool:
    """Whether this is one of ours: other programs write files of that name too."""
    if not file.is_file():
        return False
    with file.open(encoding="utf-8-sig", errors="replace") as opened:
        return {"utterance_id", "path"} <= set(opened.readline(1 << 16).strip().split(","))


def _same(there: pd.Series | None, wanted: pd.Series) -> bool:
    """Whether values are equal, where nothing equals nothing; of a column that is not there, all are nothing."""
    empty = wanted.isna()
    if there is None:
        return bool(empty.all())
    return bool((there.isna() == empty).all()) and there[~empty].tolist() == wanted[~empty].tolist()


def _number(text: str, file: Path, line: int) -> float | None:
    if not text:
        return None
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise LabelsError(f"{file}, line {line}: {text!r} is no number")
