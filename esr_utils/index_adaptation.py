"""An index whose vectors are made by the statistics of what it holds, not by the training's (`adaptation`).

A refresh writes new moments by the training's statistics, and then `adapt` brings all to the index's own: of all its
moments, or of those with one value in a column, such as a speaker's. They lie in a table beside the moments, whose rows
written last are the ones that hold. Each moment names those that its vector was made by, so that what is interrupted is
seen and completed. Vectors are made anew, from the pooled features kept beside them, only where statistics have moved.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from esr_utils import adaptation
from esr_utils.adaptation import Statistics
from esr_utils.index_rows import Embedded, File
from esr_utils.index_snapshot import Snapshot
from esr_utils.index_table import IndexTable, connect, matrix
from esr_utils.index_writing import IndexWriter
from esr_utils.memory import give_back
from esr_utils.styles import STYLES

if TYPE_CHECKING:
    from lancedb.expr import Expr

    from esr_utils.retriever import StyleRetriever

TABLE = "statistics"
OFF, ALL = "off", "all"  # of `adapt`, which else is a column
MOVED = 0.05  # of the training's deviations, on average: less is no reason to make vectors anew
_WHOLE = ""  # the group of all moments; examples from elsewhere are heard by its statistics too
_ROUNDS = 3  # as many times is looked whether another process has adapted the index meanwhile
_TOGETHER = 2048  # moments of several files whose vectors are made anew together: 29 MB with Whisper base


@dataclass(frozen=True)
class Book:
    """The statistics that hold in an index.

    Attributes:
        held: what the index held when they were taken.
        groups: id and statistics of each group that has its own; "" and None of one that is left by the training's.
    """

    held: str
    groups: Mapping[str, tuple[str, Statistics | None]]

    def of(self, group: str | None) -> tuple[str, Statistics | None]:
        """Id and statistics for a group, None for moments of none: its own, else "" and None for the training's."""
        return self.groups.get(group, ("", None))


@dataclass(frozen=True)
class Adapted:
    """What `adapt` has done.

    Attributes:
        files: of how many vectors were made anew.
        few_styles: of the groups whose statistics were taken, those that seem to hold few styles
            (`adaptation.effective_styles`), with their number. Their statistics would perhaps be these styles, and take
            them out: they are left by the training's. Groups of under MIN_CLIPS, which are left so too, are not named.
            "" is all moments.
    """

    files: int = 0
    few_styles: Mapping[str, float] = field(default_factory=dict)


def is_due(index: IndexWriter) -> bool:
    """Whether `adapt` has something to do in an index; no model is needed to tell."""
    if index.about["adapt"] == OFF:
        return False
    index.reload()
    told = read(index)
    return told.held != _held(index, index.entries()[0]) or bool(_stale(index, told))


def adapt(index: IndexWriter, model: StyleRetriever) -> Adapted:
    """Makes anew what was not made by the statistics that hold now.

    Args:
        index: one that does not adapt is left as it is.
        model: that made it.

    Raises:
        IndexUnusable, IndexWriteError: as `Index.add`.
    """
    if index.about["adapt"] == OFF:
        return Adapted()
    files, few = 0, {}
    for _ in range(_ROUNDS):
        give_back()
        index.reload()
        entries, _, _ = index.entries()
        told, held = read(index, model), _held(index, entries)
        if told.held != held:
            told, few = _Statistics(index, model).taken(told, held)
            _write(index, told)
        if not (stale := _stale(index, told)):
            break
        index.add(_remade(index, model, told, entries, stale))
        files += len(stale)
    return Adapted(files, few)


def statistics(index: IndexTable, model: StyleRetriever) -> Statistics | None:
    """Those of all moments of an index, for what is compared with them; None: the training's."""
    return None if index.about["adapt"] == OFF else read(index, model).of(_WHOLE)[1]


def left(index: IndexTable) -> tuple[int, dict[str, str]]:
    """How many groups have statistics of their own; and why each of the others is left by the training's. No model is
    needed to tell. "" are all moments, or those of no group."""
    count, told, reasons = Counter(), read(index), {}
    for batch in index.batches(["id", *_group_column(index)], Snapshot(index).alive()):
        count.update(_groups(batch, index))
    for group, n in count.items():
        if told.of(group)[0]:
            continue
        why = "not adapted to yet: run esr index again"
        if group is None:
            why = f"of no {index.about['adapt']}"
        elif count.total() < adaptation.MIN_CLIPS:
            why = f"under {adaptation.MIN_CLIPS} in the whole index"
        elif n < adaptation.MIN_GROUP:
            why = f"under {adaptation.MIN_GROUP}"
        elif group in told.groups:
            why = "they seem to be of few styles"
        reasons[group or _WHOLE] = f"{n} moments, {why}"
    return len(count) - len(reasons), reasons


