"""The table of an index: what is written is there whole or not at all, whoever writes, and nothing else is let in."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from esr_utils import index_rows, index_table, index_writing, runs
from esr_utils.audio_folder import file_key, find_audio, path_of
from esr_utils.index_rows import (
    UNFINISHED,
    Changes,
    Embedded,
    File,
    IndexUnusable,
    IndexWriteError,
    entry,
    moment_id,
)
from esr_utils.index_snapshot import Snapshot
from esr_utils.index_writing import IndexWriter

DIM = 8


def unit(n: int, seed: int = 0, dim: int = DIM) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def made(key: str, n: int, seed: int = 0, problem: str = "", sha256: str = "", **columns) -> Embedded:
    start = np.arange(n, dtype=float)
    moments = pd.DataFrame({"start_s": start, "end_s": start + 1, "channel": 0, **columns})
    return Embedded(File(key, Path(key), 10, 20, sha256), moments, unit(n, seed), None, problem)


def of_files(files):
    """An embedder: two moments a file."""
    for file in files:
        yield Embedded(file, made(file.key, 2).moments, unit(2, int(file.sha256[:8], 16)))


@pytest.fixture
def table(tmp_path) -> IndexWriter:
    return IndexWriter.create_named(tmp_path / "index", "model one", DIM)


def moments(table: IndexWriter) -> dict[str, int]:
    """What a new reader finds: moments by file; and nothing dead may be left."""
    found = IndexWriter.open_named(table.uri)
    entries, dead, stale = found.entries()
    assert not dead and not stale
    rows = found.table.to_pandas().query("written == 0")
    assert rows["id"].is_unique
    assert rows.groupby("file").size().reindex(entries.index).fillna(0).tolist() == entries["file_moments"].tolist()
    return dict(zip(entries.index, entries["file_moments"], strict=True))


# Opening ----------------------------------------------------------------------------------------------------


def test_a_folder_without_an_index_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nothing"):
        with pytest.raises(IndexUnusable, match=f"{folder} holds no index: make one"):
            IndexWriter.open_named(tmp_path / folder)
    assert not (tmp_path / "nothing").exists()


def test_a_file_address_is_a_folder_and_nothing_is_made_where_an_index_is_looked_for(tmp_path):
    with pytest.raises(IndexUnusable, match="holds no index"):
        IndexWriter.open_named(f"file://{tmp_path}/in dex%20")
    assert not list(tmp_path.iterdir())
    IndexWriter.create_named(f"file://{tmp_path}/in dex%20", "model one", DIM).add([made("a.wav", 3)])
    assert moments(IndexWriter.open_named(tmp_path / "in dex%20")) == {"a.wav": 3}


@pytest.mark.parametrize("uri", ["s3:/bucket/index", "file:/index", Path("gs://bucket/index")])
def test_an_address_with_a_slash_too_few_makes_no_folder(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for use in (IndexWriter.open_named, lambda uri: IndexWriter.create_named(uri, "model one", DIM)):
        with pytest.raises(IndexUnusable, match="write two slashes"):
            use(uri)
    assert not list(tmp_path.iterdir())


def test_of_a_bucket_that_cannot_be_used_it_is_said_why_and_what_to_look_at(monkeypatch):
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
    quick = {"AWS_ENDPOINT": "http://127.0.0.1:9", "OBJECT_STORE_CLIENT_MAX_RETRIES": "0"}  # nobody listens there
    for name, value in (keys | quick).items():
        monkeypatch.setenv(name, value)
    said = "S3: Connection refused; look at the address, whether the bucket is there, and at the keys to it"
    with pytest.raises(IndexUnusable, match=f"^s3://bucket/index cannot be read as an index: {said}"):
        IndexWriter.open_named("s3://bucket/index")
    with pytest.raises(IndexWriteError, match=f"^s3://bucket/index: an index cannot be written here: {said}"):
        IndexWriter.create_named("s3://bucket/index", "model one", DIM)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (r'Status { status: 404, body: Some("<Code>NoSuchBucket</Code><Message>No bucket.</Message>") }', "No bucket."),
        (r'Status { status: 403, body: Some("{\"error\": {\"message\": \"No access.\"}}") }', "No access."),
        (r'Status { status: 403, body: Some("denied") }', "denied"),
        (r'Status { status: 403, body: Some("") }', "status: 403"),
        (r'ConnectError("dns error", Custom { kind: Uncategorized, error: "no such name" })', "no such name"),
        ("Odd", "cannot be used"),
    ],
)
def test_what_is_told_of_a_long_error_is_the_answer(answer, told):
    error = f'Failed to connect: IO {{ source: Generic {{ store: "S3", source: RetryError({answer}) }}, line: 1506 }}'
    assert index_rows.first_line(ValueError(error)) in (f"S3: {told}", f"S3 {told}")


def test_an_index_that_is_there_is_not_overwritten_unless_asked(table):
    table.add([made("a.wav", 3)])
    for other, message in (
        ({"model": "model two"}, "model 'model one', not 'model two'"),
        ({"adapt": "all", "pooled": 4}, "adapt 'off', not 'all'"),
    ):
        with pytest.raises(IndexUnusable, match=f"was made with {message}"):
            IndexWriter.create_named(table.uri, **{"model": "model one", "dim": DIM} | other)
    assert moments(IndexWriter.create_named(table.uri, "model one", DIM)) == {"a.wav": 3}
    IndexWriter.create_named(table.uri, "model two", DIM, replace=True)
    assert moments(table) == {}
    with pytest.raises(IndexUnusable, match="replaced by an index of model 'model two' while one of 'model one'"):
        table.add([made("a.wav", 3)])


def test_an_index_removed_and_made_by_another_model_is_refused_also_at_the_same_version(tmp_path):
    open_one = IndexWriter.create_named(tmp_path / "index", "model one", 8)
    shutil.rmtree(tmp_path / "index")
    made = IndexWriter.create_named(tmp_path / "index", "model two", 8)
    assert made.table.version == open_one.table.version
    with pytest.raises(IndexUnusable, match="replaced by an index of model 'model two' while one of 'model one'"):
        open_one.reload()


def test_the_version_is_asked_for_where_there_may_be_another(table, monkeypatch):
    table.add([made("a.wav", 3)])
    other = IndexWriter.open_named(table.uri)
    asked, checkout = [], type(other.table).checkout_latest
    monkeypatch.setattr(type(other.table), "checkout_latest", lambda one: asked.append(one) or checkout(one))
    commits = Path(table.uri) / f"{index_table.TABLE}.lance" / "_versions"

    def reload(age_s: float | None = None) -> tuple[int, bool]:
        """The version, and whether it was asked for; the last commit was age_s ago."""
        if age_s is not None:
            os.utime(commits, (time.time() - age_s, time.time() - age_s))
        asked.clear()
        return other.reload(), bool(asked)

    version = other.table.version
    assert reload() == reload() == (version, True)  # one more commit could be at the same time
    assert reload(60) == (version, True) and reload() == (version, False)
    table.add([made("b.wav", 1)])
    assert reload() == (table.table.version, True) and table.table.version > version
    assert set(other.files().index) == {"a.wav", "b.wav"}


def test_an_index_of_another_model_or_dimension_is_refused_with_both_names(table):
    assert IndexWriter.open_named(table.uri, model="model one", dim=DIM).about == table.about
    with pytest.raises(IndexUnusable, match="made with model 'model one', not 'model two'"):
        IndexWriter.open_named(table.uri, model="model two", dim=DIM)
    with pytest.raises(IndexUnusable, match="made with dim 8, not 16"):
        IndexWriter.open_named(table.uri, model="model one", dim=16)


def test_an_index_of_another_format_is_refused_with_both(tmp_path, monkeypatch):
    monkeypatch.setattr(index_table, "FORMAT", 7)
    IndexWriter.create_named(tmp_path / "index", "model one", DIM)
    monkeypatch.undo()
    with pytest.raises(IndexUnusable, match="is an index of format 7; this program reads format 2"):
        IndexWriter.open_named(tmp_path / "index")


def test_a_table_of_somebody_else_is_refused(tmp_path):
    import lancedb

    lancedb.connect(tmp_path).create_table("moments", schema=pa.schema([("x", pa.int64())]))
    with pytest.raises(IndexUnusable, match="is no index of this program"):
        IndexWriter.open_named(tmp_path)


def test_a_damaged_table_is_refused(table):
    table.add([made("a.wav", 3)])
    for manifest in Path(table.uri).rglob("*.manifest"):
        manifest.write_bytes(b"no manifest at all")
    with pytest.raises(IndexUnusable, match="cannot be read as an index"):
        IndexWriter.open_named(table.uri)


@pytest.mark.parametrize("uri", ["{}/file/index", "nowhere://bucket/index", "db://index"])
def test_a_place_that_cannot_be_written_is_said(tmp_path, uri):
    (tmp_path / "file").write_text("in the way")
    uri = uri.format(tmp_path)
    with pytest.raises(IndexWriteError, match=f"^{re.escape(uri)}: an index cannot be written here"):
        IndexWriter.create_named(uri, "model one", DIM)


# Writing ----------------------------------------------------------------------------------------------------


def test_what_is_added_is_there_with_all_columns(table):
    given = made(
        'a\'b\n"c".wav', 3, speaker=["x", None, "y"], loud=[1.5, np.nan, 2], turn=[1, 2, 3], last=[True, False, True]
    )
    assert table.add([given, made("silent.wav", 0, problem="holds no speech")]) == 2
    rows = IndexWriter.open_named(table.uri).table.to_pandas().query("written == 0").sort_values("start_s")
    assert set(rows["file"]) == {'a\'b\n"c".wav'} and set(rows["model"]) == {"model one"}
    assert rows["speaker"].fillna("none").tolist() == ["x", "none", "y"]
    assert rows["loud"].fillna(-1).tolist() == [1.5, -1, 2] and rows["turn"].tolist() == [1, 2, 3]
    assert rows["last"].tolist() == [True, False, True]
    assert (np.stack(rows["vector"]) == given.vectors.astype(np.float16)).all() and rows["vector"].iloc[0].dtype == "f2"
    assert rows["id"].tolist() == [moment_id('a\'b\n"c".wav', 0, float(i), i + 1.0) for i in range(3)]
    files = table.files()
    assert files["problem"].to_dict() == {'a\'b\n"c".wav': "", "silent.wav": "holds no speech"}
    assert files.loc["silent.wav", ["size", "mtime_ns", "moments"]].tolist() == [10, 20, 0]


def test_pooled_features_are_kept_beside_the_vectors(tmp_path):
    table = IndexWriter.create_named(tmp_path / "index", "model one", DIM, pooled=24)
    one, features = made("a.wav", 3), unit(3, 1, 24) * 7
    table.add([Embedded(one.file, one.moments, one.vectors, features), made("b.wav", 0)])
    rows = table.table.to_pandas().query("written == 0")
    assert (np.stack(rows["pooled"]) == features.astype(np.float16)).all()
    with pytest.raises(IndexUnusable, match=r"c.wav: pooled is of shape \(\); this index takes \(3, 24\)"):
        table.add([made("c.wav", 3)])


def test_a_file_added_again_is_replaced(table):
    table.add([made("a.wav", 3), made("b.wav", 2)])
    table.add([made("a.wav", 5, seed=1), made("c.wav", 1), made("c.wav", 4)])
    assert moments(table) == {"a.wav": 5, "b.wav": 2, "c.wav": 4}
    table.add([made("a.wav", 0, problem="unreadable")])
    assert moments(table) == {"a.wav": 0, "b.wav": 2, "c.wav": 4}


def test_files_are_deleted_by_whatever_name_they_have(table):
    names = ["x' OR '1'='1", 'a"b', "c\nd", "e", "f; DROP TABLE moments", "%"]
    table.add([made(name, 2) for name in names])
    assert table.delete_files(["x' OR '1'='1", "nothing", "e", "e"]) == 2
    assert moments(table) == dict.fromkeys(['a"b', "c\nd", "f; DROP TABLE moments", "%"], 2)
    assert table.delete_files(['a"b', "c\nd", "%"]) == 3 and set(moments(table)) == {"f; DROP TABLE moments"}


def test_what_was_embedded_before_an_interruption_is_kept(table):
    def interrupted():
        yield made("a.wav", 3)
        yield made("b.wav", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        table.add(interrupted())
    assert moments(table) == {"a.wav": 3, "b.wav": 1}


def test_commits_are_made_on_the_way(table, monkeypatch):
    monkeypatch.setattr(index_writing, "_COMMIT_ROWS", 4)
    seen = []

    def watched():
        for i in range(4):
            yield made(f"{i}.wav", 2)
            seen.append(len(moments(table)))

    table.add(watched())
    assert seen == [0, 2, 2, 4]


def test_many_small_commits_are_joined(table, monkeypatch):
    monkeypatch.setattr(index_writing, "_COMMIT_ROWS", 1)
    monkeypatch.setattr(index_writing, "_SMALL_FRAGMENTS", 5)
    table.add(made(f"{i}.wav", 2) for i in range(8))
    assert len(moments(table)) == 8 and table.table.stats()["fragment_stats"]["num_fragments"] == 1


def on_disk(table: IndexWriter) -> int:
    return sum(path.stat().st_size for path in Path(table.uri).rglob("*") if path.is_file())


def rewritten(folder: Path) -> IndexWriter:
    """An index whose 100 moments were written 45 times, of 2 kB each."""
    table = IndexWriter.create_named(folder / "own", "model one", DIM, pooled=1000)
    for seed in range(45):
        table.add([replace(made("a.wav", 100, seed), pooled=np.full((100, 1000), seed / 8))])
    return table


def test_what_was_replaced_does_not_stay_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writing, "_READ_S", 0.0)
    table = rewritten(tmp_path)
    assert moments(table) == {"a.wav": 100}
    assert on_disk(table) < 34 * 205_000  # of the last 33 times, where there were 45


def test_what_was_replaced_within_the_hour_can_be_read_still(tmp_path, monkeypatch):
    monkeypatch.setattr(index_writing, "_OLD_VERSIONS", 0)
    monkeypatch.setattr(index_writing, "_SMALL_FRAGMENTS", 0)
    table = IndexWriter.create_named(tmp_path / "own", "model one", DIM)
    table.add([made("a.wav", 3)])
    reader = IndexWriter.open_named(table.uri)
    table.add([made("a.wav", 4)])
    assert len(reader.table.to_pandas().query("written == 0")) == 3 and moments(table) == {"a.wav": 4}


@pytest.mark.parametrize(
    ("ages_h", "removed"),
    [
        ([], []),
        ([0.1, 0.2, 1.9], []),
        ([0.1, 50], []),  # two hours ago that of 50 h was the newest
        ([0.1, 50, 51.5], []),
        ([0.1, 50, 51.5, 52.5, 90], [52.5, 90]),
        ([3, 4.5, 5.5], [5.5]),
        ([0.1, 1.1, 50, 53], [53]),  # an hour that was there twice
        ([0.1, 60, 50, 63], [63]),  # by a clock that is behind
    ],
)
def test_versions_are_removed_that_nobody_can_be_reading(ages_h, removed):
    keep_s, n = index_writing._unread([3600 * age for age in ages_h])
    assert [age for age in ages_h if 3600 * age > keep_s] == removed and n == len(removed)


def test_who_reads_after_hours_reads_what_is_there_now(table, folder, monkeypatch):
    """What they had seen was removed from disk meanwhile."""
    monkeypatch.setattr(index_writing, "_READ_S", 0.0)
    monkeypatch.setattr(index_writing, "_SMALL_FRAGMENTS", 0)
    table.refresh("audio", found(folder), of_files)
    (key, path), *_ = found(folder)
    table.append([Embedded(File.read(key, path), pd.DataFrame({"start_s": [0.0]}), unit(1), problem=UNFINISHED)])
    late = [IndexWriter.open_named(table.uri) for _ in range(4)]
    version = table.unfinished()[key][1]
    for seed in range(2):
        table.add(made(other, 3, seed) for other, _ in found(folder))
    assert late[0].unfinished() == {} and len(late[1].of_version(version, ["id"])) == 0
    assert Snapshot(late[2]).n_moments == 3 * len(found(folder))
    late[3].append([made("late", 1)])
    assert moments(table)["late"] == 1


def test_without_room_for_a_copy_nothing_is_joined(table, monkeypatch):
    monkeypatch.setattr(index_writing, "_SMALL_FRAGMENTS", 0)
    monkeypatch.setattr(index_writing.shutil, "disk_usage", lambda _: Mock(free=100))
    for i in range(3):
        table.add([made(f"{i}.wav", 2)])
    assert len(moments(table)) == 3 and table.table.stats()["fragment_stats"]["num_fragments"] == 3


def test_dead_rows_of_every_kind_are_never_seen_and_then_swept(table):
    """As two writers, or a kill between two commits, leave them."""
    table.add([made("a.wav", 3), made("b.wav", 2)])
    table.append([made("a.wav", 4)])  # the older three are dead
    table.touch([File("b.wav", Path(), 10, 99, "")])
    table.touch([File("b.wav", Path(), 10, 98, "")])  # written later, so this is what counts
    entries, dead, stale = table.entries()
    assert entries["file_moments"].to_dict() == {"a.wav": 4, "b.wav": 2} and len(dead) == 1 and len(stale) == 2
    assert entries.loc["b.wav", "file_mtime_ns"] == 98
    version = entries.loc["b.wav", "version"]
    table.table.delete(f"version = {version} AND start_s = 1")  # nothing here does such a thing
    assert set(table.files().index) == {"a.wav"}  # so that b.wav is embedded again
    table.add([])
    assert moments(table) == {"a.wav": 4}


@pytest.mark.parametrize(
    ("embedded", "message"),
    [
        (Embedded(made("a", 2).file, made("a", 2).moments, unit(3)), r"vector is of shape \(3, 8\); .* takes \(2, 8\)"),
        (Embedded(made("a", 2).file, made("a", 2).moments, unit(2, dim=9)), r"vector is of shape \(2, 9\)"),
        (Embedded(made("a", 2).file, made("a", 2).moments, unit(2) * np.nan), "not finite"),
        (Embedded(made("a", 2).file, made("a", 2).moments, unit(2) * 2), "not of unit length"),
        (Embedded(made("a", 2).file, made("a", 1).moments.iloc[[0, 0]], unit(2)), "the same moment .* is there twice"),
        (made("a", 2, speaker=[1.5, 2]), "column 'speaker' of this index is of type string"),
        (made("a", 2, score=[1, 2]), "columns 'score' cannot be in an index"),
        (made("a", 2, _rowid=[1, 2], _score="x"), "columns '_rowid', '_score' cannot be in an index"),
        (made("a", 2, **{"a b": "x"}), "columns 'a b' cannot be in an index"),
        (made("a", 2, **{"x = 1 OR y": "x"}), "cannot be in an index"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_of_it_written(table, embedded, message):
    with pytest.raises(IndexUnusable, match=message):
        table.add([embedded])
    assert moments(table) == {}


def test_a_folder_in_the_user_s_home(tmp_path, monkeypatch):
    """As a shell leaves it in --index=~/my.index."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made = IndexWriter.create_named("~/my.index", "model a", 8)
    assert made.uri == str(tmp_path / "home" / "my.index") == IndexWriter.open_named("~/my.index").uri
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


