"""Corpora: original layouts against prepared copies; what is left out is named; folders of one's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from scipy.signal import resample_poly

from esr_utils.corpora import (
    CORPORA,
    DEMO_FOLDER,
    CorpusError,
    corpus_module,
    emodb,
    folder,
    how_to_get,
    nemo,
    ravdess,
)
from esr_utils.manifest_schema import ManifestError
from esr_utils.manifests import load_corpora, read_table, to_cuts, validate, write_manifest
from esr_utils.styles import CORPUS_STYLES, STYLES

PROJECT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ESR_DATA") or PROJECT.parent / "shared" / "data")
AGREED = ["split", "speaker", "gender", "language", "style", "style_raw", "intensity", "text", "licence"]


def noise(seconds: float = 0.2, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels)).astype("float32")


def put(root: Path, *paths: str, rate: int = 16_000) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / path, noise(rate=rate), rate)


def cells(manifest: pd.DataFrame, name: str) -> dict:
    return manifest.set_index("utterance_id").loc[name].to_dict()


# --- the registry


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_says_where_to_get_it(name: str) -> None:
    module = corpus_module(name)
    assert all(word in module.__doc__ for word in ("Where:", "Licence:", "Layout:"))
    assert module.SOURCE in how_to_get(name) and module.LICENCE in how_to_get(name)


def test_an_unknown_corpus_is_named() -> None:
    with pytest.raises(CorpusError, match="unknown corpus 'os'"):
        corpus_module("os")


# --- the demo corpus


def test_the_demo_corpus_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ESR_DATA", raising=False)
    manifest = load_corpora("demo")
    assert len(manifest) == 880
    assert manifest["style"].value_counts().to_dict() == dict.fromkeys(STYLES, 40)
    assert manifest.groupby("split").size().to_dict() == {"test": 440, "train": 330, "val": 110}
    assert manifest.groupby("speaker")["split"].nunique().max() == 1  # no voice in two splits
    assert manifest["style"].equals(manifest["style_raw"].map(CORPUS_STYLES["demo"]))
    files = {file.relative_to(DEMO_FOLDER).as_posix() for file in DEMO_FOLDER.rglob("*.opus")}
    assert files == set(manifest["path"])


def test_the_demo_corpus_says_what_its_labels_are() -> None:
    text = (DEMO_FOLDER / "README.md").read_text(encoding="utf-8").lower()
    assert "synthetic" in text and "rules, not human acting" in text


# --- RAVDESS


def test_ravdess_names(tmp_path: Path) -> None:
    put(
        tmp_path,
        "Actor_15/03-01-07-02-02-01-15.wav",
        "Actor_22/03-01-01-01-01-02-22.wav",
        "Actor_02/03-01-02-01-02-01-02.WAV",
        rate=48_000,
    )
    manifest = ravdess.prepare(tmp_path)
    assert manifest.attrs["left_out"] == {}
    assert len(validate(manifest, tmp_path)) == 3
    first = cells(manifest, "ravdess/03-01-07-02-02-01-15")
    assert all(pd.isna(first.pop(column)) for column in ("start_s", "end_s", "channel"))
    assert first == {
        "path": "Actor_15/03-01-07-02-02-01-15.wav",
        "corpus": "ravdess",
        "split": "val",
        "speaker": "actor_15",
        "gender": "male",
        "language": "en",
        "style": "disgusted",
        "style_raw": "disgust",
        "intensity": "strong",
        "caption": "",
        "text": "Dogs are sitting by the door",
        "duration_s": 0.2,
        "licence": "CC BY-NC-SA 4.0",
        "source": "Zenodo record 1188976: Actor_15/03-01-07-02-02-01-15.wav",
    }
    other = cells(manifest, "ravdess/03-01-01-01-01-02-22")
    assert (other["split"], other["gender"], other["style"], other["intensity"]) == (
        "test",
        "female",
        "neutral",
        "normal",
    )
    assert cells(manifest, "ravdess/03-01-02-01-02-01-02")["split"] == "train"


def test_what_ravdess_leaves_out(tmp_path: Path) -> None:
    put(
        tmp_path,
        "Actor_07/03-01-03-01-02-01-07.wav",
        "Actor_07/03-01-03-01-02-02-07.wav",  # the same recording
        "Actor_07/03-02-03-01-02-01-07.wav",  # a song
        "Actor_07/01-01-03-01-02-01-07.wav",  # the sound of a video
        "Actor_07/03-01-09-01-02-01-07.wav",  # no such emotion
        "Actor_07/03-01-03-01-02-01-25.wav",  # no such actor
        "Actor_07/notes.wav",
        "again/Actor_07/03-01-03-01-02-01-07.wav",
    )
    (tmp_path / "Actor_07/03-01-05-01-02-01-07.wav").write_bytes(b"RIFF")
    manifest = ravdess.prepare(tmp_path)
    assert manifest["path"].tolist() == ["Actor_07/03-01-03-01-02-01-07.wav"]
    reasons = manifest.attrs["left_out"]
    assert sum(reasons.values()) == len(manifest.attrs["left_out_files"]) == 8
    unreadable = manifest.attrs["left_out_files"]["Actor_07/03-01-05-01-02-01-07.wav"]
    assert reasons == {
        "same recording as another file": 1,
        "song": 1,
        "not the audio-only modality": 1,
        "name is not of RAVDESS": 3,
        "same name as another file": 1,
        unreadable: 1,
    }
    assert "not readable" in unreadable


def test_the_repeated_recording_stays_where_its_twin_is_missing(tmp_path: Path) -> None:
    put(tmp_path, "Actor_07/03-01-03-01-02-02-07.wav")
    assert len(ravdess.prepare(tmp_path)) == 1


# --- EmoDB


def test_emodb_names(tmp_path: Path) -> None:
    put(tmp_path, "wav/03a01Fa.wav", "wav/13b03Tb.wav", "wav/16b10Wa.wav", "wav/15a05Nb.wav")
    put(tmp_path, "wav/17a01Fa.wav", "wav/03a03Fa.wav", "wav/03a01Xa.wav", "copy/03a01Fa.wav")
    manifest = emodb.prepare(tmp_path)
    assert manifest.attrs["left_out"] == {"name is not of EmoDB": 3, "same name as another file": 1}
    found = manifest[["utterance_id", "split", "speaker", "gender", "style_raw", "style"]].to_numpy().tolist()
    assert found == [
        ["emodb/03a01Fa", "train", "spk_03", "male", "happiness", "happy"],
        ["emodb/13b03Tb", "val", "spk_13", "female", "sadness", "sad"],
        ["emodb/15a05Nb", "test", "spk_15", "male", "neutral", "neutral"],
        ["emodb/16b10Wa", "test", "spk_16", "female", "anger", "angry"],
    ]
    assert len(validate(manifest[manifest["speaker"] != "spk_03"], tmp_path)) == 3


# --- nEMO

TSV_HEADER = "file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage\n"


def tsv(root: Path, rows: Sequence[Sequence[str]]) -> None:
    """data.tsv as its authors wrote it, blanks before the speaker included."""
    lines = [
        f"{name}.wav\t{emotion}\t{text}\t{text.lower()}\t        {speaker}\t{gender}\t23\n"
        for name, emotion, text, speaker, gender in rows
    ]
    (root / "data.tsv").write_text(TSV_HEADER + "".join(lines), encoding="utf-8")


def test_nemo_labels(tmp_path: Path) -> None:
    put(
        tmp_path,
        *(f"samples/{name}.wav" for name in ("KS0_fear_38", "KD0_anger_1", "WR0_sadness_2", "WR0_joy_3", "stray")),
    )
    rows = [
        ("WR0_sadness_2", "sadness", "Nie waśńmy się ze sobą.", "WR0", "male"),
        ("KS0_fear_38", "fear", '„Ród smoka” to "serial", telewizyjny.', "KS0", "male"),
        ("KD0_anger_1", "anger", "Lubię czytać przed snem.", "KD0", "female"),
        ("KD0_anger_1", "anger", "Lubię czytać przed snem.", "KD0", "female"),
        ("WR0_joy_3", "joy", "Chodźmy w tango.", "WR0", "male"),
        ("IC0_fear_5", "fear", "Chodźmy w tango.", "IC0", "female"),
    ]
    tsv(tmp_path, rows)
    manifest = validate(nemo.prepare(tmp_path), tmp_path)
    assert manifest[["utterance_id", "split", "speaker", "style", "text"]].to_numpy().tolist() == [
        ["nemo/KD0_anger_1", "val", "KD0", "angry", "Lubię czytać przed snem."],
        ["nemo/KS0_fear_38", "test", "KS0", "fearful", '„Ród smoka” to "serial", telewizyjny.'],
        ["nemo/WR0_sadness_2", "train", "WR0", "sad", "Nie waśńmy się ze sobą."],
    ]
    assert manifest.attrs["left_out_files"] == {
        "data.tsv: KD0_anger_1.wav": "named twice in data.tsv",
        "samples/WR0_joy_3.wav": "unknown emotion 'joy'",
        "samples/IC0_fear_5.wav": "is not there",
        "samples/stray.wav": "not in data.tsv",
    }


def test_nemo_without_its_labels(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no .*data\.tsv.*amu-cai/nEMO"):
        nemo.prepare(tmp_path)
    (tmp_path / "data.tsv").write_text("file_id\temotion\n")
    with pytest.raises(CorpusError, match="no column gender, raw_text, speaker_id"):
        nemo.prepare(tmp_path)


# --- original layouts against the prepared copies


def copied(name: str, ids: Sequence[str], root: Path, place: str, rate: int) -> pd.DataFrame:
    """Writes clips of a copy as WAV at another rate, where they were first; returns the copy's rows."""
    file = SHARED / name / "manifest.csv"
    if not file.is_file():
        pytest.skip(f"needs the prepared corpus {file.parent}; set $ESR_DATA to the folder that holds it")
    table = read_table(file).set_index("utterance_id")
    rows = table.loc[[f"{name}/{identity}" for identity in ids]]
    for identity, row in zip(ids, rows.itertuples(), strict=True):
        audio, given = soundfile.read(SHARED / name / row.path)
        target = root / place.format(name=identity, speaker=row.speaker.capitalize())
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, resample_poly(audio, rate, given), rate)
    return rows


