"""Evaluation: documented keys, the slow obvious way beside ours, chance where it must be, which systems a run has."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from esr_utils import evaluation, modality, runs, trials
from esr_utils.config import TrainConfig
from esr_utils.corpora import DEMO_FOLDER
from esr_utils.embedding import Embeddings
from esr_utils.evaluation import SYSTEMS, evaluate, style_queries
from esr_utils.prompts import PROMPTS_PATH, PromptBank
from esr_utils.provenance import clips_of_run
from esr_utils.styles import STYLES

RECALLS = ("r@1", "r@5", "r@10", "r@20", "map@10")


def with_intervals(names) -> set[str]:
    return {key for name in names for key in (name, f"{name}_ci95")}


def expected_keys(corpus: str, systems=SYSTEMS) -> set[str]:
    keys = {f"{corpus}/{name}" for name in ("n_clips", "n_skipped", "n_candidates", "bootstrap")}
    for system in systems:
        names = with_intervals((*RECALLS, "collection/p@10", "collection/map"))
        names |= {f"gender={g}/{name}" for g in ("female", "male") for name in (*with_intervals(RECALLS), "clips")}
        names |= {"accuracy_of_22"} if system == "classifier" else with_intervals(("modality_gap",))
        keys |= {f"{corpus}/{system}/{name}" for name in names}
        task = {"seen": "zero_shot", "held_out": "zero_shot_held_out", "classifier": "classifier"}[system]
        keys |= {f"{corpus}/{task}/{name}" for name in with_intervals(("accuracy", "uar"))}
    return keys


WHOLE = {"n_trials", "n_candidates", "seed", "seconds", "level", "split"}


@pytest.fixture
def found(tiny_model, manifest, tmp_path) -> evaluation.Evaluation:
    return evaluate(tiny_model, manifest, "test", "normalised", seed=3, cache=tmp_path, n_trials=40)


def test_results_have_the_documented_keys_and_can_be_written(found, tmp_path):
    assert set(found.results) == expected_keys("mini") | WHOLE
    runs.write_json(tmp_path / "results.json", found.results)
    assert runs.read_json(tmp_path / "results.json") == found.results
    for key, value in found.results.items():
        if re.search(r"/(r@\d+|map@10|p@10|map|accuracy|uar)$", key):
            assert 0 <= value <= 1, key
        if key.endswith("_ci95"):
            low, high = value
            value = found.results[key.removesuffix("_ci95")]
            assert 0 <= low <= value <= high <= (2 if "modality_gap" in key else 1), key
    about = {key: found.results[key] for key in WHOLE - {"seconds"}}
    assert about == {"n_trials": 40, "n_candidates": 13, "seed": 3, "level": "normalised", "split": "test"}
    assert found.results["seconds"] > 0
    assert (found.results["mini/n_clips"], found.results["mini/n_skipped"]) == (18, 0)


def test_what_else_an_evaluation_holds(found, manifest):
    confusion = found.confusion["mini"]
    assert confusion.sum(axis=1).to_dict() == {"angry": 6, "calm": 6, "whispered": 6}
    accuracy = np.trace(confusion.to_numpy()) / 18
    assert found.results["mini/zero_shot/accuracy"] == pytest.approx(accuracy)
    assert len(found.per_style) == 9 and set(found.per_style["system"]) == {"seen", "held_out", "classifier"}
    seen = found.per_style.query("system == 'seen'")
    assert found.results["mini/seen/r@1"] == pytest.approx(seen["r@1"].mean())
    test = manifest[manifest["split"] == "test"]
    assert found.embeddings.utterance_ids == test["utterance_id"].tolist()
    assert found.trials["mini"] == trials.build_trials(manifest, "mini", "test", n_trials=40, seed=3)
    assert found.skipped.empty


def test_the_numbers_are_those_of_comparing_every_pair(found, tiny_model, manifest):
    """Zero-shot and the styles' rankings, from each clip's and each prompt's own vector."""
    bank, style = PromptBank.load(), manifest.set_index("utterance_id")["style"]
    names = ["angry", "calm", "whispered"]
    with torch.no_grad():
        prompts = {s: tiny_model.encode_text(bank.all_prompts(s, "seen")).numpy() for s in names}
    vectors = dict(zip(found.embeddings.utterance_ids, found.embeddings.vectors, strict=True))
    mean = {u: {s: float((prompts[s] @ v).mean()) for s in names} for u, v in vectors.items()}
    right = [max(mean[u], key=mean[u].get) == style[u] for u in vectors]
    assert found.results["mini/zero_shot/accuracy"] == pytest.approx(np.mean(right))
    precision = []  # average precision of each style's ranking, by its definition
    for s in names:
        ranked = sorted(vectors, key=lambda u, s=s: -mean[u][s])
        hits = [rank for rank, u in enumerate(ranked, start=1) if style[u] == s]
        precision.append(np.mean([n / rank for n, rank in enumerate(hits, start=1)]))
    assert found.results["mini/seen/collection/map"] == pytest.approx(np.mean(precision))