# Refreshing -------------------------------------------------------------------------------------------------


NAMES = ["audio/a", "audio/b'\n", "audio/c", "audio/d"]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "audio").mkdir()
    for name in ("a", "b'\n", "c", "d"):
        (tmp_path / "audio" / name).write_text(f"content of {name}")
    return tmp_path / "audio"


def found(folder: Path) -> list[tuple[str, Path]]:
    return [(f"audio/{path.name}", path) for path in sorted(folder.iterdir())]


def test_a_refresh_embeds_what_is_new_or_changed_and_drops_what_is_gone(table, folder):
    asked = []

    def embedder(files):
        for file in files:
            asked.append(file.key)
            yield from of_files([file])

    assert [key for key, _ in table.refresh("audio", found(folder), embedder).new] == NAMES == asked
    asked.clear()
    assert table.refresh("audio", found(folder), embedder) == Changes(unchanged=4) and not asked
    (folder / "a").write_text("content of A")
    (folder / "c").unlink()
    (folder / "e").write_text("new")
    os.utime(folder / "d", ns=(1, 1))
    changes = table.refresh("audio", found(folder), embedder)
    assert asked == ["audio/a", "audio/e"] and changes.gone == ["audio/c"] and changes.unchanged == 1
    assert [file.key for file in changes.touched] == ["audio/d"] and [file.key for file in changes.changed] == [
        "audio/a"
    ]
    assert moments(table) == dict.fromkeys(["audio/a", "audio/b'\n", "audio/d", "audio/e"], 2)
    assert table.refresh("audio", found(folder), embedder) == Changes(unchanged=4)
    vectors = table.table.to_pandas().query("written == 0 and file == 'audio/a'")["vector"]
    digest = File.read("audio/a", folder / "a").sha256
    assert (np.stack(vectors) == unit(2, int(digest[:8], 16)).astype(np.float16)).all()


