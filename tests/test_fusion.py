"""FS-CLAP's model: against a slow obvious version, what each way may know, its parts, and a folder read back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from esr_utils import retriever, weights
from esr_utils.config import ConfigError, FusionConfig
from esr_utils.embedding import embed, frozen_frames, padded_frames
from esr_utils.evaluation import evaluate
from esr_utils.fusion import FrameHead, FusionRetriever, FusionSeparation, pool_frames
from esr_utils.index import build
from esr_utils.manifests import to_cuts
from esr_utils.retriever import StyleRetriever
from esr_utils.text import Tokens

WAYS = ("bi-encoder", "masked")
PARTS = [(True, True), (True, False), (False, True), (False, False)]
SIZES = {"dim": 16, "heads": 2, "frames_per_token": 4, "dropout": 0.0, "temperature": 0.07, "gamma": 0.15}
TEXTS = ["An angry voice.", "Speech that is calm and whispered, a voice.", "", "Speech."]


@pytest.fixture(scope="module")
def config(tiny_text, tiny_whisper) -> FusionConfig:
    return FusionConfig(speech_backbone=tiny_whisper, text_backbone=tiny_text, **SIZES)


def made(config: FusionConfig) -> FusionRetriever:
    torch.manual_seed(3)
    model = FusionRetriever.build(config).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not name.startswith(("text.", "speech.")):  # nothing stays where it starts, as after training
                value += 0.1 * torch.rand_like(value)
    return model


@pytest.fixture
def model(config) -> FusionRetriever:
    return made(config)


def clips(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    waveform = 0.1 * torch.randn(4, 16_000, generator=generator)
    return {"waveform": waveform, "n_samples": torch.tensor([16_000, 9_000, 400, 12_345])}


def row(tokens: Tokens, i: int) -> Tokens:
    """One clip or text without its padding."""
    return Tokens(tokens.values[i : i + 1, tokens.mask[i]], tokens.mask[i : i + 1, tokens.mask[i]])


def tokens(*lengths: int, dim: int = 16, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Tokens(torch.randn(len(lengths), max(lengths), dim, generator=generator) * mask[..., None], mask)


# Frames -----------------------------------------------------------------------------------------------------


def test_frames_are_averaged_over_the_valid_ones():
    # by pairs: (1 + 3)/2, 5 alone; of the second clip 4 alone, and nothing
    layers = torch.tensor([[[[1.0], [3.0], [5.0]]], [[[4.0], [100.0], [100.0]]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    pooled, valid = pool_frames(layers, mask, 2)
    torch.testing.assert_close(pooled, torch.tensor([[[[2.0], [5.0]]], [[[4.0], [0.0]]]]))
    assert valid.tolist() == [[True, True], [True, False]]
    same, same_mask = pool_frames(layers, mask, 1)
    torch.testing.assert_close(same, layers * mask[:, None, :, None])
    assert torch.equal(same_mask, mask)


def test_the_head_standardises_and_mixes_layers():
    head = FrameHead(2, 3, FusionConfig(dim=3, heads=1, dropout=0.0))
    with torch.no_grad():
        head.mix.copy_(torch.tensor([math.log(3.0), 0.0]) / 30)  # weights 3/4 and 1/4
        head.projection[0].weight.copy_(torch.eye(3)), head.projection[0].bias.zero_()
    frames = [5 + 3 * torch.randn(2, n, 3) for n in (40, 70)]
    head.fit(frames)
    everything = torch.cat(frames, dim=1)  # (2, 110, 3)
    torch.testing.assert_close(head.mean, everything.mean(1))
    torch.testing.assert_close(head.std, everything.std(1, correction=0))
    standard = (everything - everything.mean(1, keepdim=True)) / everything.std(1, correction=0, keepdim=True)
    found = head(everything[None], torch.ones(1, 110, dtype=torch.bool)).values[0]
    torch.testing.assert_close(found, 0.75 * standard[0] + 0.25 * standard[1], atol=1e-4, rtol=1e-4)


# Fusion and separation against a slow version ---------------------------------------------------------------


def attention(layer: torch.nn.MultiheadAttention, query: Tensor, x: Tensor) -> Tensor:
    """Softmax(q k / sqrt(width)) v of one sequence (T, d), head by head, query by query."""
    q, k, v = F.linear(torch.cat([query, x]), layer.in_proj_weight, layer.in_proj_bias).chunk(3, dim=1)
    q, k, v = q[: len(query)], k[len(query) :], v[len(query) :]
    heads = []
    for h in range(layer.num_heads):
        part = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
        rows = [((k[:, part] @ one[part]) / math.sqrt(layer.head_dim)).softmax(0) @ v[:, part] for one in q]
        heads.append(torch.stack(rows))
    return layer.out_proj(torch.cat(heads, dim=1))


def slow(module: FusionSeparation, streams: dict[str, Tensor], fused: bool) -> dict[str, Tensor]:
    """FS-CLAP section 3.1 for the tokens (T, d) of one pair, or of one modality alone."""
    if fused:
        index = {"speech": 0, "text": 1}
        x = torch.cat([values + module.modality[index[name]] for name, values in streams.items()])
        for block in module.blocks:
            normed = block.norm(x)
            x = x + attention(block.attention, normed, normed)
        streams = dict(zip(streams, x.split([len(values) for values in streams.values()]), strict=True))
    found = {}
    for name, values in streams.items():
        if module.separation is not None:
            values = values + module.separation[name].layers(values)
        pooling = module.pooling[name]
        found[name] = attention(pooling.attention, pooling.query[0], pooling.norm(values))[0]
    return found


@pytest.mark.parametrize(("fusion", "separation"), PARTS)
@torch.no_grad()
def test_a_batch_of_pairs_equals_each_pair_alone_by_a_slow_version(fusion, separation):
    torch.manual_seed(5)
    module = FusionSeparation(FusionConfig(fusion=fusion, separation=separation, **SIZES)).eval()
    speech, text = tokens(7, 3, 1, seed=1), tokens(2, 5, 4, seed=2)
    pairs = module.pair(speech, text)
    ways = {
        way: (module.alone(speech, "speech", way), module.alone(text, "text", way)) for way in ("bi-encoder", "masked")
    }
    for i in range(3):
        streams = {"speech": row(speech, i).values[0], "text": row(text, i).values[0]}
        expected = slow(module, streams, fusion)
        torch.testing.assert_close(pairs[0][i], expected["speech"], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(pairs[1][i], expected["text"], atol=1e-5, rtol=1e-4)
        for way, vectors in ways.items():
            for name, found in zip(("speech", "text"), vectors, strict=True):
                expected = slow(module, {name: streams[name]}, fusion and way == "masked")[name]
                torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=1e-4)


def test_without_fusion_all_ways_are_one():
    module = FusionSeparation(FusionConfig(fusion=False, separation=True, **SIZES)).eval()
    speech, text = tokens(7, 3), tokens(2, 5, seed=1)
    for found, given, name in zip(module.pair(speech, text), (speech, text), ("speech", "text"), strict=True):
        assert torch.equal(found, module.alone(given, name, "masked"))
        assert torch.equal(found, module.alone(given, name, "bi-encoder"))


def test_each_part_can_be_left_out():
    counts = {}
    for fusion, separation in PARTS:
        module = FusionSeparation(FusionConfig(fusion=fusion, separation=separation, **SIZES))
        counts[fusion, separation] = sum(p.numel() for p in module.parameters())
    d = 16
    blocks = 2 * (4 * d * d + 4 * d + 2 * d) + 2 * d  # attention and norm, twice, and the modality vectors
    networks = 2 * (2 * d * 2 * d + 3 * d + 2 * d)
    assert counts[True, False] - counts[False, False] == blocks == counts[True, True] - counts[False, True]
    assert counts[False, True] - counts[False, False] == networks


@torch.no_grad()
def test_a_codebook_shared_by_both_stands_in_place_of_the_attention(config):
    model = made(config.but(codebook=6))
    assert model.fusion.pooling is None
    speech, text = model.pair(model.speech_tokens(clips()), model.text_tokens(TEXTS))
    entries = model.fusion.codebook.entries
    for vectors in (speech, text):  # each a mixture of the entries: weights that sum to 1, none below 0
        mixture = torch.linalg.lstsq(entries.T, vectors.T).solution
        torch.testing.assert_close(mixture.sum(0), torch.ones(4), atol=1e-3, rtol=0)
        assert float(mixture.min()) > -1e-3
    none = Tokens(torch.zeros(2, 3, 16), torch.zeros(2, 3, dtype=torch.bool))
    assert not bool(model.alone(none, "text", "masked").any())


def test_a_retriever_with_a_codebook_is_read_back(config, tmp_path):
    model = made(config.but(codebook=6))
    model.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(retriever.load(tmp_path).encode_speech(clips()), model.encode_speech(clips()))


def test_an_unknown_way_or_modality_is_refused():
    module = FusionSeparation(FusionConfig(**SIZES))
    with pytest.raises(ValueError, match="matched"):
        module.alone(tokens(2), "speech", "matched")
    with pytest.raises(ValueError, match="audio"):
        module.alone(tokens(2), "audio", "masked")


# What each way knows ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_only_the_fused_vectors_know_of_the_other_side(model):
    speech = model.speech_tokens(clips())
    one, other = model.text_tokens(TEXTS), model.text_tokens(["A loud shouting person."] * 4)
    fused, fused_other = model.pair(speech, one)[0], model.pair(speech, other)[0]
    assert float((fused - fused_other).abs().max()) > 1e-3
    for way in WAYS:
        alone = model.alone(speech, "speech", way)
        assert torch.equal(alone, model.alone(speech, "speech", way))
        assert float((alone - fused).abs().max()) > 1e-3


@torch.no_grad()
def test_masked_is_fusion_under_a_block_diagonal_mask(model):
    """The mask written out: no token looks at one of the other modality."""
    module = model.fusion
    speech, text = tokens(7, seed=1), tokens(4, seed=2)
    x = torch.cat([speech.values + module.modality[0], text.values + module.modality[1]], dim=1)
    kind = torch.tensor([0] * 7 + [1] * 4)
    for block in module.blocks:
        normed = block.norm(x)
        x = x + block.attention(normed, normed, normed, attn_mask=kind[:, None] != kind, need_weights=False)[0]
    for found, part, name in (
        (module.alone(speech, "speech", "masked"), x[:, :7], "speech"),
        (module.alone(text, "text", "masked"), x[:, 7:], "text"),
    ):
        values = module.separation[name](part)
        expected = module.pooling[name](values, torch.ones(1, values.shape[1], dtype=torch.bool))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# Shapes, batches, gaps --------------------------------------------------------------------------------------


@torch.no_grad()
def test_vectors_have_unit_length_and_the_joint_dimension(model):
    for found in (model.encode_speech(clips()), model.encode_text(TEXTS)):
        assert found.shape == (4, 16)
        torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    scores = model.pair_score(model.speech_tokens(clips()), model.text_tokens(TEXTS))
    speech, text = model.pair(model.speech_tokens(clips()), model.text_tokens(TEXTS))
    torch.testing.assert_close(scores, (F.normalize(speech, dim=-1) * F.normalize(text, dim=-1)).sum(1))


@torch.no_grad()
def test_nothing_depends_on_the_batch(model):
    batch = clips()
    speech, text = model.speech_tokens(batch), model.text_tokens(TEXTS)
    together = [*model.pair(speech, text), model.encode_speech(batch), model.encode_text(TEXTS)]
    for i, n in enumerate(batch["n_samples"].tolist()):
        one = {"waveform": batch["waveform"][i : i + 1, :n], "n_samples": torch.tensor([n])}
        pair = model.pair(model.speech_tokens(one), model.text_tokens(TEXTS[i : i + 1]))
        alone = [*pair, model.encode_speech(one), model.encode_text(TEXTS[i : i + 1])]
        for found, expected in zip(together, alone, strict=True):
            assert float(F.cosine_similarity(found[i], expected[0], dim=0)) >= 0.9999


@pytest.mark.parametrize(("fusion", "separation"), PARTS)
def test_a_side_without_a_token_gives_numbers_and_gradients(fusion, separation):
    module = FusionSeparation(FusionConfig(fusion=fusion, separation=separation, **SIZES))
    empty = Tokens(torch.zeros(2, 3, 16), torch.tensor([[False] * 3, [True] * 3]))
    none = Tokens(torch.zeros(2, 0, 16), torch.zeros(2, 0, dtype=torch.bool))
    for text in (empty, none):
        for speech in (tokens(4, 2), empty):
            vectors = [*module.pair(speech, text), module.alone(text, "text", "masked")]
            assert all(bool(torch.isfinite(v).all()) for v in vectors)
            sum(F.normalize(v, dim=-1).sum() for v in vectors).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters())
    assert not bool(module.alone(none, "text", "masked").any())


@pytest.mark.parametrize(("fusion", "separation"), PARTS)
def test_the_gradient_reaches_every_parameter(config, fusion, separation):
    model = made(config.but(fusion=fusion, separation=separation)).train()
    speech, text = model.pair(model.speech_tokens(clips()), model.text_tokens(TEXTS))
    (F.cosine_similarity(speech, text.roll(1, 0)).sum() * model.logit_scale * model.gamma).backward()
    trained = {name: p for name, p in model.named_parameters() if not name.startswith(("speech.", "text."))}
    lacking = [name for name, p in trained.items() if p.grad is None or not float(p.grad.abs().max()) > 0]
    assert not lacking and "speech_head.mix" in trained
    assert not any(p.requires_grad for p in (*model.speech.parameters(), *model.text.parameters()))


def test_gamma_stops_at_zero_and_comes_back(model):
    assert float(model.gamma.detach()) == pytest.approx(float(model.raw_gamma.detach()))
    with torch.no_grad():
        model.raw_gamma.fill_(-0.3)
    model.gamma.backward()
    assert float(model.gamma.detach()) == 0 and float(model.raw_gamma.grad) == 1


def test_settings_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="multiple of heads"):
        FusionConfig(dim=10, heads=4)
    with pytest.raises(ConfigError, match="frames_per_token"):
        FusionConfig(frames_per_token=0)
    assert FusionConfig.from_dict(FusionConfig.paper().to_dict()) == FusionConfig.paper()


# A folder ---------------------------------------------------------------------------------------------------


def test_a_folder_is_read_back_whole_by_its_kind(model, tmp_path):
    model.save(tmp_path)
    for loaded in (retriever.load(tmp_path), FusionRetriever.load(tmp_path)):
        assert isinstance(loaded, FusionRetriever) and loaded.config == model.config and not loaded.training
        with torch.no_grad():
            assert torch.equal(loaded.encode_speech(clips()), model.encode_speech(clips()))
            assert torch.equal(loaded.encode_text(TEXTS), model.encode_text(TEXTS))
        assert torch.equal(loaded.raw_gamma, model.raw_gamma)


def test_another_kind_is_refused_and_said(model, tiny_model, tmp_path):
    model.save(tmp_path / "fusion"), tiny_model.save(tmp_path / "style")
    with pytest.raises(weights.WeightsError, match="kind 'fusion', not 'style'"):
        StyleRetriever.load(tmp_path / "fusion")
    with pytest.raises(weights.WeightsError, match="kind 'style', not 'fusion'"):
        FusionRetriever.load(tmp_path / "style")
    assert isinstance(retriever.load(tmp_path / "style"), StyleRetriever)


# Kept frames, and the index ---------------------------------------------------------------------------------


@torch.no_grad()
def test_kept_frames_give_the_tokens_of_the_waveforms(model, manifest, tmp_path):
    cuts = to_cuts(manifest.iloc[:4])
    kept = frozen_frames(model, cuts, "normalised", tmp_path)
    assert kept.cut_ids == [cut.id for cut in cuts] and all(one.dtype == torch.float16 for one in kept.frames)
    assert kept.frames[0].shape[0] == model.speech.n_layers and kept.frames[0].shape[2] == model.speech.dim
    again = frozen_frames(model, cuts, "normalised", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(kept.frames, again.frames, strict=True))
    batch = padded_frames(kept.frames)
    assert batch["frames"].shape[:2] == (4, model.speech.n_layers) and batch["mask"].sum(1).tolist() == [
        one.shape[1] for one in kept.frames
    ]
    whole = embed(model, cuts, "normalised", cache=None).vectors
    np.testing.assert_allclose(model.encode_speech(batch).numpy(), whole, atol=2e-3)
    np.testing.assert_allclose(embed(model, cuts, "normalised", tmp_path).vectors, whole, atol=2e-3)


def test_it_is_evaluated_by_its_prompts_alone(model, manifest, tmp_path):
    """It has no style classifier."""
    found = evaluate(model, manifest, cache=tmp_path, n_trials=10)
    assert found.systems == ("seen", "held_out") and found.embeddings.logits.shape[1] == 0
    assert 0 <= found.results["mini/seen/r@1"] <= 1 and not any("classifier" in key for key in found.results)


def test_it_can_be_searched(model, manifest, tmp_path):
    index, _ = build(model, manifest, cache=tmp_path)
    hits = index.search("a calm voice", k=5)
    found = embed(model, to_cuts(manifest), "normalised", tmp_path)
    with torch.no_grad():
        scores = found.vectors @ model.encode_text(["a calm voice"])[0].numpy()
    np.testing.assert_allclose(hits["score"], np.sort(scores)[::-1][:5], atol=2e-3)
    example = index.search_like(found.utterance_ids[3], k=3)
    assert len(example) == 3 and found.utterance_ids[3] not in set(example["utterance_id"])
