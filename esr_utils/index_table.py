"""The table of a search index: what lies in the folder (or bucket), and how it stays whole. Nothing here scores.

One LanceDB table, `moments`, holds moments and one entry a file (`index_rows`). A file is written by one append of its
moments and its entry, both under a new `version`. An append happens whole or not at all, so rows and entry cannot
disagree, whenever the process is killed and whoever else writes. What counts is the entry written last of each file,
and the moments under its version; if these are not as many as it says, the file counts as not there. All else is dead:
it is never read, and the next writing deletes it. So nothing is locked, and no step has to follow another. A new time
of the same content is one more entry, of the same version.

Conditions are built from column names that were checked and from values as literals, never as text.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
from filelock import FileLock
from numpy.typing import NDArray

from esr_utils.index_rows import (
    ENTRY,
    RESERVED,
    Changes,
    Embedded,
    File,
    IndexUnusable,
    IndexWriteError,
    column_type,
    entry,
    first_line,
    schema,
    to_table,
)

if TYPE_CHECKING:
    import lancedb
    from lancedb.expr import Expr

FORMAT = 1  # raise it when what is written changes
TABLE = "moments"
# Of the file format: a later one decodes a column of one value, such as channel 0, whole for the sake of a single row.
_STORAGE = {"new_table_data_storage_version": "2.1"}
_KEY = b"esr"  # of the schema's metadata
_TRIES = 12  # at a commit that met another one's
_COMMIT_ROWS, _COMMIT_S = 2048, 20.0  # what waits for a commit, at most, and so is lost by a kill
_SMALL_FRAGMENTS = 32  # files of the table worth joining into one

Result = TypeVar("Result")


class IndexTable:
    """An open table. It stays at the version that was read last: see `reload`.

    Attributes:
        uri: a folder, or any address that LanceDB takes (s3://, gs://, az://, memory://).
        about: format, model, dim, pooled (0: none are kept), level; run, where the model was when the index was made.
    """

    def __init__(self, uri: str, table: lancedb.table.Table) -> None:
        self.uri, self.table = uri, table
        self.about = _about(uri, table)
        self._latest = 0  # when the last entry was written of those that were seen

    # Opening ------------------------------------------------------------------------------------------------

    @classmethod
    def create_named(
        cls,
        uri: str | Path,
        model: str,
        dim: int,
        pooled: int = 0,
        level: str = "normalised",
        replace: bool = False,
        run: str = "",
    ) -> Self:
        """A new, empty table, or the one that is there, if it was made with the same. Several processes may ask for it.

        Args:
            model: what makes the vectors; an index is opened for this model only.
            dim: d of the vectors.
            pooled: p of the features kept beside them; 0 keeps none.
            level: how clips are levelled before they are embedded.
            replace: whether an index that is there already is given up.
            run: the folder of the run that holds the model, for who opens the index; not compared with what is there.

        Raises:
            IndexUnusable: the one that is there was made with something else; both are named.
            IndexWriteError: it cannot be written.
        """
        about = {"format": FORMAT, "model": model, "dim": dim, "pooled": pooled, "level": level}
        metadata = {_KEY: json.dumps(about | {"run": run})}
        mode = "overwrite" if replace else "create"
        try:
            with _alone(uri):
                table = _connect(uri).create_table(TABLE, schema=schema(about, metadata), mode=mode)
        except ValueError as error:
            if "already exists" not in str(error):
                raise
            return cls.open_named(uri, **about)
        except (OSError, RuntimeError) as error:
            raise IndexWriteError(f"{uri}: an index cannot be written here: {first_line(error)}") from None
        return cls(str(uri), table)

    @classmethod
    def open_named(cls, uri: str | Path, **wanted: Any) -> Self:
        """The table that is there.

        Args:
            wanted: what the index must have been made with, of what `about` holds.

        Raises:
            IndexUnusable: there is none, or it is of another model, dimension or format; both are named.
        """
        missing = f"{uri} holds no index: make one first (Index.create)"
        if "://" not in str(uri) and not Path(uri).is_dir():  # connecting would make the folder
            raise IndexUnusable(missing)
        try:
            table = _connect(uri).open_table(TABLE)
        except ValueError as error:
            if "not found" not in str(error):
                raise IndexUnusable(f"{uri} cannot be read as an index: {first_line(error)}") from None
            raise IndexUnusable(missing) from None
        except (OSError, RuntimeError) as error:
            raise IndexUnusable(f"{uri} cannot be read as an index: {first_line(error)}") from None
        found = cls(str(uri), table)
        for name, value in wanted.items():
            if found.about[name] != value:
                raise IndexUnusable(
                    f"{uri} was made with {name} {found.about[name]!r}, not {value!r}: open it with the run that made "
                    "it, or make a new index elsewhere"
                )
        return found

    def reload(self) -> int:
        """Goes to the newest version, which other processes may have written, and returns its number."""
        self.table.checkout_latest()
        if (found := _about(self.uri, self.table)) != self.about:
            raise IndexUnusable(
                f"{self.uri} was replaced by an index of model {found['model']!r} while one of {self.about['model']!r} "
                "was open: open it again"
            )
        return self.table.version

    # Reading ------------------------------------------------------------------------------------------------

    def columns(self) -> dict[str, pa.DataType]:
        """Columns of a moment that can be filtered and shown, with their types."""
        hidden = {"model", "vector", "pooled", "version", *ENTRY}  # model is the same in all: `about` has it
        return {field.name: field.type for field in self.table.schema if field.name not in hidden}

    def entries(self) -> tuple[pd.DataFrame, list[int], list[str]]:
        """What counts, and what is dead.

        Returns:
            The files' entries, by `file`; versions that no entry names any more; ids of entries that others of their
            version have replaced.
        """
        from lancedb.expr import col, lit

        columns = ["id", "file", "version", *ENTRY]
        entries = self.table.search().where(col("written") > lit(0)).select(columns).to_pandas()
        moments = self.table.search().where(col("written") == lit(0)).select(["version"]).to_arrow()["version"]
        counts = {one["values"]: one["counts"] for one in moments.value_counts().to_pylist()}
        entries = entries.sort_values(["written", "version"], kind="stable")
        self._latest = max([self._latest, *entries["written"].tail(1)])
        newest = entries.drop_duplicates("file", keep="last")
        whole = newest["version"].map(counts).fillna(0) == newest["file_moments"]
        newest = newest[whole]
        dead = (set(counts) | set(entries["version"])) - set(newest["version"])
        stale = entries[~entries["id"].isin(newest["id"]) & ~entries["version"].isin(dead)]
        return newest.set_index("file"), sorted(dead), list(stale["id"])

    def files(self) -> pd.DataFrame:
        """What is known of each file, by its key: size, mtime_ns, sha256, moments, problem (empty: none)."""
        self.reload()
        entries, _, _ = self.entries()
        names = {f"file_{name}": name for name in ("size", "mtime_ns", "sha256", "moments", "problem")}
        return entries[list(names)].rename(columns=names)

    def batches(self, columns: Sequence[str], where: Expr) -> Iterator[pa.RecordBatch]:
        """Rows that meet a condition, with `_rowid`, piece by piece."""
        yield from self.table.search().where(where).select(list(columns)).with_row_id(True).to_batches(2048)

    def take(self, row_ids: Sequence[int], columns: Sequence[str]) -> pd.DataFrame:
        """Rows by their `_rowid`, in the order asked for; empty values as pandas has them for the column's type."""
        return self._rows(row_ids, columns).to_pandas()

    def vectors(self, row_ids: Sequence[int]) -> NDArray[np.float16]:
        """(n, d) vectors of rows by their `_rowid`, in the order asked for."""
        return matrix(self._rows(row_ids, ["vector"])["vector"], self.about["dim"])

    def _rows(self, row_ids: Sequence[int], columns: Sequence[str]) -> pa.Table:
        rows = self.table.take_row_ids([int(i) for i in row_ids]).select(list(columns)).with_row_id().to_arrow()
        place = {row: i for i, row in enumerate(rows["_rowid"].to_pylist())}
        return rows.take(pa.array([place[int(i)] for i in row_ids], pa.int64())).drop_columns("_rowid")

    # Writing ------------------------------------------------------------------------------------------------

    def add(self, embedded: Iterable[Embedded]) -> int:
        """Writes files as they come, and returns how many. A file that is there already is replaced.

        They are committed together, some thousand moments or 20 s at a time, and when the iterator ends or fails: what
        was embedded until then is kept.

        Raises:
            IndexUnusable: a file does not fit the index (dimension, type of a column).
            IndexWriteError: the disk is full or the like; what was committed stays.
        """
        waiting: list[Embedded] = []
        n, rows, last = 0, 0, time.monotonic()

        def commit() -> None:
            nonlocal waiting, rows, last
            files, waiting, rows = waiting, [], 0  # what cannot be written is not tried again
            if files:
                self.append(files)
            last = time.monotonic()

        try:
            for one in embedded:
                waiting.append(one)
                n, rows = n + 1, rows + len(one.moments)
                if rows >= _COMMIT_ROWS or time.monotonic() - last > _COMMIT_S:
                    commit()
        finally:
            commit()
        self.sweep()
        return n

    def changes(self, within: str | Sequence[str], found: Iterable[tuple[str, str | Path]]) -> Changes:
        """Compares the files of a folder with the index: by size and time, and where these differ by content.

        Args:
            within: the key of the folder, or of one file, or several. What the index has of other places is left as it
                is.
            found: key and path of every file that is there now, each key below `within`, with "/" between its parts.
                `audio_folder.absolute_key` makes keys that also say where each file is.

        Raises:
            ValueError: a key is not below `within`.
        """
        places = [within] if isinstance(within, str) else list(within)
        files, seen, changes = self.files()[["size", "mtime_ns", "sha256"]], set(), Changes()
        known = zip(files.index, files.itertuples(index=False), strict=True)
        before = {key: file for key, file in known if _is_below(key, places)}
        for key, path in found:
            if not _is_below(key, places):
                raise ValueError(f"{key!r} is not below {', '.join(map(repr, places))}, which is refreshed")
            seen.add(key)
            try:
                status = os.stat(path)
                if key not in before:
                    changes.new.append((key, Path(path)))
                elif (status.st_size, status.st_mtime_ns) == before[key][:2]:
                    changes.unchanged += 1
                else:
                    file = File.read(key, path)
                    (changes.touched if file.sha256 == before[key].sha256 else changes.changed).append(file)
            except OSError as error:
                changes.unreadable.append((key, error.strerror or str(error)))
        changes.gone.extend(key for key in before if key not in seen)
        return changes

    def refresh(
        self,
        within: str | Sequence[str],
        found: Iterable[tuple[str, str | Path]],
        embedder: Callable[[Iterator[File]], Iterable[Embedded]],
    ) -> Changes:
        """Embeds what is new or changed in a folder, and drops what is gone from it. Interrupted, run it again.

        Args:
            within, found: as `changes`.
            embedder: from files, which are read as it asks for them, to what was made of each, in any order; one that
                could not be used comes with a `problem` and no moments, and is not tried again before it changes.
        """
        changes = self.changes(within, found)
        self.apply(changes, embedder)
        return changes

    def apply(self, changes: Changes, embedder: Callable[[Iterator[File]], Iterable[Embedded]]) -> None:
        """Brings the index up to date by what `changes` has found; see `refresh`."""
        self.delete_files(changes.gone)
        self.touch(changes.touched)
        self.add(embedder(changes.to_embed()))

    def append(self, files: Sequence[Embedded]) -> None:
        """Writes files, each with its moments, in one commit. What was there of these files is dead then.

        Raises:
            IndexUnusable: they do not fit the index.
            IndexWriteError: they could not be written; none of them was.
        """
        self._add_columns([embedded.moments for embedded in files])
        now, columns = self._now(), self.table.schema
        parts = [to_table(one, columns, self.about, now + i) for i, one in enumerate(files)]
        self._latest = now + len(files)
        self._commit(lambda: self.table.add(pa.concat_tables(parts)))

    def touch(self, files: Sequence[File]) -> None:
        """Notes a new size and time of files whose content is what it was; their moments stay."""
        known, _, _ = self.entries() if files else (pd.DataFrame(), [], [])
        rows = [entry(one, known.loc[one.key].to_dict(), self._now()) for one in files if one.key in known.index]
        if rows:
            self._commit(lambda: self.table.add(pa.Table.from_pylist(rows, schema=self.table.schema)))

    def delete_files(self, keys: Iterable[str]) -> int:
        """Deletes files with all that is there of them, and returns how many there were."""
        if not (keys := list(dict.fromkeys(keys))):
            return 0
        self.reload()
        entries, _, _ = self.entries()
        there = [key for key in keys if key in entries.index]
        self._delete("version", [int(version) for version in entries.loc[there, "version"]])
        return len(there)

    def sweep(self) -> None:
        """Deletes what is dead, and joins many small files of the table into few."""
        self.reload()
        _, dead, stale = self.entries()
        self._delete("version", dead)
        self._delete("id", stale)
        if self.table.stats()["fragment_stats"]["num_small_fragments"] > _SMALL_FRAGMENTS:
            self._commit(self.table.optimize)

    def _delete(self, column: str, values: list) -> None:
        from lancedb.expr import col, lit

        for start in range(0, len(values), 1000):
            some = [lit(value) for value in values[start : start + 1000]]
            self._commit(lambda some=some: self.table.delete(col(column).isin(some)))

    def _commit(self, call: Callable[[], Result]) -> Result:
        """Runs a writing; one that met another process's is tried again on what that one left."""
        for attempt in range(_TRIES):
            try:
                return call()
            except (OSError, RuntimeError, ValueError) as error:
                if not re.search(r"\b(conflict|concurrent|retry)", str(error), re.IGNORECASE) or attempt == _TRIES - 1:
                    raise IndexWriteError(
                        f"{self.uri}: writing failed, and the index is as it was before; make room or give access, and "
                        f"run it again: {first_line(error)}"
                    ) from error
                time.sleep(random.uniform(0, 0.02 * 2 ** min(attempt, 6)))
                self.reload()
        raise AssertionError("unreachable")

    def _now(self) -> int:
        """A time that is later than every writing seen here, also where the clocks of two machines differ."""
        if not self._latest:
            self.entries()
        return max(time.time_ns(), self._latest + 1)

    def _add_columns(self, frames: list[pd.DataFrame]) -> None:
        """Columns that the table does not have yet, of the type that their values have."""
        known = set(self.table.schema.names)
        for frame in frames:
            for name in frame.columns:
                if name in known - {*RESERVED} or name == "id":
                    continue
                if name in RESERVED or not re.fullmatch(r"[^\W\d]\w*", str(name)):
                    raise IndexUnusable(
                        f"column {name!r} cannot be in an index: give it a name of letters, digits and _ that is not "
                        f"one of {', '.join(RESERVED)}"
                    )
                field = pa.field(name, column_type(frame[name]))
                try:
                    self._commit(lambda field=field: self.table.add_columns([field]))
                except IndexWriteError as error:
                    if "already exists" not in str(error):  # else another process was faster
                        raise
                    self.reload()
                known.add(name)


def matrix(vectors: pa.FixedSizeListArray | pa.ChunkedArray, dim: int) -> NDArray[np.float16]:
    """A column of vectors as (n, dim)."""
    if isinstance(vectors, pa.ChunkedArray):
        vectors = vectors.combine_chunks()
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def _is_below(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place.rstrip('/')}/") for place in places)


def _connect(uri: str | Path) -> lancedb.db.DBConnection:
    os.environ.setdefault("LANCEDB_LOG", "error")  # read once, by the import: its warnings are of how it works inside
    import lancedb  # when asked for: it takes as long to import as all else here

    return lancedb.connect(str(uri), storage_options=_STORAGE)


def _alone(uri: str | Path) -> AbstractContextManager:
    """Within it no other process makes this index: LanceDB would let two of them, and the later one begin anew."""
    if "://" in str(uri):
        return nullcontext()
    Path(uri).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(uri) / ".lock")


def _about(uri: str, table: lancedb.table.Table) -> dict[str, Any]:
    try:
        about = json.loads((table.schema.metadata or {})[_KEY])
    except (KeyError, ValueError):
        raise IndexUnusable(
            f"{uri} holds a table {TABLE!r} that is no index of this program: give another place"
        ) from None
    if about.get("format") != FORMAT:
        raise IndexUnusable(
            f"{uri} is an index of format {about.get('format')!r}; this program reads format {FORMAT!r}: make it anew"
        )
    return about
