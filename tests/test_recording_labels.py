"""Columns of moments from a labels.csv: which row is about which moment, types, and what changes with the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from esr_utils import listening, recordings
from esr_utils.index import Index
from esr_utils.recording_labels import Labels, LabelsError

RATE = 16_000


@pytest.fixture
def folder(tmp_path, speech) -> Path:
    root = tmp_path / "folder"
    (root / "deep").mkdir(parents=True)
    soundfile.write(root / "one.flac", speech[: 10 * RATE], RATE)
    soundfile.write(root / "deep" / "two.wav", speech[10 * RATE : 18 * RATE], RATE)
    soundfile.write(root / "three.wav", speech[18 * RATE : 22 * RATE], RATE)
    return root


@pytest.fixture
def index(tmp_path, tiny_model) -> Index:
    return Index.create(tmp_path / "index", tiny_model)


def refresh(index: Index, folder: Path, labels: str) -> recordings.Report:
    (folder / "labels.csv").write_text(labels, encoding="utf-8")
    return recordings.refresh(index, recordings.find(folder))


def rows(index: Index) -> pd.DataFrame:
    index.reload()
    found = index.table.to_pandas().query("written == 0").sort_values(["file", "start_s"]).reset_index(drop=True)
    return found.assign(file=[Path(key).name for key in found["file"]])


def values(index: Index, column: str) -> dict[str, list]:
    """By file, the values of its moments, each once."""
    found = rows(index)
    cells = [None if pd.isna(cell) else cell for cell in found[column]]
    return {
        file: list(dict.fromkeys(c for c, f in zip(cells, found["file"], strict=True) if f == file))
        for file in found["file"]
    }


def test_columns_can_be_filtered_and_shown(index, folder):
    refresh(index, folder, "path,speaker,year,code\none.flac,anna,2024,007\n./deep/two.wav,ben,2025.5,1\n")
    assert values(index, "speaker") == {"one.flac": ["anna"], "two.wav": ["ben"], "three.wav": [None]}
    assert values(index, "year") == {"one.flac": [2024.0], "two.wav": [2025.5], "three.wav": [None]}
    assert values(index, "code")["one.flac"] == ["007"]  # 7 would be another code
    hits = index.search("angry", k=100, where={"speaker": "ben", "year": (2025, None)})
    assert {Path(key).name for key in hits["file"]} == {"two.wav"}
    assert len(index.search("angry", k=100, one_per="speaker", where={"speaker": ["anna", "ben"]})) == 2


def test_rows_of_parts_of_a_file(index, folder):
    refresh(index, folder, "path,start_s,end_s,speaker\none.flac,,4,anna\none.flac,4,8,ben\none.flac,7,,carl\n")
    found = rows(index).query("file == 'one.flac'")
    middles = (found["start_s"] + found["end_s"]) / 2
    expected = ["anna" if middle < 4 else "ben" if middle < 8 else "carl" for middle in middles]
    assert found["speaker"].tolist() == expected and len(set(expected)) > 1


def test_rows_of_a_channel(tmp_path):
    (tmp_path / "labels.csv").write_text("path,channel,speaker\ncall.wav,1,ben\ncall.wav,0,anna\n")
    labels = Labels()
    labels.read(tmp_path)
    moments = pd.DataFrame({"start_s": [0.0, 0.0], "end_s": [1.0, 1.0], "channel": pd.array([0, 1], "Int64")})
    columns = labels.for_index(type("Empty", (), {"columns": lambda self: {}})())
    assert columns.of(str(tmp_path / "call.wav"), moments)["speaker"].tolist() == ["anna", "ben"]
    assert columns.of(str(tmp_path / "other.wav"), moments)["speaker"].tolist() == [None, None]
    assert list(columns.of(str(tmp_path.parent / "other.wav"), moments)) == []  # of another folder nothing is told
    together = moments.assign(channel=pd.array([None, None], "Int64"))
    assert columns.of(str(tmp_path / "call.wav"), together)["speaker"].tolist() == [None, None]  # both are heard in it


def test_other_labels_change_the_moments_and_embed_nothing(index, folder, monkeypatch):
    recordings.refresh(index, recordings.find(folder))
    before = rows(index)
    monkeypatch.setattr(listening.Embedder, "_take", None)  # it would fail
    report = refresh(index, folder, "path,speaker\none.flac,anna\nthree.wav,ben\ngone.wav,carl\n")
    assert (report.embedded, report.unchanged, report.relabelled) == (0, 3, 2)
    report = refresh(index, folder, "path,speaker,mood\none.flac,anna,3\nthree.wav,carl,\n")
    assert report.relabelled == 2
    after = rows(index)
    assert values(index, "speaker") == {"one.flac": ["anna"], "two.wav": [None], "three.wav": ["carl"]}
    assert values(index, "mood") == {"one.flac": [3.0], "two.wav": [None], "three.wav": [None]}
    pd.testing.assert_frame_equal(after[["id", "file", "start_s", "end_s"]], before[["id", "file", "start_s", "end_s"]])
    np.testing.assert_array_equal(np.stack(after["vector"]), np.stack(before["vector"]))
    report = recordings.refresh(index, recordings.find(folder))
    assert (report.relabelled, report.unchanged) == (0, 3)
    assert recordings.refresh(index, recordings.find(folder)).problems == {}
    report = refresh(index, folder, "path,speaker\nthree.wav,\n")
    assert report.relabelled == 2 and set(map(tuple, values(index, "speaker").values())) == {(None,)}


def test_what_labels_no_longer_say_is_no_longer_so(index, folder):
    refresh(index, folder, "path,speaker,room\none.flac,anna,3\ndeep/two.wav,ben,4\n")
    assert refresh(index, folder, "path,speaker\none.flac,anna\n").relabelled == 2
    assert values(index, "speaker") == {"one.flac": ["anna"], "two.wav": [None], "three.wav": [None]}
    assert values(index, "room") == {"one.flac": [None], "two.wav": [None], "three.wav": [None]}
    (folder / "labels.csv").unlink()
    assert recordings.refresh(index, recordings.find(folder)).relabelled == 0  # perhaps it is on its way
    assert values(index, "speaker")["one.flac"] == ["anna"]
    assert refresh(index, folder, "path\n").relabelled == 1 and values(index, "speaker")["one.flac"] == [None]


def test_labels_nearer_to_a_file_are_not_undone_from_further_away(index, folder):
    (folder / "deep" / "labels.csv").write_text("path,speaker\ntwo.wav,ben\n")
    recordings.refresh(index, recordings.find(folder / "deep"))
    assert refresh(index, folder, "path,speaker\none.flac,anna\n").relabelled == 0
    assert values(index, "speaker") == {"one.flac": ["anna"], "two.wav": ["ben"], "three.wav": [None]}


def test_numbers_of_more_digits_than_a_number_keeps_are_text(index, folder):
    refresh(index, folder, "path,call\none.flac,123456789012345678901\nthree.wav,123456789012345678902\n")
    assert set(index.search("angry", k=9, where={"call": "123456789012345678901"})["call"]) == {"123456789012345678901"}


def test_what_another_process_has_relabelled_meanwhile_is_passed_over(index, folder, monkeypatch):
    recordings.refresh(index, recordings.find(folder))
    (folder / "labels.csv").write_text("path,speaker\none.flac,anna\ndeep/two.wav,ben\n")
    found, other, read = recordings.find(folder), Index.open(index.uri, index.model), Index.of_version

    def beaten(self, *arguments):
        if self is index:
            recordings.refresh(other, found)  # which also sweeps
            index.reload()
        return read(self, *arguments)

    monkeypatch.setattr(Index, "of_version", beaten)
    recordings.refresh(index, found)
    assert values(index, "speaker") == {"one.flac": ["anna"], "two.wav": ["ben"], "three.wav": [None]}
    assert len(index.files()) == 3


def test_a_file_by_itself_has_the_labels_of_its_folder(index, folder):
    (folder / "labels.csv").write_text("path,speaker\none.flac,anna\n")
    recordings.refresh(index, recordings.find([folder / "one.flac", folder / "three.wav"]))
    assert values(index, "speaker") == {"one.flac": ["anna"], "three.wav": [None]}


def test_numbers_in_a_column_of_text_are_text(index, folder):
    refresh(index, folder, "path,code\none.flac,a\n")
    refresh(index, folder, "path,code\none.flac,7\n")
    assert values(index, "code")["one.flac"] == ["7"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("speaker\nanna\n", "has no column 'path'; it has speaker"),
        ("path,id,score\none.flac,1,2\n", "columns 'id', 'score' cannot be in an index"),
        ("path,_rowid,a b,\none.flac,1,2,3\n", "columns '', '_rowid', 'a b' cannot be in an index"),
        ("path,start_s\none.flac,now\n", "line 2: 'now' is no number"),
        ("path,end_s\none.flac,nan\n", "line 2: 'nan' is no number"),
        ("path,speaker\none.flac\n", "labels.csv"),
        ("", "has no header"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(index, folder, labels, message):
    with pytest.raises(LabelsError, match=message):
        refresh(index, folder, labels)
    assert index.files().empty


def test_text_in_a_column_of_numbers_is_refused(index, folder):
    refresh(index, folder, "path,year\none.flac,2024\n")
    with pytest.raises(LabelsError, match="column 'year' .* is of numbers"):
        refresh(index, folder, "path,year\none.flac,old\n")


def test_a_corpus_gives_what_its_manifest_says_and_a_foreign_manifest_nothing(index, folder):
    manifest = folder / "manifest.csv"
    manifest.write_text("url,path\nhere,one.flac\n")
    assert recordings.find(folder).labels.rows == {}
    manifest.write_text("utterance_id,path,speaker,style,text\nc/1,one.flac,anna,angry,Go!\nc/2,three.wav,ben,,\n")
    recordings.refresh(index, recordings.find(folder))
    assert values(index, "speaker") == {"one.flac": ["anna"], "two.wav": [None], "three.wav": ["ben"]}
    assert values(index, "style")["one.flac"] == ["angry"] and "text" not in index.columns()
    refresh(index, folder, "path,speaker\none.flac,carla\n")  # a labels.csv comes first
    assert values(index, "speaker")["one.flac"] == ["carla"]
