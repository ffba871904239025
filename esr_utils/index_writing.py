"""Writing to the table of a search index, and bringing it up to date with a folder."""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
import pyarrow as pa

from esr_utils.index_rows import (
    RESERVED,
    UNFINISHED,
    Changes,
    Embedded,
    File,
    IndexUnusable,
    IndexWriteError,
    column_type,
    entry,
    first_line,
    to_table,
    unfit,
)
from esr_utils.index_table import IndexTable

if TYPE_CHECKING:
    import lancedb

_TRIES = 12  # at a commit that met another one's
_COMMIT_ROWS, _COMMIT_S = 2048, 20.0  # what waits for a commit, at most, and so is lost by a kill
_WRITTEN_ROWS = 256  # at a time, in one commit: a long file's at once would be held twice
_SMALL_FRAGMENTS, _OLD_VERSIONS = 32, 32  # files of a table worth joining into one, and versions worth removing
# For so long a version that was the newest may still be read: an hour, and one more, since LanceDB tells when it was
# made by the local clock, which repeats an hour in autumn.
_READ_S = 7200.0

Result = TypeVar("Result")


class IndexWriter(IndexTable):
    """An open table that is written to; how it stays whole whatever happens is told in `index_table`."""

    def add(self, embedded: Iterable[Embedded]) -> int:
        """Writes files as they come, and returns how many. What is there already of a file is replaced.

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
                n, rows = n + (one.problem != UNFINISHED), rows + len(one.moments)
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
        files, seen, changes = self.files()[["size", "mtime_ns", "sha256", "problem"]], set(), Changes()
        known = zip(files.index, files.itertuples(index=False), strict=True)
        before = {key: file for key, file in known if _is_below(key, places)}
        for key, path in found:
            if not _is_below(key, places):
                raise ValueError(f"{key!r} is not below {', '.join(map(repr, places))}, which is refreshed")
            seen.add(key)
            try:
                status = os.stat(path)
                if key not in before or before[key].problem == UNFINISHED:
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
        now, columns = self.now(), self.table.schema
        rows = pa.concat_tables(to_table(one, columns, self.about, now + i) for i, one in enumerate(files))
        self._latest = now + len(files)
        pieces = rows.to_batches(_WRITTEN_ROWS)
        self.commit(lambda: self.table.add(pa.RecordBatchReader.from_batches(rows.schema, pieces)))

    def touch(self, files: Sequence[File]) -> None:
        """Notes a new size and time of files whose content is what it was; their moments stay."""
        if not files:
            return
        self.reload()  # another process may have replaced them since they were looked at
        known, _, _ = self.entries()
        same = [one for one in files if one.key in known.index and known.at[one.key, "file_sha256"] == one.sha256]
        rows = [entry(one, known.loc[one.key].to_dict(), self.now()) for one in same]
        if rows:
            self.commit(lambda: self.table.add(pa.Table.from_pylist(rows, schema=self.table.schema)))

    def delete_files(self, keys: Iterable[str]) -> int:
        """Deletes files with all that is there of them, and returns how many there were."""
        if not (keys := list(dict.fromkeys(keys))):
            return 0
        self.reload()
        entries, dead, _ = self.entries()
        there = [key for key in keys if key in entries.index]
        self._delete("version", dead)  # before what counts: without that, an older one would count again
        self._delete("version", [int(version) for version in entries.loc[there, "version"]])
        return len(there)

    def sweep(self) -> int:
        """Deletes what is dead, tidies up, and returns how many moments there are."""
        self.reload()
        entries, dead, stale = self.entries()
        self._delete("version", dead)
        self._delete("id", stale)
        self.tidy(self.table)
        return int(entries["file_moments"].sum())

    def tidy(self, table: lancedb.table.Table) -> None:
        """Joins many small files of a table of this index into few, and removes from disk what older versions held.

        Both when there are many, since joining may write all of the table anew. A version that another process may
        still read stays, and all of them where there is no room for a copy.
        """
        stats, versions = table.stats(), sorted(table.list_versions(), key=lambda one: -one["version"])
        keep_s, unread = _unread([time.time() - one["timestamp"].timestamp() for one in versions])
        if stats["fragment_stats"]["num_small_fragments"] <= _SMALL_FRAGMENTS and unread <= _OLD_VERSIONS:
            return
        if _free(self.uri) < stats["total_bytes"]:
            return
        # What was to be written is, and this is tried again. LanceDB also fails, having joined and removed, where of
        # all rows that are new to the approximate index none has a vector.
        with suppress(IndexWriteError):
            self.commit(lambda: table.optimize(cleanup_older_than=timedelta(seconds=keep_s)))

    def _delete(self, column: str, values: list) -> None:
        from lancedb.expr import col, lit

        for start in range(0, len(values), 1000):
            some = [lit(value) for value in values[start : start + 1000]]
            self.commit(lambda some=some: self.table.delete(col(column).isin(some)))

    def commit(self, call: Callable[[], Result]) -> Result:
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

    def now(self) -> int:
        """A time that is later than every writing seen here, also where the clocks of two machines differ."""
        if not self._latest:
            self.reload()  # what an older version held may be gone
            self.entries()
        return max(time.time_ns(), self._latest + 1)

    def _add_columns(self, frames: list[pd.DataFrame]) -> None:
        """Columns that the table does not have yet, of the type that their values have."""
        known = set(self.table.schema.names)
        for frame in frames:
            new = [name for name in frame.columns if name not in known - {*RESERVED} and name != "id"]
            if problem := unfit(map(str, new)):
                raise IndexUnusable(problem)
            for name in new:
                field = pa.field(name, column_type(frame[name]))
                try:
                    self.commit(lambda field=field: self.table.add_columns([field]))
                except IndexWriteError as error:
                    if "already exists" not in str(error):  # else another process was faster
                        raise
                    self.reload()
                known.add(name)


def _unread(ages_s: list[float]) -> tuple[float, int]:
    """From which age on versions are read no more, and how many these are.

    Reading starts at what is newest then. So the version that was the newest _READ_S ago is kept, however old it is,
    with all after it; and, since joining files comes before removing any, those of as long before as that may take.

    Args:
        ages_s: the newest version's first.
    """
    older = [i for i, age in enumerate(ages_s) if age > _READ_S]
    keep_s = max(ages_s[: older[0] + 1] if older else [0.0]) + _READ_S
    return keep_s, sum(age > keep_s for age in ages_s)


def _free(uri: str) -> int:
    """Bytes that are free on the disk of an index; of a bucket more than any that are asked for."""
    with suppress(OSError):
        return shutil.disk_usage(uri).free
    return sys.maxsize


def _is_below(key: str, places: Sequence[str]) -> bool:
    return any(key == place or key.startswith(f"{place.rstrip('/')}/") for place in places)
