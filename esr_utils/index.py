"""A search index on disk: what is said how, in which file, from when to when; found by a sentence or by an example.

    index = Index.create("recordings.index", model)
    index.refresh(folder, found, embed)                          # only what is new or changed in it is embedded
    index.search("a tired, sarcastic answer", k=10)              # a DataFrame, best first
    index.search("excited", minus="angry", where={"speaker": ["anna", "ben"], "start_s": (60, None)})
    index.search("excited", one_per="file", k=10, offset=10)     # the second ten

`build` makes one of a manifest. Up to EXACT_LIMIT moments every one is scored (`nearest`), from a copy of the vectors
in memory that follows the table; past that an approximate index does it, which `add` and `refresh` then make. How the
table stays whole is told in `index_table`. Embedding is the caller's: `refresh` and `add` take its results by file.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from esr_utils import nearest, runs
from esr_utils.audio_folder import absolute_key, absolute_path, possible_keys
from esr_utils.config import Level
from esr_utils.index_rows import Embedded, File, IndexUnusable, IndexWriteError, unfit
from esr_utils.index_snapshot import QueryError, Scored, Snapshot, is_text
from esr_utils.index_writing import IndexWriter
from esr_utils.query_vectors import Query, of_file, of_query, unit

# What embeds audio is imported where that is done: a process that only searches takes 0.2 GB less.
if TYPE_CHECKING:
    import lancedb
    from lancedb.expr import Expr

    from esr_utils.embedding import Embeddings
    from esr_utils.moments import Channels
    from esr_utils.retriever import Retriever

EXACT_LIMIT = 1_000_000  # moments; past that there is an approximate index, and searches use it
_UNKNOWN, _PARTS = 0.1, 8  # share of the rows that it need not know: these are scanned; and its parts, at most


class Index(IndexWriter):
    """An open index that can be searched. `create` and `open` make one.

    Attributes:
        model: what encodes sentences and example files; None for queries that are vectors.
    """

    model: Retriever | None = None
    _snapshot: Snapshot | None = None

    def __init__(self, uri: str, table: lancedb.table.Table) -> None:
        super().__init__(uri, table)
        self._searching = Lock()  # what one thread goes to the newest version for, another would read on in

    @classmethod
    def create(
        cls,
        uri: str | Path,
        model: Retriever,
        level: Level = "normalised",
        replace: bool = False,
        run: str = "",
        channels: Channels | None = None,
        adapt: str | None = None,
    ) -> Self:
        """A new index for what this retriever makes, or the one that is there; as `IndexTable.create_named`.

        Raises:
            adaptation.AdaptationError: it is to adapt (see `index_adaptation`), and the retriever cannot.
        """
        pooled = 0
        if adapt not in (None, "off"):
            from esr_utils import adaptation

            pooled = adaptation.of_training(model).mean.size
        about = (level, replace, run, channels, adapt, pooled)
        found = cls.create_named(uri, model_id(model), model.config.dim, *about)
        found.model = model
        return found

    @classmethod
    def open(cls, uri: str | Path, model: Retriever | None = None) -> Self:
        """The index that is there, for this retriever; without one it takes vectors alone as queries.

        Raises:
            IndexUnusable: there is none, or it was made by another retriever or format; both are named.
        """
        found = cls.open_named(uri, **({"model": model_id(model), "dim": model.config.dim} if model else {}))
        found.model = model
        return found

    def sweep(self) -> int:
        """As `IndexWriter`; past EXACT_LIMIT it also makes the approximate index, again where much is new to it."""
        n = super().sweep()
        if n > EXACT_LIMIT:
            known = [self.table.index_stats(one.name) for one in self.table.list_indices() if "vector" in one.columns]
            # LanceDB adds a part for what is new whenever `tidy` joins files, and a search reads in each of them.
            if (
                not known
                or known[0].num_unindexed_rows > _UNKNOWN * self.table.count_rows()
                or known[0].num_indices > _PARTS
            ):
                try:
                    self.build_approximate()
                except IndexWriteError as error:
                    warnings.warn(f"all was written, but searches are slower than they could be: {error}", stacklevel=2)
        return n

    def build_approximate(self) -> None:
        """Makes the approximate index that a search past EXACT_LIMIT uses, of all moments there are now.

        Moments that are added later are found all the same, by a scan. It is IVF with four bits a dimension (RaBitQ).
        One bit finds less, above all by sentences, which lie far from speech, though more vectors are read; a byte is
        slower; LanceDB's product quantisation and its graph (HNSW) find less of a million clustered vectors, and take
        longer to build.

        Raises:
            QueryError: there are under 256 moments.
        """
        from lancedb.index import IvfRq

        if (n := self._current().n_moments) < 256:
            raise QueryError(f"{n} moments need no approximate index; 256 are the least that one can be trained on")
        config = IvfRq("dot", num_partitions=round(n**0.5), num_bits=4, sample_rate=64, max_iterations=20)
        self.commit(lambda: self.table.create_index("vector", config=config, replace=True))

    def recall(self, k: int = 10, queries: NDArray[np.float32] | None = None) -> float:
        """Share of the exact k best that the approximate index finds, averaged over queries.

        Args:
            queries: (n, d); by default 100 of the index's own vectors, drawn with seed 0.

        Raises:
            QueryError: there is no approximate index.
        """
        snapshot = self._current()
        if not snapshot.has_approximate:
            raise QueryError(f"{self.uri} has no approximate index: build_approximate makes one")
        shares = []
        for query in snapshot.sample()[:100] if queries is None else queries:
            exact = set(snapshot.exact(query, None).best(k)[0][:k].tolist())
            shares.append(len(exact & set(snapshot.approximate(query, None).best(k)[0].tolist())) / len(exact))
        return float(np.mean(shares))

    def stats(self) -> dict[str, Any]:
        """How much is in it, of what it was made, and its columns."""
        files, snapshot = self.files(), self._current()
        seconds = sum(
            pc.sum(pc.subtract(batch["end_s"], batch["start_s"])).as_py() or 0.0
            for batch in self.batches(["start_s", "end_s"], snapshot.alive())
        )
        return {
            **self.about,
            "uri": self.uri,
            "files": len(files),
            "files_with_problems": int((files["problem"] != "").sum()),
            "moments": snapshot.n_moments,
            "hours": seconds / 3600,
            "approximate": snapshot.has_approximate,
            "columns": {name: str(kind) for name, kind in snapshot.columns.items()},
            "bytes": self.table.stats()["total_bytes"],
        }

    # Searching ----------------------------------------------------------------------------------------------

    def search(
        self,
        query: Query,
        k: int = 10,
        min_score: float = -1.0,
        *,
        minus: Query | None = None,
        minus_weight: float = 0.5,
        where: Mapping[str, Any] | None = None,
        one_per: str | None = None,
        offset: int = 0,
        approximate: bool | None = None,
    ) -> pd.DataFrame:
        """The k moments that fit best.

        Args:
            query: a sentence; several, of which the mean of their unit vectors is taken; or a vector (d,).
            min_score: cosine, -1 to 1; moments below it are left out.
            minus: what it should not sound like: the query is unit(query) - minus_weight * unit(minus), normalised.
            where: conditions by column: a value; (low, high), both included, None for no bound; a list of these, of
                which one is to hold.
            one_per: a column, e.g. file or speaker, of whose values each is found once, by its best moment. Moments
                without a value all count.
            offset: hits to skip: the second page of ten is k=10, offset=10. Ties keep the order of the table.
            approximate: whether not all moments are scored; None decides by EXACT_LIMIT.

        Returns:
            Best first: `rank` from 1, `score` (cosine), `percentile` (the share of the whole index, 0 to 1, that scores
            below; to about 0.001 with conditions, to about 0.01 if not all moments were scored), then the moment's
            columns.

        Raises:
            QueryError: the query is empty, longer than MAX_QUERY or no unit vector can be made of it; k or offset is
                too small; a column does not exist, or its values are of another type.
        """
        vector = self._vector(query, minus, minus_weight)
        options = {"where": where, "one_per": one_per, "offset": offset, "approximate": approximate}
        with self._searching:
            return self._nearest(vector, k, min_score, **options)

    def search_like(self, example: str | Path, k: int = 10, min_score: float = -1.0, **options: Any) -> pd.DataFrame:
        """The k moments that sound most like an example: the id of a moment of this index, or an audio file.

        The example itself is not among the hits when it is of the index: that moment, or all of that file. Returns,
        raises and takes options as `search`; QueryError also for an example that cannot be found or read.
        """
        with self._searching:
            own, vector = self._example(example)
            return self._nearest(vector, k, min_score, without=own, **options)

    def _adapted(self) -> Retriever | None:
        """The model, by the statistics of this index where it adapts."""
        if self.about["adapt"] == "off" or self.model is None:
            return self.model
        from esr_utils import adaptation, index_adaptation

        own = index_adaptation.statistics(self, self.model)
        return adaptation.adapted(self.model, own) if own else self.model

    def scores(self, query: Query, *, minus: Query | None = None, minus_weight: float = 0.5) -> NDArray[np.float32]:
        """(n,) cosines of a query with all moments, in no order, for a histogram; with about 4096 past EXACT_LIMIT.

        Takes a query and raises as `search`; off by as much as `nearest.Vectors` says.
        """
        vector = self._vector(query, minus, minus_weight)
        with self._searching:
            return self._scored(self._current(), vector).scores()

    def scores_like(self, example: str | Path) -> NDArray[np.float32]:
        """As `scores`, with an example as `search_like` takes it; which, if it is of the index, is among them."""
        with self._searching:
            return self._scored(self._current(), self._example(example)[1]).scores()

    def _example(self, example: str | Path) -> tuple[list[int], NDArray[np.float32]]:
        """Row ids of an example in this index, if it is of it, and its unit vector (d,)."""
        own = self._own(str(example))
        whole = [row["vector"] for row in own if row["start_s"] is None or row["id"] == str(example)]
        vector = np.array(whole[0], np.float32) if whole else None
        if vector is None:
            vector = of_file(Path(example), self._adapted(), self.about["level"])
        return [row["_rowid"] for row in own], unit(vector)

    def _own(self, example: str) -> list[dict[str, Any]]:
        """The moment that has this id, or those of this file."""
        from lancedb.expr import col, lit

        names = [example] if is_text(example) else []
        condition = col("id").isin([lit(name) for name in names])
        condition |= col("file").isin([lit(name) for name in (*names, *possible_keys(example))])
        found = self.batches(["id", "start_s", "vector"], self._current().alive(condition))
        return [row for batch in found for row in batch.to_pylist()]

    def _vector(self, query: Query, minus: Query | None, minus_weight: float) -> NDArray[np.float32]:
        """The unit vector (d,) of a query minus another."""
        vector = of_query(query, self.model, self.about["dim"])
        if minus is None:
            return vector
        if not math.isfinite(minus_weight):
            raise QueryError(f"minus_weight is {minus_weight}; it must be a finite number")
        taken = minus_weight * of_query(minus, self.model, self.about["dim"])
        return unit(vector - taken, "the query and what is taken from it are the same")

    def _nearest(
        self,
        vector: NDArray[np.float32],
        k: int,
        min_score: float,
        *,
        where: Mapping[str, Any] | None = None,
        one_per: str | None = None,
        offset: int = 0,
        approximate: bool | None = None,
        without: Sequence[int] = (),
    ) -> pd.DataFrame:
        """Hits as `search` returns them; `without` are row ids of some that are left out."""
        for name, value, least in (("k", k, 1), ("offset", offset, 0)):
            if not isinstance(value, int | np.integer) or value < least:
                raise QueryError(f"{name} is {value}; it must be a whole number of at least {least}")
        if math.isnan(min_score):
            raise QueryError("min_score is no number; it is a cosine, -1 to 1")
        snapshot = self._current()
        condition = snapshot.condition(where or {})
        found = self._scored(snapshot, vector, condition, approximate)
        wanted, n = offset + k, offset + k + len(without)
        while True:
            rows, scores = found.best(n)
            last = len(rows) < n or scores[-1] < min_score  # there is nothing after these
            kept = (scores >= min_score) & ~np.isin(rows, np.array(without, np.uint64))
            rows, scores = rows[kept], scores[kept]
            if one_per is not None:
                first = snapshot.first_of_each(rows, one_per)
                rows, scores = rows[first], scores[first]
            if len(rows) >= wanted or last:
                break
            n *= 8
        rows, scores = rows[offset:wanted], scores[offset:wanted]
        ranks, shares = np.arange(offset + 1, offset + 1 + len(rows)), nearest.share_below(found.scores(), scores)
        moments = found.take(rows)
        columns = dict(zip(moments.column_names, moments.columns, strict=True))
        hits = pa.table({"rank": ranks, "score": scores, "percentile": shares, **columns})
        return hits.to_pandas(use_threads=False)  # for so few rows waking them takes longer

    @staticmethod
    def _scored(
        snapshot: Snapshot,
        vector: NDArray[np.float32],
        condition: Expr | None = None,
        approximate: bool | None = None,
    ) -> Scored:
        if approximate is None:
            approximate = snapshot.n_moments > EXACT_LIMIT and snapshot.has_approximate
        return (snapshot.approximate if approximate else snapshot.exact)(vector, condition)

    def _current(self) -> Snapshot:
        """The table's newest version; what was kept of an older one is let go."""
        if self.reload() != (self._snapshot.version if self._snapshot else None):
            self._snapshot = None  # before its successor is there: the vectors are most of the memory
            self._snapshot = Snapshot(self)
        return self._snapshot


