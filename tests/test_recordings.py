"""Recordings into an index and out of it: embedded in batches as one by one; files that are bad, new or gone."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from test_decoding import convert

from esr_utils import clips, decoding, index_rows, listening, recordings
from esr_utils.audio_files import AudioError
from esr_utils.audio_folder import NoAudio, absolute_key, absolute_path
from esr_utils.batches import prepared
from esr_utils.index import Index
from esr_utils.index_rows import UNFINISHED, IndexWriteError
from esr_utils.moments import moments
from esr_utils.weights import WeightsError

RATE = 16_000


@pytest.fixture(scope="module")
def originals(tmp_path_factory, speech) -> Path:
    """Two recordings; `folder` is a copy that belongs to a test."""
    root = tmp_path_factory.mktemp("originals")
    (root / "deep").mkdir()
    soundfile.write(root / "one.flac", speech[: 12 * RATE], RATE)
    call = np.stack([speech[: 9 * RATE], speech[9 * RATE : 18 * RATE]], axis=1)
    soundfile.write(root / "deep" / "call.wav", call, RATE)
    return root


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    return Path(shutil.copytree(originals, tmp_path / "folder"))


@pytest.fixture
def index(tmp_path, tiny_model) -> Index:
    return Index.create(tmp_path / "index", tiny_model)


def rows(index: Index) -> pd.DataFrame:
    """All moments, by file and place, with their vectors."""
    index.reload()
    found = index.table.to_pandas().query("written == 0").sort_values(["file", "channel", "start_s"])
    return found[["file", "channel", "start_s", "end_s", "vector"]].astype({"channel": float}).reset_index(drop=True)


def one_by_one(index: Index, folder: Path, channels: str = "mix") -> pd.DataFrame:
    """The obvious way: each moment is embedded by itself."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".flac", ".wav")):
        for moment in moments(path, channels):
            waveform = prepared(torch.from_numpy(moment.waveform), index.about["level"])
            with torch.no_grad():
                batch = {"waveform": waveform[None], "n_samples": torch.tensor([len(waveform)])}
                vector = index.model.encode_speech(batch)[0].numpy()
            found.append((str(path), moment.channel, moment.start_s, moment.end_s, vector))
    table = pd.DataFrame(found, columns=["file", "channel", "start_s", "end_s", "vector"]).astype({"channel": float})
    return table.sort_values(["file", "channel", "start_s"]).reset_index(drop=True)


def check(found: pd.DataFrame, expected: pd.DataFrame) -> None:
    names = ["file", "channel", "start_s", "end_s"]
    pd.testing.assert_frame_equal(found[names], expected[names], check_dtype=False)
    vectors = [np.stack(table["vector"]).astype(np.float32) for table in (found, expected)]
    one, other = (vector / np.linalg.norm(vector, axis=1, keepdims=True) for vector in vectors)  # they are in fp16
    assert (one * other).sum(1).min() > 0.9999


# What is embedded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", ["mix", "split"])
@pytest.mark.parametrize("pool_s", [listening.POOL_S, 5.0])
def test_moments_are_embedded_as_one_by_one(folder, tiny_model, tmp_path, channels, pool_s, monkeypatch):
    monkeypatch.setattr(listening, "POOL_S", pool_s)
    monkeypatch.setattr(listening, "_ROWS", 2)
    index = Index.create(tmp_path / "index", tiny_model, channels=channels)
    report = recordings.refresh(index, recordings.find(folder))
    expected = one_by_one(index, folder, channels)
    check(rows(index), expected)
    assert (report.embedded, report.moments, report.problems, report.left_out) == (2, len(expected), {}, {})
    assert report.speech_s == pytest.approx((expected["end_s"] - expected["start_s"]).sum())
    assert (expected["channel"].dropna().nunique() == 2) == (channels == "split") and len(expected) > 5


def test_the_level_is_that_of_the_index(folder, tmp_path, tiny_model):
    index = Index.create(tmp_path / "recorded", tiny_model, level="recorded")
    recordings.refresh(index, recordings.find(folder))
    check(rows(index), one_by_one(index, folder))