def read(index: IndexTable, model: StyleRetriever | None = None) -> Book:
    """The statistics that hold, as they were written last; without a model their ids alone, and None for them."""
    from lancedb.expr import col, lit

    try:
        table = connect(index.uri).open_table(TABLE)
    except ValueError:  # there is none yet
        return Book("", {})
    written = table.search().select(["written"]).to_arrow()["written"]
    if not len(written):  # interrupted before there was one
        return Book("", {})
    names, values = ["group", "id", "held", "count"], ["mean", "std"] if model else []
    rows = table.search().where(col("written") == lit(pc.max(written).as_py())).select(names + values).to_arrow()
    about = rows.select(names).to_pylist()
    if model is None:
        return Book(about[0]["held"], {row["group"]: (row["id"], None) for row in about})
    shape = model.speech_head.mean.shape
    mean, std = (np.stack(rows[name].to_numpy()).reshape(-1, *shape) for name in ("mean", "std"))
    found = {
        row["group"]: (row["id"], Statistics(row["count"], *values) if row["id"] else None)
        for row, *values in zip(about, mean, std, strict=True)
    }
    return Book(about[0]["held"], found)


def _write(index: IndexWriter, book: Book) -> None:
    """Appends what holds from now on, in one commit, and then lets go what held before."""
    from lancedb.expr import col, lit

    database, p, number = connect(index.uri), index.about["pooled"], pa.list_(pa.float32(), index.about["pooled"])
    names = {"group": pa.string(), "id": pa.string(), "held": pa.string(), "written": pa.int64(), "count": pa.int64()}
    schema = pa.schema([*names.items(), ("mean", number), ("std", number)])
    nothing = Statistics(0, np.zeros(p, np.float32), np.ones(p, np.float32))
    groups = {_WHOLE: ("", None)} | dict(book.groups)  # a row at least, which says what was held
    now = index.now()
    rows = [
        {"group": group, "id": name, "held": book.held, "written": now, "count": (own or nothing).count,
         "mean": (own or nothing).mean.ravel(), "std": (own or nothing).std.ravel()}
        for group, (name, own) in groups.items()
    ]  # fmt: skip
    table = index.commit(lambda: database.create_table(TABLE, schema=schema, exist_ok=True))
    index.commit(lambda: table.add(pa.Table.from_pylist(rows, schema=schema)))
    index.commit(lambda: table.delete(col("written") < lit(now)))
    index.tidy(table)


def _held(index: IndexTable, entries: pd.DataFrame) -> str:
    """A name of what an index holds, files and groups, of its model and of the rule, which does not change when vectors
    are made anew."""
    files = sorted(zip(entries.index, entries["file_sha256"], entries["file_moments"].tolist(), strict=True))
    grouped = 0  # the sum of a number for each moment and its group, in whatever order they come
    if columns := _group_column(index):
        for batch in index.batches(["id", *columns], Snapshot(index).alive()):
            for one in zip(batch["id"].to_pylist(), _groups(batch, index), strict=True):
                grouped += int.from_bytes(hashlib.blake2b(json.dumps(one).encode(), digest_size=16).digest())
    told = [index.about["model"], adaptation.PRIOR, files, grouped]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class _Statistics:
    """Takes statistics of an index, group by group."""

    def __init__(self, index: IndexTable, model: StyleRetriever) -> None:
        from esr_utils.evaluation import style_queries  # here: an index that does not adapt is opened faster without it

        self.index, self.model, self.training = index, model, adaptation.of_training(model)
        self.queries = style_queries(model, list(STYLES), "seen")
        model.text.release()  # the only sentences that adapting needs are read
        self.styles: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(len(STYLES), np.int64))

    def taken(self, before: Book, held: str) -> tuple[Book, dict[str, float]]:
        """What holds now: of before what has not moved, and none of an index with too few moments; and `few_styles`."""
        found, few, groups = {}, {}, adaptation.gather(self._parts())
        if _WHOLE not in groups or groups[_WHOLE].count < adaptation.MIN_CLIPS:
            return Book(held, {}), {}
        for group, own in groups.items():
            if (by := adaptation.shrunk(own, self.training)) is self.training:
                continue
            if (styles := adaptation.effective_styles(self.styles[group])) < adaptation.FEW_STYLES:
                found[group] = ("", None)
                few |= {group: styles} if own.count >= adaptation.MIN_CLIPS else {}
                continue
            name, known = before.groups.get(group, ("", None))
            found[group] = (name, known) if known and not self._moved(known, by) else (secrets.token_hex(8), by)
        return Book(held, found), few

    def _moved(self, before: Statistics, now: Statistics) -> bool:
        mean = (now.mean - before.mean) / self.training.std
        return float(np.sqrt((mean**2 + np.log(now.std / before.std) ** 2).mean())) > MOVED

    def _parts(self) -> Iterator[tuple[list[str], np.ndarray]]:
        """Groups and pooled features of all moments; each belongs to the whole too."""
        shape = self.training.mean.shape
        columns = _group_column(self.index)
        for batch in self.index.batches(["pooled", *columns], Snapshot(self.index).alive()):
            pooled = matrix(batch["pooled"], self.index.about["pooled"]).reshape(-1, *shape)
            groups = np.array(_groups(batch, self.index), dtype=object)
            for group in {_WHOLE, *groups} - {None}:
                rows = pooled if group == _WHOLE else pooled[groups == group]
                self.styles[group] += adaptation.style_counts(self.model, rows, self.queries)
                for start in range(0, len(rows), adaptation.AT_ONCE):
                    some = rows[start : start + adaptation.AT_ONCE]
                    yield [group] * len(some), some


