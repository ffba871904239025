"""Evaluation: numbers worked out by hand with a tie, documented keys, chance where it must be, controls."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from esr_utils import evaluation, intervals, runs, tables, trials
from esr_utils.corpora import DEMO_FOLDER
from esr_utils.embedding import Embeddings
from esr_utils.evaluation import Scorer, clips_of_run, controls, evaluate, style_queries
from esr_utils.styles import STYLES, PromptBank

# By hand ----------------------------------------------------------------------------------------------------

CLIPS = pd.DataFrame(
    {
        "utterance_id": [f"toy/{i}" for i in range(5)],
        "corpus": "toy",
        "split": "test",
        "style": ["angry", "angry", "calm", "calm", "sad"],
        "speaker": ["a", "b", "a", "b", "c"],
        "gender": ["female", "male", "female", "male", "female"],
        "language": "en",
    }
)
# rows the clips, columns angry, calm, sad
SCORES = np.array(
    [
        [0.9, 0.5, 0.85],
        [0.9, 0.6, 0.4],
        [0.9, 0.8, 0.1],  # level with the angry clips in the first column
        [0.1, 0.7, 0.2],
        [0.2, 0.1, 0.3],
    ]
)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """Every trial takes all clips of other styles: 3, 3 and 4 of them, so nothing is left to the draw."""
    return Scorer(CLIPS, trials.build_trials(CLIPS, "toy", "test", n_trials=60, seed=0), seed=0)


def test_retrieval_by_hand(scorer):
    # angry: one of three distractors is level, so rank 1 or 2   R@1 1/2   1/rank (1 + 1/2)/2 = 3/4
    # calm:  each positive is above all distractors              R@1 1     1/rank 1
    # sad:   0.85 and 0.4 are above 0.3, so rank 3               R@1 0     1/rank 1/3
    values, per_style = scorer.retrieval(SCORES)
    assert values["r@1"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert values["map@10"] == pytest.approx((3 / 4 + 1 + 1 / 3) / 3)
    assert values["r@5"] == values["r@10"] == values["r@20"] == 1
    rows = per_style.set_index("style")
    assert rows["r@1"].to_dict() == pytest.approx({"angry": 0.5, "calm": 1.0, "sad": 0.0})
    assert rows["n_candidates"].to_dict() == {"angry": 4, "calm": 4, "sad": 5}


def test_the_whole_collection_by_hand(scorer):
    # P@10 of 5 clips: 2/10, 2/10, 1/10.
    # AP of angry, 2 right among 3 level ones: at ranks 1, 2: 1; at 1, 3: 5/6; at 2, 3: 7/12; mean 29/36.
    # AP of calm 1, of sad 1/3.
    values, _ = scorer.retrieval(SCORES)
    assert values["collection/p@10"] == pytest.approx(0.5 / 3)
    assert values["collection/map"] == pytest.approx((29 / 36 + 1 + 1 / 3) / 3)


def test_by_gender_of_the_clip_to_be_found_by_hand(scorer):
    # female: angry 1/2, calm 1, sad 0.  male: angry 1/2, calm 1, and no sad clip.
    values, _ = scorer.retrieval(SCORES)
    assert values["gender=female/r@1"] == pytest.approx(1.5 / 3)
    assert values["gender=male/r@1"] == pytest.approx(1.5 / 2)
    assert not [key for key in values if key.startswith("language=")]  # there is but one


def test_classification_by_hand(scorer):
    # found: angry, angry, angry (wrong), calm, sad
    values = scorer.classification(SCORES)
    assert values["accuracy"] == pytest.approx(4 / 5)
    assert values["uar"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    confusion = scorer.confusion(SCORES)
    assert confusion.to_numpy().tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert list(confusion.index) == list(confusion.columns) == ["angry", "calm", "sad"]
    assert confusion.sum(axis=1).to_dict() == CLIPS["style"].value_counts().to_dict()


def test_every_interval_holds_its_value(scorer):
    values = scorer.retrieval(SCORES)[0] | scorer.classification(SCORES)
    for name in ("r@1", "r@5", "r@10", "r@20", "map@10", "accuracy", "uar"):
        low, high = values[f"{name}_ci95"]
        assert 0 <= low <= values[name] <= high <= 1
    low, high = values["r@1_ci95"]
    assert high - low > 0.1  # five clips say little


def test_an_interval_holds_its_value_where_few_replicates_differ():
    low, high = intervals.interval(np.array([0.5] * 98 + [1.0] * 2), 0.5)
    assert low <= 0.5 <= high


def test_scores_that_are_all_alike_are_chance(scorer):
    values, _ = scorer.retrieval(np.zeros((5, 3)))
    assert values["r@1"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 5) / 3)


def test_intervals_are_of_trials_of_the_same_size():
    """Of 30 others a trial takes 5: among equal scores the chance is 1/6, in every replicate too."""
    rows = pd.DataFrame({"utterance_id": [f"toy/{i:02d}" for i in range(45)], "corpus": "toy", "split": "test"})
    rows = rows.assign(style=["angry", "calm", "sad"] * 15, speaker="a", gender="", language="")
    drawn = trials.build_trials(rows, "toy", "test", n_trials=20, n_distractors=5)
    values, _ = Scorer(rows, drawn, 0).retrieval(np.zeros((45, 3)))
    assert values["r@1"] == pytest.approx(1 / 6)
    assert values["r@1_ci95"] == pytest.approx([1 / 6, 1 / 6])


def test_intervals_are_over_speakers_where_there_are_five():
    many = pd.concat([CLIPS] * 3, ignore_index=True)
    many["utterance_id"] = [f"toy/{i:02d}" for i in range(15)]
    few = Scorer(many, trials.build_trials(many, "toy", "test", n_trials=5), 0)
    many["speaker"] = [f"s{i % 5}" for i in range(15)]
    enough = Scorer(many, trials.build_trials(many, "toy", "test", n_trials=5), 0)
    assert (few.bootstrap, enough.bootstrap) == ("utterance", "speaker")


# A model and a manifest -------------------------------------------------------------------------------------

RECALLS = ("r@1", "r@5", "r@10", "r@20", "map@10")


def with_intervals(names) -> set[str]:
    return {key for name in names for key in (name, f"{name}_ci95")}


def expected_keys(corpus: str) -> set[str]:
    keys = {f"{corpus}/{name}" for name in ("n_clips", "n_skipped", "n_candidates", "bootstrap")}
    for prompts in ("seen", "held_out"):
        names = with_intervals(RECALLS) | {"collection/p@10", "collection/map"}
        names |= {f"gender={gender}/{name}" for gender in ("female", "male") for name in RECALLS}
        keys |= {f"{corpus}/{prompts}/{name}" for name in names}
    for task in ("zero_shot", "zero_shot_held_out"):
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
            assert 0 <= low <= high <= 1 and low - 0.02 <= value <= high + 0.02, key
    about = {key: found.results[key] for key in WHOLE - {"seconds"}}
    assert about == {"n_trials": 40, "n_candidates": 13, "seed": 3, "level": "normalised", "split": "test"}
    assert found.results["seconds"] > 0
    assert (found.results["mini/n_clips"], found.results["mini/n_skipped"]) == (18, 0)


def test_what_else_an_evaluation_holds(found, manifest):
    confusion = found.confusion["mini"]
    assert confusion.sum(axis=1).to_dict() == {"angry": 6, "calm": 6, "whispered": 6}
    accuracy = np.trace(confusion.to_numpy()) / 18
    assert found.results["mini/zero_shot/accuracy"] == pytest.approx(accuracy)
    assert len(found.per_style) == 6 and set(found.per_style["prompts"]) == {"seen", "held_out"}
    seen = found.per_style.query("prompts == 'seen'")
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
    """`evaluate` with the test clips' vectors and the three styles' queries given."""
    ids = manifest.loc[manifest["split"] == "test", "utterance_id"].tolist()
    nothing = pd.DataFrame(columns=["utterance_id", "reason"])
    monkeypatch.setattr(evaluation, "embed", lambda *_: Embeddings(ids, vectors.astype("float32"), nothing))
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


# Controls ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control(manifest) -> dict:
    return controls(manifest, "mini", n_trials=60)


def test_controls_have_the_documented_keys(control):
    names = {f"chance/{name}" for name in ("r@1", "r@5", "r@10", "r@20", "accuracy")}
    for cue in ("loudness", "prosody", "text"):
        names |= {f"{cue}/{name}" for name in with_intervals((*RECALLS, "accuracy", "uar"))}
    assert set(control) == {f"mini/control/{name}" for name in names}
    assert all(0 <= value <= 1 for key, value in control.items() if not key.endswith("_ci95"))


def test_chance(control):
    assert control["mini/control/chance/r@1"] == pytest.approx(1 / 13)
    assert control["mini/control/chance/r@20"] == 1
    assert control["mini/control/chance/accuracy"] == pytest.approx(1 / 3)


def test_chance_where_styles_differ_in_size(manifest):
    test, calm = manifest["split"] == "test", manifest["style"] == "calm"
    rows = manifest[~(test & calm) | (manifest["speaker"] == "m_mid")].reset_index(drop=True)
    found = controls(rows, "mini", n_trials=5)
    # 6 angry, 2 calm and 6 whispered clips: trials of 1 + 8, 1 + 12 and 1 + 8
    assert found["mini/control/chance/r@1"] == pytest.approx((1 / 9 + 1 / 13 + 1 / 9) / 3)


def test_words_alone_are_at_chance_where_every_sentence_is_said_in_every_style(control):
    assert control["mini/control/text/r@1"] == pytest.approx(control["mini/control/chance/r@1"])
    assert control["mini/control/text/uar"] == pytest.approx(1 / 3)


def test_words_alone_are_enough_where_they_name_the_style(manifest):
    telling = manifest.assign(text="I am " + manifest["style"])
    found = controls(telling, "mini", n_trials=30)
    assert found["mini/control/text/r@1"] == 1 and found["mini/control/text/accuracy"] == 1


def test_loudness_as_recorded_gives_whispers_away_and_words_do_not(control):
    """The demo corpus's whispered clips are quieter by rule."""
    assert control["mini/control/loudness/accuracy"] > 1 / 3 + 0.1
    assert control["mini/control/prosody/r@1"] > 2 / 13


