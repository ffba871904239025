"""Expresso from its original layout: splits with ranges, speech cut by voice, both readings, and the official files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from esr_utils.audio_files import AudioError, Header
from esr_utils.batches import load_waveform
from esr_utils.corpora import CorpusError, expresso, how_to_get, prepare
from esr_utils.manifests import (
    PAPER_TABLE_ONE,
    build_manifest,
    load_corpora,
    table_one,
    to_cuts,
    validate,
    write_missing,
)
from esr_utils.styles import CORPUS_STYLES, STYLES

PROJECT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ESR_DATA") or PROJECT.parent / "shared" / "data")
COMMENT = '# If only one segment is extracted, it will have the format: "{filename}\\t({startime},{endtime})"\n'
COLUMNS = ["utterance_id", "split", "speaker", "style", "start_s", "end_s", "channel", "duration_s"]


def put(root: Path, name: str, seconds: float, channels: int = 1, rate: int = 8_000) -> Path:
    """A recording where it belongs: noise, another in each channel."""
    file = root / expresso.Recording.named(name).path
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
    soundfile.write(file, noise, rate)
    return file


def describe(root: Path, speech: str = "", texts: str | None = None, **splits: str) -> None:
    (root / "splits").mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        (root / "splits" / f"{split}.txt").write_text(COMMENT + splits.get(split, ""))
    (root / "VAD_segments.txt").write_text("#VAD segments of Expresso long files\n#MODEL: m\n" + speech)
    if texts is not None:
        (root / "read_transcriptions.txt").write_text(texts)


def cells(manifest: pd.DataFrame) -> list[list]:
    """The rows in short, with None for an empty cell."""
    return manifest[COLUMNS].astype(object).where(manifest[COLUMNS].notna(), None).to_numpy().tolist()


# --- read clips


def test_read_clips_stay_whole(tmp_path: Path) -> None:
    names = ["ex03_default_emphasis_00010", "ex03_default_essentials_00002", "ex01_whisper_00001", "ex02_happy_00007"]
    for name in names:
        put(tmp_path, name, 12.5)
    describe(
        tmp_path,
        train=f"{names[0]}\n\n{names[1]}\n",
        dev=f"{names[2]}\t(,)\n",
        test=f"{names[3]}  \r\n",
        texts=f"{names[0]}\t*Please*, read me.\n{names[2]}\tÄnother\ttext\n",
    )
    manifest = validate(expresso.prepare(tmp_path), tmp_path)
    assert manifest.attrs["left_out"] == {}
    assert cells(manifest) == [
        [f"expresso/{names[0]}", "train", "ex03", "neutral", None, None, None, 12.5],
        [f"expresso/{names[1]}", "train", "ex03", "neutral", None, None, None, 12.5],
        [f"expresso/{names[2]}", "val", "ex01", "whispered", None, None, None, 12.5],
        [f"expresso/{names[3]}", "test", "ex02", "happy", None, None, None, 12.5],
    ]
    assert manifest["text"].tolist() == ["*Please*, read me.", "", "Änother\ttext", ""]
    assert manifest["style_raw"].tolist() == ["default", "default", "whisper", "happy"]
    assert manifest["path"][0] == "audio_48khz/read/ex03/default/base/ex03_default_emphasis_00010.wav"
    assert set(manifest["licence"]) == {"CC BY-NC 4.0"} and set(manifest["gender"]) == {""}


def test_nineteen_styles_of_26() -> None:
    mapped = CORPUS_STYLES["expresso"]
    assert len(mapped) == len(set(mapped.values())) == 19 and len({*mapped, *expresso.LEFT_OUT}) == 26
    three = set().union(*(CORPUS_STYLES[corpus].values() for corpus in ("iemocap", "esd", "expresso")))
    assert three == set(STYLES)


# --- long recordings


def test_a_conversation_is_cut_by_voice_within_each_split_s_part(tmp_path: Path) -> None:
    name = "ex04-ex01_sad-sympathetic_002"
    put(tmp_path, name, 60, channels=2)
    describe(
        tmp_path,
        train=f"{name}\t(40.5s,)\n",
        dev=f"{name}\t(,20.0s)\n",
        test=f"{name}\t(20.0s,40.5s)\n",
        speech=f"{name}/channel1\t(1.0, 1.9) (2.5, 6.0) (18.0, 25.5) (39.0, 41.0)\n"
        f"{name}/channel2\t(6.25, 18.0) (19.5, 21.0) (45.0, 75.0)\n",
    )
    manifest = validate(expresso.prepare(tmp_path), tmp_path)
    left, right = ["ex04", "sad"], ["ex01", "sympathetic"]
    short = [[row[0].removeprefix(f"expresso/{name}/"), row[1], *row[2:]] for row in cells(manifest)]
    assert short == [
        ["channel2/45.00-52.50", "train", *right, 45.0, 52.5, 1, 7.5],
        ["channel2/52.50-60.00", "train", *right, 52.5, 60.0, 1, 7.5],
        ["channel1/2.50-6.00", "val", *left, 2.5, 6.0, 0, 3.5],
        ["channel1/18.00-20.00", "val", *left, 18.0, 20.0, 0, 2.0],
        ["channel2/6.25-12.12", "val", *right, 6.25, 12.12, 1, 5.87],
        ["channel2/12.12-18.00", "val", *right, 12.12, 18.0, 1, 5.88],
        ["channel1/20.00-25.50", "test", *left, 20.0, 25.5, 0, 5.5],
        ["channel1/39.00-40.50", "test", *left, 39.0, 40.5, 0, 1.5],
        ["channel2/20.00-21.00", "test", *right, 20.0, 21.0, 1, 1.0],
    ]
    assert manifest.attrs["left_out_files"] == {
        f"train.txt line 2: {name}/channel1": "no speech of 1 s or more in its part",
        f"{name}/channel1 1.00-1.90": "speech of less than 1 s",
        f"{name}/channel2 19.50-20.00": "speech of less than 1 s",
    }


def test_one_style_is_that_of_both_speakers(tmp_path: Path) -> None:
    name = "ex03-ex01_laughing_003"
    put(tmp_path, name, 5, channels=2)
    describe(tmp_path, test=name, speech=f"{name}/channel1\t(0.0, 2.0)\n{name}/channel2\t(2.0, 4.5)\n")
    manifest = expresso.prepare(tmp_path)
    assert manifest["style"].tolist() == ["laughing", "laughing"] and manifest["speaker"].tolist() == ["ex03", "ex01"]


@pytest.mark.parametrize(("styles", "channel"), [("sad-child", 1), ("child-sad", 2)])
def test_of_two_styles_one_may_be_left_out(tmp_path: Path, styles: str, channel: int) -> None:
    name = f"ex03-ex01_{styles}_003"
    put(tmp_path, name, 5, channels=2)
    describe(tmp_path, test=name, speech=f"{name}/channel1\t(0.0, 2.0)\n{name}/channel2\t(2.0, 4.5)\n")
    manifest = expresso.prepare(tmp_path)
    assert manifest["style"].tolist() == ["sad"] and manifest["channel"].tolist() == [channel - 1]
    assert manifest.attrs["left_out_files"] == {
        f"test.txt line 2: {name}/channel{3 - channel}": "style not among the 19: child"
    }


def test_a_longform_recording_is_cut_too(tmp_path: Path) -> None:
    name = "ex01_default_longform_00001"
    put(tmp_path, name, 45)
    describe(
        tmp_path,
        test=f"{name}\t(10.0s,35.0s)\n",
        speech=f"{name}\t(0.0, 12.0) (13.0, 34.5)\n",
        texts=f"{name}\tAll that is read.\n",
    )
    manifest = validate(expresso.prepare(tmp_path), tmp_path)
    assert cells(manifest) == [
        [f"expresso/{name}/10.00-12.00", "test", "ex01", "neutral", 10.0, 12.0, None, 2.0],
        [f"expresso/{name}/13.00-20.16", "test", "ex01", "neutral", 13.0, 20.16, None, 7.16],
        [f"expresso/{name}/20.16-27.33", "test", "ex01", "neutral", 20.16, 27.33, None, 7.17],
        [f"expresso/{name}/27.33-34.50", "test", "ex01", "neutral", 27.33, 34.5, None, 7.17],
    ]
    assert set(manifest["text"]) == {""}  # the text is of the whole


def test_the_longest_segment_can_be_set(tmp_path: Path) -> None:
    name = "ex01_default_longform_00001"
    put(tmp_path, name, 30)
    describe(tmp_path, train=name, speech=f"{name}\t(0.0, 30.0)\n")
    assert expresso.prepare(tmp_path, max_segment_s=15)["duration_s"].tolist() == [15.0, 15.0]
    assert expresso.prepare(tmp_path)["duration_s"].tolist() == [10.0, 10.0, 10.0]
    with pytest.raises(ValueError, match="max_segment_s is 1.5"):
        expresso.prepare(tmp_path, max_segment_s=1.5)


@given(start=st.integers(0, 10_000), length=st.integers(100, 20_000), longest=st.integers(200, 3_000))
def test_windows_are_equal_few_and_leave_nothing_out(start: int, length: int, longest: int) -> None:
    windows = list(expresso._windows((start, start + length), longest))
    assert windows[0][0] == start and windows[-1][1] == start + length
    assert all(one[1] == other[0] for one, other in pairwise(windows))
    lengths = [b - a for a, b in windows]
    assert max(lengths) <= longest and min(lengths) >= 100 and max(lengths) - min(lengths) <= 1
    assert (len(windows) - 1) * longest < length  # one fewer would not do


@settings(max_examples=50, deadline=None)
@given(
    edges=st.lists(st.integers(0, 3_000), unique=True, min_size=2, max_size=12).map(sorted),
    cuts=st.lists(st.integers(1, 2_999), unique=True, max_size=2).map(sorted),
    seconds=st.integers(5, 30),
)
def test_speech_is_shared_out_without_loss_or_overlap(edges: list[int], cuts: list[int], seconds: int) -> None:
    """Against a mask of every hundredth of a second: what is kept and what is too short is what each part holds."""
    name, stretches = "ex01_default_longform_00001", list(zip(edges[::2], edges[1::2], strict=False))
    bounds = [0, *cuts, None]
    entries = [
        expresso.Entry(f"line {i}", split, name, bounds[i], bounds[i + 1])
        for i, split in enumerate(("train", "dev", "test")[: len(bounds) - 1])
    ]
    header = Header("a", seconds * 100, 100, 1)
    rows, left_out = expresso.utterances(entries, {name: stretches}, lambda path: header)
    spoken = np.zeros(seconds * 100, int)
    for a, b in stretches:
        spoken[a:b] = 1
    for entry in entries:
        part = spoken.copy()
        part[: entry.start] = 0
        part[len(part) if entry.end is None else entry.end :] = 0
        runs = np.flatnonzero(np.diff(part, prepend=0, append=0)).reshape(-1, 2)
        long = [(a, b) for a, b in runs if b - a >= 100]
        mine = [row for row in rows if row["split"] == expresso.SPLITS[entry.split]]
        assert sum(row["duration_s"] for row in mine) == pytest.approx(sum(b - a for a, b in long) / 100)
        for row in mine:
            assert part[round(100 * row["start_s"]) : round(100 * row["end_s"])].all() and row["duration_s"] <= 10
        assert bool(mine) != (str(entry) in left_out)
    assert len({row["utterance_id"] for row in rows}) == len(rows)


# --- what is left out


def test_every_line_is_kept_or_left_out_with_a_reason(tmp_path: Path) -> None:
    good = {"ex01_sad_00001": 1, "ex02_sad_00001": 1}
    conversations = [f"ex04-ex03_fast_00{number}" for number in range(1, 8)]
    for name in good:
        put(tmp_path, name, 1)
    for name in conversations[:4] + conversations[5:]:
        put(tmp_path, name, 10, channels=1 if name == conversations[3] else 2)
    (tmp_path / expresso.Recording.named("ex03_sad_00001").path).parent.mkdir(parents=True)
    (tmp_path / expresso.Recording.named("ex03_sad_00001").path).write_bytes(b"")
    put(tmp_path, "ex04_singing_00001", 1)  # in the corpus, in no split
    put(tmp_path, "ex04-ex01_child-childdir_002", 3, channels=2)
    train = [
        "ex01_sad_00001",
        "ex01_sad_00001",
        "ex03_sad_00001",
        "ex04_sad_00001",
        "ex01_sad_00002\t(60.0s",
        "ex01_sad_00003 (9.0s,9.0s)",
        "ex01_sad_00004 (soon,)",
        "ex5_sad_00001",
        "ex01_sad-happy_00001",
        "ex01_gloomy_00001",
        "ex02_sad_00001\t(0.5s,)",
        "ex01_narration_longform_00001",
        "ex04-ex01_child-childdir_002",
        *conversations[:6],
    ]
    speech = [
        f"{conversations[0]}/channel1\t(0.5, 5.0)",  # nothing of channel2
        f"{conversations[1]}/channel1\t(0.5, 1.0)",
        f"{conversations[1]}/channel2\t",
        f"{conversations[2]}/channel1\t(0.5; 5.0)",  # malformed
        f"{conversations[2]}/channel2\t(0.5, 5.0) and so on",
        f"{conversations[3]}/channel1\t(0.5, 5.0)",
        f"{conversations[4]}/channel1\t(0.5, 5.0)",
        f"{conversations[5]}/channel1\t(0.5, 5.0)",
        f"{conversations[6]}/channel1\t(0.5, 5.0)",
    ]
    test = ["ex02_sad_00001", f"{conversations[5]}\t(4.0s,)", f"{conversations[6]}\t(12.0s,)"]
    describe(tmp_path, train="\n".join(train), test="\n".join(test), speech="\n".join(speech))
    manifest = validate(expresso.prepare(tmp_path), tmp_path)
    kept = ["ex01_sad_00001", f"{conversations[0]}/channel1/0.50-5.00", f"{conversations[5]}/channel1/0.50-5.00"]
    assert manifest["utterance_id"].tolist() == [f"expresso/{name}" for name in [*kept, "ex02_sad_00001"]]
    assert manifest.attrs["left_out_files"] == {
        "train.txt line 3: ex01_sad_00001": "overlaps what train has of it",
        "train.txt line 4: ex03_sad_00001": "is empty (0 bytes)",
        "train.txt line 5: ex04_sad_00001": "is not there",
        "train.txt line 6": "malformed line",
        "train.txt line 7": "malformed line",
        "train.txt line 8": "malformed line",
        "train.txt line 9: ex5_sad_00001": "name is not of Expresso",
        "train.txt line 10: ex01_sad-happy_00001": "name is not of Expresso",
        "train.txt line 11: ex01_gloomy_00001": "unknown style: gloomy",
        "train.txt line 12: ex02_sad_00001": "a part of a read clip, which is taken whole or not at all",
        "train.txt line 13: ex01_narration_longform_00001": "style not among the 19: narration",
        "train.txt line 14: ex04-ex01_child-childdir_002": "style not among the 19: child, childdir",
        f"train.txt line 15: {conversations[0]}/channel2": "not in VAD_segments.txt",
        f"train.txt line 16: {conversations[1]}": "no speech of 1 s or more in its part",
        f"train.txt line 17: {conversations[2]}": "not in VAD_segments.txt",
        f"train.txt line 18: {conversations[3]}": "has 1 channel(s) where 2 would be the voices",
        f"train.txt line 19: {conversations[4]}": "is not there",
        f"train.txt line 20: {conversations[5]}/channel2": "not in VAD_segments.txt",
        f"test.txt line 3: {conversations[5]}": "overlaps what train has of it",
        f"test.txt line 4: {conversations[6]}": "no speech of 1 s or more in its part; not in VAD_segments.txt",
        "VAD_segments.txt line 6": "malformed line",
        "VAD_segments.txt line 7": "malformed line",
        "audio_48khz/read/ex04/singing/base/ex04_singing_00001.wav": "not in the split files",
    }


def test_a_vad_line_that_cannot_be_right_is_left_out(tmp_path: Path) -> None:
    """Else speech would be lost without a word, or one stretch become two utterances of one id."""
    names = [f"ex01_default_longform_0000{number}" for number in range(1, 7)]
    for name in names:
        put(tmp_path, name, 10)
    lines = [
        f"{names[0]}\t(1.0, 3.0) (3.0, 5.0)",
        f"{names[0]}\t(6.0, 8.0)",  # once more
        f"{names[1]} (1.0, 5.0)",  # a blank for the tab
        f"{names[2]}(1.0,5.0)",
        f"{names[3]}\t(5.0, 1.0)",  # ends before it begins
        f"{names[4]}\t(1.0, 5.0) (1.0, 5.0)",  # twice
        f"{names[5]}\t(1.0, 5.0) (4.0, 6.0)",  # overlap
    ]
    describe(tmp_path, train="\n".join(names), speech="\n".join(lines))
    manifest = validate(expresso.prepare(tmp_path), tmp_path)
    assert manifest["utterance_id"].tolist() == [f"expresso/{names[0]}/1.00-3.00", f"expresso/{names[0]}/3.00-5.00"]
    assert manifest.attrs["left_out_files"] == {
        **{f"train.txt line {line}: {names[line - 2]}": "not in VAD_segments.txt" for line in range(3, 8)},
        "VAD_segments.txt line 4": "names a voice for the second time",
        **dict.fromkeys((f"VAD_segments.txt line {line}" for line in range(5, 10)), "malformed line"),
    }


@pytest.mark.parametrize("gone", ["splits/dev.txt", "VAD_segments.txt"])
def test_a_missing_file_is_named(tmp_path: Path, gone: str) -> None:
    describe(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(CorpusError, match=f"there is no .*{gone}.*speechbot.*CC BY-NC 4.0"):
        expresso.prepare(tmp_path)


def test_a_folder_without_audio_says_where_to_get_it(tmp_path: Path) -> None:
    describe(tmp_path, train="ex01_sad_00001\nex02_sad_00001\nex01_singing_00001")
    with pytest.raises(
        CorpusError, match="nothing of the corpus 'expresso-paper'.*paper_compat=True.*speechbot"
    ) as error:
        prepare("expresso-paper", tmp_path)
    assert "Left out: is not there (2), style not among the 19: singing (1)." in str(error.value)
    elsewhere = tmp_path / "elsewhere"
    put(elsewhere, "ex01_sad_00001", 1)
    (tmp_path / "corpus").mkdir()
    describe(tmp_path / "corpus", train="ex01_sad_00001")
    (tmp_path / "corpus" / "audio_48khz").symlink_to(elsewhere / "audio_48khz")
    with pytest.raises(CorpusError, match=r"Left out: leaves the corpus folder \(1\)"):
        prepare("expresso", tmp_path / "corpus")


# --- both readings


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A data_root with a small Expresso: a clip in each split, a conversation in all three."""
    root, long = tmp_path / "expresso", "ex04-ex02_angry_004"
    clips = ["ex01_sad_00001", "ex01_happy_00002", "ex01_confused_00003"]
    for name in clips:
        put(root, name, 1)
    put(root, long, 40, channels=2)
    describe(
        root,
        train=f"{clips[0]}\n{long}\t(20.0s,)\n",
        dev=f"{clips[1]}\n{long}\t(,10.0s)\n",
        test=f"{clips[2]}\n{long}\t(10.0s,20.0s)\n",
        speech=f"{long}/channel1\t(5.0, 25.0)\n{long}/channel2\t(25.0, 30.0)\n",
    )
    return tmp_path


