"""The table of a search index: what lies in the folder (or bucket), and how it stays whole. Nothing here scores.

One LanceDB table, `moments`, holds moments and one entry a file (`index_rows`). A file is written by one append of its
moments and its entry, both under a new `version`. An append happens whole or not at all, so rows and entry cannot
disagree, whenever the process is killed and whoever else writes. What counts is the entry written last of each file,
and the moments under its version; if these are not as many as it says, the file counts as not there. All else is dead:
it is never read, the next writing deletes it, and a later one frees its room. So nothing is locked, and no step has to
follow another. A new time of the same content is one more entry, of the same version. Of a file that lasts hours what
there is so far is written now and then, with a problem that says so (`UNFINISHED`); each such writing replaces the one
before as a new file would.

Conditions are built from column names that were checked and from values as literals, never as text.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray

from esr_utils.audio_folder import at_home
from esr_utils.index_rows import ENTRY, UNFINISHED, IndexUnusable, IndexWriteError, first_line, schema

if TYPE_CHECKING:
    import lancedb
    from lancedb.expr import Expr

FORMAT = 2  # raise it when what is written changes
TABLE = "moments"
# Of the file format: a later one decodes a column of one value, such as channel 0, whole for the sake of a single row.
_STORAGE = {"new_table_data_storage_version": "2.1"}
_KEY = b"esr"  # of the schema's metadata
_NARROW = 2048  # rows read at a time, of which LanceDB holds several
_WIDE = 256  # the same with pooled features, which are 14 kB a row


class IndexTable:
    """An open table. It stays at the version that was read last: see `reload`.

    Attributes:
        uri: a folder, or any address that LanceDB takes (s3://, gs://, az://, memory://).
        about: format, model, dim, pooled (0: none are kept), level, channels, adapt; run, where the model was when the
            index was made, empty for the released one.
    """

    def __init__(self, uri: str, table: lancedb.table.Table) -> None:
        self.uri, self.table = uri, table
        self.about = _about(uri, table)
        self._latest = 0  # when the last entry was written of those that were seen
        self._about = _written(table)
        self._seen: tuple[object, int] = None, 0  # what `_last_commit` said at the last reload, and the version

    # Opening ------------------------------------------------------------------------------------------------

    @classmethod
    def create_named(
        cls,
        uri: str | Path,
        model: str,
        dim: int,
        level: str = "normalised",
        replace: bool = False,
        run: str = "",
        channels: str | None = None,
        adapt: str | None = None,
        pooled: int = 0,
    ) -> Self:
        """A new, empty table, or the one that is there, if it was made with the same. Several processes may ask for it.

        Args:
            model: what makes the vectors; an index is opened for this model only.
            dim: d of the vectors.
            level: how clips are levelled before they are embedded.
            replace: whether an index that is there already is given up.
            run: the folder of the run that holds the model, for who opens the index; not compared with what is there.
            channels: how recordings of several are heard, `mix` or `split`; None is as in the index that is there, and
                `mix` in a new one.
            adapt: by what the vectors adapt (see `index_adaptation`): `all`, a column, or `off`; None is as in the
                index that is there, and `off` in a new one.
            pooled: p of the features kept beside the vectors of a new index; 0 keeps none.

        Raises:
            IndexUnusable: the one that is there was made with something else; both are named.
            IndexWriteError: it cannot be written.
        """
        uri = located(uri)
        if not uri.isprintable():
            raise IndexUnusable(f"{uri!r} holds what cannot be printed: an index needs another name")
        about = {"format": FORMAT, "model": model, "dim": dim, "level": level}
        about |= {name: value for name, value in (("channels", channels), ("adapt", adapt)) if value}
        new = {"channels": "mix", "adapt": "off"} | about | {"run": run, "pooled": pooled}
        metadata = {_KEY: json.dumps(new)}
        mode = "overwrite" if replace else "create"
        try:
            with _alone(uri):
                table = connect(uri).create_table(TABLE, schema=schema(new, metadata), mode=mode)
        except (OSError, RuntimeError, ValueError) as error:
            if "already exists" in str(error):
                return cls.open_named(uri, **about)
            raise IndexWriteError(f"{uri}: an index cannot be written here: {_told(uri, error)}") from None
        return cls(uri, table)

    @classmethod
    def open_named(cls, uri: str | Path, **wanted: Any) -> Self:
        """The table that is there.

        Args:
            wanted: what the index must have been made with, of what `about` holds.

        Raises:
            IndexUnusable: there is none, or it is of another model, dimension or format; both are named.
        """
        uri = located(uri)
        missing = f"{uri} holds no index: make one first, by esr index FOLDER --index PATH or Index.create"
        if "://" not in uri and not Path(uri).is_dir():  # connecting would make the folder
            raise IndexUnusable(missing)
        try:
            table = connect(uri).open_table(TABLE)
        except (OSError, RuntimeError, ValueError) as error:
            if isinstance(error, ValueError) and "was not found" in str(error):
                raise IndexUnusable(missing) from None
            raise IndexUnusable(f"{uri} cannot be read as an index: {_told(uri, error)}") from None
        found = cls(uri, table)
        for name, value in wanted.items():
            if found.about[name] != value:
                raise IndexUnusable(
                    f"{uri} was made with {name} {found.about[name]!r}, not {value!r}: use it with what it was made "
                    "with, or make a new index elsewhere"
                )
        return found

    def reload(self) -> int:
        """Goes to the newest version, which other processes may have written, and returns its number."""
        last = _last_commit(self.uri)
        if last is not None and last == self._seen[0]:  # to ask LanceDB takes a tenth of an approximate search
            return self._seen[1]
        self.table.checkout_latest()
        if _written(self.table) != self._about:
            found = _about(self.uri, self.table)
            raise IndexUnusable(
                f"{self.uri} was replaced by an index of model {found['model']!r} while one of {self.about['model']!r} "
                "was open: open it again"
            )
        self._seen = last, self.table.version
        return self._seen[1]

    # Reading ------------------------------------------------------------------------------------------------

    def columns(self) -> dict[str, pa.DataType]:
        """Columns of a moment that can be filtered and shown, with their types."""
        hidden = {"model", "vector", "pooled", "adapted", "version", *ENTRY}  # model is the same in all: `about` has it
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
        # One that names a version which another process has deleted since does not count, but the one before it.
        whole = entries["version"].map(counts).fillna(0) == entries["file_moments"]
        newest = entries[whole].drop_duplicates("file", keep="last")
        dead = (set(counts) | set(entries["version"])) - set(newest["version"])
        stale = entries[~entries["id"].isin(newest["id"]) & ~entries["version"].isin(dead)]
        return newest.set_index("file"), sorted(dead), list(stale["id"])

    def files(self) -> pd.DataFrame:
        """What is known of each file, by its key: size, mtime_ns, sha256, moments, problem (empty: none)."""
        self.reload()
        entries, _, _ = self.entries()
        names = {f"file_{name}": name for name in ("size", "mtime_ns", "sha256", "moments", "problem")}
        return entries[list(names)].rename(columns=names)

    def unfinished(self) -> dict[str, tuple[str, int]]:
        """Content (sha256) and version of the files that are not there to their end, by their keys."""
        self.reload()
        entries, _, _ = self.entries()
        found = entries[entries["file_problem"] == UNFINISHED]
        return dict(zip(found.index, zip(found["file_sha256"], found["version"], strict=True), strict=True))

    def of_version(self, version: int, columns: Sequence[str]) -> pa.Table:
        """Columns of the moments of one version; of none where it was replaced meanwhile."""
        from lancedb.expr import col, lit

        self.reload()
        condition = (col("written") == lit(0)) & (col("version") == lit(int(version)))
        return self.table.search().where(condition).select(list(columns)).to_arrow()

    def batches(self, columns: Sequence[str], where: Expr) -> Iterator[pa.RecordBatch]:
        """Rows that meet a condition, with `_rowid`, piece by piece."""
        size = _WIDE if "pooled" in columns else _NARROW
        yield from self.table.search().where(where).select(list(columns)).with_row_id(True).to_batches(size)

    def rows(self, row_ids: NDArray[np.uint64], columns: Sequence[str]) -> pa.Table:
        """Rows by their `_rowid`, with it, in the order asked for."""
        found = self.table.take_row_ids(row_ids.tolist()).select(list(columns)).with_row_id().to_arrow()
        return found.take(pc.index_in(pa.array(row_ids, pa.uint64()), found["_rowid"]))

    def nearest(
        self, vector: NDArray[np.float32], n: int, probes: int, columns: Sequence[str], where: Expr | None = None
    ) -> pa.Table:
        """The n rows that the approximate index finds, with `_rowid`, where they meet a condition.

        LanceDB's asynchronous table is asked, since the other one takes 2 ms to ask it. All columns are read at once:
        to have it score what it finds by the vectors first (`refine_factor`) is to wait for two readings.
        """
        from lancedb.background_loop import LOOP

        async def found() -> pa.Table:
            query = self.table._table.query().nearest_to(vector).column("vector").distance_type("dot")
            query = query.limit(n).nprobes(probes).select([*columns, "_distance"]).with_row_id()
            return await (query if where is None else query.where(where)).to_arrow()

        return LOOP.run(found())


def matrix(vectors: pa.FixedSizeListArray | pa.ChunkedArray, dim: int) -> NDArray[np.float16]:
    """A column of vectors as (n, dim)."""
    if isinstance(vectors, pa.ChunkedArray):  # one chunk is not copied
        vectors = vectors.chunk(0) if vectors.num_chunks == 1 else vectors.combine_chunks()
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def located(uri: str | Path) -> str:
    """Where an index is: an address as it is, or a folder, as file:// is too, so that looking for one makes nothing.

    Raises:
        IndexUnusable: it is an address with a slash too few, which would be taken for a folder.
    """
    uri = str(uri).removeprefix("file://")
    if re.match(r"\w{2,}:/(?!/)", uri):
        raise IndexUnusable(f"{uri} is no address: write two slashes, as in s3://bucket/name")
    return uri if "://" in uri else str(at_home(uri))


def connect(uri: str) -> lancedb.db.DBConnection:
    """The database at a folder or address, in the file format that an index is written in."""
    os.environ.setdefault("LANCEDB_LOG", "error")  # read once, by the import: its warnings are of how it works inside
    import lancedb  # when asked for: it takes as long to import as all else here

    return lancedb.connect(uri, storage_options=_STORAGE)


def _last_commit(uri: str) -> tuple[int, int] | None:
    """What is another after each commit, of a table in a folder: the inode of its list of versions, and when that was
    changed. None where that cannot be known, as up to 3 s after a commit, when one more could be at the same time."""
    try:
        status = os.stat(Path(uri) / f"{TABLE}.lance" / "_versions")
    except OSError:  # there is no such folder where it is an address
        return None
    return (status.st_ino, status.st_mtime_ns) if status.st_mtime < time.time() - 3 else None


def _alone(uri: str) -> AbstractContextManager:
    """Within it no other process makes this index: LanceDB would let two of them, and the later one begin anew."""
    if "://" in uri:
        return nullcontext()
    Path(uri).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(uri) / ".lock")


def _written(table: lancedb.table.Table) -> bytes:
    """`about` as it is written; nothing in a table that is no index."""
    return (table.schema.metadata or {}).get(_KEY, b"")


def _told(uri: str, error: Exception) -> str:
    """What LanceDB says, and what to look at where it is an address."""
    look = "; look at the address, whether the bucket is there, and at the keys to it in the environment"
    return first_line(error) + (look if "://" in uri else "")


def _about(uri: str, table: lancedb.table.Table) -> dict[str, Any]:
    try:
        about = json.loads(_written(table))
    except ValueError:
        raise IndexUnusable(
            f"{uri} holds a table {TABLE!r} that is no index of this program: give another place"
        ) from None
    if about.get("format") != FORMAT:
        raise IndexUnusable(
            f"{uri} is an index of format {about.get('format')!r}; this program reads format {FORMAT!r}: make it anew"
        )
    return about