def test_without_a_train_split_there_is_chance_only(manifest):
    found = controls(manifest[manifest["split"] == "test"], "mini", n_trials=5)
    assert {key.split("/")[2] for key in found} == {"chance"}


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


# Tables -----------------------------------------------------------------------------------------------------


def test_tables_show_every_number_with_its_interval(found, control):
    results = found.results | control
    head = tables.headline(results)
    assert set(head.index) == {("mini", name) for name in ("seen", "held_out", "chance", "loudness", "prosody", "text")}
    low, high = results["mini/seen/r@1_ci95"]
    assert head.loc[("mini", "seen"), "r@1"] == f"{results['mini/seen/r@1']:.2f} [{low:.2f}, {high:.2f}]"
    assert head.loc[("mini", "chance"), "r@1"] == "0.08"
    accuracy = results["mini/zero_shot_held_out/accuracy"]
    assert head.loc[("mini", "held_out"), "accuracy"].startswith(f"{accuracy:.2f} [")
    assert list(tables.collection(results).columns) == ["p@10", "map"] and len(tables.collection(results)) == 2
    assert len(tables.groups(results)) == 4
    protocol = tables.protocol(results)
    assert protocol.loc["mini", "n_clips"] == 18 and protocol.loc["mini", "split"] == "test"
    assert json.dumps(protocol.to_dict("records"), default=str)
