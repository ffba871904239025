"""Several workers make what one process makes: also when a file is bad, a worker dies or the driver is interrupted."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from esr_utils import adaptation, recordings, runs, scale
from esr_utils.index import Index, build
from esr_utils.index_rows import Embedded, File
from esr_utils.index_table import IndexTable
from esr_utils.index_writing import IndexWriter
from esr_utils.scale import ScaleError, Workers
from esr_utils.scale_workers import Listener

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-scale.txt")

RATE = 16_000
WORKERS = Workers(2)


@pytest.fixture(scope="module", autouse=True)
def ray():
    """One for all tests: it takes seconds to start. Its workers find the classes that are written here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        with scale.connected(WORKERS):
            yield


@pytest.fixture
def folder(tmp_path, speech) -> Path:
    """Nine recordings of 2 to 10 s, and a file that is none."""
    root = tmp_path / "folder"
    (root / "deep").mkdir(parents=True)
    for i in range(8):
        soundfile.write(root / f"{i}.wav", speech[i * RATE : (2 * i + 3) * RATE], RATE)
    call = np.stack([speech[: 6 * RATE], speech[6 * RATE : 12 * RATE]], axis=1)
    soundfile.write(root / "deep" / "call.flac", call, RATE)
    (root / "broken.wav").write_text("no sound at all\n" * 1000)
    return root


@pytest.fixture
def index(tmp_path, tiny_model) -> Index:
    return Index.create(tmp_path / "index", tiny_model)


@pytest.fixture
def alone(tmp_path, tiny_model):
    """From a folder to the index and the report that one process makes of it."""

    def made(folder: Path, channels: str = "mix") -> tuple[Index, recordings.Report]:
        index = Index.create(tmp_path / "alone", tiny_model, channels=channels)
        return index, recordings.refresh(index, recordings.find(folder))

    return made


def check_same(index: IndexTable, expected: IndexTable, columns: tuple[str, ...] = ()) -> None:
    """The same moments, each once also in what a search would not read, with the same vectors; the same files."""
    tables = []
    for one in (index, expected):
        one.reload()
        tables.append(one.table.to_pandas().query("written == 0").sort_values("id", ignore_index=True))
    names = ["id", "file", "start_s", "end_s", "channel", *columns]
    pd.testing.assert_frame_equal(tables[0][names], tables[1][names])
    vectors = [np.stack(table["vector"]).astype(np.float32) for table in tables]
    one, other = (vector / np.linalg.norm(vector, axis=1, keepdims=True) for vector in vectors)  # they are in fp16
    assert len(one) > 10 and (one * other).sum(1).min() > 0.9999
    pd.testing.assert_frame_equal(index.files().sort_index(), expected.files().sort_index())


# Recordings -------------------------------------------------------------------------------------------------


class Sick(Listener):
    """At 3.wav it waits to be killed, the first time; dies of 4.wav, as of a fault in a library; cannot take 5.wav."""

    def embed(self, batch, done):
        names = {Path(key).name for key in done.keys}
        victim = Path(done.keys[0]).parents["deep" in done.keys[0]] / "victim"
        if "3.wav" in names and not victim.exists():
            victim.write_text(str(os.getpid()))
            time.sleep(600)  # longer than anybody waits for a test
        if "4.wav" in names:
            os.kill(os.getpid(), signal.SIGKILL)
        if "5.wav" in names:
            raise MemoryError("too much")
        super().embed(batch, done)