def test_the_published_code_s_reading(both: Path) -> None:
    manifest = load_corpora("expresso-paper", both)
    assert cells(manifest) == [
        ["expresso-paper/ex01_sad_00001", "train", "ex01", "sad", None, None, None, 1.0],
        ["expresso-paper/ex04-ex02_angry_004/channel1/5.00-15.00", "train", "ex04", "angry", 5.0, 15.0, 0, 10.0],
        ["expresso-paper/ex04-ex02_angry_004/channel1/15.00-25.00", "train", "ex04", "angry", 15.0, 25.0, 0, 10.0],
        ["expresso-paper/ex04-ex02_angry_004/channel2/25.00-30.00", "train", "ex02", "angry", 25.0, 30.0, 1, 5.0],
        ["expresso-paper/ex01_happy_00002", "val", "ex01", "happy", None, None, None, 1.0],
        ["expresso-paper/ex01_confused_00003", "test", "ex01", "confused", None, None, None, 1.0],
    ]
    assert manifest.attrs["left_out"] == {"expresso-paper": {"the published code has it in train": 2}}
    assert "paper_compat=True" in how_to_get("expresso-paper") and "paper_compat" not in how_to_get("expresso")


def test_both_readings_keep_their_own_manifests(both: Path) -> None:
    first = load_corpora("expresso+expresso-paper", both)
    assert Counter(first["corpus"]) == {"expresso": 7, "expresso-paper": 6}
    written = write_missing(first)
    assert [path.name for path in written] == ["manifest.csv", "manifest_expresso-paper.csv"]
    assert {path.parent for path in written} == {both / "expresso"}
    for file in (both / "expresso" / "splits").iterdir():
        file.unlink()  # from now on the manifests are what is read
    again = load_corpora("expresso+expresso-paper", both)
    pd.testing.assert_frame_equal(again, first)
    assert write_missing(again) == []
    pd.testing.assert_frame_equal(load_corpora("expresso-paper", both), first[7:].reset_index(drop=True))


