"""Adaptation: statistics against numpy's, the fall-back, the training's own statistics, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from esr_utils import adaptation, evaluation
from esr_utils.adaptation import Statistics
from esr_utils.config import FusionConfig
from esr_utils.embedding import embed, frozen_features
from esr_utils.fusion import FusionRetriever
from esr_utils.manifests import to_cuts


def pooled(n: int, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    """(n, L, P) fp16, as an index keeps them: of tiny_model's shape, 3 layers of 2 x 16."""
    return (np.random.default_rng(seed).normal(offset, 2.0, size=(n, 3, 32))).astype(np.float16)


@pytest.fixture
def fitted(tiny_model):
    """A retriever that standardises, by the statistics of some training clips."""
    tiny_model.speech_head.fit(torch.from_numpy(pooled(200, seed=9)).float())
    return tiny_model


def test_statistics_of_batches_are_those_of_all_rows_at_once():
    rows = pooled(101, offset=300.0)  # far from 0, where sums of squares in fp32 or fp16 would have no digit left
    running = adaptation.Running()
    for part in (rows[:1], rows[1:1], rows[1:60], rows[60:]):
        running.add(part)
    found = running.statistics()
    exact = rows.astype(np.float64)
    assert found.count == 101
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.std, exact.std(0), rtol=1e-6)


def test_statistics_are_what_a_head_is_fitted_to(fitted):
    rows = pooled(80)
    running = adaptation.Running()
    running.add(rows)
    fitted.speech_head.fit(torch.from_numpy(rows).float())
    np.testing.assert_allclose(running.statistics().mean, fitted.speech_head.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(running.statistics().std, fitted.speech_head.std, rtol=1e-5)


def test_a_dimension_that_never_varies_has_a_deviation_above_zero():
    running = adaptation.Running()
    running.add(np.full((60, 1, 2), 3.0))
    assert (running.statistics().std == np.float32(1e-4)).all()


def test_no_clip_has_no_statistics():
    with pytest.raises(ValueError, match="no clip"):
        adaptation.Running().statistics()


def test_groups_have_their_own_statistics_in_whatever_batches_they_come():
    rows, groups = pooled(90), np.array(["a", "b", "b"] * 30)
    together = adaptation.gather([(groups, rows)])
    apart = adaptation.gather([(groups[:7], rows[:7]), (groups[7:], rows[7:])])
    for name in "ab":
        exact = rows[groups == name].astype(np.float64)
        assert together[name].count == apart[name].count == len(exact)
        for found in (together[name], apart[name]):
            np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.std, exact.std(0), rtol=1e-5)


def test_a_groups_statistics_are_those_of_its_clips_and_of_some_of_the_training():
    """Against as many clips put together: 30 of a group, and 10 that have the training's mean and deviation."""
    rng = np.random.default_rng(0)
    own, training = (rng.normal(at, 2.0, size=(n, 1, 3)) for at, n in ((5.0, 30), (0.0, adaptation.PRIOR)))
    together = adaptation.gather([(["all"] * 40, np.concatenate([own, training]))])["all"]
    of_each = [adaptation.gather([(["one"] * len(rows), rows)])["one"] for rows in (own, training)]
    found = adaptation.shrunk(*of_each)
    assert found.count == 30
    np.testing.assert_allclose(found.mean, together.mean, rtol=1e-5)
    np.testing.assert_allclose(found.std, together.std, rtol=1e-5)


def test_the_more_clips_the_nearer_to_their_own_statistics_and_under_ten_the_trainings_stay():
    training = Statistics(0, np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32))
    few, ten, many = (Statistics(n, training.mean + 5, training.std * 2) for n in (9, 10, 10**6))
    assert adaptation.shrunk(few, training) is training
    assert adaptation.shrunk(ten, training).mean == pytest.approx(2.5)
    assert adaptation.shrunk(ten, training).std == pytest.approx(np.sqrt(0.5 * 4 + 0.5 * 1 + 0.25 * 25))
    assert adaptation.shrunk(many, training).mean == pytest.approx(5.0, abs=1e-3)
    assert adaptation.shrunk(many, training).std == pytest.approx(2.0, abs=1e-3)