def test_a_killed_worker_loses_and_doubles_nothing_and_the_numbers_are_those_of_one_process(
    folder, tmp_path, tiny_model, alone, tiny_run, monkeypatch
):
    (folder / "labels.csv").write_text("path,speaker\n1.wav,anna\n2.wav,ben\ndeep/call.flac,anna\n")
    index = Index.create(tmp_path / "index", tiny_model, channels="split")
    victim, killed = folder / "victim", []

    def kill():
        while not victim.is_file() or not (pid := victim.read_text()):
            time.sleep(0.05)
        os.kill(int(pid), signal.SIGKILL)
        killed.append(int(pid))

    threading.Thread(target=kill, daemon=True).start()
    monkeypatch.setattr(scale, "Listener", Sick)
    monkeypatch.setattr(scale, "_RETRIES", 0)  # each death takes seconds; what is missing is tried file by file
    monkeypatch.setattr(scale, "_ROUNDS", 2)  # so that there are batches of several files
    report = scale.refresh(index, recordings.find(folder), tiny_run, WORKERS)
    assert killed
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], 0)
    assert set(report.left_out) == {str(folder / "4.wav"), str(folder / "5.wav")}
    assert "died, 1 times" in report.left_out[str(folder / "4.wav")]
    assert report.left_out[str(folder / "5.wav")] == "failed: MemoryError: too much"
    expected, of_one = alone(folder, "split")
    expected.delete_files(report.left_out)
    check_same(index, expected, ("speaker",))
    assert (report.embedded, report.problems) == (7, of_one.problems) and "broken.wav" in str(report.problems)


