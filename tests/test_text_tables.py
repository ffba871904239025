"""Large text files a part at a time: the same as read whole, in memory that does not grow with what repeats."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import soundfile

from esr_utils import text_tables
from esr_utils.manifests import build_manifest
from esr_utils.text_tables import JsonError, csv_rows, json_items, read_table, text_lines, write_table


def test_a_table_of_many_parts_is_the_same_as_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_tables, "CHUNK", 7)
    table = pd.DataFrame({"id": [f"u{i}" for i in range(100)], "split": ["train", "tést\n"] * 50, "n": range(100)})
    write_table(table, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        whole = list(csv.reader(file))
    assert whole == [["id", "split", "n"], *([str(cell) for cell in row] for row in table.itertuples(index=False))]
    read = read_table(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(read, table.astype("str"))


def test_cells_that_repeat_are_held_once() -> None:
    columns = text_tables.Columns(["id", "split"])
    columns.extend([[f"u{i}", "".join(["tr", "ain"])] for i in range(50)])
    columns.extend([[f"v{i}", "".join(["tr", "ain"])] for i in range(50)])
    assert len({id(cell) for part in columns._parts[1] for cell in part}) == 1
    frame = columns.frame()
    assert set(frame["split"]) == {"train"} and frame["id"].nunique() == 100


def test_a_manifest_is_built_from_parts_with_different_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out: dict[str, str] = {}

    def rows():
        for i in range(text_tables.CHUNK + 2):
            more = {"age": "old"} if i == 0 else {"mood": "odd"} if i == text_tables.CHUNK + 1 else {}
            yield {"utterance_id": f"c/{i}", "duration_s": i} | more
        left_out["x"] = "late"

    manifest = build_manifest(rows(), left_out)
    assert manifest[["age", "mood"]].iloc[[0, 1, -1]].to_numpy().tolist() == [["old", ""], ["", ""], ["", "odd"]]
    assert manifest["duration_s"].tolist() == list(range(text_tables.CHUNK + 2))
    assert manifest.attrs["left_out"] == {"late": 1}
    assert len(build_manifest([], {})) == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_member_by_member(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "x.json"
    value = {"a": {"n": [1, 2.5]}, "b": "é中", "c": None}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1), json.dumps(value) + "\n\n"):
        file.write_text(text, encoding=encoding)
        assert list(json_items(file)) == list(value.items())
    file.write_text('{"a": 1, "a": 2}', encoding=encoding)
    assert list(json_items(file)) == [("a", 1), ("a", 2)]
    file.write_text('[{"x": 1}, "é"]', encoding=encoding)
    assert list(json_items(file)) == [("item 1", {"x": 1}), ("item 2", "é")]
    file.write_text('{"x": 1}\n{"x": 2\n\n[3]\n', encoding=encoding)
    assert list(json_items(file)) == [("line 1", {"x": 1}), ("line 2", None), ("line 4", [3])]


def test_json_that_stops(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for content in (b"", b"no json", b'{"a": 1, "b": 2, "c', b'{"a": }'):
        file.write_bytes(content)
        with pytest.raises(JsonError, match="is not JSON from here on"):
            list(json_items(file))


def test_foreign_csv_keeps_going(tmp_path: Path) -> None:
    file = tmp_path / "x.csv"
    file.write_bytes(b'a, b\r\n1,2\r\n\r\n3\r\n4,"5\n6"\r\n\xff,7\r\n')
    assert list(csv_rows(file)) == [
        ("line 2", {"a": "1", "b": "2"}),
        ("line 4", None),
        ("lines 5-6", {"a": "4", "b": "5\n6"}),
        ("line 7", {"a": "\ufffd", "b": "7"}),
    ]
    assert list(csv_rows(file, header=True)) == [("line 1", {"a": "a", "b": "b"})]
    file.write_bytes(b'a,b\n1,"' + b"x" * 200_000 + b"\n2,3\n")
    assert [cells for _, cells in csv_rows(file)][0] is None
    assert list(text_lines(file))[-1] == ("line 3", "2,3")


# Peak memory of a process of its own, in MiB, after each stage; the stages are those of a new corpus.
_STAGES = """
import re, sys
from pathlib import Path
from esr_utils import manifest_schema, manifests, text_tables
from esr_utils.corpora import prepare
text_tables.CHUNK = manifest_schema._PART = 2048  # so that what works on parts, whose size is fixed, is small
assert "torch" not in sys.modules
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
root = Path(sys.argv[1])
print(peak())
manifest = prepare("gigaspeech-m", root / "gigaspeech-m")
manifests.write_manifest(manifest, root / "gigaspeech-m" / "manifest.csv")
rows, files = len(manifest), manifest["path"].nunique()
del manifest
assert len(manifests.load_corpora("gigaspeech-m", root)) == rows == files == int(sys.argv[2])
print(peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_grows_by_little_a_row(tmp_path: Path) -> None:
    """Label JSON to manifest, written, validated and loaded: at most 2.0 KiB a row, part of it what is of fixed size.

    It takes 1.6; 670,070 rows take 0.76 GiB in all, and what json and pandas hold of whole files is 2.9 a row
    (`benchmarks/large_corpus.py`).
    """
    rows, root = 60_000, tmp_path / "gigaspeech-m"
    told = "age:Elderly\tgender:male\tpitch:low\tspeed:slow\tvolume:high\temotion:Sad"
    names = [f"YOU{i // 60:010d}_S{i % 60:07d}" for i in range(rows)]
    root.mkdir()
    (root / "labels.json").write_text(json.dumps({f"GigaSpeech_{name}": {"labels": told} for name in names}))
    captions = {f"GigaSpeech_{name}": f"An old man, number {name}, speaks slowly in a low voice" for name in names}
    (root / "descriptions.json").write_text(json.dumps(captions))
    for i, name in enumerate(names):
        file = root / f"{i // 1000:03d}" / f"{name}.wav"
        file.parent.mkdir(exist_ok=True)
        if i % 30_000 == 0:
            soundfile.write(first := file, [0.1, -0.1] * 800, 16_000)
        else:
            file.hardlink_to(first)
    command = [sys.executable, "-c", _STAGES, str(tmp_path), str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    before, after = map(float, done.stdout.split())
    assert after - before < 2.0 * rows / 2**10 and before < 200, (before, after)