def assert_agree(prepared: pd.DataFrame, rows: pd.DataFrame) -> None:
    prepared = prepared.set_index("utterance_id")
    assert sorted(prepared.index) == sorted(rows.index)
    pd.testing.assert_frame_equal(prepared.loc[rows.index, AGREED], rows[AGREED])
    np.testing.assert_allclose(prepared.loc[rows.index, "duration_s"], rows["duration_s"].astype(float), atol=0.002)


def test_ravdess_agrees_with_its_copy(tmp_path: Path) -> None:
    ids = [
        f"03-01-{emotion:02}-01-01-01-{actor:02}" for emotion, actor in zip(range(1, 9), range(10, 24, 2), strict=False)
    ]
    ids += ["03-01-03-01-02-01-07", "03-01-08-02-02-02-24"]
    rows = copied("ravdess", ids, tmp_path, "{speaker}/{name}.wav", 48_000)
    put(tmp_path, "Actor_07/03-01-03-01-02-02-07.wav")
    assert_agree(load_corpora("ravdess", _as_root(tmp_path, "ravdess")), rows)


def test_emodb_agrees_with_its_copy(tmp_path: Path) -> None:
    ids = [
        "03a01Fa",
        "08a02La",
        "09a01Ea",
        "10a04Wa",
        "11a05Fb",
        "12a01Wc",
        "13a07Na",
        "14b01Na",
        "15b09Ac",
        "16b10Tb",
    ]
    rows = copied("emodb", ids, tmp_path, "wav/{name}.wav", 44_100)
    assert_agree(load_corpora("emodb", _as_root(tmp_path, "emodb")), rows)