def test_an_interrupted_driver_goes_on(folder, index, alone, tiny_run, monkeypatch):
    found, append = recordings.find(folder), index.append

    def interrupted(files):
        append(files)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("esr_utils.index_writing._COMMIT_ROWS", 5)
        patch.setattr(index, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scale.refresh(index, found, tiny_run, WORKERS)
    n = len(index.files())
    assert 1 <= n < 10
    report = scale.refresh(index, found, tiny_run, Workers(1))
    assert (report.unchanged, report.embedded + len(report.problems)) == (n, 10 - n)
    check_same(index, alone(folder)[0])


def test_an_index_that_adapts_does_so_by_what_the_workers_have_heard(folder, tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(adaptation, "MIN_CLIPS", 2)
    monkeypatch.setattr(adaptation, "MIN_GROUP", 2)
    monkeypatch.setattr(adaptation, "FEW_STYLES", 0.0)  # what a retriever that is not trained takes for styles
    (folder / "labels.csv").write_text("path,speaker\n" + "".join(f"{i}.wav,{'ab'[i % 2]}\n" for i in range(8)))
    tiny_model.speech_head.fit(torch.randn(100, *tiny_model.speech_head.mean.shape) + 0.1)
    tiny_model.save(tmp_path / "run" / "best")
    runs.write_json(tmp_path / "run" / "config.json", {"kind": "style", "training": {"level": "recorded"}})
    found = recordings.find(folder)
    spread, alone = (Index.create(tmp_path / name, tiny_model, adapt="speaker") for name in ("spread", "alone"))
    reports = scale.refresh(spread, found, tmp_path / "run", WORKERS), recordings.refresh(alone, found)
    assert reports[0].adapted == reports[1].adapted == 8
    check_same(spread, alone, ("speaker",))
    adapted = spread.table.to_pandas().query("written == 0").groupby("speaker", dropna=False)["adapted"].unique()
    assert len(set(np.concatenate(adapted.tolist()))) == 3  # a, b, and what has no speaker


# Manifests --------------------------------------------------------------------------------------------------


def test_a_manifest_becomes_the_index_that_one_process_builds(own_corpus, tmp_path, tiny_model, tiny_run):
    rest = own_corpus.iloc[1:]
    expected, _ = build(tiny_model, rest, tmp_path / "alone", cache=None)
    bad = Path(own_corpus["root"].iloc[0]) / own_corpus["path"].iloc[0]
    bad.write_text("no sound at all")
    index = Index.create(tmp_path / "index", tiny_model)
    report = scale.fill(index, own_corpus, tiny_run, Workers(1))
    assert list(report.problems) == [str(bad)] and own_corpus["utterance_id"].iloc[0] in report.problems[str(bad)]
    assert (report.embedded, report.moments, report.unchanged) == (len(rest), len(rest), 0)
    index.delete_files([str(bad)])
    columns = ("speaker", "style", "corpus", "split", "utterance_id", "duration_s")
    check_same(index, expected, columns)
    report = scale.build(index, rest.iloc[:20], tiny_run)
    assert (report.embedded, report.unchanged, report.removed) == (0, 20, len(rest) - 20)


# How the work is shared, and what cannot be -----------------------------------------------------------------


def test_batches_are_longest_first_and_bounded():
    seconds = pd.Series({"short": 10.0, "long": 7200.0, "middle": 900.0, "mid": 890.0, "tiny": 1.0})
    assert scale.batches(seconds, 1) == [["long"], ["middle", "mid", "short"], ["tiny"]]
    assert scale.batches(pd.Series({"a": 1.0, "b": 1.0}), 8) == [["a"], ["b"]]
    many = pd.Series(np.random.default_rng(0).uniform(1, 60, 5000))
    made = scale.batches(many, 4)
    assert sorted(key for batch in made for key in batch) == list(range(5000))
    assert max(many[batch].sum() for batch in made) <= 1800 and max(map(len, made)) <= 500 and len(made) > 16


def test_a_sample_is_made_again_by_one_process(folder, index, manifest, tmp_path, tiny_model):
    found = recordings.find(folder)
    recordings.refresh(index, found)
    clips, _ = build(tiny_model, manifest, tmp_path / "clips", cache=None)
    for filled, source, unit in ((index, found, "file"), (clips, manifest, "id")):
        for n in (3, 100):
            one = scale.alone(filled, tiny_model, source, n, seed=0)
            ((_, missing, apart),) = scale.agreement(filled, one).to_numpy().tolist()
            assert missing == 0 and apart < 1e-4
            made = set(one.table.to_pandas().query("written == 0")[unit])
            assert len(made) == min(n, 9 if unit == "file" else len(manifest))  # none of the broken file


def test_agreement_names_what_is_missing_and_how_far_vectors_are_apart(tmp_path, tiny_model):
    def made(name, ids, vectors):
        one = Index.create(tmp_path / name, tiny_model)
        file = File("/a.wav", Path("/a.wav"), 1, 1, "")
        one.add([Embedded(file, pd.DataFrame({"id": ids}), np.array(vectors))])
        return one

    x, y = np.eye(8)[:2]
    index = made("one", ["a", "b", "c"], [x, y, x])
    assert scale.agreement(index, index).to_numpy().tolist() == [[3, 0, 0.0]]
    (found,) = scale.agreement(index, made("other", ["b", "c", "d"], [0.6 * x + 0.8 * y, x, y])).to_numpy().tolist()
    assert found == [3, 1, pytest.approx(0.2, abs=1e-3)]


def test_length_is_told_by_size(tmp_path, speech):
    for name in ("a.wav", "a.flac", "a.ogg"):
        soundfile.write(tmp_path / name, speech, RATE)
    lasts = len(speech) / RATE
    assert all(lasts / 4 < scale._seconds(path) < lasts * 4 for path in tmp_path.iterdir())
    assert scale._seconds(tmp_path / "gone.wav") == 0


def test_a_run_of_another_model_is_refused_with_both_names(folder, tmp_path, tiny_run):
    other = IndexWriter.create_named(tmp_path / "other", "another model", 8)
    with pytest.raises(ScaleError, match="made by model 'another model', and .*tiny holds 'style "):
        scale.refresh(other, recordings.find(folder), tiny_run, Workers(1))
    assert len(other.files()) == 0


def test_what_ray_has_not_is_not_waited_for(folder, index, tiny_run, monkeypatch):
    found = recordings.find(folder)
    with pytest.raises(ScaleError, match="takes 64 CPU, and Ray has 2"):
        scale.refresh(index, found, tiny_run, Workers(threads=64))
    with pytest.raises(ScaleError, match="takes 1000 GPU, and Ray has"):
        scale.refresh(index, found, tiny_run, Workers(gpus=1000))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ScaleError, match="pip install -r requirements-scale.txt"):
        scale.refresh(index, found, tiny_run, WORKERS)