def test_by_the_training_statistics_vectors_are_the_retrievers_own(fitted):
    rows = pooled(7)
    batch = {"pooled": torch.from_numpy(rows).float()}
    with torch.no_grad():
        own = fitted.encode_speech(batch).numpy()
    np.testing.assert_allclose(adaptation.vectors(fitted, rows, adaptation.of_training(fitted)), own, atol=1e-6)


def test_adapted_vectors_are_those_of_a_retriever_fitted_to_the_clips(fitted):
    rows = pooled(60, seed=3, offset=1.0)
    (own,) = adaptation.gather([(["one"] * 60, rows)]).values()
    before = fitted.speech_head.mean.clone()
    adapted = adaptation.vectors(fitted, rows, own)
    assert torch.equal(fitted.speech_head.mean, before)  # the model is as it was
    fitted.speech_head.fit(torch.from_numpy(rows).float())
    with torch.no_grad():
        refitted = fitted.encode_speech({"pooled": torch.from_numpy(rows).float()}).numpy()
    np.testing.assert_allclose(adapted, refitted, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(adapted, axis=1), 1.0, atol=1e-5)


def test_a_shift_and_a_scale_of_the_recording_are_undone(fitted):
    """What a room or a microphone does, were it just that: each dimension times a number, plus a number."""
    rows = pooled(60).astype(np.float32)
    rng = np.random.default_rng(1)
    elsewhere = rows * rng.uniform(0.5, 2.0, (3, 32)) + rng.normal(0, 5, (3, 32))
    of = [adaptation.gather([(["one"] * 60, part)])["one"] for part in (rows, elsewhere)]
    here, there = (adaptation.vectors(fitted, part, own) for part, own in zip((rows, elsewhere), of, strict=True))
    np.testing.assert_allclose(here, there, atol=1e-3)


def test_in_a_mixture_each_clip_has_its_groups_and_the_training_where_they_are_small(monkeypatch):
    monkeypatch.setattr(adaptation, "MIN_CLIPS", 2)
    training = Statistics(0, np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32))
    # means by corpus: c 2 (0, 2, 4), d 10; by speaker: c/x 1 (0, 2), and one clip each of c/y and d/x
    rows = np.array([0.0, 2.0, 4.0, 10.0]).reshape(4, 1, 1)
    groups = [["c", "c", "c", "d"], ["c/x", "c/x", "c/y", "d/x"]]
    mixture = adaptation.Mixture(["1", "2", "3", "4"], groups, rows, training)
    means = {name: [float(one.mean.squeeze()) for one in of] for name, of in mixture.of.items()}
    assert means == {"1": [0, 2, 1], "2": [0, 2, 1], "3": [0, 2, 0], "4": [0, 0, 0]}
    rng = np.random.default_rng(0)
    drawn = [float(mixture.draw(["1"], rng)["1"].mean.squeeze()) for _ in range(300)]
    assert all(70 < drawn.count(mean) < 130 for mean in (0, 1, 2))


def test_clips_are_embedded_by_the_statistics_of_their_group(fitted, manifest, tmp_path, monkeypatch):
    """Against a copy of the head refitted to each group in turn; the small group keeps the training's."""
    rows = manifest.sort_values("utterance_id").reset_index(drop=True)
    cuts, groups = to_cuts(rows), np.where(np.arange(len(rows)) % 3 == 0, "few", "many")
    for name, value in {"MIN_CLIPS": len(rows), "MIN_GROUP": (groups == "many").sum(), "PRIOR": 0}.items():
        monkeypatch.setattr(adaptation, name, value)
    of_clip = dict(zip(rows["utterance_id"], groups, strict=True))
    found = embed(fitted, cuts, "normalised", tmp_path, of_clip)
    plain = embed(fitted, cuts, "normalised", tmp_path)
    assert found.utterance_ids == plain.utterance_ids
    many = np.array([of_clip[name] == "many" for name in found.utterance_ids])
    np.testing.assert_allclose(found.vectors[~many], plain.vectors[~many], atol=1e-5)
    np.testing.assert_allclose(found.logits[~many], plain.logits[~many], atol=1e-5)
    features = frozen_features(fitted, cuts, "normalised", tmp_path).pooled[torch.from_numpy(many)]
    fitted.speech_head.fit(features)
    again = embed(fitted, cuts, "normalised", tmp_path)
    np.testing.assert_allclose(found.vectors[many], again.vectors[many], atol=1e-4)
    np.testing.assert_allclose(found.logits[many], again.logits[many], atol=1e-4)
    assert np.abs(found.vectors[many] - plain.vectors[many]).max() > 0.01  # else nothing was tested
    monkeypatch.setattr(adaptation, "MIN_CLIPS", len(rows) + 1)
    too_few = embed(fitted, cuts, "normalised", tmp_path, of_clip)
    np.testing.assert_allclose(too_few.vectors, again.vectors, atol=1e-5)