def test_a_refresh_of_one_folder_or_file_leaves_those_of_others(table, folder):
    others = ["other/x", "audio 2/x", "audio.wav", "x/audio/y"]
    table.add(made(key, 1) for key in [*others, "audio/gone", "audio/below/gone"])
    changes = table.refresh("audio", found(folder), of_files)
    assert sorted(changes.gone) == ["audio/below/gone", "audio/gone"]
    assert moments(table) == dict.fromkeys(others, 1) | dict.fromkeys(NAMES, 2)
    assert table.refresh("audio/", found(folder), of_files) == Changes(unchanged=4)
    assert table.refresh("audio/a", found(folder)[:1], of_files) == Changes(unchanged=1)
    assert table.refresh("audio/a", [], of_files).gone == ["audio/a"] and "audio/c" in moments(table)
    several = table.changes(["other", "audio/a"], [("other/new", folder / "a"), *found(folder)[:1]])
    assert [key for key, _ in several.new] == ["other/new", "audio/a"] and several.gone == ["other/x"]
    with pytest.raises(ValueError, match="'other/x' is not below 'audio'"):
        table.refresh("audio", [("other/x", folder / "a")], of_files)


def test_all_of_a_disk_is_a_folder_too(table, folder):
    keys = [(str(path), path) for path in sorted(folder.iterdir())]
    assert len(table.refresh("/", keys, of_files).new) == 4 and table.refresh("/", keys, of_files).unchanged == 4