def _group_column(index: IndexTable) -> list[str]:
    """The column that tells groups apart, if the index has it."""
    return [name for name in index.columns() if name == index.about["adapt"]]


def _groups(batch: pa.RecordBatch | pa.Table, index: IndexTable) -> list[str | None]:
    """The group of each row; None where the column says nothing."""
    if index.about["adapt"] == ALL:
        return [_WHOLE] * batch.num_rows
    if not (columns := _group_column(index)):
        return [None] * batch.num_rows
    return [None if value in (None, "") else str(value) for value in batch[columns[0]].to_pylist()]


def _stale(index: IndexTable, book: Book) -> list[int]:
    """Versions of the files of which a moment was made by other statistics than it should be."""
    found, columns = set(), _group_column(index)
    for batch in index.batches(["version", "adapted", *columns], Snapshot(index).alive()):
        rows = zip(batch["version"].to_pylist(), batch["adapted"].to_pylist(), _groups(batch, index), strict=True)
        found.update(version for version, made_by, group in rows if made_by != book.of(group)[0])
    return sorted(found)


def _remade(
    index: IndexTable, model: StyleRetriever, book: Book, entries: pd.DataFrame, versions: list[int]
) -> Iterator[Embedded]:
    """Files with vectors by the statistics that hold."""
    from lancedb.expr import col, lit

    known = entries.reset_index().set_index("version")
    names = ["version", "pooled", *index.columns()]
    before = known.loc[versions, "file_moments"].cumsum().shift(fill_value=0)  # moments of the files before each
    for some in before.groupby(before // _TOGETHER).groups.values():
        of_some: Expr = (col("written") == lit(0)) & col("version").isin([lit(int(version)) for version in some])
        pooled = np.empty((known.loc[some, "file_moments"].sum(), index.about["pooled"]), np.float16)
        rows, n = [], 0
        for batch in index.batches(names, of_some):  # a long file's features are held once
            pooled[n : n + len(batch)] = matrix(batch["pooled"], index.about["pooled"])
            # Copied: as long as one of its columns is there, all of a batch of LanceDB's is.
            rows.append(batch.drop_columns(["pooled", "_rowid"]).take(np.arange(len(batch))))
            n += len(batch)
        of_rows = np.concatenate([np.zeros(0, np.int64), *(batch["version"].to_numpy() for batch in rows)])
        give_back()
        for version in np.unique(of_rows):  # none where another process has replaced them all
            places = np.flatnonzero(of_rows == version)
            features = pooled[:n] if len(places) == n else pooled[places]
            yield _one(index, model, book, known.loc[version], pa.Table.from_batches(rows).take(places), features)


def _one(
    index: IndexTable,
    model: StyleRetriever,
    book: Book,
    about: Mapping[str, Any],
    rows: pa.Table,
    pooled: np.ndarray,
) -> Embedded:
    features = pooled.reshape(-1, *model.speech_head.mean.shape)
    groups = np.array(_groups(rows, index), dtype=object)
    vectors, made_by = np.zeros((len(groups), index.about["dim"]), np.float32), groups.copy()
    for group in set(groups):
        here = groups == group
        made_by[here], own = book.of(group)
        some = features if here.all() else features[here]  # a long file's are not copied
        vectors[here] = adaptation.vectors(model, some, own or adaptation.of_training(model))
    size, mtime_ns = int(about["file_size"]), int(about["file_mtime_ns"])
    file = File(about["file"], Path(about["file"]), size, mtime_ns, about["file_sha256"])
    moments = rows.drop_columns(["file", "version"]).to_pandas()
    return Embedded(file, moments, vectors, pooled, about["file_problem"], made_by.tolist())
