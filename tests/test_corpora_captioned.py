"""Captioned corpora: small trees in each layout, what is malformed in them, and SECap's real clips."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from esr_utils import captions
from esr_utils.corpora import CorpusError, captioned, gigaspeech_m, promptspeech, secap_test, textrolspeech, zhvoice
from esr_utils.corpora.speechcraft import description_of, labels_of
from esr_utils.manifests import load_corpora, read_table, validate

PROJECT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ESR_DATA") or PROJECT.parent / "shared" / "data")


def put(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        noise = 0.1 * np.random.default_rng(0).standard_normal(3200)
        soundfile.write(root / path, noise, 16_000)


def rows_of(manifest: pd.DataFrame, *columns: str) -> list[list]:
    return manifest[["utterance_id", *columns]].to_numpy().tolist()


# --- TextrolSpeech and PromptSpeech

HEADER = "num,wav_fp,item_name,gender,pitch,tempo,energy,emotion,style_prompt,content_prompt"


def test_textrolspeech(tmp_path: Path) -> None:
    put(tmp_path, "emotion/ESD/0011/0011_000351.wav", "libritts/84/84_1.wav", "libritts/84/84_2.wav", "stray.wav")
    (tmp_path / "cut.wav").write_bytes(b"RIFF")
    lines = [
        HEADER,
        '1,/data/ji/emotion/ESD/0011/0011_000351.wav,0011_000351,F,high,fast,low,angry,"Loud, she rushes",Get out!',
        "2,libritts/84/84_1.wav,84_1,male,low,slow,normal,contempt,He drawls,",
        "3,libritts/84/84_1.wav,84_1,male,low,slow,normal,neutral,He drawls again,",
        "4,libritts/84/84_2.wav,84_2,male,low,slow,normal,neutral,,Nothing",
        "5,libritts/84/84_9.wav,84_9,male,low,slow,normal,neutral,A man,Gone",
        "6,../outside.wav,outside,male,low,slow,normal,neutral,A man,Climbs",
        "7,libritts/84/84_2.wav,84_2,male,low,slow",
        "8,cut.wav,cut,male,low,slow,normal,neutral,A man,Cut short",
        "9,libritts/84/84_2.wav,,male,medium,normal,high,Fear,A man shakes,Oh",
    ]
    (tmp_path / "random_train.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    put(tmp_path.parent, "outside.wav")
    manifest = validate(textrolspeech.prepare(tmp_path), tmp_path)
    columns = ("path", "split", "gender", "pitch", "tempo", "energy", "style", "style_raw", "caption")
    esd = "emotion/ESD/0011/0011_000351.wav"
    assert rows_of(manifest, *columns) == [
        ["textrolspeech/0011_000351", esd, "train", "female", "high", "high", "low", "angry", "angry",
         "Loud, she rushes"],
        ["textrolspeech/84_1", "libritts/84/84_1.wav", "train", "male", "low", "low", "normal", "", "contempt",
         "He drawls"],
        ["textrolspeech/libritts/84/84_2", "libritts/84/84_2.wav", "train", "male", "normal", "normal", "high",
         "fearful", "Fear", "A man shakes"],
    ]  # fmt: skip
    assert manifest["text"].tolist() == ["Get out!", "", "Oh"]
    left_out = manifest.attrs["left_out_files"]
    assert left_out.pop("random_train.csv line 9: cut").startswith("is not readable as audio")
    assert left_out == {
        "random_train.csv line 4: 84_1": "names a clip for the second time",
        "random_train.csv line 5: 84_2": "caption is empty",
        "random_train.csv line 6: 84_9": "is not there",
        "random_train.csv line 7: outside": "leaves the corpus folder",
        "random_train.csv line 8": "malformed line",
    }


def test_odd_encodings_of_a_csv(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "b.wav")
    table = f"{HEADER}\n1,a.wav,a,m,low,slow,low,sad,Un homme âgé,\n2,b.wav,b,f,low,slow,low,sad,A woman,\n"
    (tmp_path / "dev.csv").write_bytes(table.encode("utf-16"))
    manifest = textrolspeech.prepare(tmp_path)
    assert manifest["caption"].tolist() == ["Un homme âgé", "A woman"] and set(manifest["split"]) == {"val"}
    (tmp_path / "dev.csv").write_bytes(table.encode("latin-1"))
    manifest = textrolspeech.prepare(tmp_path)
    assert manifest["caption"].tolist() == ["A woman"]
    assert manifest.attrs["left_out"] == {"caption is not UTF-8": 1}


def test_a_quote_that_nothing_closes_costs_the_rest_and_is_reported(tmp_path: Path) -> None:
    put(tmp_path, "a.wav", "b.wav")
    (tmp_path / "x.csv").write_text(f'{HEADER}\n1,a.wav,a,m,,,,sad,A man,\n2,b.wav,b,m,,,,sad,"A man,\n3,b.wav,b,m\n')
    manifest = textrolspeech.prepare(tmp_path)
    assert rows_of(manifest) == [["textrolspeech/a"]]
    assert manifest.attrs["left_out_files"] == {"x.csv lines 3-4": "malformed line"}


def test_promptspeech_takes_a_map_of_columns(tmp_path: Path) -> None:
    put(tmp_path, "wavs/p1.wav", "wavs/p2.wav")
    (tmp_path / "real.csv").write_text("id;x\n")
    (tmp_path / "all.csv").write_text("key,prompt,who,part,loudness\np1,A quiet man,4,test,low\np2,A man,4,,high\n")
    columns = {"name": "key", "caption": "prompt", "speaker": "who", "split": "part", "energy": "loudness"}
    with pytest.raises(CorpusError, match="no CSV with columns style_prompt and wav_fp and item_name"):
        promptspeech.prepare(tmp_path)
    manifest = validate(promptspeech.prepare(tmp_path, columns), tmp_path)
    assert rows_of(manifest, "path", "speaker", "split", "energy", "caption") == [
        ["promptspeech/p1", "wavs/p1.wav", "4", "test", "low", "A quiet man"],
        ["promptspeech/p2", "wavs/p2.wav", "4", captioned.split_of("p2"), "high", "A man"],
    ]
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    (tmp_path.parent / "root").mkdir()
    (tmp_path.parent / "root" / "promptspeech").symlink_to(tmp_path)
    assert len(load_corpora("promptspeech", tmp_path.parent / "root")) == 2
    with pytest.raises(CorpusError, match="columns has captoin; known are name, path, caption"):
        promptspeech.prepare(tmp_path, {"captoin": "prompt"})


# --- SpeechCraft: GigaSpeech-M and Zhvoice


def test_gigaspeech_m(tmp_path: Path) -> None:
    names = ("YOU01_S0000001", "YOU01_S0000002", "POD02_S0000009", "AUD03_S0000004")
    put(
        tmp_path,
        *(f"audio/{name[:5]}/{name}.wav" for name in names),
        "audio/YOU01/unlabelled.wav",
        "b/YOU01_S0000001.wav",
    )
    (tmp_path / "audio" / "link.wav").symlink_to(tmp_path.parent / "outside.wav")
    put(tmp_path.parent, "outside.wav")
    labels = """{
        "GigaSpeech_YOU01_S0000001": {
            "labels": "age:Elderly\\tgender:Male\\tpitch:low\\tspeed:fast\\tvolume:high\\temotion:Sad"},
        "GigaSpeech_YOU01_S0000001": {"labels": "gender:Female"},
        "GigaSpeech_POD02_S0000009": {"labels": "gender:Female\\tmood:odd\\tpitch:normal\\ttranscript:Hello: there"},
        "GigaSpeech_GONE_S0000001": {"labels": "gender:Female"},
        "../../outside": {"labels": "gender:Female"},
        "GigaSpeech_link": {"labels": "gender:Female"},
        "GigaSpeech_bad": {"labels": 7},
        "GigaSpeech_AUD03_S0000004": {"labels": "gender:Male"},
        "GigaSpeech_YOU01_S000"""
    (tmp_path / "labels.json").write_text(labels)
    told = {
        "GigaSpeech_YOU01_S0000001": "An old  man\nrushes",
        "GigaSpeech_POD02_S0000009": {"description": ["A woman"]},
    }
    (tmp_path / "descriptions.json").write_text(json.dumps(told | {"GigaSpeech_YOU01_S0000002": "No labels"}))
    (tmp_path / "instruction_en.json").write_text("{}")
    manifest = validate(gigaspeech_m.prepare(tmp_path), tmp_path)
    columns = ("split", "gender", "age", "pitch", "tempo", "energy", "style", "caption", "text")
    split = {name: captioned.split_of(name) for name in ("YOU01", "POD02")}
    assert rows_of(manifest, *columns) == [
        ["gigaspeech-m/GigaSpeech_YOU01_S0000001", split["YOU01"], "male", "Elderly", "low", "high", "high", "sad",
         "An old man rushes", ""],
        ["gigaspeech-m/GigaSpeech_POD02_S0000009", split["POD02"], "female", "", "normal", "", "", "", "A woman",
         "Hello: there"],
        ["gigaspeech-m/GigaSpeech_YOU01_S0000002", split["YOU01"], "", "", "", "", "", "", "No labels", ""],
    ]  # fmt: skip
    left_out = manifest.attrs["left_out_files"]
    assert left_out.pop("labels.json").startswith("is not JSON from here on")
    assert left_out == {
        "labels.json: 'GigaSpeech_YOU01_S0000001'": "names a clip for the second time",
        "labels.json: label 'mood'": "label is not known",
        "labels.json: 'GigaSpeech_GONE_S0000001'": "has no audio file",
        "labels.json: 'outside'": "has no audio file",
        "labels.json: 'GigaSpeech_link'": "leaves the corpus folder",
        "labels.json: 'GigaSpeech_bad'": "has no labels",
        "instruction_en.json": "instructions, which quote what is said",
        "b/YOU01_S0000001.wav": "same name as another file",
        "audio/YOU01/unlabelled.wav": "neither labelled nor described",
        "audio/AUD03/AUD03_S0000004.wav": "neither labelled nor described",  # the parser drops what it had not passed
    }


FORMS = {
    "object.json": '{"z_1": "一位青年女性", "z_2": ["她语速快", "又"]}',
    "array.json": '[{"id": "z_1", "caption": "一位青年女性"}, {"key": "wav/z_2.wav", "description": "她语速快"}]',
    "lines.jsonl": '\n{"utt": "z_1", "desc": "一位青年女性"}\nnot json\n{"name": "z_2", "描述": "她语速快"}\n',
    "tab.txt": "z_1\t一位青年女性\nz_2\t她语速快\n\nalone\n",
    "blank.txt": "z_1 一位青年女性\nz_2.wav 她语速快\n",
    "bar.txt": "z_1|一位青年女性\nz_2|她语速快\n",
    "table.csv": "id,caption\nz_1,一位青年女性\nz_2,她语速快\nz_3\n",
}


@pytest.mark.parametrize("name", FORMS)
def test_zhvoice_descriptions_in_many_forms(tmp_path: Path, name: str) -> None:
    put(tmp_path, "zhaishell/S01/z_1.wav", "zhaishell/S02/z_2.wav")
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    (tmp_path / "label.json").write_text(
        '{"z_1": {"labels": "年龄:青年\t性别:女\t音高:高\t语速:慢\t语气:平静"}}'.replace("\t", "\\t")
    )
    manifest = validate(zhvoice.prepare(tmp_path), tmp_path)
    assert rows_of(manifest, "caption", "gender", "age", "pitch", "tempo", "tone", "language") == [
        ["zhvoice/z_1", "一位青年女性", "female", "青年", "high", "low", "平静", "zh"],
        ["zhvoice/z_2", "她语速快", "", "", "", "", "", "zh"],
    ]
    malformed = {"lines.jsonl": "lines.jsonl line 3", "tab.txt": "tab.txt line 4", "table.csv": "table.csv line 4"}
    assert manifest.attrs["left_out_files"] == ({malformed[name]: "malformed line"} if name in malformed else {})


def test_a_folder_without_annotations_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.wav")
    for module in (gigaspeech_m, zhvoice):
        with pytest.raises(CorpusError, match="neither a JSON of labels nor a file of descriptions"):
            module.prepare(tmp_path)
    with pytest.raises(CorpusError, match="no fid2captions.json under"):
        secap_test.prepare(tmp_path)


def test_labels_and_descriptions_are_told_apart() -> None:
    assert labels_of({"labels": "age:Elderly\tgender:male"}) == "age:Elderly\tgender:male"
    assert labels_of("gender:male\tpitch:low") and labels_of({"labels": ["gender:male", "pitch:low"]})
    assert labels_of("He says: go") is None and labels_of({"labels": None}) is None and labels_of(3) is None
    assert description_of({"caption": " a\n b "}) == "a b" and description_of([3, "", "x"]) == "x"
    assert description_of(None) == "" and description_of({"description": {"x": 1}}) == ""


def test_splits_by_hash_are_a_tenth_and_stay() -> None:
    splits = pd.Series([captioned.split_of(f"clip{i}") for i in range(20_000)])
    shares = splits.value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.05, abs=0.01) and shares["val"] == pytest.approx(0.05, abs=0.01)
    assert [captioned.split_of(name) for name in ("a", "0011", "YOU0000000315")] == ["val", "train", "train"]