def test_two_folders_with_files_of_the_same_names_are_kept_apart_by_keys_from_the_root(table, folder):
    (folder / "c.wav").touch()
    (folder.parent / "audio two").mkdir()
    (folder.parent / "audio two" / "c.wav").touch()
    for place in (folder, folder.parent / "audio two", folder / "c.wav"):
        paths = [path for _, path in find_audio(place)[0]]
        changes = table.refresh(file_key(place, "/"), [(file_key(path, "/"), path) for path in paths], of_files)
        assert not changes.gone
    assert {path_of(key, "/") for key in moments(table)} == {folder / "c.wav", folder.parent / "audio two" / "c.wav"}


def test_a_file_that_could_not_be_used_is_not_tried_again_before_it_changes(table, folder):
    def embedder(files):
        return (Embedded(file, pd.DataFrame(), np.zeros((0, DIM)), problem="no speech") for file in files)

    table.refresh("audio", found(folder), embedder)
    assert set(table.files()["problem"]) == {"no speech"}
    assert table.refresh("audio", found(folder), embedder).unchanged == 4


def test_what_cannot_be_read_is_said_and_what_is_known_of_it_stays(table, folder):
    table.refresh("audio", found(folder), of_files)
    (folder / "a").unlink()
    (folder / "b'\n").unlink()
    (folder / "b'\n").symlink_to(folder / "b'\n")  # a loop
    listed = [("audio/a", folder / "a"), *found(folder), ("audio/new", folder / "new")]
    changes = table.refresh("audio", listed, of_files)
    reasons = dict(changes.unreadable)
    assert (
        "No such file" in reasons["audio/a"]
        and "symbolic links" in reasons["audio/b'\n"]
        and "No such file" in reasons["audio/new"]
    )
    assert moments(table) == dict.fromkeys(NAMES, 2)