def test_one_reading_written_leaves_the_other_to_be_prepared(both: Path) -> None:
    write_missing(load_corpora("expresso-paper", both))
    assert not (both / "expresso" / "manifest.csv").exists()
    assert set(load_corpora("expresso", both)["corpus"]) == {"expresso"}


def test_table_one_stands_beside_the_paper_s(both: Path) -> None:
    table = table_one(load_corpora("expresso+expresso-paper", both))
    assert table.index.tolist() == ["expresso", "expresso (paper)", "expresso-paper", "Total", "Total (paper)"]
    assert table.loc["expresso (paper)"].tolist() == [19, 36.9, 0.6, 0.6]
    assert table.loc["Total (paper)"].tolist() == [22, 60.7, 1.4, 1.9]
    assert table.loc["expresso"].tolist() == pytest.approx([4, 11 / 3600, 6 / 3600, 11 / 3600])
    assert table["styles"].tolist() == [4, 19, 4, 4, 22] and table["styles"].dtype == "int64"


# --- the audio


def test_a_segment_is_its_speaker_s_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, rate = "ex03-ex01_happy_002", 48_000
    file = put(tmp_path, name, 3, channels=2, rate=rate)
    second = np.arange(3 * rate) / rate
    soundfile.write(file, 0.2 * np.sin(2 * np.pi * second[:, None] * np.array([440, 880])), rate)
    describe(tmp_path, train=name, speech=f"{name}/channel1\t(0.5, 2.0)\n{name}/channel2\t(1.0, 2.5)\n")
    asked, read = [], soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, **more: asked.append(frames) or read(self, frames, **more),
    )
    cuts = to_cuts(validate(expresso.prepare(tmp_path), tmp_path), tmp_path)
    assert asked == []
    for cut, pitch in zip(cuts, (440, 880), strict=True):
        waveform = load_waveform(cut).numpy()
        assert len(waveform) == 24_000
        assert np.abs(np.fft.rfft(waveform)).argmax() / 1.5 == pytest.approx(pitch, abs=1)
    assert asked == [72_000, 72_000]


