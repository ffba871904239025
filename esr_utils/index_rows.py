"""Rows of a search index: what is given of a file, and the two kinds of row that the table makes of it.

moment  id, file, version, written (0), model, start_s, end_s, channel, speaker, vector, pooled, adapted, and any
        column of its manifest
entry   id, file, version, written (when), file_size, file_mtime_ns, file_sha256, file_moments, file_problem
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

ENTRY = ("written", "file_size", "file_mtime_ns", "file_sha256", "file_moments", "file_problem")
RESERVED = ("id", "file", "version", "model", "vector", "pooled", "adapted", *ENTRY, "rank", "score", "percentile")

# The problem of a file of which only the moments up to some place are there, since it is still being embedded, or that
# was interrupted; a refresh goes on with it.
UNFINISHED = "is not embedded to its end yet: run esr index again"

# What the owner of a bucket answers, in XML, JSON or plain text; what the system says; the number of the answer.
_ANSWERS = (
    "<Message>(.*?)</Message>", r'message\\?"?: \\?"(.*?)\\?"', r'body: Some\("([^"]+)"', 'error: "(.*?)"',
    r"\b(status: \d+)",
)  # fmt: skip


class IndexUnusable(ValueError):
    """There is no index, it is another one's, or what is to be added does not fit it; the message says what to do."""


class IndexWriteError(OSError):
    """What was to be written could not be; the index is as it was before."""


@dataclass(frozen=True)
class File:
    """A file as it was when it was read.

    Attributes:
        key: its name in the index, UTF-8.
        path: where it is; not kept.
        size: bytes.
        mtime_ns: last change, nanoseconds since 1970.
        sha256: hex, of its content.
    """

    key: str
    path: Path
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def read(cls, key: str, path: str | Path) -> Self:
        """
        Raises:
            OSError: it cannot be read.
        """
        status = os.stat(path)  # before the content: a change in between is seen the next time
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(key, Path(path), status.st_size, status.st_mtime_ns, digest)


@dataclass(frozen=True)
class Embedded:
    """What was made of one file.

    Attributes:
        file: the file.
        moments: n rows: start_s, end_s (seconds), channel (from 0), any of them empty for a whole file; speaker and
            any other column, of text, numbers or truth values. `id`, where there is one, is kept; else it is made of
            file, channel and range.
        vectors: (n, d), unit length; kept as fp16.
        pooled: (n, p) what the vectors were projected from, kept as fp16, or None in an index that keeps none.
        problem: why there are no moments, or not those of the whole file, where it could not be used; UNFINISHED where
            the rest is still to come.
        adapted: n ids of the statistics that the vectors were made by (`index_adaptation`); None: the training's.
    """

    file: File
    moments: pd.DataFrame
    vectors: NDArray
    pooled: NDArray | None = None
    problem: str = ""
    adapted: Sequence[str] | None = None


def moment_id(file: str, channel: int | None, start_s: float | None, end_s: float | None) -> str:
    """32 hex digits: the same moment of the same file has the same, whenever it is embedded."""
    return hashlib.blake2b(json.dumps([file, channel, start_s, end_s]).encode(), digest_size=16).hexdigest()


@dataclass
class Changes:
    """What has become of the files since they were indexed.

    Attributes:
        new: key and path of files that are not in the index yet, or not to their end.
        changed: of another content.
        touched: of another time in their folder, of the same content.
        gone: keys that are in the index and were not found.
        unchanged: how many are as they were.
        unreadable: key and reason; what the index has of them stays.
    """

    new: list[tuple[str, Path]] = field(default_factory=list)
    changed: list[File] = field(default_factory=list)
    touched: list[File] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    unchanged: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def to_embed(self) -> Iterator[File]:
        """The new and the changed, read one by one when they are asked for; those that fail go to `unreadable`."""
        yield from self.changed
        for key, path in self.new:
            try:
                file = File.read(key, path)
            except OSError as error:
                self.unreadable.append((key, error.strerror or str(error)))
            else:
                yield file


def schema(about: dict[str, Any], metadata: dict[bytes, str]) -> pa.Schema:
    """The columns of a new index."""
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    kinds = {
        "id": text, "file": text, "version": whole, "model": text, "start_s": number, "end_s": number, "channel": whole,
        "speaker": text, "written": whole, "file_size": whole, "file_mtime_ns": whole, "file_sha256": text,
        "file_moments": whole, "file_problem": text, "vector": pa.list_(pa.float16(), about["dim"]),
    }  # fmt: skip
    if about["pooled"]:
        kinds |= {"pooled": pa.list_(pa.float16(), about["pooled"]), "adapted": text}
    return pa.schema(list(kinds.items()), metadata=metadata)


def unfit(names: Iterable[str]) -> str:
    """What is wrong with names of new columns of moments; nothing if none is. LanceDB's own begin with _."""
    refused = sorted({name for name in names if name in RESERVED or not re.fullmatch(r"[^\W\d_]\w*", name)})
    if not refused:
        return ""
    return (
        f"columns {', '.join(map(repr, refused))} cannot be in an index: give them names of letters, digits and _ that "
        f"begin with a letter and are not among {', '.join(RESERVED)}"
    )


def column_type(values: pd.Series) -> pa.DataType:
    """What a new column of these values is kept as: truth values, whole numbers, numbers or text."""
    found = pa.Array.from_pandas(values).type if len(values) else pa.string()
    for kind, is_kind in (
        (pa.bool_(), pa.types.is_boolean),
        (pa.int64(), pa.types.is_integer),
        (pa.float64(), pa.types.is_floating),
    ):
        if is_kind(found):
            return kind
    return pa.string()