# Several processes, kills, full disks -----------------------------------------------------------------------


def write_many(uri: str, name: str, start) -> None:
    index_writing._COMMIT_ROWS = 4
    start.wait()
    table = IndexWriter.create_named(uri, "model one", DIM)
    table.add(made(f"{name}-{i}", 3, colour=name) for i in range(12))
    table.add(made(f"shared-{i}", 3, seed=i, **{f"of_{name}": i}) for i in range(6))
    table.delete_files([f"{name}-0"])


def test_two_processes_that_make_one_index_and_write_at_once_lose_and_double_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["esr_utils.index_writing", "lance_namespace", "pyarrow.dataset"])
    expected = [f"{name}-{i}" for name in ("one", "two") for i in range(1, 12)] + [f"shared-{i}" for i in range(6)]
    for i in range(2):
        uri, start = str(tmp_path / f"{i}"), context.Barrier(2)
        writers = [context.Process(target=write_many, args=(uri, name, start)) for name in ("one", "two")]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(60)
            assert writer.exitcode == 0
        assert moments(IndexWriter.open_named(uri)) == dict.fromkeys(expected, 3)


FULL = """
import resource, signal, sys
from pathlib import Path
import numpy as np, pandas as pd
from esr_utils.index_rows import Embedded, File, IndexWriteError
from esr_utils.index_writing import IndexWriter
table = IndexWriter.open_named(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
moments = pd.DataFrame({"start_s": np.arange(20_000.0), "end_s": np.arange(20_000.0) + 1})
vectors = np.random.default_rng(0).standard_normal((20_000, 8))
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
try:
    table.add([Embedded(File("large", Path(), 1, 1, ""), moments, vectors)])
except IndexWriteError as error:
    print(error)
"""