PEAK = """
import resource, sys
from pathlib import Path
from esr_utils.batches import load_waveform
from esr_utils.corpora import expresso
from esr_utils.manifests import to_cuts, validate

def peak():  # MB; Linux counts in kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)

root, before = Path(sys.argv[1]), peak()
manifest = validate(expresso.prepare(root), root)
loud = [float(load_waveform(cut, "recorded").square().mean()) ** 0.5 for cut in to_cuts(manifest, root)]
print(len(loud), min(loud), max(loud), peak() - before)
"""


def test_an_hour_of_48_khz_stereo_is_read_by_the_segment(tmp_path: Path) -> None:
    """The whole hour would be 1.4 GB as float32, and one voice of it at 16 kHz 230 MB. The file is sparse: noise where
    there is speech, each half as loud to the right."""
    name, rate, seconds, at = "ex01-ex02_default_001", 48_000, 3600, range(20, 3600, 200)
    burst = np.random.default_rng(0).standard_normal((8 * rate, 1)) * np.array([2000, 1000])
    file = put(tmp_path, name, 0.1, channels=2, rate=rate)
    header = bytearray(file.read_bytes()[:44])
    header[4:8] = (36 + seconds * rate * 4).to_bytes(4, "little")
    header[40:44] = (seconds * rate * 4).to_bytes(4, "little")
    with file.open("wb") as wav:
        wav.write(header)
        for second in at:
            wav.seek(44 + second * rate * 4)
            wav.write(burst.astype("<i2").tobytes())
        wav.truncate(44 + seconds * rate * 4)
    stretches = " ".join(f"({second}.0, {second + 8}.0)" for second in at)
    describe(tmp_path, train=name, speech=f"{name}/channel1\t{stretches}\n{name}/channel2\t{stretches}\n")
    # by way of a shell, which forks: on Linux a process starts with the peak of the one that it was made from
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, quietest, loudest, grown_mb = map(float, done.stdout.split())
    assert count == 2 * len(at)
    assert loudest / quietest == pytest.approx(2, rel=0.02)
    # resampling to a third of the rate keeps a third of the noise's power, less what the filter's edge takes
    assert loudest == pytest.approx(2000 / 32768 / 3**0.5, rel=0.06)
    print(f"peak memory grew by {grown_mb:.0f} MB")
    assert grown_mb < 150