def build(
    model: Retriever,
    manifest: pd.DataFrame,
    uri: str | Path = "memory://",
    level: Level = "normalised",
    embeddings: Embeddings | None = None,
    cache: Path | None = runs.RUNS / "cache",
) -> tuple[Index, pd.DataFrame]:
    """An index of a manifest's clips (rows of `manifests.load_corpora`), in place of one that is there.

    Their ids are the utterances'. By default it is kept in memory alone, for as long as the index is.

    Args:
        embeddings: of these clips, where they are there already.
        cache: as `embed`.

    Returns:
        The index, and the clips that could not be embedded: utterance_id, reason.

    Raises:
        IndexUnusable: a column of the manifest has a name that none of an index can have.
    """
    from esr_utils.embedding import embed
    from esr_utils.manifests import to_cuts

    if problem := unfit(name for name in manifest.columns if name != "id"):
        raise IndexUnusable(problem)
    embeddings = embeddings or embed(model, to_cuts(manifest), level, cache)
    index = Index.create(uri, model, level=level, replace=True)
    index.add(of_clips(manifest, embeddings))
    return index, embeddings.skipped


def clip_keys(manifest: pd.DataFrame) -> list[str]:
    """The key of each clip's file, by the columns `root` and `path`."""
    return [absolute_key(Path(root) / path) for root, path in zip(manifest["root"], manifest["path"], strict=True)]


def of_clips(manifest: pd.DataFrame, embeddings: Embeddings) -> Iterator[Embedded]:
    """What was made of each file of a manifest, as `build` writes it: those of its clips that could be embedded."""
    clips = manifest.set_index("utterance_id", drop=False).loc[embeddings.utterance_ids].reset_index(drop=True)
    clips["id"] = clips["utterance_id"]
    for key, rows in clips.groupby(clip_keys(clips), sort=False).indices.items():
        yield Embedded(stated(key), clips.iloc[rows], embeddings.vectors[rows])


def model_id(model: Retriever) -> str:
    """A name for a retriever that another one with the same settings but other weights does not have."""
    from esr_utils import weights

    config, released = model.config, model.text.model is None
    model.text.load()  # the same name whether they are there or not
    digest = weights.fingerprint(model)[:16]
    if released:
        model.text.release()
    return f"{model.kind} {config.speech_backbone}+{config.text_backbone} {config.dim}-d {digest}"


def stated(key: str) -> File:
    """A file by size and time: a manifest's clips are not refreshed, so their content need not be read."""
    path = absolute_path(key)
    status = os.stat(path)
    return File(key, path, status.st_size, status.st_mtime_ns, "")
