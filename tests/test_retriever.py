"""StyleRetriever: pooling and head by hand, the temperature's clamp, a folder read back whole or refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from esr_utils import weights
from esr_utils.config import ConfigError, ModelConfig
from esr_utils.retriever import SpeechHead, StyleRetriever, pool

TEXTS = ["An angry voice.", "Speech that is calm."]


def batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    waveform = 0.1 * torch.randn(3, 16_000, generator=generator)
    return {"waveform": waveform, "n_samples": torch.tensor([16_000, 9_000, 400])}


@torch.no_grad()
def vectors(model: StyleRetriever) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    return model.encode_speech(batch()), model.encode_text(TEXTS)


def assert_same(model: StyleRetriever, other: StyleRetriever) -> None:
    for found, expected in zip(vectors(model), vectors(other), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


# Pooling and head -------------------------------------------------------------------------------------------


def masks(*rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames as letters, S speech, - quiet, . padding -> the valid ones and the active ones."""
    valid = torch.tensor([[letter != "." for letter in row] for row in rows])
    return valid, torch.tensor([[letter == "S" for letter in row] for row in rows])


def test_pooling_by_hand():
    # one layer, width 1. clip 1: 1, 3, 5: mean 3, variance (4 + 0 + 4)/3.
    # clip 2: 2, 6 and padding: mean 4, variance 4.
    frames = torch.tensor([[[[1.0], [3.0], [5.0]]], [[[2.0], [6.0], [100.0]]]])
    valid, active = masks("SSS", "SS.")
    mean = torch.tensor([[[3.0]], [[4.0]]])
    torch.testing.assert_close(pool(frames, valid, active, "mean"), mean)
    spread = torch.tensor([[[math.sqrt(8 / 3)]], [[2.0]]])
    torch.testing.assert_close(pool(frames, valid, active, "stats"), torch.cat([mean, spread], dim=-1))


def test_quiet_frames_count_in_the_mean_and_not_in_the_statistics():
    # all of 9, 1, 5: mean 5. those that carry speech, 1 and 5: mean 3, deviation 2.
    frames, (valid, active) = torch.tensor([[[[9.0], [1.0], [5.0]]]]), masks("-SS")
    torch.testing.assert_close(pool(frames, valid, active, "mean"), torch.tensor([[[5.0]]]))
    torch.testing.assert_close(pool(frames, valid, active, "stats"), torch.tensor([[[3.0, 2.0]]]))


@pytest.mark.parametrize("pooling", ["mean", "stats"])
def test_padding_changes_nothing_of_the_pooled(pooling):
    frames = torch.randn(2, 3, 7, 4)
    alone = pool(frames[:, :, :5], *masks("S-SSS", "SSS--"), pooling)
    torch.testing.assert_close(pool(frames, *masks("S-SSS..", "SSS--.."), pooling), alone)