def test_batches_are_of_like_lengths_and_bounded():
    rng = np.random.default_rng(0)
    waiting = [(None, i, torch.zeros(int(n))) for i, n in enumerate(rng.uniform(1, 10, 300) * RATE)]
    batches = list(listening.by_length(waiting))
    assert sorted(i for batch in batches for _, i, _ in batch) == list(range(300))
    lengths = [[len(waveform) for _, _, waveform in batch] for batch in batches]
    assert all(len(one) * max(one) <= listening.BATCH_S * RATE for one in lengths)
    assert sum(len(one) * max(one) for one in lengths) < 1.05 * sum(map(sum, lengths))
    assert list(listening.by_length([])) == []


def test_what_waits_is_bounded_and_files_are_given_when_they_are_done(folder, index, monkeypatch):
    """The first of two files is committed before the second has been heard."""
    monkeypatch.setattr(listening, "POOL_S", 5.0)
    waited, committed, embed = [], [], listening.Embedder._embed

    def watched(self):
        waited.append(sum(len(waveform) for _, _, waveform in self.waiting) / RATE)
        embed(self)

    monkeypatch.setattr(listening.Embedder, "_embed", watched)
    monkeypatch.setattr("esr_utils.index_writing._COMMIT_ROWS", 1)
    seen = lambda done, total, seconds: committed.append((done, len(index.files())))  # noqa: E731
    recordings.refresh(index, recordings.find(folder), progress=seen)
    assert max(waited) <= 5.0 + 10.0 and len(waited) > 2
    assert (1, 1) in committed


def test_progress_is_told(folder, index):
    told = []
    recordings.refresh(index, recordings.find(folder), progress=lambda *values: told.append(values))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told) and told[-1][:2] == (2, 2)
    seconds = [heard for _, _, heard in told]
    assert seconds == sorted(seconds) and 18 < seconds[-1] <= 21


# Places -----------------------------------------------------------------------------------------------------


def test_a_second_time_nothing_is_done_and_changes_are_followed(folder, index, speech):
    recordings.refresh(index, recordings.find(folder))
    before = rows(index)
    report = recordings.refresh(index, recordings.find(folder))
    assert (report.embedded, report.unchanged, report.removed) == (0, 2, 0)
    check(rows(index), before)
    soundfile.write(folder / "one.flac", speech[20 * RATE : 30 * RATE], RATE)
    (folder / "deep" / "call.wav").rename(folder / "renamed.wav")
    report = recordings.refresh(index, recordings.find(folder))
    assert (report.embedded, report.unchanged, report.removed) == (2, 0, 1)
    check(rows(index), one_by_one(index, folder))


def test_several_places_and_files_are_one_refresh(folder, index, tmp_path, speech):
    (tmp_path / "other").mkdir()
    soundfile.write(tmp_path / "other" / "two.wav", speech[: 5 * RATE], RATE)
    soundfile.write(tmp_path / "three.wav", speech[: 4 * RATE], RATE)
    places = [folder / "deep", folder, str(tmp_path / "other"), tmp_path / "three.wav"]
    assert recordings.refresh(index, recordings.find(places)).embedded == 4
    (tmp_path / "other" / "two.wav").rename(tmp_path / "other" / "2.wav")
    report = recordings.refresh(index, recordings.find(tmp_path / "other"))
    assert (report.embedded, report.removed) == (1, 1)  # what is elsewhere stays
    assert set(index.files().index) == {
        str(path) for path in [*folder.rglob("*.*"), tmp_path / "other" / "2.wav", tmp_path / "three.wav"]
    }


def test_what_cannot_be_seen_just_now_is_not_taken_for_gone(folder, index):
    recordings.refresh(index, recordings.find(folder))
    before = rows(index)
    found = recordings.find(folder)
    hidden = str(folder / "deep")
    found.files.pop(f"{hidden}/call.wav")
    found.left_out[hidden] = "cannot be opened: Permission denied"
    report = recordings.refresh(index, found)
    assert report.removed == 0 and report.left_out == {hidden: "cannot be opened: Permission denied"}
    check(rows(index), before)


