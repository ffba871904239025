"""The leak: nothing is found in noise but by it, and naive training learns it on speech too."""

from __future__ import annotations

import pytest

from esr_utils import captions, fusion_evaluation, fusion_systems
from esr_utils.config import FusionConfig, FusionTrainConfig
from esr_utils.leakage import noise_experiment, speech_experiment
from esr_utils.protocols import HONEST, LEAKY


def test_nothing_is_found_in_noise_but_by_the_leak():
    """Speech and captions are independent: whoever finds the pairs has been told them."""
    found = noise_experiment()
    assert len(found) == 5 * 2 * 2 and set(found["steps"]) == {0, 300} and (found["chance"] == 1 / 200).all()
    honest = found[found["honest"]]
    assert set(honest["protocol"]) == set(HONEST)
    at_chance = (honest["low"] <= honest["chance"]) & (honest["chance"] <= honest["high"])
    assert at_chance.all(), honest[~at_chance]
    leaked = found[~found["honest"] & (found["steps"] == 300)]
    assert set(leaked["protocol"]) == set(LEAKY) and (leaked["r@1"] > 0.95).all()


@pytest.mark.usefixtures("read_once")
def test_naive_training_claims_on_speech_what_its_own_vectors_do_not_find(manifest, tiny_text, tiny_whisper, tmp_path):
    told = captions.of_manifest(manifest, per_clip=2, cache=tmp_path)
    model = FusionConfig(speech_backbone=tiny_whisper, text_backbone=tiny_text, dim=32, heads=4)
    config = FusionTrainConfig(batch_size=8, max_steps=1)
    given = (manifest, told, tmp_path / "grid", model, config, (0,), ("FS-CLAP",), "", "cpu", tmp_path)
    (folder,) = fusion_systems.train_all(*given)["FS-CLAP"]
    (test,) = fusion_evaluation.captioned_sets(manifest, told)
    found = speech_experiment(folder, manifest, told, test, 200, device="cpu", cache=tmp_path)
    after = found[found["steps"] == 200].set_index(["protocol", "direction"])["r@1"]
    assert set(found["steps"]) == {0, 200} and len(found) == 2 * 3 * 2
    assert found["chance"].iloc[0] == test.captions.relevant[test.own].mean()
    assert after["matched"].min() > 0.6 > 0.3 > after["masked"].max(), after
    again = speech_experiment(folder, manifest, told, test, 200, device="cpu", cache=tmp_path)
    assert again.equals(found)