def test_nemo_agrees_with_its_copy(tmp_path: Path) -> None:
    ids = [
        "EB0_anger_38",
        "IC0_fear_5",
        "KD0_happiness_2",
        "KS0_neutral_3",
        "MK0_sadness_4",
        "MP0_surprised_30",
        "WR0_fear_26",
    ]
    rows = copied("nemo", ids, tmp_path, "samples/{name}.wav", 44_100)
    tsv(
        tmp_path,
        [(i, r.style_raw, r.text, r.speaker, r.gender) for i, r in zip(ids, rows.itertuples(), strict=True)],
    )
    assert_agree(load_corpora("nemo", _as_root(tmp_path, "nemo")), rows)


def _as_root(original: Path, name: str) -> Path:
    """A data_root in which the corpus `name` is the folder `original`."""
    root = original.parent / f"{original.name}_root"
    root.mkdir()
    (root / name).symlink_to(original)
    return root


@pytest.mark.parametrize("name", ["ravdess", "emodb", "nemo"])
def test_the_map_of_styles_is_that_of_the_copies(name: str) -> None:
    file = SHARED / name / "manifest.csv"
    if not file.is_file():
        pytest.skip(f"needs the prepared corpus {file.parent}; set $ESR_DATA to the folder that holds it")
    table = read_table(file)
    assert dict(zip(table["style_raw"], table["style"], strict=True)) == CORPUS_STYLES[name]


# --- a folder of one's own