def test_places_without_audio_are_refused_and_nothing_is_lost(folder, index, tmp_path):
    recordings.refresh(index, recordings.find(folder))
    (tmp_path / "empty").mkdir()
    for places in (tmp_path / "empty", [folder, tmp_path / "nowhere"]):
        with pytest.raises(NoAudio):
            recordings.refresh(index, recordings.find(places))
    assert len(index.files()) == 2


def test_a_folder_that_was_emptied_or_removed_is_dropped_when_that_is_said(folder, index):
    recordings.refresh(index, recordings.find(folder))
    (folder / "deep" / "call.wav").unlink()
    report = recordings.refresh(index, recordings.find([folder / "deep"], gone=True))
    assert report.removed == 1 and list(index.files().index) == [str(folder / "one.flac")]
    shutil.rmtree(folder)
    assert recordings.refresh(index, recordings.find([folder], gone=True)).removed == 1
    assert index.files().empty and rows(index).empty


def test_links_to_nowhere_are_not_taken_for_gone(folder, index):
    """What stands in an emptied folder and cannot be seen just now stays in the index."""
    recordings.refresh(index, recordings.find(folder))
    for path in (folder / "one.flac", folder / "deep" / "call.wav"):
        path.unlink()
    (folder / "one.flac").symlink_to(folder.parent / "not mounted" / "one.flac")
    report = recordings.refresh(index, recordings.find(folder, gone=True))
    assert report.removed == 1 and list(index.files().index) == [str(folder / "one.flac")]


NAMES = [b'it\'s "so".wav', b"two\nlines.wav", b"caf\xe9.wav", "日本 é.wav".encode(), b"100%.wav", b"%41.wav"]


def test_names_of_any_bytes(tmp_path, index, speech):
    folder = tmp_path / "odd"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            soundfile.write(file, speech[i * RATE : (i + 6) * RATE], RATE, format="WAV")
    assert recordings.refresh(index, recordings.find(folder)).embedded == len(NAMES)
    assert recordings.refresh(index, recordings.find(folder)).unchanged == len(NAMES)
    table = clips.export(index.search("angry", k=100, one_per="file"), tmp_path / "clips")
    assert len(table) == len(NAMES) and (table["problem"] == "").all()
    assert {os.fsencode(absolute_path(key).name) for key in table["file"]} == set(NAMES)
    written = pd.read_csv(tmp_path / "clips" / "hits.csv", keep_default_na=False)
    assert written["file"].tolist() == table["file"].tolist()
    assert sorted(written["audio"]) == sorted(path.name for path in (tmp_path / "clips").glob("*.wav"))


def test_links_in_a_loop_have_an_end(folder, index):
    (folder / "deep" / "back").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "again.flac").symlink_to(folder / "one.flac")
    assert recordings.refresh(index, recordings.find(folder)).embedded == 2


# Files that cannot be used ----------------------------------------------------------------------------------