# --- the official split and VAD files


@pytest.fixture(scope="module")
def official() -> tuple[list[expresso.Entry], expresso.Speech]:
    root = SHARED / "expresso_metadata"
    if not root.is_dir():
        pytest.skip(f"needs the official split and VAD files in {root}; set $ESR_DATA to the folder that holds it")
    entries, malformed = expresso.read_splits(root / "splits")
    speech, garbled = expresso.read_speech(root / "VAD_segments.txt")
    assert not malformed and not garbled
    return entries, speech


def headers(speech: expresso.Speech, read_s: float | None) -> Callable[[str], Header]:
    """Headers for audio that is not at hand: long recordings end with their last speech; read clips last `read_s`, or
    are not there."""
    ends: dict[str, list[int]] = {}
    for voice, stretches in speech.items():
        ends.setdefault(voice.split("/")[0], []).append(stretches[-1][1])

    def header_of(path: str) -> Header:
        name = Path(path).stem
        if name not in ends and read_s is None:
            raise AudioError("is not there")
        last = ends.get(name) or [round(100 * read_s)]
        return Header(path, max(last), 100, len(last))

    return header_of


def taken(rows: list[dict]) -> set[tuple[str, str]]:
    """(split, recording) of the entries that rows come from."""
    return {(row["split"], Path(row["path"]).stem) for row in rows}


