"""IEMOCAP from its original layout: labels, speakers, transcripts, and what is left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from esr_utils.corpora import CorpusError, iemocap, prepare
from esr_utils.manifests import load_corpora, validate
from esr_utils.styles import CORPUS_STYLES

HEADER = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\r\n\r\n"
CODES = ("ang", "hap", "exc", "sad", "neu", "fru", "fea", "sur", "dis", "oth", "xxx")


def label(name: str, code: str) -> str:
    """An entry of an EmoEvaluation file, with what three raters and the speaker said."""
    return (
        f"[6.2901 - 8.2357]\t{name}\t{code}\t[2.5000, 2.5000, 2.5000]\r\n"
        "C-E2:\tNeutral;\t()\r\nC-E3:\tNeutral; Anger;\t(ang)\r\nC-F1:\tNeutral;\t()\r\n"
        "A-E3:\tval 3; act 2; dom  2;\t()\r\nA-F1:\tval 3; act 2; dom  1;\t()\r\n\r\n"
    )


def write(root: Path, session: int, dialog: str, labels: str, spoken: str | None = None) -> None:
    folder = root / f"Session{session}" / "dialog"
    for name, text in (("EmoEvaluation", HEADER + labels), ("transcriptions", spoken)):
        if text is not None:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{dialog}.txt").write_bytes(text.encode("latin-1"))


def speak(root: Path, *names: str) -> None:
    """Utterances of 0.5 s where they belong, dialog by dialog."""
    for name in names:
        wav = root / f"Session{int(name[3:5])}" / "sentences" / "wav" / name.rpartition("_")[0] / f"{name}.wav"
        wav.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(wav, 0.1 * np.random.default_rng(0).standard_normal(8_000), 16_000)


def test_an_utterance(tmp_path: Path) -> None:
    write(
        tmp_path,
        3,
        "Ses03F_script01_1",
        label("Ses03F_script01_1_M004", "fru"),
        "Ses03F_script01_1_F003 [006.0000-008.2357]: No.\r\nM: [BREATHING]\r\n"
        "Ses03F_script01_1_M004 [006.2901-008.2357]: You infuriate me: caf\xe9, o'clock [LAUGHTER].\r\n",
    )
    speak(tmp_path, "Ses03F_script01_1_M004")
    manifest = validate(iemocap.prepare(tmp_path), tmp_path)
    assert manifest.attrs["left_out"] == {}
    (row,) = manifest.to_dict("records")
    assert {name: row[name] for name in row if name not in ("start_s", "end_s", "channel", "licence")} == {
        "utterance_id": "iemocap/Ses03F_script01_1_M004",
        "path": "Session3/sentences/wav/Ses03F_script01_1/Ses03F_script01_1_M004.wav",
        "corpus": "iemocap",
        "split": "train",
        "speaker": "Ses03M",  # the man speaks, though the woman wears the markers
        "gender": "male",
        "language": "en",
        "style": "frustrated",
        "style_raw": "fru",
        "intensity": "",
        "caption": "",
        "text": "You infuriate me: café, o'clock [LAUGHTER].",
        "duration_s": 0.5,
        "source": "IEMOCAP: Session3/sentences/wav/Ses03F_script01_1/Ses03F_script01_1_M004.wav",
    }


def test_nine_styles_and_two_codes_without_one(tmp_path: Path) -> None:
    names = [f"Ses01M_impro0{1 + i % 2}_F{i:03}" for i in range(11)]
    for dialog in ("Ses01M_impro01", "Ses01M_impro02"):
        labels = [label(name, code) for name, code in zip(names, CODES, strict=True) if name.startswith(dialog)]
        write(tmp_path, 1, dialog, "".join(labels))
    speak(tmp_path, *names)
    manifest = iemocap.prepare(tmp_path)
    assert dict(zip(manifest["style_raw"], manifest["style"], strict=True)) == CORPUS_STYLES["iemocap"]
    assert manifest["style"].nunique() == 9 and set(manifest["split"]) == {"train"}
    assert set(manifest["speaker"]) == {"Ses01F"} and set(manifest["gender"]) == {"female"}
    assert set(manifest["text"]) == {""}  # no transcripts
    assert manifest.attrs["left_out"] == {
        "an emotion that is none of the nine (oth)": 1,
        "the raters do not agree (xxx)": 1,
    }


def test_every_session_is_read_in_a_folder_within_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "iemocap" / "IEMOCAP_full_release"
    for session in range(1, 6):
        name = f"Ses0{session}F_impro01_F000"
        write(root, session, f"Ses0{session}F_impro01", label(name, "sad"))
        speak(root, name)
    # what single raters wrote lies in folders beside, and what macOS left behind in between
    other = root / "Session1" / "dialog" / "EmoEvaluation" / "Categorical" / "Ses01F_impro01_e2_cat.txt"
    other.parent.mkdir()
    other.write_text("Ses01F_impro01_F000 :Anger; ()\n")
    (other.parents[1] / "._Ses01F_impro01.txt").write_bytes(b"\x00\x05\x16\x07")
    manifest = load_corpora("iemocap", tmp_path)
    assert manifest["speaker"].tolist() == [f"Ses0{session}F" for session in range(1, 6)]
    assert manifest["path"][0].startswith("IEMOCAP_full_release/Session1/sentences/wav/")
    assert manifest.attrs["left_out"] == {"iemocap": {}}


def test_every_entry_is_kept_or_left_out_with_a_reason(tmp_path: Path) -> None:
    dialog = "Ses02F_impro01"
    malformed = [
        "[6.2901 - 8.2357]\tSes02F_impro01_F009\r\n",
        "[6.2901 - 8.2357]\tfamous last words\tneu\t[2.5000, 2.5000, 2.5000]\r\n",
        "[6.2901 - 8.2357]\tSes02X_impro01_F009\tneu\t[2.5000, 2.5000, 2.5000]\r\n",
        "6.2901 - 8.2357]\tSes02F_impro01_F009\tneu\t[2.5000, 2.5000, 2.5000]\r\n",
        "Ses02F_impro01_F009\tneu\r\n",
    ]
    labels = [
        "  " + label(f"{dialog}_F000", "ang"),
        label(f"{dialog}_F001", "joy"),
        label(f"{dialog}_F002", "hap"),  # no audio
        label(f"{dialog}_F003", "hap"),  # empty audio
        label(f"{dialog}_F000", "sad"),
        *malformed,
    ]
    write(tmp_path, 2, dialog, "".join(labels))
    speak(tmp_path, *(f"{dialog}_{last}" for last in ("F000", "F001", "F003", "MXX1")))
    wavs = f"Session2/sentences/wav/{dialog}/{dialog}"
    (tmp_path / f"{wavs}_F003.wav").write_bytes(b"")
    manifest = iemocap.prepare(tmp_path)
    assert manifest["utterance_id"].tolist() == [f"iemocap/{dialog}_F000"]
    assert manifest["style"].tolist() == ["angry"]  # as first named
    file = f"Session2/dialog/EmoEvaluation/{dialog}.txt line"
    assert manifest.attrs["left_out_files"] == {
        f"{wavs}_F001.wav": "unknown emotion 'joy'",
        f"{wavs}_F002.wav": "is not there",
        f"{wavs}_F003.wav": "is empty (0 bytes)",
        f"{file} 31": "names an utterance for the second time",
        f"{file} 38": "malformed line",
        f"{file} 39": "malformed line",
        f"{file} 40": "malformed line",
        f"{file} 41": "malformed line",
        f"{file} 42": "malformed line",
        f"{wavs}_MXX1.wav": "not in the annotation files",
    }


def test_a_second_copy_is_left_out(tmp_path: Path) -> None:
    for copy in ("a", "b"):
        write(tmp_path / copy, 1, "Ses01F_impro01", label("Ses01F_impro01_F000", "sad"))
        speak(tmp_path / copy, "Ses01F_impro01_F000")
    manifest = iemocap.prepare(tmp_path)
    assert manifest["path"].tolist() == ["a/Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav"]
    assert manifest.attrs["left_out"] == {"names an utterance for the second time": 1}


def test_a_folder_without_it_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="nothing of the corpus 'iemocap'.*sail.usc.edu.*EmoEvaluation"):
        prepare("iemocap", tmp_path)
