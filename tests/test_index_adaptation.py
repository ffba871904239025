"""Indexes that adapt: vectors against those computed at once, few moments, interruptions, what is left alone."""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from esr_utils import adaptation, cli, index_adaptation, recordings, runs
from esr_utils import index as index_module
from esr_utils.adaptation import AdaptationError, Statistics
from esr_utils.cli_options import OK
from esr_utils.config import SAMPLE_RATE
from esr_utils.index import Index
from esr_utils.index_rows import Embedded, File, IndexUnusable, IndexWriteError

N = 30  # moments in a file


@pytest.fixture(autouse=True)
def any_styles(monkeypatch):
    """What a retriever that is not trained takes for styles, says nothing."""
    monkeypatch.setattr(adaptation, "FEW_STYLES", 0.0)


@pytest.fixture
def model(tiny_model):
    tiny_model.speech_head.fit(torch.from_numpy(features(300, 99)))
    return tiny_model


def features(n: int, seed: int, offset: float = 0.0) -> np.ndarray:
    """(n, L, P) float32 that fp16 has exactly, of tiny_model's shape."""
    return np.random.default_rng(seed).normal(offset, 2.0, (n, 3, 32)).astype(np.float16).astype(np.float32)


def embedded(model, key: str, seed: int, offset: float = 0.0, speaker: str | None = None, n: int = N) -> Embedded:
    pooled = features(n, seed, offset)
    moments = pd.DataFrame({"start_s": np.arange(n) * 1.0, "end_s": np.arange(n) + 1.0, "speaker": speaker})
    vectors = adaptation.vectors(model, pooled, adaptation.of_training(model))
    file = File(key, None, 1, 1, f"sha {seed} {offset}")
    return Embedded(file, moments, vectors, pooled.reshape(n, -1))


def fill(index, model, **files) -> None:
    index.add(embedded(model, name, *values) for name, values in files.items())
    index_adaptation.adapt(index, model)


def take_again(monkeypatch) -> None:
    """From now on statistics are taken whenever they are asked for."""
    monkeypatch.setattr(index_adaptation, "_held", lambda *_: secrets.token_hex(4))


def vectors(index) -> pd.DataFrame:
    """Vectors and features by file and start."""
    index.reload()
    _, dead, _ = index.entries()
    table = (
        index.table.search()
        .select(["file", "start_s", "vector", "pooled", "adapted", "version", "written"])
        .to_pandas()
    )
    table = table[(table["written"] == 0) & ~table["version"].isin(dead)]
    return table.sort_values(["file", "start_s"]).set_index("file")


def check(index, model, statistics: dict[str, Statistics], **files) -> None:
    """Every file's vectors are those that these statistics, with the prior, make of its features."""
    there, training = vectors(index), adaptation.of_training(model)
    assert sorted(there.index.unique()) == sorted(files)
    for name, values in files.items():
        by = adaptation.shrunk(statistics[name], training)
        expected = adaptation.vectors(model, features(N, *values[:2]), by)
        found = np.stack(there.loc[name, "vector"]).astype(np.float32)
        assert len(found) == N  # none lost, none doubled
        np.testing.assert_allclose(found, expected, atol=1e-3)


def of(*parts: tuple) -> Statistics:
    """What numpy makes of the features of some files at once."""
    rows = np.concatenate([features(N, *part[:2]) for part in parts]).astype(np.float64)
    return Statistics(len(rows), rows.mean(0).astype(np.float32), rows.std(0).astype(np.float32))


FILES = {"a": (1, 3.0, "anna"), "b": (2, 3.0, "anna"), "c": (3, -5.0, "ben"), "d": (4, -5.0, "ben"), "e": (5, 0.0)}


def test_all_vectors_are_by_the_statistics_of_the_whole(model, tmp_path):
    index = Index.create(tmp_path / "index", model, adapt="all")
    fill(index, model, **FILES)
    check(index, model, dict.fromkeys(FILES, of(*FILES.values())), **FILES)


def test_by_speaker_and_by_the_trainings_where_nobody_is_named_or_too_little_was_said(model, tmp_path):
    index = Index.create(tmp_path / "index", model, adapt="speaker")
    files = FILES | {"f": (6, 1.0, "carl")}  # alone, 30 moments would be too small an index
    fill(index, model, **files)
    anna, ben, training = of(FILES["a"], FILES["b"]), of(FILES["c"], FILES["d"]), adaptation.of_training(model)
    by = {"a": anna, "b": anna, "c": ben, "d": ben, "e": training, "f": of(files["f"])}
    check(index, model, by, **files)
    whole = index_adaptation.statistics(index, model)  # for examples from elsewhere
    np.testing.assert_allclose(whole.mean, adaptation.shrunk(of(*files.values()), training).mean, atol=1e-3)
    fill(index, model, g=(7, 1.0, "dora", 9), h=(8, 1.0, "emil", 10))
    assert set(vectors(index).loc["g", "adapted"]) == {""} and "" not in set(vectors(index).loc["h", "adapted"])