def test_every_official_entry_is_kept_or_left_out_with_a_reason(official: tuple) -> None:
    entries, speech = official
    assert Counter(entry.split for entry in entries) == {"train": 10_727, "dev": 688, "test": 648}
    assert sum((entry.start, entry.end) != (0, None) for entry in entries) == 227
    rows, left_out = expresso.utterances(entries, speech, headers(speech, read_s=3.0))
    kept = taken(rows)
    for entry in entries:
        assert ((expresso.SPLITS[entry.split], entry.name) in kept) != (str(entry) in left_out), entry
    reasons = Counter(left_out[str(entry)].split(":")[0] for entry in entries if str(entry) in left_out)
    assert reasons == {"style not among the 19": 100}
    assert len(kept) == 12_063 - 100
    assert {row["style"] for row in rows} == set(CORPUS_STYLES["expresso"].values())
    without, more = expresso.utterances(entries, speech, headers(speech, read_s=None))
    assert len(rows) - len(without) == sum(reason == "is not there" for reason in more.values()) == 11_596
    assert taken(without) == {(split, name) for split, name in kept if expresso.Recording.named(name).long}


def test_a_folder_with_the_official_files_alone(official: tuple) -> None:
    manifest = expresso.prepare(SHARED / "expresso_metadata")
    assert manifest.empty and len(manifest.attrs["left_out_files"]) == 10_727 + 688 + 648
    assert manifest.attrs["left_out"]["is not there"] == 12_063 - 100