def test_a_folder_without_labels(tmp_path: Path) -> None:
    home = tmp_path / "my calls"
    put(home, "a.wav", "day 1/ä.flac", "day 1/b.WAV", "x.wav", "x.mp3")
    soundfile.write(home / "c.opus", noise(1, 48_000, 2), 48_000, format="OGG", subtype="OPUS")
    soundfile.write(home / "eight.ogg", noise(1, 8_000), 8_000)
    (home / "notes.txt").write_text("not audio")
    manifest = folder.prepare(home)
    assert manifest["utterance_id"].tolist() == [
        "my calls/a",
        "my calls/c",
        "my calls/day 1/b",
        "my calls/day 1/ä",
        "my calls/eight",
        "my calls/x.mp3",
        "my calls/x.wav",
    ]
    assert set(manifest["split"]) == {"test"} and set(manifest["style"]) == {""}
    write_manifest(manifest, home / "manifest.csv")
    loaded = load_corpora("my calls", tmp_path)
    shapes = {cut.id: cut.load_audio().shape for cut in to_cuts(loaded)}
    assert shapes["my calls/c"] == (2, 48_000) and shapes["my calls/eight"] == (1, 8_000)


def test_a_folder_goes_on_without_what_it_cannot_use(tmp_path: Path) -> None:
    put(tmp_path, "good.wav", ".hidden/h.wav", "._good.wav", "line\nbreak.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "corrupt.flac").write_bytes(b"fLaC" + bytes(100))
    soundfile.write(tmp_path / "nothing.wav", noise(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), 16_000)
    (tmp_path / "folder.wav").mkdir()
    manifest = folder.prepare(tmp_path)
    assert manifest["path"].tolist() == ["good.wav", "nan.wav", "silent.wav"]  # headers do not tell
    named = {"._good.wav", ".hidden/h.wav", "corrupt.flac", "empty.wav", "line\nbreak.wav", "nothing.wav"}
    assert set(manifest.attrs["left_out_files"]) == named
    assert manifest.attrs["left_out"]["hidden file"] == 2
    manifest = folder.prepare(tmp_path, read_data=True)
    assert manifest["path"].tolist() == ["good.wav"]
    assert "NaN" in manifest.attrs["left_out_files"]["nan.wav"]
    assert "silent" in manifest.attrs["left_out_files"]["silent.wav"]


def test_a_folder_with_labels(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "sub/b.wav", "unlabelled.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "labels.csv").write_text(
        "path,style,caption,speaker,split,start_s,end_s,mood\n"
        './a.wav,sad,"slow, low",ana,train,,0.1,7\n'
        "a.wav,happy,,ana,train,0.1,,8\n"
        "sub/b.wav,,a tired voice,ben,,,,\n"
        "gone.wav,sad,,,,,,\n"
        "../outside.wav,sad,,,,,,\n"
        "empty.wav,sad,,,,,,\n",
        encoding="utf-8",
    )
    manifest = validate(folder.prepare(tmp_path), tmp_path)
    name = tmp_path.name
    columns = ["utterance_id", "path", "split", "speaker", "style", "caption", "duration_s", "mood"]
    assert manifest[columns].to_numpy().tolist() == [
        [f"{name}/a#1", "a.wav", "train", "ana", "sad", "slow, low", 0.1, "7"],
        [f"{name}/a#2", "a.wav", "train", "ana", "happy", "", 0.1, "8"],
        [f"{name}/sub/b", "sub/b.wav", "test", "ben", "", "a tired voice", 0.2, ""],
    ]
    assert manifest.attrs["left_out_files"] == {
        "empty.wav": "is empty (0 bytes)",
        "../outside.wav": "labelled, but no audio file in the folder",
        "gone.wav": "labelled, but no audio file in the folder",
        "unlabelled.wav": "not named in the labels",
    }


def test_labels_from_elsewhere_may_name_corpus_and_id(tmp_path: Path) -> None:
    put(tmp_path / "audio", "a.wav")
    labels = tmp_path / "my labels.csv"
    labels.write_text("path,corpus,utterance_id\na.wav,mine,mine/first\n")
    manifest = validate(folder.prepare(tmp_path / "audio", labels), tmp_path / "audio")
    assert manifest[["utterance_id", "corpus"]].to_numpy().tolist() == [["mine/first", "mine"]]


def test_labels_that_cannot_be_used(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    labels = tmp_path / "labels.csv"
    labels.write_text("file,style\na.wav,sad\n")
    with pytest.raises(CorpusError, match="no column 'path'"):
        folder.prepare(tmp_path)
    labels.write_text("path,start_s\na.wav,soon\n")
    with pytest.raises(ManifestError, match="start_s: 'soon' is not a number"):
        folder.prepare(tmp_path)
    labels.write_text("path,style\na.wav,gloomy\n")
    with pytest.raises(ManifestError, match="'gloomy' is not one of the 22 styles"):
        write_manifest(folder.prepare(tmp_path), tmp_path / "manifest.csv")
    assert not (tmp_path / "manifest.csv").exists()
    with pytest.raises(CorpusError, match="no folder"):
        folder.prepare(tmp_path / "nowhere")