def test_pooled_statistics_of_a_constant_have_a_gradient():
    """The standard deviation of equal frames is 0, where a square root has no slope."""
    frames = torch.ones(1, 1, 5, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(pool(frames, *masks("SSSSS"), "stats").sum(), frames)
    assert bool(torch.isfinite(gradient).all())


def test_the_mix_is_a_softmax_over_layers():
    head = SpeechHead(2, 3, ModelConfig(dim=3, mix_layers=True, hidden=0, dropout=0.0))
    torch.testing.assert_close(head.layer_weights, torch.tensor([0.5, 0.5]))  # at the start all count alike
    with torch.no_grad():
        head.mix.copy_(torch.tensor([math.log(3.0), 0.0]) / head.GAIN)  # weights 3/4 and 1/4
        head.projection[-1].weight.copy_(torch.eye(3)), head.projection[-1].bias.zero_()
    torch.testing.assert_close(head.layer_weights, torch.tensor([0.75, 0.25]))
    pooled = torch.tensor([[[4.0, 0.0, 8.0], [0.0, 4.0, -8.0]]])
    torch.testing.assert_close(head(pooled), torch.tensor([[3.0, 1.0, 4.0]]))


def test_without_the_mix_only_the_last_layer_is_read(tiny_config):
    model = StyleRetriever.build(tiny_config.but(mix_layers=False)).eval()
    batch = {"waveform": torch.randn(2, 9000), "n_samples": torch.tensor([9000, 7000])}
    layers, mask = model.speech.layers(batch["waveform"], batch["n_samples"])
    frames, same_mask, active = model.frames(batch)
    assert frames.shape == (2, 1, *layers.shape[2:]) and torch.equal(mask, same_mask)
    torch.testing.assert_close(frames[:, 0], layers[:, -1])
    pooled = pool(frames, mask, active, model.config.pooling)
    torch.testing.assert_close(model.speech_vectors(batch), model.speech_head.projection(pooled[:, 0]))


def test_layers_side_by_side(tiny_config, tmp_path):
    model = StyleRetriever.build(tiny_config.but(concat_layers=True)).eval()
    batch = {"waveform": torch.randn(2, 9000), "n_samples": torch.tensor([9000, 7000])}
    pooled = pool(*model.frames(batch), model.config.pooling)
    model.speech_head.fit(torch.randn(40, *pooled.shape[1:]) * 3)
    standardised = (pooled - model.speech_head.mean) / model.speech_head.std
    expected = torch.stack([model.speech_head.projection(torch.cat(list(layers))) for layers in standardised])
    torch.testing.assert_close(model.speech_vectors(batch), expected)
    assert model.speech_head.mix is None and pooled.shape[1] > 1
    model.save(tmp_path)
    torch.testing.assert_close(StyleRetriever.load(tmp_path).speech_vectors(batch), expected)
    with pytest.raises(ConfigError, match="mix_layers False"):
        tiny_config.but(concat_layers=True, mix_layers=False)


def test_the_head_standardises_by_what_it_was_fitted_on():
    head = SpeechHead(1, 3, ModelConfig(dim=3, mix_layers=False, hidden=0, dropout=0.0))
    with torch.no_grad():
        head.projection[-1].weight.copy_(torch.eye(3)), head.projection[-1].bias.zero_()
    pooled = 5 + 3 * torch.randn(200, 1, 3)
    torch.testing.assert_close(head(pooled), pooled[:, -1])  # before fitting it is the identity
    head.fit(pooled)
    torch.testing.assert_close(head(pooled).mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(head(pooled).std(0, correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_fitting_on_a_feature_that_never_changes_is_no_division_by_zero():
    head = SpeechHead(1, 2, ModelConfig(dim=2, mix_layers=False, hidden=0, dropout=0.0))
    head.fit(torch.tensor([[[1.0, 7.0]], [[2.0, 7.0]], [[3.0, 7.0]]]))
    assert bool(torch.isfinite(head(torch.tensor([[[2.0, 7.0]]]))).all())


def test_fitting_on_one_clip_gives_numbers():
    head = SpeechHead(1, 2, ModelConfig(dim=2, mix_layers=False, hidden=0, dropout=0.0))
    head.fit(torch.tensor([[[1.0, 7.0]]]))
    assert bool(torch.isfinite(head(torch.tensor([[[2.0, 7.0]]]))).all())


def test_dropout_acts_in_training_only():
    head = SpeechHead(1, 50, ModelConfig(dim=4, mix_layers=True, dropout=0.5, hidden=0))
    pooled = torch.randn(3, 1, 50)
    assert not torch.equal(head(pooled), head(pooled))
    head.eval()
    assert torch.equal(head(pooled), head(pooled))


# Vectors ----------------------------------------------------------------------------------------------------


def test_vectors_have_unit_length_and_the_joint_dimension(tiny_model):
    speech, text = vectors(tiny_model)
    assert speech.shape == (3, 8) and text.shape == (2, 8)
    torch.testing.assert_close(speech.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))


def test_the_pair_given_to_the_losses_is_the_same_before_normalisation(tiny_model):
    with torch.no_grad():
        speech, text = tiny_model.speech_vectors(batch()), tiny_model.text_vectors(TEXTS)
    torch.testing.assert_close(F.normalize(speech, dim=-1), vectors(tiny_model)[0])
    torch.testing.assert_close(F.normalize(text, dim=-1), vectors(tiny_model)[1])
    assert float((speech.norm(dim=1) - 1).abs().max()) > 1e-2


def test_pooled_features_that_come_with_a_batch_are_used_as_they_are(tiny_model):
    with torch.no_grad():
        pooled = tiny_model.pooled(batch())
        found = tiny_model.encode_speech({"pooled": pooled})
    torch.testing.assert_close(found, vectors(tiny_model)[0])


def test_the_same_seed_builds_the_same_heads(tiny_config):
    def built(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return StyleRetriever.build(tiny_config).text_head.weight

    assert torch.equal(built(7), built(7)) and not torch.equal(built(7), built(8))


# Temperature ------------------------------------------------------------------------------------------------


def test_the_logit_scale_starts_at_one_over_tau_and_stops_at_100(tiny_model):
    assert float(tiny_model.logit_scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        tiny_model.log_scale.fill_(math.log(99.0))
        assert float(tiny_model.logit_scale) == pytest.approx(99, rel=1e-5)
        tiny_model.log_scale.fill_(6.0)  # exp(6) = 403
        assert float(tiny_model.logit_scale) == pytest.approx(100, rel=1e-5)


def test_the_temperature_has_a_gradient(tiny_model):
    tiny_model.logit_scale.backward()  # d exp(x) / dx = exp(x)
    assert float(tiny_model.log_scale.grad) == pytest.approx(1 / 0.07, rel=1e-5)


def test_a_temperature_at_its_limit_can_come_back(tiny_model):
    with torch.no_grad():
        tiny_model.log_scale.fill_(math.log(100.0) + 1e-3)  # one optimiser step too far
    tiny_model.logit_scale.backward()
    assert float(tiny_model.log_scale.grad) > 0


# A folder ---------------------------------------------------------------------------------------------------


def trained(model: StyleRetriever) -> StyleRetriever:
    """As after training: nothing is where it started, the standardisation included."""
    torch.manual_seed(11)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not name.startswith(("text.", "speech.")):
                value += 0.1 * torch.rand_like(value)
    return model


@pytest.fixture
def saved(tiny_model, tmp_path) -> Path:
    trained(tiny_model).save(tmp_path / "best")
    return tmp_path / "best"


def test_what_is_saved_is_loaded_with_the_same_vectors(tiny_model, saved):
    torch.manual_seed(99)  # what is loaded does not depend on the state of the generators
    loaded = StyleRetriever.load(saved)
    assert_same(loaded, tiny_model)
    assert not loaded.training and loaded.config == tiny_model.config
    assert torch.equal(loaded.log_scale, tiny_model.log_scale)


def test_a_frozen_backbone_is_kept_by_name_and_hash_only(tiny_model, saved):
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]
    state = load_file(saved / "model.safetensors")
    assert not [name for name in state if name.startswith(("speech.", "text."))]
    assert {"speech_head.mean", "speech_head.projection.1.weight", "text_head.weight", "log_scale"} <= set(state)
    about = json.loads((saved / "config.json").read_text())
    assert about["speech_backbone_sha256"] == weights.fingerprint(tiny_model.speech)
    assert about["text_backbone_sha256"] == weights.fingerprint(tiny_model.text)


def tune(model: StyleRetriever) -> StyleRetriever:
    """As after training the speech backbone too."""
    model.speech.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.speech.parameters():
            parameter += 0.05 * torch.rand_like(parameter)
    return trained(model)


def test_a_tuned_backbone_is_saved_and_loaded(tiny_model, tmp_path):
    untouched = vectors(tiny_model)[0]
    tune(tiny_model).save(tmp_path / "tuned")
    state = load_file(tmp_path / "tuned" / "model.safetensors")
    assert any(name.startswith("speech.") for name in state)
    assert not any(name.startswith("text.") for name in state)
    loaded = StyleRetriever.load(tmp_path / "tuned")
    assert_same(loaded, tiny_model)
    assert float((vectors(loaded)[0] - untouched).abs().max()) > 1e-2


@pytest.mark.parametrize("tuned", [False, True])
def test_a_loaded_model_can_be_saved_again(tiny_model, tmp_path, tuned):
    (tune if tuned else trained)(tiny_model).save(tmp_path / "first")
    StyleRetriever.load(tmp_path / "first").save(tmp_path / "second")
    assert_same(StyleRetriever.load(tmp_path / "second"), tiny_model)


def test_saving_again_replaces_what_was_there(tiny_model, saved):
    with torch.no_grad():
        tiny_model.text_head.weight += 1.0
    tiny_model.save(saved)
    assert_same(StyleRetriever.load(saved), tiny_model)
    assert len(list(saved.iterdir())) == 2


def test_a_backbone_that_is_not_the_one_it_was_trained_on_is_refused(tiny_config, tmp_path):
    folders = {}
    for part in ("speech", "text"):
        folders[part] = tmp_path / part
        shutil.copytree(getattr(tiny_config, f"{part}_backbone"), folders[part])
    config = tiny_config.but(speech_backbone=str(folders["speech"]), text_backbone=str(folders["text"]))
    StyleRetriever.build(config).save(tmp_path / "best")
    StyleRetriever.load(tmp_path / "best")
    for folder, tensor in (
        (folders["speech"], "encoder.conv1.bias"),
        (folders["text"], "embeddings.LayerNorm.bias"),
    ):
        original = (folder / "model.safetensors").read_bytes()
        state = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
        state[tensor][0] += 0.5
        (folder / "model.safetensors").unlink()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(weights.WeightsError, match=f"trained on.*{folder.name}.*sha256"):
            StyleRetriever.load(tmp_path / "best")
        (folder / "model.safetensors").write_bytes(original)
    StyleRetriever.load(tmp_path / "best")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_weights_that_are_cut_short_are_refused(saved, share):
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(weights.WeightsError, match="model.safetensors"):
        StyleRetriever.load(saved)


def test_missing_weights_are_refused(saved):
    (saved / "model.safetensors").unlink()
    with pytest.raises(weights.WeightsError, match="missing"):
        StyleRetriever.load(saved)


def test_a_mixture_of_two_saves_is_refused(tiny_model, saved):
    """A process killed between the two files leaves the weights of one save and the settings of another."""
    settings = (saved / "config.json").read_bytes()
    with torch.no_grad():
        tiny_model.text_head.weight += 1.0
    tiny_model.save(saved)
    (saved / "config.json").write_bytes(settings)
    with pytest.raises(weights.WeightsError, match="sha256"):
        StyleRetriever.load(saved)


def test_weights_of_another_shape_of_model_are_refused(saved):
    """Edited settings: the head no longer mixes layers."""
    about = json.loads((saved / "config.json").read_text())
    about["model"]["mix_layers"] = False
    (saved / "config.json").write_text(json.dumps(about))
    with pytest.raises(weights.WeightsError, match="speech_head.mean"):
        StyleRetriever.load(saved)


@pytest.mark.parametrize("content", [None, "{", "run"])
def test_a_folder_without_a_retriever_is_refused(tmp_path, content, request):
    if content == "run":  # the run's folder in place of its best/
        content = json.dumps({"model": {}, "training": {}})
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((weights.WeightsError, ValueError), match="holds no retriever|config.json"):
        StyleRetriever.load(tmp_path)


def test_a_save_that_fails_leaves_the_old_one(tiny_model, saved, monkeypatch):
    def full_disk(state, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    before = vectors(StyleRetriever.load(saved))
    monkeypatch.setattr("esr_utils.retriever.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        tiny_model.save(saved)
    torch.testing.assert_close(vectors(StyleRetriever.load(saved)), before)
    assert len(list(saved.iterdir())) == 2