def test_what_is_left_by_the_trainings_is_told_with_the_reason(model, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", model, adapt="speaker")
    fill(index, model, a=FILES["a"])
    assert index_adaptation.left(index) == (0, {"anna": "30 moments, under 50 in the whole index"})
    files = FILES | {"f": (6, 1.0, "carl"), "g": (7, 1.0, "dora", 9)}
    index.add(embedded(model, name, *values) for name, values in files.items())
    assert index_adaptation.left(index)[1]["ben"] == "60 moments, not adapted to yet: run esr index again"
    fill(index, model, **files)
    few = {"": "30 moments, of no speaker", "dora": "9 moments, under 10"}
    assert index_adaptation.left(index) == (3, few)
    take_again(monkeypatch)
    monkeypatch.setattr(adaptation, "FEW_STYLES", 22.1)
    index_adaptation.adapt(index, model)
    styles = {"anna": "60 moments, they seem to be of few styles", "carl": "30 moments, they seem to be of few styles"}
    n, reasons = index_adaptation.left(index)
    assert n == 0 and reasons.items() > (few | styles).items()
    whole = Index.create(tmp_path / "whole", model, adapt="all")
    fill(whole, model, a=FILES["a"])
    assert index_adaptation.left(whole) == (0, {"": "30 moments, under 50 in the whole index"})


def test_a_small_index_has_the_trainings(model, tmp_path):
    index = Index.create(tmp_path / "index", model, adapt="all")
    fill(index, model, a=FILES["a"])
    check(index, model, {"a": adaptation.of_training(model)}, a=FILES["a"])
    assert index_adaptation.statistics(index, model) is None
    assert set(vectors(index)["adapted"]) == {""}


def test_more_files_move_the_statistics_and_removed_ones_too(model, tmp_path):
    index = Index.create(tmp_path / "index", model, adapt="all")
    two = {name: FILES[name] for name in "ab"}
    fill(index, model, **two)
    check(index, model, dict.fromkeys(two, of(*two.values())), **two)
    fill(index, model, **{name: FILES[name] for name in "cde"})
    check(index, model, dict.fromkeys(FILES, of(*FILES.values())), **FILES)
    index.delete_files("cde")
    index_adaptation.adapt(index, model)
    check(index, model, dict.fromkeys(two, of(*two.values())), **two)


def test_by_file_each_has_its_own(model, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "MIN_CLIPS", N)
    index = Index.create(tmp_path / "index", model, adapt="file")
    fill(index, model, **FILES)
    check(index, model, {name: of(values) for name, values in FILES.items()}, **FILES)


def test_interrupted_before_there_are_any_statistics_it_goes_on(model, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", model, adapt="all")
    index.add(embedded(model, name, *values) for name, values in FILES.items())
    with monkeypatch.context() as patch:
        patch.setattr(Index, "commit", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index_adaptation.adapt(index, model)
    assert index_adaptation.statistics(index, model) is None and index_adaptation.is_due(index)
    assert index_adaptation.adapt(index, model).files == len(FILES)
    check(index, model, dict.fromkeys(FILES, of(*FILES.values())), **FILES)


def test_an_index_made_anew_by_another_model_takes_its_own_statistics(model, tmp_path, monkeypatch):
    fill(Index.create(tmp_path / "index", model, adapt="all"), model, **FILES)
    monkeypatch.setattr(index_module, "model_id", lambda _: "another")
    index = Index.create(tmp_path / "index", model, adapt="all", replace=True)
    heard = {name: (seed + 50, offset + 9.0, *rest) for name, (seed, offset, *rest) in FILES.items()}
    index.add(  # of the same recordings
        replace(embedded(model, name, *values), file=embedded(model, name, *FILES[name]).file)
        for name, values in heard.items()
    )
    index_adaptation.adapt(index, model)
    check(index, model, dict.fromkeys(heard, of(*heard.values())), **heard)


def test_what_has_not_moved_is_left_alone(model, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", model, adapt="all")
    fill(index, model, **FILES)
    version = index.reload()
    assert index_adaptation.adapt(index, model).files == 0 and index.reload() == version  # nothing is even read
    take_again(monkeypatch)
    assert index_adaptation.adapt(index, model).files == 0
    before = index_adaptation.statistics(index, model)
    small = embedded(model, "z", 7, n=1)
    index.add([small])
    assert index_adaptation.adapt(index, model).files == 1  # the new one alone
    assert index_adaptation.statistics(index, model).count == before.count


def test_interrupted_it_is_completed_and_nothing_is_lost(model, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", model, adapt="all")
    monkeypatch.setattr(index_adaptation, "_TOGETHER", 1)
    monkeypatch.setattr("esr_utils.index_writing._COMMIT_ROWS", 1)
    made, made_again = index_adaptation._one, []

    def failing(*arguments):
        made_again.append(arguments)
        if len(made_again) == 3:
            raise KeyboardInterrupt
        return made(*arguments)

    monkeypatch.setattr(index_adaptation, "_one", failing)
    with pytest.raises(KeyboardInterrupt):
        fill(index, model, **FILES)
    assert vectors(index)["adapted"].nunique() == 2
    assert index_adaptation.adapt(index, model).files == 3  # of five
    check(index, model, dict.fromkeys(FILES, of(*FILES.values())), **FILES)


def test_groups_that_seem_to_hold_one_style_are_told_and_left_by_the_trainings(model, tmp_path, monkeypatch):
    """Of anna's clips the nearest style is always the same, of the others' it is any."""
    index = Index.create(tmp_path / "index", model, adapt="speaker")
    one = np.repeat(features(1, 8), 2 * N, axis=0)
    varied = {"b": (2, 0.0, "ben", 60), "c": (3, 0.0, "carl", 60)}
    alike = embedded(model, "a", 1, speaker="anna", n=2 * N)
    index.add([replace(alike, pooled=one.reshape(2 * N, -1)), *(embedded(model, k, *v) for k, v in varied.items())])
    monkeypatch.setattr(adaptation, "FEW_STYLES", 1.5)
    found = index_adaptation.adapt(index, model)
    assert found.few_styles == {"anna": pytest.approx(1.0)} and found.files == 2
    made_by = vectors(index).groupby("file")["adapted"].unique()
    assert list(made_by["a"]) == [""] and made_by["b"][0] and made_by["c"][0]  # not by the whole's either
    again = index_adaptation.adapt(index, model)
    assert again.few_styles == {} and again.files == 0  # said once, and it holds
    take_again(monkeypatch)
    monkeypatch.setattr(adaptation, "FEW_STYLES", 0.5)
    assert index_adaptation.adapt(index, model).files == 1 and all(vectors(index)["adapted"] != "")
    monkeypatch.setattr(adaptation, "FEW_STYLES", 22.1)
    found = index_adaptation.adapt(index, model)
    assert set(found.few_styles) == {"", "anna", "ben", "carl"} and set(vectors(index)["adapted"]) == {""}
    assert index_adaptation.statistics(index, model) is None
    monkeypatch.setattr(adaptation, "MIN_CLIPS", 61)
    assert set(index_adaptation.adapt(index, model).few_styles) == {""}  # of so few moments a group is not spoken of


def test_an_index_that_does_not_adapt_keeps_no_features(model, tmp_path):
    index = Index.create(tmp_path / "index", model)
    assert index.about["adapt"] == "off" and "pooled" not in index.table.schema.names
    assert index_adaptation.adapt(index, model).files == 0


def test_voices_that_change_places_within_a_file_change_their_statistics(model, tmp_path):
    index = Index.create(tmp_path / "index", model, adapt="speaker")
    anna, ben = embedded(model, "call", 1, 3.0, "anna"), embedded(model, "other", 2, -3.0, "ben")
    call = replace(
        anna,
        moments=pd.concat([anna.moments, ben.moments.assign(start_s=ben.moments["start_s"] + 1000)], ignore_index=True),
        vectors=np.concatenate([anna.vectors, ben.vectors]),
        pooled=np.concatenate([anna.pooled, ben.pooled]),
    )
    index.add([call])
    index_adaptation.adapt(index, model)
    first = vectors(index)["vector"].to_numpy()
    swapped = call.moments.assign(speaker=call.moments["speaker"].map({"anna": "ben", "ben": "anna"}))
    index.add([replace(call, moments=swapped)])
    assert index_adaptation.is_due(index) and index_adaptation.adapt(index, model).files == 1
    np.testing.assert_allclose(np.stack(vectors(index)["vector"]), np.stack(first), atol=1e-3)  # the same two groups
    assert not index_adaptation.is_due(index)


def test_two_processes_that_adapt_at_once_end_with_the_same_statistics(model, tmp_path, monkeypatch):
    """Another process adds files and adapts wholly while this one makes vectors anew."""
    index = Index.create(tmp_path / "index", model, adapt="all")
    index.add([embedded(model, key, *about) for key, about in FILES.items()])
    made, more = index_adaptation._one, {"f": (6, 5.0), "g": (7, 5.0), "h": (8, 5.0)}

    def beaten(*arguments):
        monkeypatch.setattr(index_adaptation, "_one", made)
        fill(Index.open(index.uri, model), model, **more)
        return made(*arguments)

    monkeypatch.setattr(index_adaptation, "_one", beaten)
    index_adaptation.adapt(index, model)
    assert not index_adaptation.is_due(index) and vectors(index)["adapted"].nunique() == 1
    everyone = FILES | more
    check(index, model, dict.fromkeys(everyone, of(*everyone.values())), **everyone)


def test_long_files_are_adapted_piece_by_piece_to_the_same_vectors(model, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "AT_ONCE", 7)
    test_all_vectors_are_by_the_statistics_of_the_whole(model, tmp_path)


def test_statistics_that_cannot_be_written_are_said_and_taken_later(model, tmp_path, monkeypatch):
    index = Index.create(tmp_path / "index", model, adapt="all")
    index.add([embedded(model, key, *about) for key, about in FILES.items()])

    class Full:
        def open_table(self, name):
            raise ValueError(f"{name} was not found")

        def create_table(self, *_, **__):
            raise RuntimeError("lance error: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index_adaptation, "connect", lambda uri: Full())
        with pytest.raises(IndexWriteError, match="No space left on device"):
            index_adaptation.adapt(index, model)
    assert index_adaptation.adapt(index, model).files == len(FILES)
    check(index, model, dict.fromkeys(FILES, of(*FILES.values())), **FILES)


def test_how_it_adapts_is_fixed(model, tmp_path):
    Index.create(tmp_path / "index", model, adapt="speaker")
    assert Index.create(tmp_path / "index", model).about["adapt"] == "speaker"
    with pytest.raises(IndexUnusable, match="'speaker', not 'all'"):
        Index.create(tmp_path / "index", model, adapt="all")


def test_a_retriever_that_does_not_standardise_is_refused(tiny_model, tmp_path):
    with pytest.raises(AdaptationError):
        Index.create(tmp_path / "index", tiny_model, adapt="all")


# With recordings --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(speech, tmp_path):
    (tmp_path / "speech").mkdir()
    for i, part in enumerate(np.array_split(speech, 2)):
        soundfile.write(tmp_path / "speech" / f"{i}.wav", part, SAMPLE_RATE)
    (tmp_path / "speech" / "labels.csv").write_text("path,speaker\n0.wav,anna\n1.wav,ben\n")
    return tmp_path / "speech"


@pytest.fixture
def few(monkeypatch):
    """Three moments are enough."""
    monkeypatch.setattr(adaptation, "MIN_CLIPS", 3)
    monkeypatch.setattr(adaptation, "MIN_GROUP", 3)


def test_recordings_adapt_and_an_example_is_heard_as_they_are(model, folder, tmp_path, few):
    plain, index = Index.create(tmp_path / "plain", model), Index.create(tmp_path / "index", model, adapt="all")
    for one in (plain, index):
        report = recordings.refresh(one, recordings.find(folder))
    assert report.adapted == 2
    there = vectors(index)
    pooled = np.stack(there["pooled"]).reshape(-1, *model.speech_head.mean.shape)
    own, training = adaptation.gather([([""] * len(pooled), pooled)])[""], adaptation.of_training(model)
    expected = adaptation.vectors(model, pooled, adaptation.shrunk(own, training))
    np.testing.assert_allclose(np.stack(there["vector"]).astype(np.float32), expected, atol=2e-3)
    hits = index.search("an angry voice", k=1)
    example = tmp_path / "example.wav"
    samples, rate = soundfile.read(folder / f"{hits['file'][0][-5]}.wav", dtype="float32")
    start, end = (round(float(hits[name][0]) * rate) for name in ("start_s", "end_s"))
    soundfile.write(example, samples[start:end], rate, subtype="FLOAT")
    found = index.search_like(example, k=1)
    assert found["id"][0] == hits["id"][0] and found["score"][0] > 0.999
    assert plain.search_like(example, k=1)["score"][0] > 0.999


def test_other_speakers_other_statistics(model, folder, tmp_path, few):
    index = Index.create(tmp_path / "index", model, adapt="speaker")
    recordings.refresh(index, recordings.find(folder))
    made_by = vectors(index).groupby("file")["adapted"].unique()
    assert [len(one) for one in made_by] == [1, 1] and made_by.iloc[0][0] != made_by.iloc[1][0]
    (folder / "labels.csv").write_text("path,speaker\n0.wav,anna\n1.wav,anna\n")
    report = recordings.refresh(index, recordings.find(folder))
    assert report.relabelled == 1 and vectors(index)["adapted"].nunique() == 1
    assert recordings.refresh(index, recordings.find(folder)).adapted == 0


def test_labels_that_were_written_and_not_adapted_to_are_adapted_to_later(model, folder, tmp_path, few, monkeypatch):
    index = Index.create(tmp_path / "index", model, adapt="speaker")
    recordings.refresh(index, recordings.find(folder))
    (folder / "labels.csv").write_text("path,speaker\n0.wav,carl\n1.wav,dora\n")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index_adaptation, "adapt", Mock(side_effect=KeyboardInterrupt))
        recordings.refresh(index, recordings.find(folder))
    report = recordings.refresh(index, recordings.find(folder))
    assert report.relabelled == 0 and report.adapted == 2
    groups = index_adaptation.read(index, model).groups
    assert set(groups) == {"", "carl", "dora"}
    assert set(vectors(index)["adapted"]) == {groups["carl"][0], groups["dora"][0]}


def test_opened_without_its_retriever_it_adapts_by_that_of_its_run(model, folder, tmp_path, few, speech):
    model.save(tmp_path / "run" / "best")
    runs.write_json(tmp_path / "run" / "config.json", {"training": {"level": "normalised"}})
    index = Index.create(tmp_path / "index", model, run=str(tmp_path / "run"), adapt="all")
    recordings.refresh(index, recordings.find(folder))
    again = Index.open(tmp_path / "index")
    assert not index_adaptation.is_due(again) and recordings.refresh(again, recordings.find(folder)).adapted == 0
    assert again.model is None  # with nothing to do it is not loaded
    soundfile.write(folder / "2.wav", speech[: 9 * SAMPLE_RATE] * 0.5, SAMPLE_RATE)
    index = Index.open(tmp_path / "index")
    report = recordings.refresh(index, recordings.find(folder))
    assert report.embedded == 1 and report.adapted > 0
    assert set(vectors(index)["adapted"]) == {index_adaptation.read(index, model).of("")[0]}


def test_a_new_index_adapts_by_speaker_where_the_labels_name_one(model, folder, tmp_path, few):
    model.save(tmp_path / "run" / "best")
    runs.write_json(tmp_path / "run" / "config.json", {"training": {"level": "normalised"}})
    found = recordings.find(folder)
    index = recordings.index_for(tmp_path / "index", found, tmp_path / "run")
    assert index.about["adapt"] == "speaker" and recordings.refresh(index, found).adapted == 2
    assert recordings.index_for(tmp_path / "index", found).about["adapt"] == "speaker"
    assert recordings.index_for(tmp_path / "off", found, tmp_path / "run", adapt="off").about["adapt"] == "off"
    assert recordings.index_for(tmp_path / "off", found, tmp_path / "run").about["adapt"] == "off"  # as it was made
    (folder / "labels.csv").write_text("path,speaker\n0.wav,anna\n1.wav,\n")  # of one of two files, no speaker
    half = recordings.index_for(tmp_path / "half", recordings.find(folder), tmp_path / "run")
    assert half.about["adapt"] == "off"
    (folder / "labels.csv").unlink()
    plain = recordings.index_for(tmp_path / "plain", recordings.find(folder), tmp_path / "run")
    assert plain.about["adapt"] == "off"


def test_esr_stats_tells_what_an_index_adapts_to_and_what_not(model, folder, tmp_path, few, capsys):
    index = Index.create(tmp_path / "index", model, adapt="speaker")
    (folder / "labels.csv").write_text("path,speaker\n0.wav,anna\n1.wav,\n")
    recordings.refresh(index, recordings.find(folder))
    assert cli.main(["stats", "--index", str(tmp_path / "index")]) == OK
    out = capsys.readouterr().out
    assert re.search(r"adapt: +speaker\n", out) and re.search(r"\nadapted_to: +1\n", out)
    assert re.search(r"not_adapted_to: +1\n  none: \d+ moments, of no speaker\n", out)
    assert cli.main(["stats", "--index", str(tmp_path / "index"), "--json"]) == OK
    about = json.loads(capsys.readouterr().out)
    assert (about["adapted_to"], list(about["not_adapted_to"])) == (1, [""])
