"""emotion2vec: what funasr computes of a clip alone, read without its loader, and in silence."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from esr_utils import batches, weights
from esr_utils.manifests import to_cuts
from esr_utils.speech import SpeechBackbone, emotion2vec, funasr_classes, load_speech_backbone


@pytest.fixture(scope="module")
def config() -> dict:
    return tiny_models.emotion2vec_config(**tiny_models.TINY_EMOTION2VEC)


@pytest.fixture(scope="module")
def model(config) -> nn.Module:
    """funasr's own. Do not change it."""
    return tiny_models.emotion2vec_model(config)


@pytest.fixture(scope="module")
def clip(manifest) -> Tensor:
    """Two seconds of real speech."""
    cut = to_cuts(manifest[manifest["split"] == "test"].head(1))[0]
    return batches.load_waveform(cut)[:32_000]


def own_frames(model: nn.Module, clip: Tensor, normalize: bool = True) -> Tensor:
    """(T, D), as funasr's `inference` calls its forward."""
    source = (F.layer_norm(clip, clip.shape) if normalize else clip)[None]
    return model(source, padding_mask=None, mask=False, features_only=True)["x"][0]


def frames_of(backbone: SpeechBackbone, clip: Tensor) -> Tensor:
    """(L, T, D)."""
    return backbone.layers(clip[None], torch.tensor([len(clip)]))[0][0]


# Agreement with funasr --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_the_last_layer_is_funasrs_own(normalize, config, model, clip, tmp_path):
    """On a waveform with an offset, so that the normalisation counts."""
    stated = copy.deepcopy(config)
    stated["model_conf"]["normalize"] = normalize
    backbone = load_speech_backbone(tiny_models.write_emotion2vec(tmp_path, stated, model))
    shifted = 0.3 * clip + 0.1
    with torch.no_grad():
        found, expected = frames_of(backbone, shifted), own_frames(model, shifted, normalize)
        other = own_frames(model, shifted, not normalize)
    assert found.shape == (4, 99, 32)
    torch.testing.assert_close(found[-1], expected, atol=1e-4, rtol=1e-4)
    assert float((found[-1] - other).norm() / other.norm()) > 1e-2


def test_every_layer_is_funasrs_own(tiny_speech, model, clip):
    """Watched as its blocks run; the ten extra tokens come first."""
    seen = []
    blocks = [*model.modality_encoders["AUDIO"].context_encoder.blocks, *model.blocks]
    hooks = [
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[0]))) for block in blocks
    ]
    try:
        with torch.no_grad():
            own_frames(model, clip)
            found = frames_of(load_speech_backbone(tiny_speech("emotion2vec")), clip)
    finally:
        for hook in hooks:
            hook.remove()
    expected = [seen[0][0], *(output for _, output in seen)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs[0, 10:], atol=1e-4, rtol=1e-4)


def test_every_gradient_is_funasrs_own(tiny_speech, config, clip):
    backbone, own = load_speech_backbone(tiny_speech("emotion2vec")), tiny_models.emotion2vec_model(config)
    backbone.set_trainable(True)
    weight = torch.randn(99, 32, generator=torch.Generator().manual_seed(0))
    (frames_of(backbone, clip)[-1] * weight).sum().backward()
    (own_frames(own, clip) * weight).sum().backward()
    theirs = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
    ours = {name: p.grad for name, p in backbone.model.named_parameters()}
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=1e-3)


