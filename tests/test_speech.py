"""Speech backbones: exact frame counts, frames that ignore the batch, parity with Whisper's own code."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperFeatureExtractor, WhisperModel

from esr_utils import batches, embedding, runs, weights
from esr_utils.manifests import to_cuts
from esr_utils.retriever import StyleRetriever
from esr_utils.speech import LogMelBackbone, SpeechBackbone, active_frames, load_speech_backbone

FAMILY = ("wavlm", "hubert", "wav2vec2", "wavlm-large", "hubert-large", "wav2vec2-large")
LEARNED = ("whisper", "emotion2vec", "clap", *FAMILY)  # tiny ones


@pytest.fixture(scope="module", params=("whisper-tiny", "logmel", *LEARNED))
def backbone(request, tiny_speech, whisper_tiny) -> SpeechBackbone:
    """Every kind there is. Do not change it; `learned` is of the test's own."""
    if request.param == "whisper-tiny":
        return whisper_tiny
    return load_speech_backbone("logmel" if request.param == "logmel" else tiny_speech(request.param))


@pytest.fixture(params=LEARNED)
def learned(request, tiny_speech) -> SpeechBackbone:
    return load_speech_backbone(tiny_speech(request.param))


@pytest.fixture(scope="module")
def speech(manifest) -> list[Tensor]:
    """A few seconds of real speech each."""
    cuts = to_cuts(manifest[manifest["split"] == "test"].head(6))
    return [batches.load_waveform(cut) for cut in cuts]


def noise(n_samples: int) -> Tensor:
    return 0.1 * torch.randn(n_samples, generator=torch.Generator().manual_seed(n_samples))


def batch_of(speech: list[Tensor], *lengths: int) -> tuple[Tensor, Tensor]:
    """The first clips, cut to these lengths, or all of them whole: the waveform padded, and the samples of each."""
    clips = [clip[:length] for clip, length in zip(speech, lengths, strict=False)] if lengths else speech
    return pad_sequence(clips, batch_first=True), torch.tensor([len(clip) for clip in clips])


@torch.no_grad()
def alone(backbone: SpeechBackbone, clip: Tensor) -> Tensor:
    """(L, T, D) of one clip."""
    frames, mask = backbone.layers(clip[None], torch.tensor([len(clip)]))
    assert bool(mask.all()) and mask.shape[1] == frames.shape[2]
    return frames[0]


# Frame counts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whisper", "logmel", "wavlm", "emotion2vec"])
def test_frame_count_at_every_length(name, tiny_speech):
    """Over two borders or more."""
    backbone = load_speech_backbone("logmel" if name == "logmel" else tiny_speech(name))
    lengths = torch.arange(400, 2001 if name in ("whisper", "logmel") else 1045)
    found = torch.tensor([alone(backbone, noise(n)).shape[1] for n in lengths.tolist()])
    assert torch.equal(backbone.n_frames(lengths), found)


def test_frame_count_of_the_pretrained_whisper_at_every_length(whisper_tiny):
    """The last convolution for each count of mel frames, then the whole encoder at the borders."""
    lengths = torch.arange(400, 2001)
    mel_frames = [whisper_tiny.log_mel(noise(n)[None], torch.tensor([n]))[0].shape[2] for n in lengths.tolist()]
    real = {m: whisper_tiny.encoder.conv2(torch.zeros(1, 384, m)).shape[2] for m in set(mel_frames)}
    assert torch.equal(whisper_tiny.n_frames(lengths), torch.tensor([real[m] for m in mel_frames]))
    for n in (400, 480, 481, 640, 641, 799, 800, 801, 1599, 1600, 1601, 1760, 1761, 1920, 1921, 2000):
        assert alone(whisper_tiny, noise(n)).shape[1] == int(whisper_tiny.n_frames(torch.tensor(n)))


def test_frame_counts_by_hand(whisper_tiny):
    # a mel frame every 160 samples from 0 on: 400 -> 0, 160, 320; 480 ends before 480 begins; 481 -> one more
    lengths = torch.tensor([400, 480, 481, 640, 641, 16_000, 480_000])
    assert LogMelBackbone().n_frames(lengths).tolist() == [3, 3, 4, 4, 5, 100, 3000]
    assert whisper_tiny.n_frames(lengths).tolist() == [2, 2, 2, 2, 3, 50, 1500]