def test_bad_files_are_named_and_the_others_go_on(folder, index, speech):
    (folder / "empty.wav").touch()
    (folder / "text.mp3").write_text("no sound at all\n" * 100)
    soundfile.write(folder / "silent.wav", np.zeros(3 * RATE), RATE)
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (folder / "renamed.wav").write_bytes((folder / "one.flac").read_bytes())  # its content counts
    whole = (folder / "deep" / "call.wav").read_bytes()
    (folder / "short.wav").write_bytes(whole[: len(whole) // 2])
    os.mkfifo(folder / "pipe.wav")
    report = recordings.refresh(index, recordings.find(folder))
    reasons = {Path(key).name: reason for key, reason in (report.problems | report.left_out).items()}
    assert set(reasons) == {"empty.wav", "text.mp3", "silent.wav", "nan.wav", "short.wav", "pipe.wav"}
    for name, reason in {"empty": "empty", "silent": "no speech of 1 s", "nan": "NaN", "short": "cut short"}.items():
        assert reason in reasons[f"{name}.wav"]
    found = index.files()
    assert found["problem"].to_dict() == {key: report.problems.get(key, "") for key in found.index}
    moments_of = {Path(key).name: n for key, n in found["moments"].items()}
    assert moments_of["renamed.wav"] == moments_of["one.flac"] > 0
    assert moments_of["short.wav"] > 0 == moments_of["empty.wav"]  # what came before the cut is kept
    assert recordings.refresh(index, recordings.find(folder)).problems == {}  # they are not tried again


def test_a_protected_file_is_said_to_be(folder, index, monkeypatch):
    def protected(command):
        raise AudioError("is protected (DRM)")

    (folder / "bought.m4p").write_bytes(b"\0\0\0\x20ftypM4P " + bytes(200))
    monkeypatch.setattr(decoding, "find_ffmpeg", lambda: "ffmpeg")
    monkeypatch.setattr(decoding, "_check_track", protected)
    report = recordings.refresh(index, recordings.find(folder))
    assert report.problems == {str(folder / "bought.m4p"): "is protected (DRM)"} and report.embedded == 2


def test_a_file_that_waits_for_ffmpeg_is_tried_again(folder, index, monkeypatch):
    video = convert(folder / "one.flac", folder / "one.m4a")

    def missing():
        raise decoding.NoFfmpegError("needs ffmpeg, which is not there")

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "find_ffmpeg", missing)
        report = recordings.refresh(index, recordings.find(folder))
        assert report.embedded == 2 and "needs ffmpeg" in report.left_out[str(video)] and not report.problems
        assert str(video) not in index.files().index
    report = recordings.refresh(index, recordings.find(folder))
    assert (report.embedded, report.unchanged, report.left_out) == (1, 2, {})


def test_a_file_whose_ffmpeg_was_killed_is_tried_again(folder, index, tmp_path, monkeypatch):
    video = convert(folder / "one.flac", folder / "one.m4a")
    killed = tmp_path / "ffmpeg"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "find_ffmpeg", lambda: str(killed))
        report = recordings.refresh(index, recordings.find(folder))
    assert report.embedded == 2 and "was ended (signal 9)" in report.left_out[str(video)] and not report.problems
    report = recordings.refresh(index, recordings.find(folder))
    assert (report.embedded, report.unchanged, report.left_out) == (1, 2, {})