def test_an_evaluation_adapts_by_a_column_within_each_corpus(fitted, manifest, tmp_path, monkeypatch):
    asked, own_embed = [], evaluation.embed

    def noted(model, cuts, level, cache, groups):
        asked.append(groups)
        return own_embed(model, cuts, level, cache, groups)

    monkeypatch.setattr(evaluation, "embed", noted)
    evaluation.evaluate(fitted, manifest, "train", cache=tmp_path, n_trials=5, adapt="speaker")
    one = manifest[manifest["split"] == "train"].iloc[0]
    assert asked[0][one["utterance_id"]] == f"{one['corpus']}/{one['speaker']}"
    with pytest.raises(ValueError, match="no column"):
        evaluation.evaluate(fitted, manifest, "train", cache=tmp_path, n_trials=5, adapt="room")


def test_how_many_styles_clips_seem_to_have():
    # Of many clips the correction, (styles seen - 1) / 2n, is nothing.
    assert adaptation.effective_styles(np.array([1, 1, 1, 1]) * 10**6) == pytest.approx(4)
    assert adaptation.effective_styles(np.array([0, 0, 3, 0])) == pytest.approx(1)
    # half of one style, a quarter each of two: 2^(1/2) * 4^(1/4) * 4^(1/4) = 2^1.5
    assert adaptation.effective_styles(np.array([2, 1, 1, 0]) * 10**6) == pytest.approx(2**1.5)
    assert adaptation.effective_styles(np.array([2, 1, 1, 0])) == pytest.approx(2**1.5 * np.exp(2 / 8))


def test_of_few_clips_as_many_styles_are_seen_as_of_many():
    rng, share = np.random.default_rng(0), np.full(8, 1 / 8)
    of_few = [adaptation.effective_styles(rng.multinomial(20, share)) for _ in range(500)]
    assert np.mean(of_few) == pytest.approx(8, rel=0.08)  # 6.6 without the correction


def test_styles_are_counted_by_the_statistics_of_the_training(fitted):
    pooled = np.random.default_rng(0).normal(size=(40, *fitted.speech_head.mean.shape)).astype(np.float32)
    queries = np.random.default_rng(1).normal(size=(6, fitted.config.dim))
    near = [
        int((queries @ one).argmax())
        for one in fitted.encode_speech({"pooled": torch.from_numpy(pooled)}).detach().numpy()
    ]
    assert adaptation.style_counts(fitted, pooled, queries).tolist() == [near.count(i) for i in range(6)]


def test_a_retriever_that_does_not_standardise_is_refused(tiny_model):
    with pytest.raises(adaptation.AdaptationError, match="finetune frozen"):
        adaptation.of_training(tiny_model)


def test_a_fusion_retriever_is_refused(tiny_config):
    model = FusionRetriever.build(
        FusionConfig(speech_backbone=tiny_config.speech_backbone, text_backbone=tiny_config.text_backbone, dim=16)
    )
    with pytest.raises(adaptation.AdaptationError, match="kind 'fusion'"):
        adaptation.vectors(model, pooled(2), Statistics(0, np.zeros(1), np.ones(1)))
