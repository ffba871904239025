"""The joint space in numbers: gap, distance of styles and probe on vectors whose answer is known, then on real runs."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from esr_utils import modality, spaces, training
from esr_utils.config import TrainConfig
from esr_utils.prompts import PromptBank

STYLES = np.array(["angry", "calm", "sad", "awe", "bored", "happy"])


def two_clouds(offset: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit vectors of 6 styles around a centre each, 20 of speech and 10 of text; text moved by `offset` one way."""
    rng = np.random.default_rng(seed)
    centres, way = rng.standard_normal((6, 16)), rng.standard_normal(16)
    style, kind = np.repeat(np.arange(6), 30), np.tile(np.array(["speech"] * 20 + ["text"] * 10), 6)
    vectors = centres[style] + 0.3 * rng.standard_normal((180, 16)) + offset * way * (kind == "text")[:, None]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), STYLES[style], kind


def test_the_gap_by_hand():
    assert modality.gap(np.array([[1.0, 0], [0, 1]]), np.array([[-1.0, 0], [0, -1]])) == pytest.approx(2**0.5)
    same = np.eye(3)
    assert modality.gap(same, same[[2, 0, 1]]) == 0


def test_the_gap_of_a_replicate_is_that_of_its_clips():
    vectors, _, kind = two_clouds(1.0)
    speech, text = vectors[kind == "speech"], vectors[kind == "text"]
    weights = np.random.default_rng(0).integers(0, 4, (5, len(speech)))
    by_hand = [modality.gap(np.repeat(speech, times, axis=0), text) for times in weights]
    assert modality.gap_replicates(speech, text, weights) == pytest.approx(by_hand)


def test_the_distance_of_styles_by_hand():
    vectors = np.array([[1.0, 0], [-1, 0], [0, 1], [0, 1], [3, 0]])
    # centroids (0, 0), (0, 1), (3, 0): distances 1, 3 and the root of 10
    assert modality.style_distance(vectors, list("aabbc")) == pytest.approx((1 + 3 + 10**0.5) / 3)


def test_a_probe_tells_two_places_and_not_one():
    for seed in range(3):
        assert modality.probe_accuracy(*two_clouds(3.0, seed)) > 0.97
        assert abs(modality.probe_accuracy(*two_clouds(0.0, seed)) - 0.5) < 0.12


def test_a_probe_cannot_learn_styles_by_heart():
    """Where each style has its own way of telling speech from text, no one direction does it for all of them."""
    rng = np.random.default_rng(0)
    vectors, style, kind = two_clouds(0.0)
    ways = dict(zip(STYLES, rng.standard_normal((6, 16)), strict=True))
    vectors += (kind == "text")[:, None] * np.stack([ways[s] for s in style])
    assert modality.probe_accuracy(vectors, style, kind) < 0.9
    assert modality.probe_accuracy(vectors, rng.permutation(style), kind) > 0.95  # folds that mix styles


def test_a_probe_weighs_both_modalities_the_same():
    """All called speech is right for two thirds of the vectors, and no better than chance."""
    vectors, style, kind = two_clouds(0.0)
    assert modality.probe_accuracy(np.ones_like(vectors), style, kind) == 0.5
    with pytest.raises(ValueError, match="2 styles"):
        modality.probe_accuracy(vectors, ["calm"] * 180, kind)


# Real runs, tiny --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(manifest, tiny_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("spaces")
    config = TrainConfig().but(epochs=1, classify_epochs=0, align_epochs=1, batch_size=6)
    kinds = {"with": {}, "without": {"seed": 1, "adversarial_weight": 0.0}, "base": {"objective": "classifier"}}
    for name, changes in kinds.items():
        training.fit(manifest, folder / name, tiny_config, config.but(**changes), cache=folder / "cache")
    return folder


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "spaces-cache"
    monkeypatch.setattr(spaces, "embed", functools.partial(spaces.embed, cache=cache))


def test_two_runs_on_the_same_clips_and_sentences(trained, manifest):
    named = {"with": trained / "with", "without": trained / "without"}
    found = spaces.joint_spaces(named, manifest, "test", "held_out", "cpu")
    (first, about), (second, other) = found.values()
    assert first.shape == second.shape == (18 + 3 * 15, 8) and about.equals(other)
    assert np.abs(first - second).max() > 0  # they are two runs
    model, _ = training.load_run(trained / "with", "cpu")
    with torch.no_grad():
        text = model.encode_text(PromptBank.load().all_prompts("calm", "held_out")).numpy()
    calm = ((about["modality"] == "text") & (about["style"] == "calm")).to_numpy()
    np.testing.assert_allclose(first[calm], text, atol=1e-6)
    table = spaces.modality_table(found)
    assert list(table.index) == ["with", "without"]
    assert table.loc["with", "modality gap"].value == pytest.approx(modality.gap(first[:18], first[18:]))
    low, high = table.loc["with", "modality gap"].interval
    assert 0 <= low < table.loc["with", "modality gap"].value < high <= 2
    assert table.loc["with", ["clips", "sentences"]].tolist() == [18, 45]
    assert about["speaker"][:18].str.startswith("mini/").all() and set(about["speaker"][18:]) == {""}
    assert table.loc["with", "checkpoint"] == "epoch 1 of 1, 0 with discriminator"
    assert 0 <= table.loc["without", "linear probe, accuracy"].value <= 1


def test_what_has_no_map_is_refused(trained, manifest):
    with pytest.raises(ValueError, match="base cannot be mapped with 'seen' prompts; it is for: classifier"):
        spaces.joint_spaces({"x": trained / "base"}, manifest, "test", "seen", "cpu")
    with pytest.raises(ValueError, match="no clip of split 'dev' has a style"):
        spaces.joint_spaces({"x": trained / "with"}, manifest, "dev", "seen", "cpu")