# --- SECap's test set


def secap_copy() -> pd.DataFrame:
    file = SHARED / "secap_test" / "manifest.csv"
    if not file.is_file():
        pytest.skip(f"needs the prepared corpus {file.parent}; set $ESR_DATA to the folder that holds it")
    return read_table(file)


def test_secap_agrees_with_its_copy(tmp_path: Path) -> None:
    """All 600 real clips, laid out as they were first; the captions and texts are those of the copy."""
    copy = secap_copy()
    names = copy["utterance_id"].str.removeprefix("secap_test/")
    (tmp_path / "dataset" / "wav").mkdir(parents=True)
    for name, path in zip(names, copy["path"], strict=True):
        shutil.copy(SHARED / "secap_test" / path, tmp_path / "dataset" / "wav" / f"{name}.opus")
    told = dict(zip(names, copy["caption"], strict=True))
    (tmp_path / "dataset" / "fid2captions.json").write_text(json.dumps(told | {"gone": "x"}, ensure_ascii=False))
    lines = [f"{name}{' 	'[i % 2]}{text} " for i, (name, text) in enumerate(zip(names, copy["text"], strict=True))]
    (tmp_path / "dataset" / "text.txt").write_text("\n".join([*lines, "alone"]), encoding="utf-8")
    manifest = validate(secap_test.prepare(tmp_path), tmp_path).set_index("utterance_id")
    copy = copy.set_index("utterance_id")
    same = ["split", "language", "style", "caption", "text", "licence"]
    pd.testing.assert_frame_equal(manifest.loc[copy.index, same], copy[same])
    assert len(manifest) == 600
    assert manifest.attrs["left_out_files"] == {
        "fid2captions.json: 'gone'": "has no audio file",
        "text.txt line 601": "malformed line",
    }


def test_secap_is_described() -> None:
    secap_copy()
    manifest = load_corpora("secap_test", SHARED)
    table = captions.free_captions(manifest)
    found = captions.describe(table, manifest).loc["secap_test"]
    assert found["clips"] == found["captions"] == 600 and found["distinct captions"] == 536
    assert found["words a caption"] == pytest.approx(15, abs=3)
    right = captions.relevance(table, manifest)
    assert right.diagonal().all() and right.sum() > 600  # some clips share their caption
    counts = manifest["caption"].map(manifest["caption"].value_counts()).to_numpy()
    assert (right.sum(axis=1) == counts).all()
