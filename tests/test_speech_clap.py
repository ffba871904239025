"""CLAP: the frames of transformers' own audio encoder in the order of time, and its text side."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torchaudio
from torch.nn import functional as F
from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

from esr_utils import weights
from esr_utils.config import FusionConfig
from esr_utils.fusion import FusionRetriever
from esr_utils.speech import load_speech_backbone
from esr_utils.text import load_text_backbone

TEXTS = ["An angry voice.", "Calm.", "Speech that is calm, an angry voice, speech that is angry."]


@pytest.fixture(scope="module")
def folder(tiny_speech) -> str:
    return tiny_speech("clap")


@pytest.fixture(scope="module")
def backbone(folder):
    return load_speech_backbone(folder)


@pytest.fixture(scope="module")
def original(folder) -> ClapModel:
    with weights.quiet_transformers():
        return ClapModel.from_pretrained(folder).eval()


def noise(n_samples: int, seed: int = 0) -> torch.Tensor:
    """Loud and quiet by turns, so that no stretch is like the next."""
    generator = torch.Generator().manual_seed(seed)
    level = 0.02 + 0.2 * torch.rand(-(-n_samples // 4000), generator=generator).repeat_interleave(4000)[:n_samples]
    return level * torch.randn(n_samples, generator=generator)


@torch.no_grad()
def alone(backbone, clip: torch.Tensor) -> torch.Tensor:
    frames, mask = backbone.layers(clip[None], torch.tensor([len(clip)]))
    assert bool(mask.all())
    return frames[0, 0]


@torch.no_grad()
def theirs(original: ClapModel, folder: str, clip: torch.Tensor) -> torch.Tensor:
    """(T, D): transformers' extractor and encoder on one clip of at most 10 s; the mean over frequency."""
    at_48k = torchaudio.functional.resample(clip, 16_000, 48_000).numpy()
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    features = extractor(at_48k, sampling_rate=48_000, return_tensors="pt")
    found = original.audio_model(features["input_features"], features["is_longer"])
    frames = found.last_hidden_state.mean(dim=2)[0].T
    torch.testing.assert_close(frames.mean(0), found.pooler_output[0])  # what CLAP itself goes on with
    return frames


@pytest.mark.parametrize("n_samples", [400, 16_000, 37_123, 80_001, 159_999, 160_000])
def test_a_clip_up_to_10_s_has_the_frames_of_transformers(backbone, original, folder, n_samples):
    clip = noise(n_samples)
    found, expected = alone(backbone, clip), theirs(original, folder, clip)
    assert len(found) == -(-n_samples // 1250) == int(backbone.n_frames(torch.tensor(n_samples)))
    assert float(F.cosine_similarity(found, expected[: len(found)], dim=-1).min()) >= 0.9999
    torch.testing.assert_close(found, expected[: len(found)], atol=1e-3, rtol=1e-2)


def test_a_longer_clip_is_windows_and_the_last_ends_with_it(backbone):
    clip = noise(400_001)  # 25 s: two windows, and the last 10 s
    found = alone(backbone, clip)
    assert len(found) == 321 == int(backbone.n_frames(torch.tensor(400_001)))
    torch.testing.assert_close(found[:127], alone(backbone, clip[:160_000])[:127], atol=1e-3, rtol=1e-2)
    last = alone(backbone, clip[-160_000:])
    assert float(F.cosine_similarity(found[256:], last[-65:], dim=-1).min()) >= 0.999
    twice = alone(backbone, clip[:320_000])
    assert len(twice) == 256 and float(F.cosine_similarity(twice[:256], found[:256], dim=-1).min()) >= 0.99


def test_frames_stand_in_the_order_of_time(backbone):
    clip = noise(160_000)
    for second in (0, 3, 9):
        changed = clip.clone()
        changed[second * 16_000 : (second + 1) * 16_000] = noise(16_000, seed=1)
        moved = (alone(backbone, changed) - alone(backbone, clip)).norm(dim=1)
        inside = moved[round(12.8 * second) : round(12.8 * (second + 1))]
        assert float(inside.mean()) > 3 * float(moved.sum() - inside.sum()) / (len(moved) - len(inside))


def test_the_norm_over_the_batch_keeps_its_statistics(folder):
    backbone = load_speech_backbone(folder)
    backbone.set_trainable(True)
    backbone.train()
    before = backbone.encoder.batch_norm.running_mean.clone()
    frames, _ = backbone.layers(noise(32_000)[None], torch.tensor([32_000]))
    frames.square().mean().backward()
    assert torch.equal(before, backbone.encoder.batch_norm.running_mean)
    assert float(backbone.encoder.patch_embed.proj.weight.grad.abs().max()) > 0


def test_a_clap_of_fused_crops_is_refused(tmp_path):
    tiny_models.write_clap(tmp_path, TEXTS, enable_fusion=True)
    with pytest.raises(weights.WeightsError, match="clap-htsat-unfused"):
        load_speech_backbone(str(tmp_path))


def test_without_its_preprocessor_it_is_refused(tmp_path):
    tiny_models.write_clap(tmp_path, TEXTS)
    next(tmp_path.glob("pre*.json")).unlink()
    with pytest.raises(weights.WeightsError, match="preprocessor_config.json"):
        load_speech_backbone(str(tmp_path))


@torch.no_grad()
def test_the_text_side_is_transformers_own(folder, original):
    backbone = load_text_backbone(folder)
    assert backbone.max_tokens == 512 and backbone.dim == 16
    tokens = backbone.sequences(TEXTS)
    for i, text in enumerate(TEXTS):
        encoded = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
        hidden = original.text_model(encoded["input_ids"], encoded["attention_mask"]).last_hidden_state[0]
        torch.testing.assert_close(tokens.values[i, tokens.mask[i]], hidden, atol=2e-3, rtol=2e-3)  # kept as fp16
        torch.testing.assert_close(backbone.embed([text])[0], hidden[0], atol=1e-4, rtol=1e-4)  # the first token
    assert backbone.embed(["angry " * 2000]).isfinite().all()


@torch.no_grad()
def test_fs_clap_stands_on_it(folder, tmp_path):
    config = FusionConfig(speech_backbone=folder, text_backbone=folder, dim=16, heads=2, frames_per_token=1)
    model = FusionRetriever.build(config).eval()
    batch = {"waveform": noise(200_000)[None].repeat(2, 1), "n_samples": torch.tensor([200_000, 20_000])}
    speech, text = model.speech_tokens(batch), model.text_tokens(TEXTS[:2])
    assert speech.mask.sum(1).tolist() == [160, 16]
    scores = model.pair_score(speech, text)
    model.save(tmp_path)
    loaded = FusionRetriever.load(tmp_path)
    assert torch.equal(loaded.pair_score(loaded.speech_tokens(batch), loaded.text_tokens(TEXTS[:2])), scores)