def test_a_styles_query_is_the_mean_of_its_prompts(tiny_model):
    """Similarity to the mean of unit vectors is the mean of the similarities, by which the paper ranks."""
    bank, clips = PromptBank.load(), np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
    for kind, n in (("seen", 66), ("held_out", 15)):
        found = style_queries(tiny_model, ["calm", "awe"], kind)
        assert found.shape == (2, 8)
        for query, style in zip(found, ("calm", "awe"), strict=True):
            with torch.no_grad():
                each = tiny_model.encode_text(bank.all_prompts(style, kind)).numpy()
            assert len(each) == n
            np.testing.assert_allclose(clips @ query, (clips @ each.T).mean(axis=1), atol=1e-5)
            assert np.linalg.norm(query) < 0.9999  # it is not normalised again


def evaluate_vectors(monkeypatch, model, manifest: pd.DataFrame, vectors: np.ndarray, queries: np.ndarray, **options):
    """`evaluate` with the test clips' vectors and the three styles' queries given; the classifier's logits are 0."""
    ids = manifest.loc[manifest["split"] == "test", "utterance_id"].tolist()
    nothing, logits = pd.DataFrame(columns=["utterance_id", "reason"]), np.zeros((len(ids), 22), "float32")
    monkeypatch.setattr(evaluation, "embed", lambda *_: Embeddings(ids, vectors.astype("float32"), logits, nothing))
    monkeypatch.setattr(evaluation, "style_queries", lambda *_: queries.astype("float32"))
    return evaluate(model, manifest, cache=None, **options).results


def test_a_model_that_knows_every_style_scores_1(monkeypatch, tiny_model, manifest):
    style = manifest.loc[manifest["split"] == "test", "style"].map(["angry", "calm", "whispered"].index)
    results = evaluate_vectors(monkeypatch, tiny_model, manifest, np.eye(3)[style], np.eye(3))
    for name in (
        "seen/r@1",
        "held_out/map@10",
        "zero_shot/accuracy",
        "zero_shot_held_out/uar",
        "seen/collection/map",
    ):
        assert results[f"mini/{name}"] == 1
    assert results["mini/seen/r@1_ci95"] == pytest.approx([1, 1])
    assert results["mini/seen/collection/p@10"] == pytest.approx(6 / 10)


def test_a_model_that_gives_every_clip_the_same_vector_is_at_chance(monkeypatch, tiny_model, manifest):
    results = evaluate_vectors(monkeypatch, tiny_model, manifest, np.ones((18, 3)), np.ones((3, 3)))
    for k in (1, 5, 10):
        assert results[f"mini/seen/r@{k}"] == pytest.approx(k / 13)
    assert results["mini/seen/r@20"] == 1
    assert results["mini/zero_shot/uar"] == pytest.approx(1 / 3)
    assert results["mini/classifier/r@1"] == pytest.approx(1 / 13)
    assert results["mini/classifier/accuracy"] == pytest.approx(1 / 3)
    assert results["mini/classifier/accuracy_of_22"] == pytest.approx(1 / 22)


def test_the_same_seed_draws_the_same_trials(tiny_model, manifest, tmp_path):
    def trials_of(seed: int):
        return evaluate(tiny_model, manifest, cache=tmp_path, seed=seed, n_trials=20).trials["mini"]

    assert trials_of(1) == trials_of(1) != trials_of(2)


def test_a_clip_that_cannot_be_used_is_counted_and_named(tiny_model, own_corpus, tmp_path):
    row = own_corpus[own_corpus["split"] == "test"].iloc[3]
    silence(Path(row["root"]) / row["path"])
    found = evaluate(tiny_model, own_corpus, cache=tmp_path / "cache", n_trials=20)
    assert (found.results["mini/n_clips"], found.results["mini/n_skipped"]) == (17, 1)
    assert found.skipped["utterance_id"].tolist() == [row["utterance_id"]]
    assert row["utterance_id"] not in found.trials["mini"].utterances