def test_a_file_that_is_gone_does_not_come_back_as_it_was_before(table, folder):
    """Killed after a commit and before what it replaced was swept."""
    (key, path), *_ = found(folder)
    table.append([Embedded(File.read(key, path), pd.DataFrame({"start_s": [0.0]}), unit(1), problem=UNFINISHED)])
    table.append([Embedded(File.read(key, path), pd.DataFrame({"start_s": [0.0, 1.0]}), unit(2), problem=UNFINISHED)])
    path.unlink()
    assert table.refresh("audio", [], of_files).gone == [key]
    assert key not in table.files().index and moments(table) == {}


def test_a_file_touched_while_another_process_relabels_it_is_not_lost(table, folder):
    table.refresh("audio", found(folder), of_files)
    for _, path in found(folder):
        os.utime(path, (1, 1))
    changes = table.changes("audio", found(folder))
    before = moments(table)
    other = IndexWriter.open_named(table.uri)
    other.add([replace(one, moments=one.moments.assign(speaker="anna")) for one in of_files(changes.touched)])
    table.apply(changes, of_files)
    assert moments(table) == before
    assert set(table.table.to_pandas().query("written == 0")["speaker"]) == {"anna"}


def test_an_entry_that_names_what_is_no_longer_there_does_not_hide_the_one_before(table):
    table.add([made("a", 2)])
    known, _, _ = table.entries()
    file = File("a", Path("a"), 1, 1, "")
    about = known.loc["a"].to_dict() | {"version": 7}  # as a writer would that had looked before `a` was replaced
    row = pa.Table.from_pylist([entry(file, about, table.now())], schema=table.table.schema)
    table.commit(lambda: table.table.add(row))
    assert table.files()["moments"].to_dict() == {"a": 2}
    table.sweep()
    assert moments(table) == {"a": 2}