def test_a_file_that_cannot_be_opened_keeps_what_there_is_of_it(folder, index, monkeypatch, speech):
    recordings.refresh(index, recordings.find(folder))
    before = rows(index)
    soundfile.write(folder / "one.flac", speech[20 * RATE : 30 * RATE], RATE)
    read = index_rows.File.read

    def denied(key, path):
        if path.name == "one.flac":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(key, path)

    monkeypatch.setattr(index_rows.File, "read", denied)
    report = recordings.refresh(index, recordings.find(folder))
    assert report.left_out == {str(folder / "one.flac"): "Permission denied"}
    check(rows(index), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interrupted_it_keeps_what_was_done_and_goes_on(folder, index, monkeypatch, error):
    monkeypatch.setattr(listening, "POOL_S", 1.0)
    of_the_second = []

    def stop(done, total, seconds):
        of_the_second.extend([seconds] * (done == 1))
        if len(of_the_second) == 3:  # the first is given when the second has its first moment
            raise error

    with pytest.raises(error):
        recordings.refresh(index, recordings.find(folder), progress=stop)
    expected = one_by_one(index, folder)
    check(rows(index), expected[expected["file"] == str(folder / "deep" / "call.wav")])
    report = recordings.refresh(index, recordings.find(folder))
    assert (report.embedded, report.unchanged) == (1, 1)
    check(rows(index), expected)


@pytest.mark.parametrize("channels", ["mix", "split"])
def test_of_a_long_file_that_was_interrupted_nothing_is_embedded_again(
    tmp_path, tiny_model, speech, monkeypatch, channels
):
    """Twice interrupted, and once again before it has come as far as it was; then it is as if nothing had happened."""
    (tmp_path / "long").mkdir()
    call = np.stack([speech, np.roll(speech, len(speech) // 2)], axis=1)
    soundfile.write(tmp_path / "long" / "long.wav", np.concatenate([call, call[::-1]]), RATE)
    whole = Index.create(tmp_path / "whole", tiny_model, channels=channels)
    index = Index.create(tmp_path / "index", tiny_model, channels=channels)
    recordings.refresh(whole, recordings.find(tmp_path / "long"))
    expected = rows(whole)
    monkeypatch.setattr(listening, "POOL_S", 5.0)
    monkeypatch.setattr(listening, "PART_S", 0.0)
    monkeypatch.setattr(listening, "_ROWS", 1)
    monkeypatch.setattr("esr_utils.index_writing._COMMIT_ROWS", 1)
    embedded, there = 0, [0]
    embed = listening.Embedder._embed

    def counted(self):
        nonlocal embedded
        embedded += len(self.waiting)
        embed(self)

    monkeypatch.setattr(listening.Embedder, "_embed", counted)
    for stop_s in (25, 20, 45):

        def stop(done, total, seconds, stop_s=stop_s):
            if seconds > stop_s:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            recordings.refresh(index, recordings.find(tmp_path / "long"), stop)
        there.append(len(index.search("angry", k=1000)))  # they can be found already
        assert there[-1] == embedded  # all that was embedded is there
        assert index.files()["problem"].tolist() == [UNFINISHED]
    assert 0 < there[1] == there[2] < there[3] < len(expected)
    report = recordings.refresh(index, recordings.find(tmp_path / "long"))
    assert embedded == len(expected) and (report.embedded, report.problems) == (1, {})
    check(rows(index), expected)
    assert index.files()["problem"].tolist() == [""]
    recordings.refresh(index, recordings.find(tmp_path / "long"))
    assert embedded == len(expected)


def test_a_long_file_that_changes_after_an_interruption_is_embedded_anew(tmp_path, index, speech, monkeypatch):
    (tmp_path / "long").mkdir()
    soundfile.write(tmp_path / "long" / "long.wav", speech, RATE)
    monkeypatch.setattr(listening, "POOL_S", 5.0)
    monkeypatch.setattr(listening, "PART_S", 0.0)

    def stop(done, total, seconds):
        if seconds > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recordings.refresh(index, recordings.find(tmp_path / "long"), stop)
    assert index.files()["problem"].tolist() == [UNFINISHED]
    soundfile.write(tmp_path / "long" / "long.wav", speech * np.float32(0.5), RATE, subtype="FLOAT")
    recordings.refresh(index, recordings.find(tmp_path / "long"))
    check(rows(index), one_by_one(index, tmp_path / "long"))


def test_a_full_disk_leaves_the_index_as_it_was(folder, index, monkeypatch, speech):
    recordings.refresh(index, recordings.find(folder))
    before = rows(index)
    soundfile.write(folder / "more.wav", speech[: 5 * RATE], RATE)

    def full(rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index.table, "add", full)
        with pytest.raises(IndexWriteError, match="No space left on device"):
            recordings.refresh(index, recordings.find(folder))
    check(rows(index), before)
    assert recordings.refresh(index, recordings.find(folder)).embedded == 1


# Retrievers -------------------------------------------------------------------------------------------------


def test_the_retriever_of_a_run(tmp_path, tiny_run, tiny_model, monkeypatch):
    model, level, run = recordings.load_retriever(tiny_run)
    assert level == "recorded" and run == str(tiny_run)
    torch.testing.assert_close(model.encode_text(["angry"]), tiny_model.encode_text(["angry"]))
    with pytest.raises(WeightsError, match="holds no retriever"):
        recordings.load_retriever(tmp_path / "none")
    monkeypatch.setattr("esr_utils.runs.RUNS", tiny_run.parent)
    monkeypatch.setattr(recordings, "DEFAULT_RUN", tiny_run.name)
    assert recordings.load_retriever()[1:] == ("recorded", str(tiny_run))


def test_a_retriever_is_loaded_only_when_there_is_something_to_embed(folder, tmp_path, tiny_run, speech):
    model, level, run = recordings.load_retriever(tiny_run)
    recordings.refresh(Index.create(tmp_path / "index", model, level=level, run=run), recordings.find(folder))
    index = Index.open(tmp_path / "index")
    assert recordings.refresh(index, recordings.find(folder)).unchanged > 0 and index.model is None
    soundfile.write(folder / "more.wav", speech[: 4 * RATE], RATE)
    assert recordings.refresh(index, recordings.find(folder)).embedded == 1
    assert index.search("angry")["file"].nunique() > 1  # the text side, let go before, is there when it is needed


# Out of the index -------------------------------------------------------------------------------------------


def hits(*spans: tuple[Path, float | None, float | None, int | None]) -> pd.DataFrame:
    table = pd.DataFrame(spans, columns=["file", "start_s", "end_s", "channel"])
    return table.assign(file=[absolute_key(path) for path in table["file"]], score=0.5)


def test_hits_are_cut_out_as_recorded(folder, tmp_path):
    call, one = folder / "deep" / "call.wav", folder / "one.flac"
    found = hits((call, 1.0, 3.5, 1), (one, 0.25, 1.5, None), (call, 2.0, 4.0, None), (call, None, None, 0))
    table = clips.export(found, tmp_path / "clips")
    assert table["audio"].tolist() == [
        "001_call_1.00-3.50.wav", "002_one_0.25-1.50.wav", "003_call_2.00-4.00.wav", "004_call_0.00.wav",
    ]  # fmt: skip
    (both, rate), (mono, _) = (soundfile.read(path, always_2d=True) for path in (call, one))
    expected = [
        both[rate : round(3.5 * rate), 1:], mono[rate // 4 : round(1.5 * rate)], both[2 * rate : 4 * rate], both[:, :1]
    ]  # fmt: skip
    for name, samples in zip(table["audio"], expected, strict=True):
        written, found_rate = soundfile.read(tmp_path / "clips" / name, always_2d=True)
        assert found_rate == rate
        np.testing.assert_allclose(written, samples, atol=1e-4)
    written = pd.read_csv(tmp_path / "clips" / "hits.csv", keep_default_na=False, na_values={"channel": ""})
    assert list(written.columns) == ["audio", "problem", "path", "file", "start_s", "end_s", "channel", "score"]
    assert written["audio"].tolist() == table["audio"].tolist()
    assert written["path"].tolist() == [str(path) for path in (call, one, call, call)]
    assert ",1,0.5\n" in (tmp_path / "clips" / "hits.csv").read_text()  # the channel, no 1.0 for the others' sake
    again = clips.export(table, tmp_path / "again")  # what an export told is told anew
    pd.testing.assert_frame_equal(again, table)
    labelled = clips.export(found.assign(problem="the line"), tmp_path / "labelled")
    assert set(labelled["problem"]) == {""} and set(labelled["problem_label"]) == {"the line"}


@pytest.mark.parametrize("kind", ["mp3", "ogg", "m4a"])
def test_spans_of_files_of_every_kind_are_those_of_the_decoded_whole(folder, kind):
    path = folder / f"a.{kind}"
    if kind == "m4a":
        convert(folder / "deep" / "call.wav", path)
    else:
        soundfile.write(path, *soundfile.read(folder / "deep" / "call.wav"))
    whole = np.concatenate([block for block, _ in decoding.decode(path)])
    spans = [(3.0, 4.5), (0.0, 1.0), (6.5, None), (2.0, 3.25)]
    pieces, rate = decoding.read_spans(path, spans)
    for (start, end), piece in zip(spans, pieces, strict=True):
        expected = whole[round(start * rate) : None if end is None else round(end * rate)]
        np.testing.assert_allclose(piece, expected, atol=2e-3)


def test_hits_that_can_no_longer_be_cut_are_named(folder, tmp_path):
    one = folder / "one.flac"
    gone = hits((one, 100.0, 101.0, None), (folder / "gone.wav", 0, 1, None), (one, 1, 2, 3), (one, 1, 2, 0))
    gone.loc[len(gone)] = ["../../etc/passwd", 0, 1, None, 0.5]
    table = clips.export(gone, tmp_path / "clips")
    assert [bool(name) for name in table["audio"]] == [False, False, False, True, False]
    for problem, said in zip(
        table["problem"], ["no longer has", "is not there", "no longer has", "", "name of no file"], strict=True
    ):
        assert said in problem and bool(said) == bool(problem)


def test_a_folder_that_holds_something_is_left_alone(folder):
    with pytest.raises(FileExistsError, match="is not empty"):
        clips.export(hits((folder / "one.flac", 0, 1, None)), folder)