def silence(file: Path) -> None:
    info = soundfile.info(file)
    soundfile.write(file, np.zeros(info.frames), info.samplerate, format="OGG", subtype="OPUS")


def test_clips_without_a_style_are_left_out(tiny_model, manifest, tmp_path):
    rows = manifest.copy()
    rows.loc[rows.index[rows["split"] == "test"][:2], "style"] = ""
    assert evaluate(tiny_model, rows, cache=tmp_path, n_trials=5).results["mini/n_clips"] == 16


def test_two_corpora_are_kept_apart(tiny_model, manifest, tmp_path):
    other = manifest.assign(corpus="other", utterance_id="other/" + manifest["utterance_id"].str[5:])
    other = other[other["style"] != "calm"]
    both = pd.concat([other, manifest], ignore_index=True)
    found = evaluate(tiny_model, both, cache=tmp_path, n_trials=20)
    assert set(found.results) == expected_keys("mini") | expected_keys("other") | WHOLE
    assert found.results["other/n_candidates"] == found.results["n_candidates"] == 7
    assert found.results["mini/n_candidates"] == 13
    alone = evaluate(tiny_model, manifest, cache=tmp_path, n_trials=20).results
    assert all(found.results[key] == value for key, value in alone.items() if key.startswith("mini/"))


def test_what_cannot_be_evaluated_is_refused(tiny_model, manifest, tmp_path):
    with pytest.raises(ValueError, match="no clip of split 'test' has a style.*train.*val"):
        evaluate(tiny_model, manifest[manifest["split"] != "test"], cache=tmp_path)
    with pytest.raises(ValueError, match="second style"):
        evaluate(tiny_model, manifest[manifest["style"] == "calm"], cache=tmp_path)


def test_a_corpus_without_a_usable_clip_is_refused_by_name(tiny_model, own_corpus, tmp_path):
    for path in own_corpus.loc[own_corpus["split"] == "test", "path"]:
        silence(tmp_path / "mini" / path)
    with pytest.raises(ValueError, match="mini"):
        evaluate(tiny_model, own_corpus, cache=None)


def test_clips_of_unknown_gender_are_no_group(tiny_model, manifest, tmp_path):
    rows = manifest.copy()
    rows.loc[rows.index[rows["split"] == "test"][:5], "gender"] = ""
    found = evaluate(tiny_model, rows, cache=tmp_path, n_trials=20)
    assert not [key for key in found.results if "gender=/" in key]


# The classifier, and which systems a run has ----------------------------------------------------------------


def test_the_classifier_ranks_by_the_logit_of_the_style(monkeypatch, tiny_model, manifest):
    """A classifier that knows calm clips, but would call every clip sleepy, which is not in the split."""
    test = manifest[manifest["split"] == "test"]
    logits = np.zeros((18, 22), "float32")
    logits[:, STYLES.index("calm")] = test["style"] == "calm"
    logits[:, STYLES.index("sleepy")] = 5
    nothing = pd.DataFrame(columns=["utterance_id", "reason"])
    embedded = Embeddings(test["utterance_id"].tolist(), np.ones((18, 8), "float32"), logits, nothing)
    monkeypatch.setattr(evaluation, "embed", lambda *_: embedded)
    found = evaluate(tiny_model, manifest, cache=None, n_trials=20, systems=("classifier",))
    assert set(found.results) == expected_keys("mini", ("classifier",)) | WHOLE
    assert found.results["mini/classifier/r@1"] == pytest.approx((1 + 2 / 13) / 3)  # the others are level with all
    assert found.results["mini/classifier/accuracy"] == pytest.approx((1 + 2 * 1 / 3) / 3)
    assert found.results["mini/classifier/accuracy_of_22"] == 0
    assert found.confusion["mini"].loc["calm", "calm"] == 6


def test_a_run_is_evaluated_by_what_it_was_trained_for():
    def systems(**training) -> tuple[str, ...]:
        return evaluation.options({"training": TrainConfig().but(**training).to_dict()})["systems"]

    assert systems() == ("seen", "held_out", "classifier")
    assert systems(objective="classifier") == ("classifier",)
    assert systems(classification_weight=0.0) == ("seen", "held_out")
    how = evaluation.options({"training": TrainConfig().but(level="recorded", held_out_styles=["awe"]).to_dict()})
    assert how["level"] == "recorded" and how["held_out_styles"] == ("awe",)