def test_training_mode_reads_the_models_settings(config, model, clip, tmp_path):
    """All off, training is evaluation; each alone acts from its layer on."""
    places = {
        ("encoder_dropout",): 1,
        ("post_mlp_drop",): 1,
        ("attention_dropout",): 1,
        ("activation_dropout",): 1,
        ("dropout_input",): 2,
        ("layerdrop",): 2,
        ("modalities", "audio", "prenet_dropout"): 0,
        ("modalities", "audio", "prenet_layerdrop"): 1,
    }
    for active in (None, *places):
        stated = copy.deepcopy(config)
        for path in places:
            part = stated["model_conf"]
            for key in path[:-1]:
                part = part[key]
            part[path[-1]] = 0.0 if path != active else 1.0 if "layerdrop" in path[-1] else 0.5
        name = "off" if active is None else active[-1]
        backbone = load_speech_backbone(tiny_models.write_emotion2vec(tmp_path / name, stated, model))
        with torch.no_grad():
            expected = frames_of(backbone, clip)
            torch.manual_seed(0), np.random.seed(0)
            changed = (frames_of(backbone.train(), clip) - expected).abs().amax(dim=(1, 2)) > 1e-3
        first = 4 if active is None else places[active]
        assert changed.tolist() == [layer >= first for layer in range(4)], name


# Loading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["wrapped", "plain", "fine-tuned", "with a teacher", "safetensors", "model.pt"])
def test_the_forms_a_checkpoint_comes_in(form, tiny_speech, config, model, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    state, file = dict(model.state_dict()), "emotion2vec_base.pt"
    if form == "fine-tuned":
        state = {f"d2v_model.{k}": v for k, v in state.items()} | {"proj.weight": torch.zeros(9, 32)}
    if form == "with a teacher":
        state |= {f"_ema.{k}": v + 1 for k, v in state.items()} | {"_ema": {"step": 1}}
    if form == "safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    else:
        file = "model.pt" if form == "model.pt" else file
        torch.save(state if form == "plain" else {"model": state, "args": None}, tmp_path / file)
    found = load_speech_backbone(str(tmp_path))
    assert weights.fingerprint(found) == weights.fingerprint(load_speech_backbone(tiny_speech("emotion2vec")))


def test_loading_draws_nothing_at_random(tiny_speech):
    torch.manual_seed(3), np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1]
    backbone = load_speech_backbone(tiny_speech("emotion2vec"))
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])
    assert all(p.device.type == "cpu" and p.dtype == torch.float32 for p in backbone.parameters())


@pytest.fixture
def own_folder(config, model, tmp_path) -> Path:
    return Path(tiny_models.write_emotion2vec(tmp_path / "own", config, model))


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(damage, own_folder, model):
    name, state = "blocks.1.mlp.fc1.weight", dict(model.state_dict())
    if damage == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(3, 32)
    torch.save({"model": state}, own_folder / "emotion2vec_base.pt")
    with pytest.raises(weights.WeightsError, match=name):
        load_speech_backbone(str(own_folder))


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["ESR_TEST_TRACE"],)


def test_a_checkpoint_that_holds_a_program_is_refused(own_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ESR_TEST_TRACE", str(tmp_path / "trace"))
    torch.save({"model": Malicious()}, own_folder / "emotion2vec_base.pt")
    with pytest.raises(weights.WeightsError, match="emotion2vec_base.pt.*more than tensors"):
        load_speech_backbone(str(own_folder))
    assert not (tmp_path / "trace").exists()
    torch.load(own_folder / "emotion2vec_base.pt", weights_only=False)  # what it would have done
    assert (tmp_path / "trace").exists()


@pytest.mark.parametrize("spec", ["__import__('os').mkdir(trace)", "[(16, 10, 5)] and exit()", "16 ** 9", "", "None"])
def test_a_config_that_holds_a_program_is_refused(spec, own_folder, config, tmp_path):
    """funasr evaluates this entry."""
    stated = copy.deepcopy(config)
    stated["model_conf"]["modalities"]["audio"]["feature_encoder_spec"] = spec.replace(
        "trace", repr(str(tmp_path / "t"))
    )
    (own_folder / "config.yaml").write_text(yaml.safe_dump(stated))
    with pytest.raises(weights.WeightsError, match="feature_encoder_spec"):
        load_speech_backbone(str(own_folder))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    "content", ["", "model: Emotion2vec", "a: [", "model: Paraformer", "!!python/object:os.system x"]
)
def test_a_damaged_config_is_refused(content, own_folder):
    (own_folder / "config.yaml").write_text(content)
    with pytest.raises(weights.WeightsError, match="config.yaml"):
        load_speech_backbone(str(own_folder))