def test_no_split_holds_a_part_of_another(official: tuple) -> None:
    entries, speech = official
    by_name: dict[str, list[expresso.Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    assert sum(len(parts) > 1 for parts in by_name.values()) == 107
    for parts in by_name.values():
        parts = sorted(parts, key=lambda entry: entry.start)
        assert all(one.end is not None and one.end <= other.start for one, other in pairwise(parts))
    rows, _ = expresso.utterances(entries, speech, headers(speech, read_s=None))
    segments = pd.DataFrame(rows).sort_values("start_s")
    for _, segment in segments.groupby(["path", segments["channel"].fillna(0)]):
        assert (segment["start_s"].to_numpy()[1:] >= segment["end_s"].to_numpy()[:-1]).all()
    assert segments["duration_s"].between(1, 10).all()


def test_hours_by_split_beside_the_paper_s(official: tuple) -> None:
    """What the official files alone tell: the long recordings. How long the read clips are, only their audio does."""
    entries, speech = official
    rows, _ = expresso.utterances(entries, speech, headers(speech, read_s=None))
    table = table_one(build_manifest(rows, {}))
    print(f"\nhours of the long recordings, and the paper's of all:\n{table.round(2)}")
    assert table.loc["expresso (paper)"].tolist() == list(PAPER_TABLE_ONE["expresso"])
    spoken = Counter()
    for entry in entries:
        recording = expresso.Recording.named(entry.name)
        for voice, style in enumerate(recording.styles if recording.long else ()):
            if style in CORPUS_STYLES["expresso"]:
                name = f"{entry.name}/channel{voice + 1}" if len(recording.styles) == 2 else entry.name
                ends = [(max(a, entry.start), min(b, entry.end or b)) for a, b in speech[name]]
                spoken[expresso.SPLITS[entry.split]] += sum(b - a for a, b in ends if b - a >= 100) / 360_000
    assert table.loc["expresso", ["train", "val", "test"]].tolist() == pytest.approx(
        [*map(spoken.get, table.columns[1:])]
    )
    # 30 h of improvised speech in all, the corpus says; and a minute of each speaker in each style to val and to test
    assert 25 < table.loc["expresso", "train"] < 30
    assert 0.6 < table.loc["expresso", "val"] < 0.7 and 0.6 < table.loc["expresso", "test"] < 0.7


def test_the_official_files_as_the_published_code_reads_them(official: tuple) -> None:
    entries, speech = official
    compat, dropped = expresso.published_splits(entries)
    assert Counter(dropped.values()) == {"the published code has it in train": 120}
    rows, _ = expresso.utterances(compat, speech, headers(speech, read_s=3.0))
    ours, _ = expresso.utterances(entries, speech, headers(speech, read_s=3.0))
    styles = {split: {row["style"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    seven = {"confused", "neutral", "enunciated", "happy", "laughing", "sad", "whispered"}
    assert styles["test"] == styles["val"] == seven and len(styles["train"]) == 19
    assert Counter(row["split"] for row in rows if row.get("start_s") is None) == {
        "train": 10_380,
        "val": 628,
        "test": 588,
    }
    assert not [row for row in rows if row["split"] != "train" and row.get("start_s") is not None]
    for split in ("train", "val", "test"):
        assert len({row["style"] for row in ours if row["split"] == split}) == 19
