"""Manifests: every refusal, writing whole or not at all, exact round trips, cuts that read their part."""

from __future__ import annotations

import csv
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal

from esr_utils import manifests
from esr_utils.corpora import CorpusError
from esr_utils.manifest_schema import COLUMNS, ManifestError
from esr_utils.manifests import (
    load_corpora,
    read_manifest,
    statistics,
    table_one,
    to_cuts,
    validate,
    with_root,
    write_manifest,
)


def noise(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels)).astype("float32")


def row(number: int = 0, **cells: object) -> dict:
    """A sound row of a corpus "mine" whose files last 1 s."""
    return dict.fromkeys(COLUMNS, "") | {
        "utterance_id": f"mine/{number:03d}",
        "path": "a.wav",
        "corpus": "mine",
        "split": "train",
        "speaker": "ana",
        "style": "happy",
        "duration_s": 1.0,
        **cells,
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder with a good file of 1 s (a.wav), a stereo one (two.wav), and some of no use."""
    folder = tmp_path_factory.mktemp("data") / "mine"
    folder.mkdir()
    soundfile.write(folder / "a.wav", noise(1), 16_000)
    soundfile.write(folder / "two.wav", noise(1, 48_000, 2), 48_000)
    soundfile.write(folder / "nothing.wav", noise(0), 16_000)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("no audio at all, whatever the suffix says")
    soundfile.write(folder.parent / "outside.wav", noise(1), 16_000)
    (folder / "link.wav").symlink_to(folder.parent / "outside.wav")
    (folder / "inner.wav").symlink_to(folder / "a.wav")
    return folder


def refusal(rows: list[dict] | pd.DataFrame, root: Path, **options: bool) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        validate(pd.DataFrame(rows, dtype=object), root, **options)
    return caught.value


# --- validation


def test_a_sound_manifest_gets_its_types(home: Path) -> None:
    checked = validate(pd.DataFrame([row(0), row(1, start_s="0.25", end_s=0.75, duration_s="0.5")]), home)
    assert checked["duration_s"].tolist() == [1.0, 0.5]
    assert checked["start_s"].isna().tolist() == [True, False]
    assert checked["caption"].tolist() == ["", ""]
    assert str(checked["channel"].dtype) == "Int64"


@pytest.mark.parametrize(
    ("cells", "column", "words"),
    [
        ({"utterance_id": "no-slash", "corpus": "no-slash"}, "utterance_id", "<corpus>/<id>"),
        ({"utterance_id": "mine/"}, "utterance_id", "<corpus>/<id>"),
        ({"utterance_id": "mine/a\nb"}, "utterance_id", "<corpus>/<id>"),
        ({"utterance_id": "mine/b\n"}, "utterance_id", "<corpus>/<id>"),
        ({"corpus": "theirs"}, "corpus", "does not begin the utterance_id"),
        ({"path": ""}, "path", "is empty"),
        ({"split": "dev"}, "split", "'dev' is not one of train, val, test"),
        ({"style": "joyful"}, "style", "'joyful' is not one of the 22 styles"),
        ({"style": "Happy"}, "style", "'Happy' is not one of the 22 styles"),
        ({"path": "gone.wav"}, "path", "'gone.wav' is not there"),
        ({"path": "."}, "path", "is not there"),
        ({"path": "text.wav"}, "path", "not readable as audio"),
        ({"path": "empty.wav"}, "path", "0 bytes"),
        ({"path": "nothing.wav"}, "path", "holds no audio"),
        ({"path": "../outside.wav"}, "path", "leaves the corpus folder"),
        ({"path": "x/../../outside.wav"}, "path", "leaves the corpus folder"),
        ({"path": "link.wav"}, "path", "leaves the corpus folder"),
        ({"path": "/etc/hostname"}, "path", "absolute"),
        ({"path": "C:\\audio\\a.wav"}, "path", "absolute"),
        ({"path": "a\0.wav"}, "path", "not a path"),
        ({"start_s": -0.1, "end_s": 0.9}, "start_s", "negative"),
        ({"start_s": 0.6, "end_s": 0.4, "duration_s": 0.2}, "end_s", "not after start_s"),
        ({"start_s": 0.5, "end_s": 0.5, "duration_s": 0.1}, "end_s", "not after start_s"),
        ({"start_s": 1.5, "duration_s": 0.1}, "start_s", "past the file's end"),
        ({"end_s": 1.06, "duration_s": 1.06}, "end_s", "past the file's end"),
        ({"duration_s": 0}, "duration_s", "not above 0"),
        ({"duration_s": -1}, "duration_s", "not above 0"),
        ({"duration_s": ""}, "duration_s", "is empty"),
        ({"duration_s": "long"}, "duration_s", "'long' is not a number"),
        ({"start_s": "inf"}, "start_s", "not a number"),
        ({"duration_s": 1.06}, "duration_s", "does not match"),
        ({"start_s": 0.5, "duration_s": 1.0}, "duration_s", "does not match the audio, 0.500 s"),
        ({"channel": 1}, "channel", "not in the file"),
        ({"channel": -1}, "channel", "negative"),
        ({"text": "\udcff"}, "text", "not text that UTF-8 can hold"),
        ({"channel": 0.5}, "channel", "not a whole number"),
        ({"path": "two.wav", "channel": 2}, "channel", "which has 2"),
    ],
)
def test_each_fault_is_named(home: Path, cells: dict, column: str, words: str) -> None:
    error = refusal([row(0), row(1, **cells)], home)
    assert [(problem.row, problem.column) for problem in error.problems] == [(3, column)]
    assert error.problems[0].utterance_id == cells.get("utterance_id", "mine/001")
    assert words in error.problems[0].reason
    assert "line 3" in str(error) and str(home) in str(error)


@pytest.mark.parametrize(
    "cells",
    [
        {"end_s": 1.04, "duration_s": 1.04},  # within the tolerance of 0.05 s
        {"duration_s": 0.96},
        {"path": "./a.wav"},
        {"path": "x/../a.wav"},
        {"path": "inner.wav"},  # a link that stays inside
        {"path": "two.wav", "channel": 1},
        {"style": ""},
        {"utterance_id": "mine/day 1/ä.b"},
    ],
)
def test_what_is_allowed(home: Path, cells: dict) -> None:
    assert len(validate(pd.DataFrame([row(0, **cells)]), home)) == 1


def test_a_second_use_of_an_id_is_named(home: Path) -> None:
    error = refusal([row(1), row(2), row(1), row(1)], home)
    assert [(problem.row, problem.column) for problem in error.problems] == [
        (4, "utterance_id"),
        (5, "utterance_id"),
    ]


def test_missing_columns_are_named_with_the_other_faults(home: Path) -> None:
    error = refusal(pd.DataFrame([row(0, split="dev")]).drop(columns=["path", "licence"]), home)
    assert [(problem.row, problem.column) for problem in error.problems] == [
        (None, "path"),
        (None, "licence"),
        (2, "split"),
    ]


def test_two_columns_of_one_name_are_refused(home: Path) -> None:
    table = pd.DataFrame([row(0)])
    error = refusal(pd.concat([table, table[["style"]]], axis=1), home)
    assert error.problems[0].column == "style"


def test_twenty_problems_are_listed_and_the_rest_counted(home: Path) -> None:
    error = refusal([row(number, style="odd", path="gone.wav") for number in range(12)] + [row(99)], home)
    assert len(error.problems) == 24
    lines = str(error).splitlines()
    assert len(lines) == 22 and lines[0].endswith("24 problems in the manifest")
    assert lines[-1].strip() == "... and 4 more"
    assert "more" not in str(refusal([row(number, style="odd") for number in range(20)], home))


def test_the_line_counts_breaks_inside_cells(home: Path) -> None:
    error = refusal([row(0, text="one\ntwo\r\nthree"), row(1, style="odd")], home)
    assert error.problems[0].row == 5  # header, three lines of the first row, then this one


def test_the_error_survives_a_worker_process(home: Path) -> None:
    error = refusal([row(0, style="odd")], home)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_each_file_is_opened_once(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1), 16_000)
    opened = []
    info = soundfile.info
    monkeypatch.setattr(soundfile, "info", lambda path: opened.append(path) or info(path))
    rows = [row(n, start_s=n / 100, end_s=n / 100 + 0.1, duration_s=0.1) for n in range(50)]
    validate(pd.DataFrame(rows), tmp_path)
    assert len(opened) == 1


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1), 16_000)
    validate(pd.DataFrame([row(0)]), tmp_path)
    soundfile.write(tmp_path / "a.wav", noise(2), 16_000)
    assert refusal([row(0)], tmp_path).problems[0].column == "duration_s"


# --- the audio itself


def test_read_data_finds_what_headers_hide(tmp_path: Path) -> None:
    bad = noise(1)
    bad[8000] = np.nan
    soundfile.write(tmp_path / "nan.wav", bad, 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", 0 * noise(1), 16_000)
    soundfile.write(tmp_path / "half.flac", noise(1), 16_000)
    whole = (tmp_path / "half.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(whole[: len(whole) // 2])
    soundfile.write(tmp_path / "a.wav", noise(1), 16_000)
    rows = [row(n, path=path) for n, path in enumerate(["nan.wav", "silent.wav", "half.flac", "a.wav"])]
    validate(pd.DataFrame(rows), tmp_path)
    problems = refusal(rows, tmp_path, read_data=True).problems
    assert [problem.row for problem in problems] == [2, 3, 4]
    for problem, words in zip(problems, ["NaN", "silent", ("cut short", "does not decode")], strict=True):
        assert any(word in problem.reason for word in ([words] if isinstance(words, str) else words))


def test_read_data_looks_only_at_the_row_s_own_part(tmp_path: Path) -> None:
    audio = noise(1, channels=2)
    audio[12_000, 0] = np.nan
    soundfile.write(tmp_path / "a.wav", audio, 16_000, subtype="FLOAT")
    clean = [row(0, start_s=0, end_s=0.7, duration_s=0.7), row(1, channel=1)]
    assert len(validate(pd.DataFrame(clean), tmp_path, read_data=True)) == 2
    for cells in ({}, {"start_s": 0.7, "end_s": 0.8, "duration_s": 0.1}, {"channel": 0}):
        assert "NaN" in refusal([row(2, **cells)], tmp_path, read_data=True).problems[0].reason


# --- reading and writing

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
AWKWARD = st.sampled_from(
    ["", ' "', "a,b", "\r", "\n", "\r\n", "x\n", '"', ",", "nan", "NA", "None", "007", "\ufeff", "é;\t"]
)
CELL = st.one_of(AWKWARD, TEXT)


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    rows = []
    for number in range(draw(st.integers(0, 5))):
        start_s = draw(st.one_of(st.just(""), st.floats(0, 0.4)))
        end_s = draw(st.one_of(st.just(""), st.floats(0.5, 1)))
        rows.append(
            row(
                number,
                start_s=start_s,
                end_s=end_s,
                duration_s=(1.0 if end_s == "" else end_s) - (start_s or 0),
                channel=draw(st.sampled_from(["", 0])),
                **{name: draw(CELL) for name in ("text", "caption", "speaker", "source", "a column, of my own")},
            )
        )
    return pd.DataFrame(rows, columns=[*COLUMNS, "a column, of my own"])


@settings(max_examples=25, deadline=None)
@given(table=tables())
def test_what_is_read_is_what_was_written(home: Path, table: pd.DataFrame) -> None:
    path = home / "manifest.csv"
    checked = validate(table, home)
    write_manifest(checked, path)
    assert_frame_equal(read_manifest(path), checked.astype({"a column, of my own": "str"}), check_exact=True)


def test_unknown_columns_stay_and_root_is_not_written(home: Path) -> None:
    table = pd.DataFrame([row(0, rating="007"), row(1, rating="")])
    path = home / "rated.csv"
    write_manifest(with_root(table, home), path)
    again = read_manifest(path)
    assert again["rating"].tolist() == ["007", ""]
    assert list(again.columns) == [*COLUMNS, "rating"]


def test_an_invalid_manifest_is_not_written(home: Path) -> None:
    path = home / "never.csv"
    with pytest.raises(ManifestError):
        write_manifest(pd.DataFrame([row(0, style="odd")]), path)
    assert not path.exists()


@pytest.mark.parametrize("step", ["open", "replace"])
def test_a_crash_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1), 16_000)
    path = tmp_path / "manifest.csv"
    write_manifest(pd.DataFrame([row(0)]), path)
    before, names = path.read_bytes(), sorted(os.listdir(tmp_path))

    def crash(target: Path, *data: object, **options: object) -> None:
        if step == "open":
            with open(target, "wb") as file:
                file.write(b"utterance_id,pa")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, crash)
        with pytest.raises(OSError, match="No space left"):
            write_manifest(pd.DataFrame([row(1)]), path)
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names  # no temporary file stays behind


def test_a_manifest_cut_short_is_refused(home: Path) -> None:
    path = home / "cut.csv"
    write_manifest(pd.DataFrame([row(0), row(1, text='she said "no", and\nleft', licence="CC0", source="disk")]), path)
    whole = path.read_bytes()
    second = whole.index(b"mine/001")
    for length in range(second + 1, whole.index(b",CC0") + 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ManifestError):
            read_manifest(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no header"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a,a\r\n1,2\r\n", "two columns"),
        (b"a,b\r\n1,2,3\r\n", "line 2, 1: has 3 cells of 2"),
        (b"a,b\r\n1,2\r\n\r\n", "line 3: has 0 cells of 2"),
        (b'a,b\r\n1,"2\r\n', "not UTF-8 CSV"),
        (b"utterance_id;path;corpus\r\n", "missing"),
    ],
)
def test_files_that_are_no_manifest(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "manifest.csv").write_bytes(content)
    with pytest.raises(ManifestError, match=words):
        read_manifest(tmp_path / "manifest.csv")


def test_a_table_saved_by_other_programs_is_read(home: Path) -> None:
    """With a byte order mark, plain line ends and needless quotes."""
    path = home / "foreign.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row(0, text="Grüße"))
    assert read_manifest(path)["text"].tolist() == ["Grüße"]


def test_check_false_reads_what_would_be_refused(home: Path) -> None:
    path = home / "unchecked.csv"
    pd.DataFrame([row(0, style="odd", path="gone.wav")]).to_csv(path, index=False)
    with pytest.raises(ManifestError):
        read_manifest(path)
    assert read_manifest(path, check=False)["style"].tolist() == ["odd"]


# --- statistics


def test_statistics_by_hand() -> None:
    table = pd.DataFrame(
        [
            row(0, duration_s=1800.0, speaker="a"),
            row(1, duration_s=1800.0, speaker="b"),
            row(2, duration_s=900.0, speaker="a", style="sad"),
            row(3, duration_s=360.0, speaker="", split="test", style=""),
            row(4, duration_s=720.0, corpus="other", speaker="a", split="val"),
        ]
    )
    expected = pd.DataFrame(
        [
            ("mine", "train", "happy", 1.0, 2, 2),
            ("mine", "train", "sad", 0.25, 1, 1),
            ("mine", "test", "", 0.1, 1, 0),
            ("other", "val", "happy", 0.2, 1, 1),
        ],
        columns=["corpus", "split", "style", "hours", "clips", "speakers"],
    )
    assert_frame_equal(statistics(table), expected)
    paper = table_one(table)
    assert paper.index.tolist() == ["mine", "other", "Total"]
    assert paper.columns.tolist() == ["styles", "train", "val", "test"]
    assert paper.loc["mine"].tolist() == pytest.approx([2, 1.25, 0.0, 0.1])
    assert paper.loc["Total"].tolist() == pytest.approx([2, 1.25, 0.2, 0.1])


def test_table_one_names_the_paper_s_rows_as_such() -> None:
    cells = {"corpus": "esd", "utterance_id": "esd/0", "style": "sad", "duration_s": 1800.0}
    table = table_one(pd.DataFrame([row(0, **cells), row(1, duration_s=360.0)]))
    assert table.index.tolist() == ["esd", "esd (paper)", "mine", "Total", "Total (paper)"]
    assert table.loc["esd"].tolist() == pytest.approx([1, 0.5, 0, 0])
    assert table.loc["esd (paper)"].tolist() == [5, 11.4, 0.8, 1.3]
    assert table.loc["Total"].tolist() == pytest.approx([2, 0.6, 0, 0])  # without the paper's


def test_left_out_is_a_table() -> None:
    table = pd.DataFrame([row(0)])
    table.attrs["left_out"] = {"one": {"is not there": 3, "a song": 1}, "two": {}}
    assert manifests.left_out(table).to_numpy().tolist() == [["one", "is not there", 3], ["one", "a song", 1]]
    table.attrs["left_out"] = {"two": {}}
    assert manifests.left_out(table).columns.tolist() == ["corpus", "reason", "count"]


# --- corpora by name


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Two corpora, "one" and "two", with manifests; the second has a column of its own."""
    for name, extra in [("one", {}), ("two", {"rating": "5"})]:
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", noise(1), 16_000)
        cells = {"utterance_id": f"{name}/x", "corpus": name, **extra}
        write_manifest(pd.DataFrame([row(0, **cells)]), tmp_path / name / "manifest.csv")
    return tmp_path


def test_corpora_are_put_one_after_the_other(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_corpora("one+two", data_root)
    assert table["utterance_id"].tolist() == ["one/x", "two/x"]
    assert table["root"].tolist() == [str(data_root / "one"), str(data_root / "two")]
    assert table["rating"].tolist() == ["", "5"]
    monkeypatch.setenv("ESR_DATA", str(data_root))
    assert_frame_equal(load_corpora(["one", "two"]), table)
    assert [cut.load_audio().shape for cut in to_cuts(table)] == [(1, 16_000)] * 2


@pytest.mark.parametrize("names", ["", "one+", "one+one", [], "../one"])
def test_names_that_are_none(data_root: Path, names: str | list) -> None:
    with pytest.raises(CorpusError):
        load_corpora(names, data_root)


def test_errors_say_what_to_do(data_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESR_DATA", raising=False)
    with pytest.raises(CorpusError, match=r"data_root.*ESR_DATA.*1188976.*CC BY-NC-SA"):
        load_corpora("ravdess")
    with pytest.raises(CorpusError, match=r"no folder .*emodb.*emodb\.bilderbar\.info.*CC0"):
        load_corpora("emodb", data_root)
    with pytest.raises(CorpusError, match=r"unknown corpus 'three'.*ravdess.*manifest\.csv"):
        load_corpora("three", data_root)
    (data_root / "emodb").mkdir()
    with pytest.raises(CorpusError, match="nothing of the corpus 'emodb'.*bilderbar"):
        load_corpora("emodb", data_root)


def test_the_same_corpus_under_two_names_is_refused(data_root: Path) -> None:
    (data_root / "copy").mkdir()
    for name in ("a.wav", "manifest.csv"):
        (data_root / "copy" / name).write_bytes((data_root / "one" / name).read_bytes())
    with pytest.raises(CorpusError, match="share an utterance_id"):
        load_corpora("one+copy", data_root)


# --- cuts

FORMATS = {"wav": None, "flac": None, "ogg": "VORBIS", "opus": "OPUS", "mp3": None}


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (48_000, 2)])
def test_a_cut_is_its_part_of_the_file(tmp_path: Path, suffix: str, rate: int, channels: int) -> None:
    file = tmp_path / f"a.{suffix}"
    container = {"ogg": "OGG", "opus": "OGG"}.get(suffix)
    soundfile.write(file, noise(3, rate, channels), rate, format=container, subtype=FORMATS[suffix])
    cells = {"path": file.name, "start_s": 1.0001, "end_s": 2.5, "duration_s": 1.5}
    cut = to_cuts(pd.DataFrame([row(0, **cells)]).pipe(validate, tmp_path), tmp_path)[0]
    whole, _ = soundfile.read(file, dtype="float32", always_2d=True)
    first, last = round(1.0001 * rate), round(2.5 * rate)
    np.testing.assert_allclose(cut.load_audio(), whole[first:last].T, atol=1e-6)
    assert cut.sampling_rate == rate


def test_a_cut_carries_its_row(home: Path) -> None:
    table = validate(pd.DataFrame([row(0, style="sad", caption="slow, low", rating="5")]), home)
    cut = to_cuts(with_root(table, home))[0]
    assert cut.id == "mine/000" and cut.duration == 1.0
    assert cut.custom["utterance_id"] == "mine/000"
    assert (cut.custom["style"], cut.custom["caption"], cut.custom["rating"]) == ("sad", "slow, low", "5")
    assert not {"root", "path", "start_s"} & set(cut.custom)


def test_channels(home: Path) -> None:
    rows = [row(0, path="two.wav"), row(1, path="two.wav", channel=1), row(2)]
    both, right, mono = to_cuts(validate(pd.DataFrame(rows), home), home)
    audio, _ = soundfile.read(home / "two.wav", dtype="float32")
    np.testing.assert_allclose(both.load_audio(), audio.T)
    np.testing.assert_allclose(right.load_audio(), audio[:, 1:].T)
    assert mono.load_audio().shape == (1, 16_000)
    assert both.resample(16_000).load_audio().shape == (2, 16_000)
    assert both.truncate(offset=0.25, duration=0.5).load_audio().shape == (2, 24_000)


def test_an_end_past_the_last_sample_is_drawn_in(home: Path) -> None:
    table = validate(pd.DataFrame([row(0, start_s=0.5, end_s=1.04, duration_s=0.54)]), home)
    assert to_cuts(table, home)[0].load_audio().shape == (1, 8_000)


def test_a_clip_of_30_ms(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(0.03), 16_000)
    table = validate(pd.DataFrame([row(0, duration_s=0.03)]), tmp_path)
    assert to_cuts(table, tmp_path)[0].load_audio().shape == (1, 480)


def test_two_hours_are_read_by_the_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate, seconds, at = 48_000, 7200, 5400
    file = tmp_path / "long.wav"
    soundfile.write(file, noise(1, rate), rate, subtype="PCM_16")
    sound = file.read_bytes()[44:]
    with file.open("r+b") as wav:  # a sparse file: two hours of zeros, and one second of noise at 1.5 h
        size = seconds * rate * 2
        wav.seek(4)
        wav.write(struct.pack("<I", size + 36))
        wav.seek(40)
        wav.write(struct.pack("<I", size))
        wav.write(bytes(len(sound)))
        wav.seek(44 + at * rate * 2)
        wav.write(sound)
        wav.truncate(44 + size)
    asked = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile,
        "read",
        lambda self, frames=-1, **more: asked.append(frames) or read(self, frames, **more),
    )
    cells = {"path": "long.wav", "start_s": at, "end_s": at + 1, "duration_s": 1}
    cut = to_cuts(validate(pd.DataFrame([row(0, **cells)]), tmp_path), tmp_path)[0]
    assert asked == []  # neither validation nor the cut has read a sample
    assert (cut.load_audio()[0] * 32768).astype("<i2").tobytes() == sound
    assert asked == [rate]


def test_cuts_of_what_cannot_be_read_are_refused(home: Path) -> None:
    table = pd.DataFrame([row(0), row(1, path="gone.wav"), row(2, path="two.wav", channel=5)])
    table = manifests.typed(table)[0]
    with pytest.raises(ManifestError) as caught:
        to_cuts(table, home)
    assert [(problem.row, problem.column) for problem in caught.value.problems] == [
        (3, "path"),
        (4, "channel"),
    ]
    with pytest.raises(ValueError, match="corpus folder"):
        to_cuts(table)
