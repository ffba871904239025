"""Protocols: each against a slow version pair by pair, and what they may not know."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from esr_utils import protocols
from esr_utils.config import FusionConfig
from esr_utils.embedding import frozen_frames
from esr_utils.fusion import FusionRetriever, FusionSeparation
from esr_utils.manifests import to_cuts
from esr_utils.objective import has_bf16
from esr_utils.protocols import HONEST, LEAKY, refuse_leaky, score, unit_vectors
from esr_utils.text import Tokens

N_CLIPS, N_TEXTS, DIM = 9, 7, 16


def tokens(n: int, longest: int, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(longest) < torch.randint(1, longest + 1, (n, 1), generator=generator)
    return Tokens(torch.randn(n, longest, DIM, generator=generator) * mask[..., None], mask)


@pytest.fixture(scope="module")
def model() -> FusionSeparation:
    torch.manual_seed(5)
    made = FusionSeparation(FusionConfig(dim=DIM, heads=2, dropout=0.3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made  # in training mode, with dropout: scoring must see to that itself


@pytest.fixture(scope="module")
def sides() -> tuple[Tokens, Tokens]:
    return tokens(N_CLIPS, 40, 1), tokens(N_TEXTS, 12, 2)


def one(given: Tokens, i: int) -> Tokens:
    """A clip or caption by itself, without padding."""
    return Tokens(given.values[i : i + 1, given.mask[i]], given.mask[i : i + 1, given.mask[i]])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a[0], b[0], dim=0))


@torch.no_grad()
def slow(model: FusionSeparation, speech: Tokens, text: Tokens, protocol: str) -> np.ndarray:
    """(M, N), pair by pair."""
    model.eval()
    found = np.zeros((len(text.mask), len(speech.mask)))
    for j in range(len(text.mask)):
        for i in range(len(speech.mask)):
            if protocol == "all-pairs":
                found[j, i] = cosine(*model.pair(one(speech, i), one(text, j)))
            elif protocol == "matched":
                knows_its_caption = model.pair(one(speech, i), one(text, i))[0]
                knows_its_clip = model.pair(one(speech, j), one(text, j))[1]
                found[j, i] = cosine(knows_its_caption, knows_its_clip)
            else:
                clip, caption = (
                    model.alone(one(speech, i), "speech", protocol),
                    model.alone(one(text, j), "text", protocol),
                )
                found[j, i] = cosine(clip, caption)
    return found


@pytest.mark.parametrize("protocol", ["bi-encoder", "masked", "all-pairs", "matched"])
@pytest.mark.parametrize("batch", [3, 128])
def test_scores_are_those_of_each_pair_alone(model, sides, protocol, batch, monkeypatch):
    monkeypatch.setattr(protocols, "_BATCH", batch)
    speech, text = sides
    if protocol == "matched":
        speech = Tokens(speech.values[:N_TEXTS], speech.mask[:N_TEXTS])
    model.train()
    scored = score(model, speech, text, protocol)
    assert scored.matrix.dtype == np.float32 and scored.protocol == protocol and scored.shortlist is None
    np.testing.assert_allclose(scored.matrix, slow(model, speech, text, protocol), atol=1e-5)
    expected = {"all-pairs": N_CLIPS * N_TEXTS, "matched": N_TEXTS}
    assert scored.fusions == expected.get(protocol, 0) and 0 < scored.seconds < 60


@pytest.mark.parametrize("direction", ["t2a", "a2t"])
@pytest.mark.parametrize("first", ["masked", "bi-encoder"])
def test_a_rerank_fuses_each_query_with_its_shortlist(model, sides, direction, first):
    speech, text = sides
    scored = score(model, speech, text, "rerank", k=3, direction=direction, first=first)
    base, fused = slow(model, speech, text, first), slow(model, speech, text, "all-pairs")
    found = scored.matrix
    if direction == "a2t":
        base, fused, found = base.T, fused.T, found.T
    assert scored.shortlist.shape == (len(base), 3) and scored.fusions == 3 * len(base)
    for query in range(len(base)):
        chosen = np.argsort(-base[query])[:3]
        assert set(scored.shortlist[query]) == set(chosen)
        np.testing.assert_allclose(found[query, chosen], fused[query, chosen], atol=1e-5)
        assert list(scored.shortlist[query]) == list(chosen[np.argsort(-fused[query, chosen])])  # best first
        outside = np.setdiff1d(np.arange(base.shape[1]), chosen)
        assert found[query, outside].max() < found[query, chosen].min()
        assert list(np.argsort(found[query, outside])) == list(np.argsort(base[query, outside]))


@pytest.mark.parametrize("direction", ["t2a", "a2t"])
def test_a_shortlist_of_all_is_all_pairs(model, sides, direction):
    reranked = score(model, *sides, "rerank", k=1000, direction=direction)
    every = score(model, *sides, "all-pairs")
    np.testing.assert_allclose(reranked.matrix, every.matrix, atol=1e-6)
    assert reranked.fusions == every.fusions


@pytest.mark.parametrize("protocol", ["masked", "bi-encoder", "rerank"])
def test_clips_vectors_that_are_kept_are_used(model, sides, protocol):
    """As an index keeps them: for a new query no clip is encoded again."""
    speech, text = sides
    kept = unit_vectors(model, speech, "speech", "bi-encoder" if protocol == "rerank" else protocol)
    found, expected = (score(model, *sides, protocol, k=3, vectors=v).matrix for v in (kept, None))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    turned = score(model, *sides, protocol, k=3, vectors=-kept).matrix
    assert np.abs(turned - expected).max() > 1e-2
    with pytest.raises(ValueError, match="8 vectors, 9 clips"):
        score(model, *sides, protocol, vectors=kept[:8])


def test_a_caption_says_nothing_of_another_pair_s_score(model, sides):
    """All but `matched`: changing one caption changes its own row alone."""
    speech, text = sides
    speech = Tokens(speech.values[:N_TEXTS], speech.mask[:N_TEXTS])
    changed = Tokens(text.values.clone(), text.mask)
    changed.values[2] *= torch.arange(DIM) % 3
    others = np.arange(N_TEXTS) != 2
    for protocol in (*HONEST, *LEAKY):
        before, after = (score(model, speech, t, protocol, k=3).matrix for t in (text, changed))
        same = np.abs(before - after)[others].max() < 1e-5
        assert same == (protocol in HONEST), protocol
        assert np.abs(before - after)[2].max() > 1e-3


def test_without_fusion_all_protocols_score_alike(sides):
    plain = FusionSeparation(FusionConfig(dim=DIM, heads=2, fusion=False))
    expected = score(plain, *sides, "bi-encoder").matrix
    for protocol in ("masked", "all-pairs"):
        np.testing.assert_allclose(score(plain, *sides, protocol).matrix, expected, atol=1e-5)


def test_leaky_protocols_stand_in_no_table():
    for protocol in HONEST:
        refuse_leaky(protocol)
    with pytest.raises(ValueError, match="answer is in the question"):
        refuse_leaky("matched")
    with pytest.raises(ValueError, match="'unheard'; it must be one of"):
        refuse_leaky("unheard")


@pytest.mark.parametrize("change", [{"protocol": "unheard"}, {"direction": "v2t"}, {"k": 0}, {"protocol": "matched"}])
def test_what_cannot_be_scored_is_refused(model, sides, change):
    with pytest.raises(ValueError, match="unheard|v2t|k 0|7 captions, 9 clips"):
        score(model, *sides, **({"protocol": "rerank"} | change))


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="this CPU can only imitate bf16")
def test_half_precision_scores_alike(model, sides):
    whole, half = (score(model, *sides, "all-pairs", bf16=bf16).matrix for bf16 in (False, True))
    np.testing.assert_allclose(half, whole, atol=0.03)
    assert np.abs(half - whole).max() > 0  # it was asked for, so it is used


def test_frames_and_sentences_of_a_corpus_are_scored(manifest, tiny_text, tiny_whisper, tmp_path):
    config = FusionConfig(speech_backbone=tiny_whisper, text_backbone=tiny_text, dim=DIM, heads=2)
    torch.manual_seed(3)
    retriever = FusionRetriever.build(config)
    kept = frozen_frames(retriever, to_cuts(manifest.iloc[:5]), "normalised", tmp_path)
    captions = ["An angry voice.", "Speech that is calm.", "A whispered voice."]
    found = score(retriever, kept.frames, captions, "masked").matrix
    with torch.no_grad():
        from_scratch = retriever.encode_text(captions) @ torch.cat(
            [retriever.encode_speech({"frames": one[None], "mask": torch.ones(1, one.shape[1], dtype=torch.bool)})
             for one in kept.frames]
        ).T  # fmt: skip
    np.testing.assert_allclose(found, from_scratch.numpy(), atol=1e-5)
    reranked = score(retriever, kept.frames, captions, "rerank", k=2)
    assert reranked.matrix.shape == (3, 5) and reranked.fusions == 6
