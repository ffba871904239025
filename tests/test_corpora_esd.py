"""ESD from its original layouts: two of them, three encodings, lines that do not hold, and one rule for the splits."""

from __future__ import annotations

import codecs
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from esr_utils.corpora import CorpusError, esd, prepare
from esr_utils.manifests import load_corpora, validate

EMOTIONS = ("Neutral", "Angry", "Happy", "Sad", "Surprise")  # in the order of their numbers
NUMBERS = (1, 20, 21, 50, 51, 350)  # the ends of evaluation, test and train
FOLDERS = dict(zip(NUMBERS, ("evaluation", "evaluation", "test", "test", "train", "train"), strict=True))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("sound") / "a.wav"
    soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal(4_800), 16_000)
    return file.read_bytes()


def put(root: Path, sound: bytes, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(sound)


def tree(root: Path, sound: bytes, folders: bool, speakers: tuple[str, ...] = ("0011", "0015")) -> None:
    """Two speakers, five emotions, the clips at the splits' ends; with the folders of the splits or without."""
    for speaker in speakers:
        for block, emotion in enumerate(EMOTIONS):
            for number, folder in FOLDERS.items():
                middle = f"{emotion}/{folder}" if folders else emotion
                put(root, sound, f"{speaker}/{middle}/{speaker}_{350 * block + number:06}.wav")


def test_both_layouts_say_the_same(tmp_path: Path, sound: bytes) -> None:
    tree(tmp_path / "foldered" / "Emotion Speech Dataset", sound, folders=True)
    tree(tmp_path / "flat", sound, folders=False)
    foldered, flat = (validate(esd.prepare(tmp_path / name), tmp_path / name) for name in ("foldered", "flat"))
    assert foldered.attrs["left_out"] == flat.attrs["left_out"] == {}
    columns = [column for column in foldered.columns if column not in ("path", "source")]
    pd.testing.assert_frame_equal(foldered[columns], flat[columns])
    assert flat.groupby("split").size().to_dict() == {"test": 20, "train": 20, "val": 20}
    assert flat["style"].value_counts().to_dict() == dict.fromkeys(
        ("angry", "happy", "neutral", "sad", "surprised"), 12
    )
    row = foldered.set_index("utterance_id").loc["esd/0015_000371"]
    assert row["path"] == "Emotion Speech Dataset/0015/Angry/test/0015_000371.wav"
    assert row[["split", "speaker", "gender", "language", "style", "style_raw", "duration_s"]].tolist() == [
        "test", "0015", "female", "en", "angry", "Angry", 0.3,
    ]  # fmt: skip
    assert set(flat[flat["speaker"] == "0011"]["gender"]) == {"male"}


def test_the_rule_is_that_of_the_sorted_names() -> None:
    """The published code sorts the 350 names of an emotion and takes the first 20, the next 30, and the rest."""
    for block in range(5):
        names = sorted(f"0011_{350 * block + i:06}.wav" for i in range(1, 351))
        by_place = ["val"] * 20 + ["test"] * 30 + ["train"] * 300
        assert [esd.split_of(int(name[5:11])) for name in names] == by_place


def test_a_missing_clip_moves_no_other(tmp_path: Path, sound: bytes) -> None:
    tree(tmp_path, sound, folders=False)
    before = esd.prepare(tmp_path).set_index("utterance_id")["split"]
    (tmp_path / "0011" / "Neutral" / "0011_000001.wav").unlink()
    after = esd.prepare(tmp_path).set_index("utterance_id")["split"]
    pd.testing.assert_series_equal(after, before.drop("esd/0011_000001"))


def test_the_folder_has_the_last_word(tmp_path: Path, sound: bytes) -> None:
    put(tmp_path, sound, "0012/Sad/train/0012_001051.wav")
    assert esd.prepare(tmp_path)["split"].tolist() == ["train"]


def test_what_is_left_out(tmp_path: Path, sound: bytes) -> None:
    put(
        tmp_path,
        sound,
        "0011/Angry/0011_000351.wav",
        "0011/Angry/evaluation/0011_000351.wav",
        "0011/Fear/0011_000352.wav",
        "0011/Angry/0011_000000.wav",
        "0011/Angry/0011_001751.wav",
        "0011/Angry/._0011_000353.wav",
        "0011/Angry/Notes.WAV",
        "0001/Angry/0001_000351.wav",
        "0021/Angry/0021_000351.wav",
    )
    (tmp_path / "0011/Angry/0011_000354.wav").write_bytes(b"RIFF")
    manifest = esd.prepare(tmp_path)
    assert manifest["path"].tolist() == ["0011/Angry/0011_000351.wav"]
    files = dict(manifest.attrs["left_out_files"])
    assert "not readable" in files.pop("0011/Angry/0011_000354.wav")
    assert Counter(files.values()) == {
        "same name as another file": 1,
        "unknown emotion 'Fear'": 1,
        "name is not of ESD": 4,
        "not an English speaker": 2,
    }


# --- the text files

TEXTS = "0011_000001\tHe said: “caf\xe9”.\tNeutral\r\n0011_000002\tThe nine, the eggs, I keep.\tNeutral\r\n"


@pytest.mark.parametrize(
    ("data", "first"),
    [
        (TEXTS.encode(), "He said: “café”."),
        (TEXTS.encode("utf-8-sig"), "He said: “café”."),
        (TEXTS.encode("utf-16"), "He said: “café”."),
        (codecs.BOM_UTF16_BE + TEXTS.encode("utf-16-be"), "He said: “café”."),
        (TEXTS.encode("utf-16-le"), "He said: “café”."),
        (TEXTS.encode("utf-16-be"), "He said: “café”."),
        (TEXTS.replace("“", '"').replace("”", '"').encode("latin-1"), 'He said: "café".'),
        (TEXTS.encode().replace(b"\t", b"\t\0", 1), "He said: “café”."),  # a stray NUL does not make it UTF-16
        (TEXTS.replace("“", "").replace("”", "\x85").encode("latin-1"), "He said: café\x85."),  # not a line's end
    ],
    ids=["utf-8", "utf-8-bom", "utf-16", "utf-16-be-bom", "utf-16-le", "utf-16-be", "latin-1", "NUL", "next line"],
)
def test_encodings(tmp_path: Path, sound: bytes, data: bytes, first: str) -> None:
    put(tmp_path, sound, "0011/Neutral/0011_000001.wav", "0011/Neutral/0011_000002.wav")
    (tmp_path / "0011" / "0011.txt").write_bytes(data)
    manifest = esd.prepare(tmp_path)
    assert manifest["text"].tolist() == [first, "The nine, the eggs, I keep."]
    assert manifest.attrs["left_out"] == {}


def test_lines_that_do_not_hold(tmp_path: Path, sound: bytes) -> None:
    lines = [
        ("0013_000351\tI am Sad.\tAngry", "I am Sad."),
        ("0013_000352 How do you do? Angry", "How do you do?"),  # blanks for tabs
        ("  0013_000353   I am Angry   Angry  ", "I am Angry"),
        ("0013_000354\tNo emotion.", "No emotion."),
        ("0013_000355\t\tAngry", ""),  # no text
        ("0013_000356\t  Blanks.  \tAngry\textra", "Blanks."),
        ("0013_000357 It makes me Sadder", "It makes me Sadder"),
    ]
    bad = ["0013_000358", "just some words", "0001_000358\tNi hao.\tAngry", "0013_000351\tAgain.\tAngry"]
    put(tmp_path, sound, *(f"0013/Angry/0013_{n:06}.wav" for n in range(351, 359)))
    text = "\n".join(["", *(line for line, _ in lines), *bad, "0013_000700\tNo clip.\tAngry"])
    (tmp_path / "0013" / "0013.txt").write_text(text)
    (tmp_path / "0001").mkdir()
    (tmp_path / "0001" / "0001.txt").write_bytes("0001_000001\t你好。\t中立\n".encode("gb2312"))  # Mandarin: not read
    (tmp_path / "ReadMe.txt").write_text("about")
    manifest = esd.prepare(tmp_path)
    assert manifest["text"].tolist() == [*(text for _, text in lines), ""]
    assert manifest.attrs["left_out_files"] == {
        "0013/0013.txt line 9": "malformed line",
        "0013/0013.txt line 10": "malformed line",
        "0013/0013.txt line 11": "malformed line",
        "0013/0013.txt line 12": "names a clip for the second time",
        "0013/0013.txt line 13": "names a clip that is not kept or not there",
    }


def test_a_folder_without_it_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nothing of the corpus 'esd'.*HLTSingapore.*research only"):
        prepare("esd", tmp_path)


def test_it_loads_by_name(tmp_path: Path, sound: bytes) -> None:
    tree(tmp_path / "esd", sound, folders=True, speakers=("0020",))
    assert len(load_corpora("esd", tmp_path)) == 30
