"""A search index as one search sees it: the moments that counted at one version of the table, and how to rank them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esr_utils import nearest
from esr_utils.index_table import IndexTable, matrix

if TYPE_CHECKING:
    from lancedb.expr import Expr

_SAMPLE = 4096  # vectors that stand for all of them where not all are scored
# Of an approximate search: lists read; and how many times k, and at least how many, are scored again exactly. For the
# recall that this gives see `benchmarks/index_search.py`.
_PROBES, _TIMES, _LEAST = 32, 2, 20
_ASIDE = ThreadPoolExecutor(1, "esr-aside")  # scores the sample meanwhile

Rows = tuple[NDArray[np.uint64], NDArray[np.float32]]


class QueryError(ValueError):
    """A query that cannot be answered; the message says why."""


def is_text(value: str) -> bool:
    """Whether it can be encoded: what came from a shell may hold bytes that are no UTF-8."""
    return value.encode("utf-8", "ignore").decode() == value


class Snapshot:
    """The newest version of the table. What is read of it is kept until there is a newer one.

    Attributes:
        version: of the table.
        n_moments: how many moments count.
        columns: of a moment that can be filtered and shown, with their types.
    """

    def __init__(self, table: IndexTable) -> None:
        self.table, self.version = table, table.reload()
        entries, self._dead, _ = table.entries()
        self.n_moments = int(entries["file_moments"].sum())
        named = [one.name for one in table.table.list_indices() if "vector" in one.columns]
        self._approximate = named[0] if named else None
        self._asked = 0  # queries of the approximate index
        self.columns = table.columns()
        self._vectors: tuple[nearest.Vectors, NDArray[np.uint64], NDArray[np.int64]] | None = None
        self._random: NDArray[np.float32] | None = None
        self._kept: Columns | None = None

    @property
    def has_approximate(self) -> bool:
        """Whether there is an approximate index."""
        return self._approximate is not None

    # What counts --------------------------------------------------------------------------------------------

    def alive(self, condition: Expr | None = None) -> Expr:
        """That a row is a moment that counts and meets a condition."""
        from lancedb.expr import col, lit

        found = col("written") == lit(0)
        if self._dead:
            found = found & ~col("version").isin([lit(version) for version in self._dead])
        return found if condition is None else found & condition

    def condition(self, where: Mapping[str, Any]) -> Expr | None:
        """Conditions by column as LanceDB takes them; values go in as literals.

        Raises:
            QueryError: there is no such column, or a value is not of its type.
        """
        from lancedb.expr import col, lit

        found = None
        for name, wanted in where.items():
            kind = self._kind(name)
            several = wanted if isinstance(wanted, list | set | frozenset) else [wanted]
            values = [lit(_fitting(name, kind, value)) for value in several if not isinstance(value, tuple)]
            ranges = [_within(name, kind, value) for value in several if isinstance(value, tuple)]
            met = reduce(or_, ranges if ranges and not values else [col(name).isin(values), *ranges])
            found = met if found is None else found & met
        return found

    def _kind(self, column: object) -> pa.DataType:
        if column not in self.columns:
            raise QueryError(f"there is no column {column!r}; this index has {', '.join(self.columns)}")
        return self.columns[column]

    # Ranking ------------------------------------------------------------------------------------------------

    def exact(self, vector: NDArray[np.float32], condition: Expr | None) -> Scored:
        """All moments scored; the share below is right to the last moment, but of many with a condition only to about
        0.001."""
        vectors, row_ids, order = self._loaded()
        scores, errors = vectors.scores(vector)
        met_places = None
        if condition is not None:
            met = _joined(
                batch["_rowid"].to_numpy() for batch in self.table.batches(["version"], self.alive(condition))
            )
            met_places = np.sort(order[np.searchsorted(row_ids, met, sorter=order)])  # ties keep the order of the table

        def score_again(rows: NDArray[np.int64]) -> None:
            own = self.table.rows(row_ids[rows], ["vector"])["vector"]
            scores[rows] = _products(matrix(own, self.table.about["dim"]), vector)
            errors[rows] = 0

        if condition is not None and 0 < len(scores) <= _SAMPLE:  # in so few one moment is much of a share
            score_again(np.arange(len(scores)))

        def best(n: int) -> Rows:
            some = slice(None) if met_places is None else met_places
            rows = nearest.candidates(scores[some], errors[some], n)
            rows = rows if met_places is None else met_places[rows]
            score_again(rows)
            rows = rows[nearest.best(scores[rows], n)]
            return row_ids[rows], scores[rows]

        return Scored(best, lambda: scores, lambda rows: self._all_columns().of(rows))

    def approximate(self, vector: NDArray[np.float32], condition: Expr | None) -> Scored:
        """The best found by the approximate index, and scored exactly; the share below is that of a sample."""
        self._warm()
        condition = self.alive(condition) if condition is not None or self._dead else None
        columns = self._kept
        read = ["vector"] if columns else ["vector", *self.columns]

        def best(n: int) -> Rows:
            nonlocal columns
            found = self.table.nearest(vector, max(_TIMES * n, _LEAST), _PROBES, read, condition)
            columns = columns if read == ["vector"] else Columns(found.select(["_rowid", *self.columns]))
            scores = _products(matrix(found["vector"], self.table.about["dim"]), vector)
            rows = nearest.best(scores, n)
            return found["_rowid"].to_numpy()[rows], scores[rows]

        scores = _ASIDE.submit(np.einsum, "nd,d->n", self.sample(), vector)
        return Scored(best, scores.result, lambda rows: columns.of(rows))

    def _warm(self) -> None:
        """Before the second query, reads the approximate index and the columns into memory, for a million moments of
        short names 250 MB in a second. Else each would wait for the parts that none before it had asked for, longer
        than it takes itself; but who asks once needs no more than these."""
        self._asked += 1
        if self._asked == 2 and self.has_approximate:
            self.table.table.prewarm_index(self._approximate)
            self._all_columns()

    def sample(self) -> NDArray[np.float32]:
        """(n, d), at most 4096 of the vectors, drawn with seed 0."""
        if self._random is None:
            rows = self.table.table.count_rows()
            drawn = np.random.default_rng(0).choice(rows, min(rows, _SAMPLE), replace=False)
            found = self.table.table.take_offsets(np.sort(drawn).tolist()).select(["vector", "version"]).to_arrow()
            alive = pc.and_(
                pc.is_valid(found["vector"]),
                pc.invert(pc.is_in(found["version"], pa.array(self._dead, pa.int64()))),
            )
            self._random = matrix(found["vector"].filter(alive), self.table.about["dim"]).astype(np.float32)
        return self._random

    def first_of_each(self, rows: NDArray[np.uint64], column: str) -> NDArray[np.int64]:
        """Places of those rows before which none has the same value in a column; rows without a value all stay."""
        self._kind(column)
        values = self._all_columns().of(rows)[column].combine_chunks().dictionary_encode()
        codes = values.indices.fill_null(-1).to_numpy().astype(np.int64)
        codes = np.where(codes < 0, -1 - np.arange(len(codes)), codes)
        return np.sort(np.unique(codes, return_index=True)[1])

    def _all_columns(self) -> Columns:
        """Those of all moments, read into memory once: to read them hit by hit takes some ms. A million moments take
        100 MB where names are short and there is no other text."""
        if self._kept is None:
            schema = pa.schema({**self.columns, "_rowid": pa.uint64()})
            self._kept = Columns(pa.Table.from_batches(self.table.batches(list(self.columns), self.alive()), schema))
        return self._kept

    def _loaded(self) -> tuple[nearest.Vectors, NDArray[np.uint64], NDArray[np.int64]]:
        """All vectors, read into memory once; their row ids; and the order that sorts these."""
        if self._vectors is None:
            dim, row_ids = self.table.about["dim"], []
            vectors = nearest.Vectors(self.n_moments, dim)
            for batch in self.table.batches(["vector"], self.alive()):
                vectors.add(matrix(batch["vector"], dim))
                row_ids.append(batch["_rowid"].to_numpy().copy())  # itself it would keep the whole batch in memory
            row_ids = _joined(row_ids)
            self._vectors = vectors, row_ids, np.argsort(row_ids)
        return self._vectors


class Columns:
    """Columns of moments, found by their row ids.

    Args:
        found: these, and `_rowid`.
    """

    def __init__(self, found: pa.Table) -> None:
        row_ids, found = found["_rowid"].to_numpy(), found.drop_columns("_rowid")
        wide = [pa.large_string() if pa.types.is_string(kind) else kind for kind in found.schema.types]
        # in one piece, since to take from many takes longer; text may then be over the 2 GB that a string column holds
        self._columns = found.cast(pa.schema(list(zip(found.column_names, wide, strict=True)))).combine_chunks()
        self._order = np.argsort(row_ids)
        self._row_ids = row_ids[self._order]

    def of(self, rows: NDArray[np.uint64]) -> pa.Table:
        """The moments of some row ids, in the order of these.

        Raises:
            KeyError: one is not there.
        """
        places = np.minimum(np.searchsorted(self._row_ids, rows), len(self._row_ids) - 1)
        if len(rows) and (not len(self._row_ids) or (self._row_ids[places] != rows).any()):
            raise KeyError(
                "a row that was found is none of this version of the index: who writes while another thread searches "
                "should write by an Index of their own"
            )
        return self._columns.take(self._order[places])


@dataclass(frozen=True)
class Scored:
    """The answer to a query, of which the first n can be asked for.

    Attributes:
        best: from n to the row ids and scores of the n best, best first, and of all that tie with the last.
        scores: of the whole index, or of a sample of it.
        take: from some of the row ids that `best` gave last to the moments' columns, in this order.
    """

    best: Callable[[int], Rows]
    scores: Callable[[], NDArray[np.float32]]
    take: Callable[[NDArray[np.uint64]], pa.Table]


def _within(column: str, kind: pa.DataType, bounds: tuple) -> Expr:
    """That a column's value is in a range (low, high), both included, one of which may be None."""
    from lancedb.expr import col, lit

    if len(bounds) != 2 or all(bound is None for bound in bounds):
        raise QueryError(f"{column}: a range is (low, high), one of which may be None; this is {bounds!r}")
    low, high = (None if bound is None else lit(_fitting(column, kind, bound)) for bound in bounds)
    parts = ([] if low is None else [col(column) >= low]) + ([] if high is None else [col(column) <= high])
    return reduce(and_, parts)


def _fitting(column: str, kind: pa.DataType, value: object) -> str | float | int | bool:
    """A value as its column's type has it."""
    if pa.types.is_string(kind) and isinstance(value, str):
        if not is_text(value):
            raise QueryError(f"column {column!r} is asked for {value!r}, which holds bytes that are no UTF-8")
        return str(value)
    if pa.types.is_boolean(kind) and isinstance(value, bool | np.bool_):
        return bool(value)
    number = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool) and math.isfinite(value)
    if number and pa.types.is_floating(kind):
        return float(value)
    if number and pa.types.is_integer(kind):
        return int(value) if float(value).is_integer() else float(value)
    raise QueryError(f"column {column!r} is of type {kind}; {value!r} is no value of it")


def _products(vectors: NDArray[np.floating], query: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n,) scores. In fp64 they do not depend on what stands beside a vector, and by einsum no threads are started,
    which would wait for work in the way of LanceDB's."""
    return np.einsum("nd,d->n", vectors.astype(np.float64, copy=False), query.astype(np.float64)).astype(np.float32)


def _joined(parts: Iterable[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    return np.concatenate([np.zeros(0, np.uint64), *parts])