@pytest.mark.parametrize("name", ["wavlm", "emotion2vec"])
def test_frame_counts_of_convolutions_by_hand(name, tiny_speech):
    """A window of 400 samples every 320, none of them past the end."""
    lengths = torch.tensor([400, 719, 720, 1039, 1040, 16_000, 480_000])
    assert load_speech_backbone(tiny_speech(name)).n_frames(lengths).tolist() == [1, 1, 2, 2, 3, 49, 1499]


# Batches ----------------------------------------------------------------------------------------------------


def assert_same_frames(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float(F.cosine_similarity(found, expected, dim=-1).min()) >= 0.9999
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_frames_do_not_depend_on_the_batch(backbone, speech):
    """Clips of 25 ms to 5 s side by side, with rubbish written where the padding is."""
    clips = [speech[0], speech[1][:16_001], noise(400), torch.cat(speech[2:4]), speech[4][:7_999]]
    n_samples = torch.tensor([len(clip) for clip in clips])
    waveform = 30 * torch.randn(len(clips), int(n_samples.max()) + 1234)
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    with torch.no_grad():
        frames, mask = backbone.layers(waveform, n_samples)
    assert frames.shape[:2] == (len(clips), backbone.n_layers) and frames.shape[3] == backbone.dim
    assert mask.sum(1).tolist() == backbone.n_frames(n_samples).tolist()
    for row, clip in enumerate(clips):
        valid = int(mask[row].sum())
        assert bool(mask[row, :valid].all()) and bool((frames[row, :, valid:] == 0).all())
        assert_same_frames(frames[row, :, :valid], alone(backbone, clip))


def test_frames_do_not_depend_on_the_batch_in_half_precision_either(backbone, speech):
    clips = [speech[0], speech[1][:16_001], speech[2][:20_000], speech[3][:5000], speech[4][:7_999]]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        frames, mask = backbone.layers(*batch_of(clips))
        for row, clip in enumerate(clips):
            expected = backbone.layers(*batch_of([clip]))[0][0, :, : int(mask[row].sum())].float()
            found = frames[row, :, mask[row]].float()
            assert float(F.cosine_similarity(found.mean(1), expected.mean(1), dim=-1).min()) >= 0.9999


def test_padding_that_is_not_a_number_is_ignored_too(backbone):
    n_samples = torch.tensor([3000, 5000])
    waveform = torch.stack([F.pad(noise(3000), (0, 2000), value=float("nan")), noise(5000)])
    with torch.no_grad():
        frames, _ = backbone.layers(waveform, n_samples)
    assert_same_frames(frames[0, :, : int(backbone.n_frames(n_samples)[0])], alone(backbone, noise(3000)))


def test_the_layers_of_a_backbone_differ_and_depend_on_the_audio(backbone, speech):
    first, second = alone(backbone, speech[0][:16_000]), alone(backbone, speech[1][:16_000])
    assert float((first - second).abs().mean()) > 1e-3
    for i in range(backbone.n_layers - 1):
        assert float((first[i] - first[i + 1]).abs().mean()) > 1e-3


@pytest.mark.parametrize("n_samples", [399, 0])
def test_too_short_is_refused(backbone, n_samples):
    with pytest.raises(ValueError, match=f"{n_samples} samples.*400"):
        backbone.layers(torch.zeros(2, 800), torch.tensor([800, n_samples]))


def test_too_long_is_refused(backbone):
    longest = backbone.max_samples
    with pytest.raises(ValueError, match=f"{longest + 1} samples.*{longest}"):
        backbone.layers(torch.zeros(1, longest + 1), torch.tensor([longest + 1]))


def test_two_frame_rates_go_through_the_same_retriever(tiny_config, manifest, tmp_path):
    """50 and 100 frames a second, 3 layers and 1, width 16 and 80: only the head's size differs."""
    cuts = to_cuts(manifest[manifest["split"] == "test"].head(3))
    second = torch.tensor([16_000])
    rates = []
    for name in (tiny_config.speech_backbone, "logmel"):
        torch.manual_seed(0)
        model = StyleRetriever.build(tiny_config.but(speech_backbone=name))
        rates.append(int(model.speech.n_frames(second)))
        found = embedding.embed(model, cuts, "normalised", tmp_path)
        assert found.vectors.shape == (3, tiny_config.dim)
        again = embedding.embed(model, cuts, "normalised", None)
        assert float((found.vectors * again.vectors).sum(1).min()) >= 0.9999
        speech = model.speech_vectors({"waveform": noise(16_000)[None], "n_samples": second})
        (speech @ model.text_vectors(["a calm voice"]).T).sum().backward()
        assert float(model.speech_head.projection[-1].weight.grad.abs().sum()) > 0
    assert rates == [50, 100]


# Frames that carry speech -----------------------------------------------------------------------------------


def levels(*dbfs: float, hop: int = 320) -> Tensor:
    """A waveform of one hop at each level."""
    return torch.cat([torch.full((hop,), 10 ** (level / 20)) for level in dbfs])


def test_frames_that_carry_speech_by_hand():
    # within 35 dB of the loudest (-20), or within two frames of such a one
    clip = levels(-60, -60, -60, -20, -54, -60, -60, -60, -56, -60, -60)
    found = active_frames(clip[None], torch.tensor([len(clip)]), 320, 11)
    # -20 at 3 and -54 at 4 reach from 1 to 6; -56 at 8 is 36 dB below
    assert found[0].tolist() == [False, True, True, True, True, True, True, False, False, False, False]
    louder = clip * 30
    assert torch.equal(active_frames(louder[None], torch.tensor([len(clip)]), 320, 11), found)
    even = levels(-60, -60, -60, -60)
    assert bool(active_frames(even[None], torch.tensor([len(even)]), 320, 4).all())


def test_frames_that_carry_speech_do_not_depend_on_the_batch(backbone, speech):
    clips = [speech[0], F.pad(speech[1][:16_001], (8000, 8000)), noise(400)]
    n_samples = torch.tensor([len(clip) for clip in clips])
    waveform = 30 * torch.randn(len(clips), int(n_samples.max()) + 1234)
    for row, clip in zip(waveform, clips, strict=True):
        row[: len(clip)] = clip
    counts = backbone.n_frames(n_samples)
    found = active_frames(waveform, n_samples, backbone.hop, int(counts.max()))
    for row, (clip, count) in enumerate(zip(clips, counts.tolist(), strict=True)):
        alone_ = active_frames(clip[None], torch.tensor([len(clip)]), backbone.hop, count)[0]
        assert torch.equal(found[row, :count], alone_) and bool(alone_.any())
    silence = found[1, : 8000 // backbone.hop - 3]
    assert not bool(silence.any())  # what was added before the speech


def test_the_hop_is_the_distance_of_frames(backbone):
    first, both = backbone.n_frames(torch.tensor([80_000, 160_000])).tolist()
    assert backbone.hop * (both - first) == 80_000


# One layer, or all ------------------------------------------------------------------------------------------


def test_the_last_layer_alone_is_the_last_of_all(backbone, speech):
    batch = batch_of(speech, 9000, 4000)
    with torch.no_grad():
        every, mask = backbone.layers(*batch)
        last, same_mask = backbone.layers(*batch, last_only=True)
    assert last.shape == (2, 1, *every.shape[2:]) and torch.equal(mask, same_mask)
    torch.testing.assert_close(last, every[:, -1:], atol=0, rtol=0)


# Training ---------------------------------------------------------------------------------------------------


def gradients(
    backbone: SpeechBackbone, waveform: Tensor, n_samples: Tensor, last_only: bool = True
) -> dict[str, Tensor]:
    """Of a loss that reads every frame, by parameter."""
    backbone.zero_grad()
    frames, mask = backbone.layers(waveform, n_samples, last_only)
    weight = torch.randn(frames.shape, generator=torch.Generator().manual_seed(0)) * mask[:, None, :, None]
    (frames.float() * weight).sum().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
def test_recomputing_gives_the_same_gradients(learned, speech, training):
    """With dropout on, the same elements must be dropped again."""
    learned.set_trainable(True)
    learned.train(training)
    found = {}
    for recompute in (False, True):
        learned.recompute = recompute
        torch.manual_seed(7), np.random.seed(7)
        found[recompute] = gradients(learned, *batch_of(speech, 9000, 4000, 16_000, 5000))
    assert found[False].keys() == found[True].keys()
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, atol=1e-6, rtol=1e-4)


def kept(backbone: SpeechBackbone, waveform: Tensor, n_samples: Tensor) -> int:
    """Bytes that the forward keeps for the backward, parameters apart."""
    storages, own = {}, {p.untyped_storage().data_ptr() for p in backbone.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        frames, _ = backbone.layers(waveform, n_samples, last_only=True)
    assert frames.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


def test_recomputing_keeps_less(learned, speech):
    learned.set_trainable(True)
    batch = batch_of(speech, 16_000, 16_000, 16_000)
    plain = kept(learned, *batch)
    learned.recompute = True
    assert kept(learned, *batch) < 0.6 * plain


def test_a_step_in_half_precision_follows_one_in_full(learned, speech):
    learned.set_trainable(True)
    batch = batch_of(speech, 9000, 4000, 16_000, 5000)
    full, full_frames = gradients(learned, *batch), learned.layers(*batch)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        half, half_frames = gradients(learned, *batch), learned.layers(*batch)[0].detach()
    assert float(F.cosine_similarity(full_frames.flatten(), half_frames.flatten().float(), dim=0)) > 0.999
    assert half.keys() == full.keys()
    every = [torch.cat([found[name].flatten() for name in full]) for found in (full, half)]
    assert all(bool(torch.isfinite(one).all()) for one in every)
    assert float(F.cosine_similarity(*every, dim=0)) > 0.98


def test_every_parameter_is_trained_but_what_its_authors_fixed(learned, speech):
    learned.set_trainable(True)
    found = gradients(learned, *batch_of(speech, 9000, 4000), last_only=False)
    idle = {name for name, p in learned.named_parameters() if name not in found or not bool(found[name].any())}
    fixed = {"encoder.embed_positions.weight", "model.masked_spec_embed"}  # sinusoids; read by SpecAugment only
    # A key's bias moves all scores of a query alike, and a group norm takes away a convolution's.
    assert {name for name in idle if not name.endswith("k_proj.bias")} <= fixed
    learned.set_trainable(False)
    assert not any(p.requires_grad for p in learned.parameters())


def test_depth_counts_the_layers(learned):
    depths = {name: learned.depth(name) for name, _ in learned.named_parameters()}
    assert set(depths.values()) == set(range(learned.n_layers))
    for name, depth in depths.items():
        inside = re.search(r"(context_encoder\.blocks|layers|model\.blocks)\.(\d+)\.", name)
        if inside and "conv_layers" not in name and learned.n_layers > 1:  # CLAP gives its last layer alone
            after = len(learned.encoder.context_encoder.blocks) if inside[1] == "model.blocks" else 0
            assert depth == int(inside[2]) + 1 + after, name
        else:
            assert depth in (0, learned.n_layers - 1), name
    assert all(depth == 0 for name, depth in depths.items() if "conv" in name)


@pytest.mark.parametrize("kind", ["emotion2vec", "wavlm", "hubert-large"])
def test_dropout_is_active_in_training_and_repeats_with_the_seeds(kind, tiny_speech, speech):
    backbone, batch = load_speech_backbone(tiny_speech(kind)), batch_of(speech, 9000, 4000)

    def frames(seed: int) -> Tensor:
        torch.manual_seed(seed), np.random.seed(seed)
        with torch.no_grad():
            return backbone.layers(*batch)[0]

    assert torch.equal(frames(1), frames(2))
    backbone.train()
    assert torch.equal(frames(1), frames(1)) and not torch.equal(frames(1), frames(2))


# Agreement with transformers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thirty_seconds(speech) -> Tensor:
    return torch.cat(speech).repeat(3)[:480_000]


@pytest.fixture(scope="module")
def features(thirty_seconds) -> Tensor:
    """Whisper's own log-mel features (1, 80, 3000)."""
    assert len(thirty_seconds) == 480_000
    return WhisperFeatureExtractor()(thirty_seconds.numpy(), sampling_rate=16_000, return_tensors="pt").input_features


def test_log_mel_is_whispers(thirty_seconds, features):
    """But for the last frame, whose window runs over the end: mirrored there, zeros here."""
    mel = alone(LogMelBackbone(), thirty_seconds)[0].T
    assert mel.shape == features[0].shape
    torch.testing.assert_close(mel[:, :-1], features[0, :, :-1], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", ["whisper-tiny", "tiny"])
def test_at_30_s_it_is_transformers_own_encoder(name, thirty_seconds, features, tiny_whisper, whisper_tiny):
    backbone = whisper_tiny if name == "whisper-tiny" else load_speech_backbone(tiny_whisper)
    mel = alone(LogMelBackbone(), thirty_seconds)[0].T
    with torch.no_grad():
        same_mel = backbone.encoder(mel[None], output_hidden_states=True)
        own_mel = backbone.encoder(features).last_hidden_state[0]
    frames = alone(backbone, thirty_seconds)
    # From the same log-mel frames, every layer and every frame.
    torch.testing.assert_close(frames[-1], same_mel.last_hidden_state[0], atol=2e-4, rtol=1e-4)
    for ours, theirs in zip(frames[:-1], same_mel.hidden_states[:-1], strict=True):
        torch.testing.assert_close(ours, theirs[0], atol=2e-4, rtol=1e-4)
    # From its own features, every frame but the last, which sees the differing log-mel frame.
    assert_same_frames(frames[-1, :-1], own_mel[:-1])


# Loading ----------------------------------------------------------------------------------------------------


def test_a_loaded_backbone_is_frozen_and_in_eval_mode(backbone):
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())


def copy_of(folder: str, to: Path) -> Path:
    to.mkdir()
    for file in Path(folder).iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_another_kind_of_model_is_refused_by_name(tiny_text):
    with pytest.raises(weights.WeightsError, match="'bert'.*whisper"):
        load_speech_backbone(tiny_text)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(weights.WeightsError, match="config.json"):
        load_speech_backbone(str(tmp_path))


def test_a_whisper_for_transcription_loads_too(tiny_whisper, tmp_path):
    """Its weights stand under "model."; the frames are those of the bare model."""
    folder = copy_of(tiny_whisper, tmp_path / "generation")
    state = load_file(folder / "model.safetensors")
    save_file({f"model.{k}": v for k, v in state.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["WhisperForConditionalGeneration"]}))
    found = alone(load_speech_backbone(str(folder)), noise(4000))
    torch.testing.assert_close(found, alone(load_speech_backbone(tiny_whisper), noise(4000)))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_weights_file_that_is_cut_short_is_refused(tiny_whisper, tmp_path, share):
    folder = copy_of(tiny_whisper, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: int(share * len(data))])
    with pytest.raises(weights.WeightsError):
        load_speech_backbone(str(folder))