def test_a_write_that_fails_says_so_and_leaves_the_index_as_it_was(table):
    """A limit on the size of files stands for a disk that is full."""
    table.add([made("a.wav", 3)])
    environment = os.environ | {"PYTHONPATH": str(runs.PROJECT)}
    done = subprocess.run([sys.executable, "-c", FULL, table.uri], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "writing failed, and the index is as it was before" in done.stdout and "File too large" in done.stdout
    assert ".rs:" not in done.stdout and not done.stderr
    assert moments(table) == {"a.wav": 3}
    table.add([made("b.wav", 2)])
    assert moments(table) == {"a.wav": 3, "b.wav": 2}


def test_channels_are_those_of_the_index_unless_others_are_asked_for(table, tmp_path):
    assert table.about["channels"] == "mix"
    split = IndexWriter.create_named(tmp_path / "split", "model one", DIM, channels="split")
    for asked in (None, "split"):
        found = IndexWriter.create_named(split.uri, "model one", DIM, channels=asked)
        assert found.about["channels"] == "split"
    with pytest.raises(IndexUnusable, match="channels 'split', not 'mix'"):
        IndexWriter.create_named(split.uri, "model one", DIM, channels="mix")


def test_the_index_says_what_it_was_made_with(table):
    about = {
        "format": 2,
        "model": "model one",
        "dim": DIM,
        "pooled": 0,
        "level": "normalised",
        "channels": "mix",
        "adapt": "off",
        "run": "",
    }
    assert table.about == about
    assert json.loads(table.table.schema.metadata[b"esr"]) == table.about


def test_what_is_written_later_counts_also_by_a_clock_that_is_behind(table, monkeypatch):
    table.add([made("a.wav", 3)])
    monkeypatch.setattr(index_writing.time, "time_ns", lambda: 1000)
    IndexWriter.open_named(table.uri).add([made("a.wav", 5)])
    table.append([made("b.wav", 1)])
    table.append([made("b.wav", 2)])
    table.add([])
    assert moments(table) == {"a.wav": 5, "b.wav": 2}