def test_another_model_of_funasr_is_refused(own_folder, config):
    (own_folder / "config.yaml").write_text(yaml.safe_dump(config | {"model": "Paraformer"}))
    with pytest.raises(weights.WeightsError, match="Paraformer"):
        load_speech_backbone(str(own_folder))


@pytest.mark.parametrize(("setting", "value"), [("layer_norm_first", True), ("learned_alibi", True)])
def test_a_model_with_parts_that_are_not_supported_is_refused(setting, value, own_folder, config):
    stated = copy.deepcopy(config)
    conf = stated["model_conf"]
    (conf if setting in conf else conf["modalities"]["audio"])[setting] = value
    (own_folder / "config.yaml").write_text(yaml.safe_dump(stated))
    with pytest.raises(weights.WeightsError, match=setting):
        load_speech_backbone(str(own_folder))


def test_a_folder_without_weights_is_refused(own_folder):
    (own_folder / "emotion2vec_base.pt").unlink()
    with pytest.raises(weights.WeightsError, match="holds no weights"):
        load_speech_backbone(str(own_folder))


# funasr's manners -------------------------------------------------------------------------------------------

QUIET = """
import logging, socket, sys
import torch
def refuse(*args): raise AssertionError("the network was asked")
socket.socket.connect = refuse
threads, handlers = torch.get_num_threads(), list(logging.getLogger().handlers)
import esr_utils.speech
assert not any(name.split(".")[0] == "funasr" for name in sys.modules), "imported before it is needed"
backbone = esr_utils.speech.load_speech_backbone(sys.argv[1])
backbone.layers(torch.randn(1, 4000), torch.tensor([4000]))
assert torch.get_num_threads() == threads and logging.getLogger().handlers == handlers
assert not any(name.split(".")[0] == "funasr" for name in sys.modules)
assert type(backbone.model).__module__ == "funasr.models.emotion2vec.model"
"""


def test_loading_says_nothing_asks_nobody_and_leaves_the_threads_alone(tiny_speech):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", QUIET, tiny_speech("emotion2vec")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_funasr_it_is_asked_for(monkeypatch, tiny_speech):
    monkeypatch.setattr(funasr_classes, "find_spec", lambda name: None)
    with pytest.raises(weights.WeightsError, match="funasr.*not installed"):
        load_speech_backbone(tiny_speech("emotion2vec"))


def test_a_funasr_that_is_already_imported_is_used_and_left(monkeypatch, tiny_speech):
    with emotion2vec._funasr() as model_class:
        modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "funasr"}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert type(load_speech_backbone(tiny_speech("emotion2vec")).model) is model_class
    assert all(sys.modules[name] is module for name, module in modules.items())


def test_a_model_of_the_real_size_is_funasrs_own(tmp_path, clip, monkeypatch):
    """Random weights in the shape of emotion2vec base, found by its short name."""
    config = tiny_models.emotion2vec_config()
    model = tiny_models.emotion2vec_model(config)
    assert sum(p.numel() for p in model.parameters()) == 93_790_988
    tiny_models.write_emotion2vec(tmp_path / "emotion2vec" / "emotion2vec_base", config, model)
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    backbone = load_speech_backbone("emotion2vec")
    decoder = sum(p.numel() for p in model.modality_encoders["AUDIO"].decoder.parameters())
    assert sum(p.numel() for p in backbone.parameters()) == 93_790_988 - decoder
    assert (backbone.n_layers, backbone.dim, backbone.hop) == (13, 768, 320)
    with torch.no_grad():
        pair = torch.stack([F.pad(clip[:8000], (0, len(clip) - 8000)), clip])
        found, mask = backbone.layers(pair, torch.tensor([8000, len(clip)]), last_only=True)
        torch.testing.assert_close(found[1, 0], own_frames(model, clip), atol=2e-4, rtol=1e-3)
        assert float((found[0, 0, mask[0]] - own_frames(model, clip[:8000])).abs().max()) < 2e-4
