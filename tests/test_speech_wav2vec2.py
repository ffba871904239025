"""WavLM, HuBERT and wav2vec 2.0: what transformers computes of a clip alone, and how their settings are honoured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForCTC, WavLMModel

from esr_utils import batches, weights
from esr_utils.manifests import to_cuts
from esr_utils.speech import load_speech_backbone
from esr_utils.speech.wavlm import Wav2Vec2Backbone

KINDS = ("wavlm", "hubert", "wav2vec2")
SIZES = {"base": tiny_models.BASE, "large": tiny_models.LARGE, "mixed": tiny_models.LARGE | {"conv_bias": False}}
SIZES["mixed"] = SIZES["mixed"] | {"do_stable_layer_norm": False}  # layer norm in the convolutions, after each sum


@pytest.fixture(scope="module")
def clip(manifest) -> Tensor:
    """Two seconds of real speech."""
    cut = to_cuts(manifest[manifest["split"] == "test"].head(1))[0]
    return batches.load_waveform(cut)[:32_000]


def as_backbone(model, normalize: bool = False) -> Wav2Vec2Backbone:
    return Wav2Vec2Backbone(model, normalize).eval()


def lengths_of(waveform: Tensor) -> Tensor:
    return torch.full((len(waveform),), waveform.shape[1])


# Agreement with transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_transformers_own(kind, size, clip):
    model = tiny_models.wav2vec2(kind, **SIZES[size])
    with torch.no_grad():
        expected = model(clip[None], output_hidden_states=True)
        found, mask = as_backbone(model).layers(clip[None], lengths_of(clip[None]))
    assert bool(mask.all()) and found.shape[1] == len(expected.hidden_states) == 4
    torch.testing.assert_close(found[:, -1], expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    # transformers gives the last layer's output before the final norm of the models that have one.
    for i in range(3):
        torch.testing.assert_close(found[:, i], expected.hidden_states[i], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_is_transformers_own(kind, size, clip):
    """Of two clips of one length, which transformers does not pad."""
    model = tiny_models.wav2vec2(kind, **SIZES[size])
    batch = torch.stack([clip[:9000], clip[10_000:19_000]])
    weight = torch.randn(2, 27, 32, generator=torch.Generator().manual_seed(0))

    def gradients(frames: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        (frames * weight).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model(batch).last_hidden_state)
    found = gradients(as_backbone(model).layers(batch, lengths_of(batch))[0][:, -1])
    names = {"feature_extractor.conv_layers.0.conv.weight", "feature_extractor.conv_layers.0.layer_norm.weight"}
    names |= {"encoder.layers.0.attention.rel_attn_embed.weight"} if kind == "wavlm" else set()
    assert names <= found.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        if name.endswith("k_proj.bias") or (scale < 1e-4 and name not in found):
            continue  # zero but for rounding: softmax and group norm take them away
        torch.testing.assert_close(
            found[name], gradient, atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_clips_of_many_lengths_are_what_transformers_makes_of_each_alone(kind, clip):
    """More than three clips, of lengths around the positional convolution's blocks of 129 frames."""
    model = tiny_models.wav2vec2(kind, **tiny_models.BASE)
    long = clip.repeat(3)
    clips = [long[: 400 + 320 * n] for n in (0, 1, 63, 127, 128, 129, 260)]
    with torch.no_grad():
        padded = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        found, mask = as_backbone(model).layers(padded, torch.tensor([len(one) for one in clips]))
        for row, one in enumerate(clips):
            expected = model(one[None], output_hidden_states=True).hidden_states
            assert int(mask[row].sum()) == expected[0].shape[1]
            for i, theirs in enumerate(expected):
                torch.testing.assert_close(found[row, i, mask[row]], theirs[0], atol=1e-4, rtol=1e-4)