def test_seen_prompts_are_those_of_the_runs_own_bank(tiny_model, tmp_path):
    content = runs.read_json(PROMPTS_PATH)
    content["styles"]["calm"]["label"] = "softly placid"
    runs.write_json(tmp_path / "bank.json", content)
    settings = {"training": TrainConfig().but(prompt_bank=str(tmp_path / "bank.json")).to_dict()}
    bank = evaluation.options(settings)["bank"]
    assert "Speech that is softly placid." in bank.all_prompts("calm", "seen")
    with torch.no_grad():
        expected = tiny_model.encode_text(bank.all_prompts("calm", "seen")).numpy().mean(0)
    found = style_queries(tiny_model, ["calm"], "seen", bank)[0]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.abs(found - style_queries(tiny_model, ["calm"], "seen")[0]).max() > 1e-4


def test_styles_that_were_not_trained_on_are_told_apart(tiny_model, manifest, tmp_path):
    found = evaluate(tiny_model, manifest, cache=tmp_path, n_trials=30, held_out_styles=("calm",))
    rows = found.per_style.query("system == 'seen'").set_index("style")["r@5"]
    assert found.results["mini/seen/trained=no/r@5"] == pytest.approx(rows["calm"])
    assert found.results["mini/seen/trained=yes/r@5"] == pytest.approx((rows["angry"] + rows["whispered"]) / 2)


def test_the_modality_gap_of_results_is_that_of_all_vectors(found, tiny_model, manifest):
    vectors, about = evaluation.joint_space(tiny_model, found.embeddings, manifest, "held_out")
    speech = (about["modality"] == "speech").to_numpy()
    expected = modality.gap(vectors[speech], vectors[~speech])
    assert found.results["mini/held_out/modality_gap"] == pytest.approx(expected, abs=1e-5)


# Which clips, and maps --------------------------------------------------------------------------------------


def test_the_clips_of_a_run_are_those_it_was_trained_on_unless_others_are_named(data_root, manifest, monkeypatch):
    monkeypatch.delenv("ESR_DATA", raising=False)
    settings = {"corpora": ["mini"], "roots": [str(data_root / "mini")]}
    pd.testing.assert_frame_equal(clips_of_run(settings), manifest)
    pd.testing.assert_frame_equal(clips_of_run(settings, manifest=str(data_root / "mini" / "manifest.csv")), manifest)
    assert set(clips_of_run(settings, corpora="demo+mini")["corpus"]) == {"demo", "mini"}
    demo = {"corpora": ["demo"], "roots": [str(DEMO_FOLDER)]}
    pd.testing.assert_frame_equal(clips_of_run(demo, corpora="mini", data_root=str(data_root)), manifest)
    monkeypatch.setenv("ESR_DATA", str(data_root))
    pd.testing.assert_frame_equal(clips_of_run(demo, corpora="mini"), manifest)


def test_speech_and_text_stand_in_one_space(found, tiny_model, manifest):
    vectors, about = evaluation.joint_space(tiny_model, found.embeddings, manifest, "held_out")
    assert vectors.shape == (18 + 3 * 15, 8) and len(about) == 63
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors[:18], found.embeddings.vectors)
    style = manifest.set_index("utterance_id")["style"]
    assert about["style"][:18].tolist() == style[found.embeddings.utterance_ids].tolist()
    calm = about.query("style == 'calm' and modality == 'text'").index
    with torch.no_grad():
        expected = tiny_model.encode_text(PromptBank.load().all_prompts("calm", "held_out")).numpy()
    np.testing.assert_allclose(vectors[calm], expected, atol=1e-6)


def test_the_space_of_the_prompts(tiny_model):
    vectors, about = evaluation.prompt_space(tiny_model.text)
    assert vectors.shape == (22 * (66 + 15), 16) and about["modality"].value_counts()["held_out"] == 22 * 15
    row = about.index[700]
    alone = torch.nn.functional.normalize(tiny_model.text.embed([about["prompt"][row]]), dim=-1)[0].numpy()
    np.testing.assert_allclose(vectors[row], alone, atol=1e-6)


def test_the_nearest_style_by_hand():
    """Each style at a place of its own; the held-out prompt of the second stands at the first's."""
    seen = pd.DataFrame({"style": STYLES, "prompt": "x", "modality": "seen"})
    held_out = pd.DataFrame({"style": STYLES[:2], "prompt": "y", "modality": "held_out"})
    vectors = np.vstack([np.eye(22), np.eye(22)[[0, 0]]])
    found = evaluation.nearest_style(vectors, pd.concat([seen, held_out], ignore_index=True))
    assert found["nearest"].tolist() == [STYLES[0]] * 2 and found["style"].tolist() == list(STYLES[:2])