def test_a_folder_without_weights_is_refused(tiny_whisper, tmp_path):
    folder = copy_of(tiny_whisper, tmp_path / "none")
    (folder / "model.safetensors").unlink()
    with pytest.raises(weights.WeightsError):
        load_speech_backbone(str(folder))


def test_a_weights_file_that_lacks_a_tensor_is_refused(tiny_whisper, tmp_path):
    """transformers would draw what is missing at random, and say so only in its log."""
    folder = copy_of(tiny_whisper, tmp_path / "lacking")
    state = load_file(folder / "model.safetensors")
    del state["encoder.layers.1.fc1.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(weights.WeightsError):
        load_speech_backbone(str(folder))


# CTranslate2 ------------------------------------------------------------------------------------------------

DTYPES = {np.dtype(t): i for i, t in enumerate((np.float32, np.int8, np.int16, np.int32, np.float16))}


def text_field(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def ctranslate2_file(variables: dict[str, np.ndarray]) -> bytes:
    """The container as its authors describe it, without aliases."""
    parts = [struct.pack("<I", 6), text_field("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        head = struct.pack(f"<B{value.ndim}IBI", value.ndim, *value.shape, DTYPES[value.dtype], value.nbytes)
        parts += [text_field(name), head, value.tobytes()]
    return b"".join(parts)


SMALL = {
    "a/weight": np.array([[1.5, -2.0], [0.25, 3.0]], dtype=np.float32),
    "a/half": np.array([0.5, -0.125, 8.0], dtype=np.float16),
    "a/bytes": np.array([-128, 127], dtype=np.int8),
    "a/shorts": np.array([-300, 300], dtype=np.int16),
    "a/heads": np.array(6, dtype=np.int32),
}


def test_ctranslate2_variables_are_read(tmp_path):
    (tmp_path / "model.bin").write_bytes(ctranslate2_file(SMALL))
    found = weights.read_ctranslate2(tmp_path / "model.bin")
    assert list(found) == list(SMALL)
    for name, value in SMALL.items():
        assert found[name].dtype == torch.float32
        np.testing.assert_array_equal(found[name].numpy(), value.astype(np.float32))


def test_a_ctranslate2_file_cut_anywhere_is_refused(tmp_path):
    whole, file = ctranslate2_file(SMALL), tmp_path / "model.bin"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(weights.WeightsError, match="not a whole CTranslate2 model"):
            weights.read_ctranslate2(file)


def as_ctranslate2(folder: str) -> dict[str, np.ndarray]:
    """The encoder of a transformers Whisper folder under CTranslate2's names, q, k and v fused."""
    model = WhisperModel.from_pretrained(folder)
    state = {k: v.numpy() for k, v in model.encoder.state_dict().items()}
    found = {
        "encoder/num_heads": np.array(model.config.encoder_attention_heads, dtype=np.int16),
        "encoder/position_encodings/encodings": state["embed_positions.weight"],
        "encoder/layer_norm/gamma": state["layer_norm.weight"],
        "encoder/layer_norm/beta": state["layer_norm.bias"],
        "decoder/num_heads": np.array(1, dtype=np.int16),
    }
    for conv in ("conv1", "conv2"):
        found |= {f"encoder/{conv}/{part}": state[f"{conv}.{part}"] for part in ("weight", "bias")}
    for i in range(model.config.encoder_layers):
        ours, theirs = f"encoder/layer_{i}", f"layers.{i}"
        for norm, source in (
            ("self_attention/layer_norm", "self_attn_layer_norm"),
            ("ffn/layer_norm", "final_layer_norm"),
        ):
            found[f"{ours}/{norm}/gamma"] = state[f"{theirs}.{source}.weight"]
            found[f"{ours}/{norm}/beta"] = state[f"{theirs}.{source}.bias"]
        for linear, source in (
            ("self_attention/linear_1", "self_attn.out_proj"),
            ("ffn/linear_0", "fc1"),
            ("ffn/linear_1", "fc2"),
        ):
            for part in ("weight", "bias"):
                found[f"{ours}/{linear}/{part}"] = state[f"{theirs}.{source}.{part}"]
        q, k, v = (state[f"{theirs}.self_attn.{name}_proj.weight"] for name in "qkv")
        found[f"{ours}/self_attention/linear_0/weight"] = np.concatenate([q, k, v])
        q, v = (state[f"{theirs}.self_attn.{name}_proj.bias"] for name in "qv")
        found[f"{ours}/self_attention/linear_0/bias"] = np.concatenate([q, np.zeros_like(q), v])
    return found


def test_a_ctranslate2_model_gives_the_frames_of_the_original(tiny_whisper, tmp_path, speech):
    (tmp_path / "model.bin").write_bytes(ctranslate2_file(as_ctranslate2(tiny_whisper)))
    found = alone(load_speech_backbone(str(tmp_path)), speech[0])
    torch.testing.assert_close(found, alone(load_speech_backbone(tiny_whisper), speech[0]))


@pytest.mark.parametrize("missing", ["encoder/conv1/bias", "encoder/layer_1/ffn/linear_1/weight"])
def test_a_ctranslate2_model_must_have_every_weight(tiny_whisper, tmp_path, missing):
    variables = as_ctranslate2(tiny_whisper)
    del variables[missing]
    (tmp_path / "model.bin").write_bytes(ctranslate2_file(variables))
    with pytest.raises((weights.WeightsError, RuntimeError), match=missing.split("/")[1].split("_")[0]):
        load_speech_backbone(str(tmp_path))


def test_a_ctranslate2_model_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(ctranslate2_file(SMALL))
    with pytest.raises(weights.WeightsError):
        load_speech_backbone(str(tmp_path))


# Packaged weights -------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path, monkeypatch, tiny_whisper) -> Path:
    """An installed package "weights_in_a_package" with a tiny Whisper, known as "packed" by its sha256."""
    file = tmp_path / "weights_in_a_package" / "model" / "model.bin"
    file.parent.mkdir(parents=True)
    (tmp_path / "weights_in_a_package" / "__init__.py").touch()
    file.write_bytes(ctranslate2_file(as_ctranslate2(tiny_whisper)))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = weights.Packaged((("weights_in_a_package", "model/model.bin"),), digest, "someone/packed")
    monkeypatch.setitem(weights.PACKAGED, "packed", entry)
    monkeypatch.syspath_prepend(tmp_path)
    return file


def test_packaged_weights_are_found(packaged):
    assert weights.find("packed") == packaged.parent
    assert load_speech_backbone("packed").dim == 16


def test_packaged_weights_that_are_not_the_pinned_ones_are_refused(packaged):
    data = bytearray(packaged.read_bytes())
    data[-1] ^= 1  # one bit
    packaged.write_bytes(data)
    with pytest.raises(weights.WeightsError, match="sha256"):
        load_speech_backbone("packed")


def test_packaged_weights_that_are_gone_are_refused(packaged):
    packaged.unlink()
    with pytest.raises(weights.WeightsError, match="missing"):
        load_speech_backbone("packed")


def test_packaged_weights_in_parts_are_joined_once(packaged, tmp_path, monkeypatch):
    whole = packaged.read_bytes()
    digest = hashlib.sha256(whole).hexdigest()
    parts = [(f"a_part_{i}", f"data/model.bin.part{i}") for i in (1, 2)]
    for (package, file), data in zip(parts, (whole[:1000], whole[1000:]), strict=True):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
        (tmp_path / package / file).write_bytes(data)
    monkeypatch.setitem(weights.PACKAGED, "parted", weights.Packaged(tuple(parts), digest, "someone/parted"))
    monkeypatch.setattr(runs, "RUNS", tmp_path / "runs")
    joined = weights.find("parted") / "model.bin"
    assert joined == tmp_path / "runs/weights/parted/model.bin" and joined.read_bytes() == whole
    assert load_speech_backbone("parted").dim == 16
    before = joined.stat().st_mtime_ns
    assert weights.find("parted") == joined.parent and joined.stat().st_mtime_ns == before
    joined.write_bytes(whole[:-1])  # damaged since
    weights.find("parted")
    assert joined.read_bytes() == whole

    joined.unlink()
    (tmp_path / parts[1][0] / parts[1][1]).write_bytes(whole[1000:-1])
    with pytest.raises(weights.WeightsError, match="a_part_1.*a_part_2.*sha256.*reinstall"):
        weights.find("parted")
    assert not list(joined.parent.iterdir())
    monkeypatch.setattr(runs, "RUNS", packaged)  # no folder
    with pytest.raises(weights.WeightsError, match="'parted' are joined once, cannot be written"):
        weights.find("parted")
    (tmp_path / parts[1][0] / parts[1][1]).unlink()
    with pytest.raises(weights.WeightsError, match="part2 is missing"):
        weights.find("parted")


def test_the_fingerprint_is_of_the_weights_not_of_the_file(tiny_whisper, packaged, whisper_tiny):
    one, other = load_speech_backbone(tiny_whisper), load_speech_backbone("packed")
    assert weights.fingerprint(one) == weights.fingerprint(other) != weights.fingerprint(whisper_tiny)
    with torch.no_grad():
        other.encoder.conv1.bias[0] += 1e-3
    assert weights.fingerprint(one) != weights.fingerprint(other)