def to_table(one: Embedded, schema: pa.Schema, about: dict[str, Any], written: int) -> pa.Table:
    """A file's moments and its entry, written at `written`, as a table of this schema has them.

    Raises:
        IndexUnusable: they do not fit it.
    """
    file, n = one.file, len(one.moments)
    version = secrets.randbits(62)
    arrays = {
        "id": _ids(one),
        "file": [file.key] * n,
        "version": [version] * n,
        "written": [0] * n,
        "model": [about["model"]] * n,
    }
    arrays["vector"] = _matrix(one, "vector", one.vectors, about["dim"], unit=True)
    if about["pooled"]:
        arrays["pooled"] = _matrix(one, "pooled", one.pooled, about["pooled"])
        arrays["adapted"] = [""] * n if one.adapted is None else list(one.adapted)
    columns = []
    for column in schema:
        values = arrays.get(column.name, one.moments.get(column.name))
        try:
            columns.append(
                pa.nulls(n, column.type) if values is None else pa.array(values, column.type, from_pandas=True)
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise IndexUnusable(
                f"{file.key}: column {column.name!r} of this index is of type {column.type}: {first_line(error)}"
            ) from None
    last = entry(file, {"version": version, "file_moments": n, "file_problem": one.problem}, written)
    return pa.concat_tables([pa.Table.from_arrays(columns, schema=schema), pa.Table.from_pylist([last], schema=schema)])


def _ids(one: Embedded) -> list[str]:
    if "id" in one.moments:
        ids = [str(value) for value in one.moments["id"]]
    else:
        empty = pd.Series(np.nan, one.moments.index)
        places = [one.moments.get(name, empty) for name in ("channel", "start_s", "end_s")]
        ids = [
            moment_id(
                one.file.key,
                *(None if pd.isna(v) else kind(v) for v, kind in zip(place, (int, float, float), strict=True)),
            )
            for place in zip(*places, strict=True)
        ]
    if len(set(ids)) < len(ids):
        raise IndexUnusable(f"{one.file.key}: the same moment (channel, start, end) is there twice")
    return ids


def _matrix(one: Embedded, name: str, values: NDArray | None, width: int, unit: bool = False) -> pa.Array:
    """(n, width) numbers as a column of fp16."""
    values = np.zeros((0, width)) if values is None and not len(one.moments) else np.asarray(values)
    if values.shape != (len(one.moments), width):
        raise IndexUnusable(
            f"{one.file.key}: {name} is of shape {values.shape}; this index takes ({len(one.moments)}, {width})"
        )
    if values.size and not np.isfinite([values.min(), values.max()]).all():  # no array of its own
        raise IndexUnusable(f"{one.file.key}: {name} holds numbers that are not finite")
    if unit and len(values) and abs(np.linalg.norm(values.astype(np.float32), axis=1) - 1).max() > 0.01:
        raise IndexUnusable(f"{one.file.key}: vectors are not of unit length")
    return pa.FixedSizeListArray.from_arrays(pa.array(values.astype(np.float16, copy=False).ravel()), width)


def entry(file: File, about: dict[str, Any], written: int) -> dict[str, Any]:
    """A file's entry; `about` has the version, file_moments and file_problem."""
    return {
        "id": secrets.token_hex(16), "file": file.key, "version": int(about["version"]), "written": written,
        "file_size": file.size, "file_mtime_ns": file.mtime_ns, "file_sha256": file.sha256,
        "file_moments": int(about["file_moments"]), "file_problem": about["file_problem"],
    }  # fmt: skip


def first_line(error: Exception) -> str:
    """What a library's error says, without what follows and without where in its source that was."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    if store := re.search(r'store: "(.*?)"', line):  # all that LanceDB knows of a request: what was answered is told
        answers = (re.search(answer, line) for answer in _ANSWERS)
        return next((f"{store[1]}: {found[1]}" for found in answers if found), f"{store[1]} cannot be used")
    return re.sub(r",? *\S+\.rs:\d+:\d+$", "", line)


@dataclass
class Report:
    """What became of recordings.

    Attributes:
        embedded, unchanged, removed: files; embedded are those of which moments were made.
        relabelled: those of the unchanged of which a labels.csv says something else than before.
        adapted: files whose vectors were made anew by the index's own statistics (see `index_adaptation`).
        few_styles: groups that seem to hold too few styles to adapt (see `index_adaptation.Adapted`).
        moments: of those embedded.
        speech_s: seconds that these moments last together.
        problems: key and reason of files that could not be used, or not whole; of those embedded or looked at now.
        left_out: the same of what was left as it is in the index, and is tried again the next time: it cannot be
            opened, leads elsewhere, needs ffmpeg, or ffmpeg was stopped.
    """

    embedded: int = 0
    unchanged: int = 0
    removed: int = 0
    relabelled: int = 0
    adapted: int = 0
    few_styles: dict[str, float] = field(default_factory=dict)
    moments: int = 0
    speech_s: float = 0.0
    problems: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def not_adapted(self, by: str) -> dict[str, str]:
        """A sentence on each of `few_styles`; Args: by: what the index adapts by."""
        sentence = "the moments of {} seem to be of few styles (about {:.1f}), so they are not adapted to"
        return {
            group: sentence.format(f"{by} {group}" if group else "this index as a whole", n)
            for group, n in self.few_styles.items()
        }