def test_a_long_clip_is_done_in_pieces(clip):
    """Over 2048 frames, a head of the attention is a piece; 2049 output rows are three chunks of the convolutions."""
    model = tiny_models.wav2vec2("wavlm", num_hidden_layers=1, **tiny_models.BASE)
    long = clip.repeat(22)[:656_000]
    with torch.no_grad():
        expected = model(long[None]).last_hidden_state
        found = as_backbone(model).layers(long[None], lengths_of(long[None]), last_only=True)[0][:, 0]
    assert found.shape[1] > 2048
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("size", ["base", "large"])
def test_the_waveform_is_normalised_where_the_folder_says_so(size, stated, clip, tmp_path):
    """Without a preprocessor_config.json: in the models with layer norm, as their authors had it."""
    folder = tiny_models.write_wav2vec2(tmp_path, "wavlm", **SIZES[size])
    if stated is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": stated}))
    normalize = (size == "large") if stated is None else stated
    backbone = load_speech_backbone(folder)
    quiet = 0.01 * clip[:500] + 0.02  # short: dividing by n - 1 would show
    own = Wav2Vec2FeatureExtractor(do_normalize=normalize)(quiet.numpy(), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = backbone.model(own.input_values).last_hidden_state
        found = backbone.layers(F.pad(quiet, (0, 5000), value=9.0)[None], torch.tensor([len(quiet)]))[0][:, -1]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_quiet_speech_on_an_offset_keeps_its_frames():
    """The group norm's statistics are those of differences; in single precision an offset would drown them."""
    model = tiny_models.wav2vec2("wavlm", **tiny_models.BASE).double()
    wave = 1e-3 * torch.randn(1, 8000, generator=torch.Generator().manual_seed(1)) + 0.5
    with torch.no_grad():
        exact = model(wave.double()).last_hidden_state.float()
        found = as_backbone(model.float()).layers(wave, lengths_of(wave))[0][:, -1]
    assert float((found - exact).norm() / exact.norm()) < 1e-2


# Training ---------------------------------------------------------------------------------------------------

OFF = {
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
    "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip


def training(kind: str = "wavlm", **settings) -> Wav2Vec2Backbone:
    return as_backbone(tiny_models.wav2vec2(kind, **(tiny_models.BASE | OFF | settings))).train()


def frames_of(backbone: Wav2Vec2Backbone, clip: Tensor) -> Tensor:
    with torch.no_grad():
        return backbone.layers(clip[None], lengths_of(clip[None]))[0][0]


def test_with_all_of_it_off_training_is_evaluation(clip):
    backbone = training()
    found = frames_of(backbone, clip)
    torch.testing.assert_close(found, frames_of(backbone.eval(), clip), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("setting", "first"),
    [
        ("feat_proj_dropout", 0),
        ("hidden_dropout", 0),
        ("attention_dropout", 1),
        ("activation_dropout", 1),
        ("mask_time_prob", 0),
    ],
)
def test_each_setting_acts_where_it_stands(setting, first, clip):
    """Alone, from the layer on where transformers has it."""
    backbone = training(**{setting: 0.5})
    torch.manual_seed(1), np.random.seed(1)
    changed = (frames_of(backbone, clip) - frames_of(backbone.eval(), clip)).abs().amax(dim=(1, 2))
    assert [bool(one > 1e-3) for one in changed] == [layer >= first for layer in range(4)]


@pytest.mark.parametrize(("kind", "kept"), [("wavlm", 1), ("hubert", 0), ("wav2vec2", 0)])
def test_a_dropped_layer_passes_its_input_on(kind, kept, clip):
    """WavLM's first layer, which owns the position bias of all, is never dropped."""
    found = frames_of(training(kind, layerdrop=1.0), clip)
    evaluated = frames_of(training(kind).eval(), clip)
    for layer in range(4):
        torch.testing.assert_close(found[layer], evaluated[min(layer, kept)], atol=0, rtol=0)


def test_spec_augment_replaces_spans_of_frames_and_nothing_of_the_padding(monkeypatch):
    backbone = training(mask_time_prob=0.4, mask_time_length=5)
    hidden, lengths, told = torch.randn(300, 32), [180, 120], {}
    own = backbone.model._mask_hidden_states
    monkeypatch.setattr(backbone.model, "_mask_hidden_states", lambda x, **given: told.update(given) or own(x, **given))
    np.random.seed(0)
    with torch.no_grad():
        found = backbone._spec_augment(hidden.clone(), lengths)
    assert told["attention_mask"].sum(1).tolist() == lengths
    replaced = (found == backbone.model.masked_spec_embed).all(1)
    assert torch.equal(found[~replaced], hidden[~replaced])
    for part in replaced.split(lengths):
        assert 0.2 < float(part.float().mean()) < 0.45  # spans may overlap
    edges = torch.nn.functional.pad(replaced.split(lengths)[0].int(), (1, 1)).diff()
    assert min((edges.eq(-1).nonzero() - edges.eq(1).nonzero()).flatten().tolist()) >= 5
    backbone.model.config.apply_spec_augment = False
    assert torch.equal(backbone._spec_augment(hidden, lengths), hidden)


def test_clips_shorter_than_a_masked_span_can_be_trained_on(clip):
    backbone = training(mask_time_prob=0.9, mask_time_length=10)
    assert frames_of(backbone, clip[:1000]).shape[1] == 2  # transformers refuses such a batch


def test_far_less_is_kept_for_the_backward_than_by_transformers(clip):
    backbone = training(conv_dim=(64,) * 7)
    batch = clip.repeat(4, 1)

    def kept(run) -> int:
        storages = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert run().requires_grad
        return sum(storage.nbytes() for storage in storages.values())

    ours = kept(lambda: backbone.layers(batch, lengths_of(batch), last_only=True)[0])
    assert ours < 0.4 * kept(lambda: backbone.model(batch).last_hidden_state)


# Loading ----------------------------------------------------------------------------------------------------


def write_bin(folder: Path, model, names: dict | None = None) -> str:
    """As the hub has microsoft/wavlm-base-plus: pytorch_model.bin, no safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    torch.save(tiny_models.as_published(model) if names is None else names, folder / "pytorch_model.bin")
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pytorch_model_bin_loads_as_safetensors_do(kind, tmp_path, clip):
    model = tiny_models.wav2vec2(kind, **tiny_models.BASE)
    with weights.quiet_transformers():
        model.save_pretrained(tmp_path / "new")
    new, old = load_speech_backbone(str(tmp_path / "new")), load_speech_backbone(write_bin(tmp_path / "old", model))
    assert weights.fingerprint(new) == weights.fingerprint(old)
    torch.testing.assert_close(frames_of(new, clip), frames_of(old, clip), atol=0, rtol=0)


def test_the_encoder_of_a_model_with_a_head_loads(tmp_path, clip):
    """Its weights stand under "wavlm."."""
    bare = tiny_models.wav2vec2("wavlm", **tiny_models.BASE)
    whole = WavLMForCTC(bare.config)
    whole.wavlm.load_state_dict(bare.state_dict())
    with weights.quiet_transformers():
        whole.save_pretrained(tmp_path)
    torch.testing.assert_close(frames_of(load_speech_backbone(str(tmp_path)), clip), frames_of(as_backbone(bare), clip))


@pytest.mark.parametrize("form", ["bin", "safetensors"])
@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_do_not_fit_are_refused_by_name(form, damage, tmp_path):
    model = tiny_models.wav2vec2("wavlm", **tiny_models.BASE)
    name, state = "encoder.layers.1.attention.q_proj.weight", tiny_models.as_published(model)
    if damage == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(3, 32)
    folder = write_bin(tmp_path, model, state)
    if form == "safetensors":
        from safetensors.torch import save_file

        (tmp_path / "pytorch_model.bin").unlink()
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(weights.WeightsError, match=name):
        load_speech_backbone(folder)


@pytest.mark.parametrize(
    "setting", [{"add_adapter": True}, {"hidden_act": "relu"}, {"feat_extract_activation": "silu"}]
)
def test_a_model_with_parts_that_are_not_supported_is_refused(setting, tmp_path):
    folder = tiny_models.write_wav2vec2(tmp_path, "wav2vec2", **tiny_models.BASE, **setting)
    with pytest.raises(weights.WeightsError, match=next(iter(setting))):
        load_speech_backbone(folder)


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_damaged_preprocessor_config_is_refused(content, tiny_speech, tmp_path):
    shutil.copytree(tiny_speech("wavlm"), tmp_path / "copy")
    (tmp_path / "copy" / "preprocessor_config.json").write_text(content)
    with pytest.raises(weights.WeightsError, match="preprocessor_config.json"):
        load_speech_backbone(str(tmp_path / "copy"))


def test_a_model_of_the_real_size_is_transformers_own(tmp_path, clip, monkeypatch):
    """Random weights in the shape of microsoft/wavlm-base-plus, found by its short name."""
    model = WavLMModel(WavLMConfig()).eval()
    write_bin(tmp_path / "microsoft" / "wavlm-base-plus", model)
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    backbone = load_speech_backbone("wavlm")
    assert sum(p.numel() for p in backbone.parameters()) == 94_381_936
    assert (backbone.n_layers, backbone.dim, backbone.hop) == (13, 768, 320)
    with torch.no_grad():
        expected = model(clip[None], output_hidden_states=True).hidden_states
        pair = torch.stack([F.pad(clip[:8000], (0, len(clip) - 8000)), clip])
        found, mask = backbone.layers(pair, torch.tensor([8000, len(clip)]))
    for i, theirs in enumerate(expected):
        torch.testing.assert_close(found[1, i], theirs[0], atol=2e-4, rtol=1e-3)
    alone = frames_of(backbone, clip[:8000])
    assert float((found[0, :, mask[0]] - alone).abs().max()) < 1e-4
