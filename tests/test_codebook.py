"""The shared codebook: sparsemax against numbers by hand and a slow projection, pooling over real tokens alone."""

import math

import pytest
import torch

from esr_utils.codebook import Codebook, sparsemax


def test_sparsemax_by_hand():
    # (0.5, 0.3, -1): 1 + 2*0.3 > 0.8, 1 - 3 < -0.2, so k = 2, threshold (0.8 - 1)/2 = -0.1: 0.6, 0.4, 0
    # (2, 0, 0): 1 + 0 < 2, so k = 1, threshold 1: 1, 0, 0;  all alike: 1/3 each
    x = torch.tensor([[0.5, 0.3, -1.0], [2.0, 0.0, 0.0], [7.0, 7.0, 7.0]])
    expected = torch.tensor([[0.6, 0.4, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(sparsemax(x), expected)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """Found slowly: the threshold t for which max(0, x - t) sums to 1, by halving."""
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = x.amin(1, keepdim=True) - 1, x.amax(1, keepdim=True)
    for _ in range(80):
        middle = (low + high) / 2
        too_much = (x - middle).clamp_min(0).sum(1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    found = sparsemax(x)
    torch.testing.assert_close(found, (x - low).clamp_min(0))
    assert 0.3 < float((found == 0).double().mean()) < 0.9  # sparse, not one-hot throughout
    assert torch.autograd.gradcheck(sparsemax, x[:4].clone().requires_grad_())


def book(entries: list[list[float]], temperature: float) -> Codebook:
    codebook = Codebook(len(entries), len(entries[0])).double()
    codebook.entries.data = torch.tensor(entries, dtype=torch.float64)
    codebook.temperature = temperature
    return codebook


def test_codebook_by_hand():
    # d = 4, so products are halved. Token 1 scores 0.5, 0, -0.5; token 2 scores 0, 0.3, 0; the most: 0.5, 0.3, 0.
    # sparsemax at temperature 1: 1 + 2*0.3 > 0.8, 1 + 0 > 0.8: k = 3, threshold (0.8 - 1)/3 = -1/15: 17/30, 11/30, 2/30
    codebook = book([[1, 0, 0, 0], [0, 1, 0, 0], [-1, 0, 0, 1]], temperature=1.0)
    tokens = torch.tensor([[[1, 0, 0, 0], [0, 0.6, 0, 0], [9, 9, 9, 9]]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    expected = torch.tensor([[17, 11, 2]], dtype=torch.float64) / 30
    torch.testing.assert_close(codebook.weights(tokens, mask), expected)
    torch.testing.assert_close(codebook(tokens, mask), expected @ codebook.entries.detach())
    codebook.temperature = 0.1  # 5, 3, 0: all to the first
    assert codebook.weights(tokens, mask).tolist() == [[1, 0, 0]]


def test_padding_does_not_count_even_where_all_scores_are_negative():
    codebook = book([[1.0, 0.0], [0.0, 1.0]], temperature=1.0)
    tokens = torch.tensor([[[-3.0, -1.0]]], dtype=torch.float64)
    padded = torch.cat([tokens, torch.zeros(1, 4, 2, dtype=torch.float64)], dim=1)
    alone = codebook(tokens, torch.ones(1, 1, dtype=torch.bool))
    torch.testing.assert_close(codebook(padded, torch.arange(5)[None] < 1), alone)
    assert not torch.allclose(codebook(padded, torch.ones(1, 5, dtype=torch.bool)), alone)


def test_gradients_reach_tokens_and_entries():
    torch.manual_seed(0)
    codebook = Codebook(12, 5).double()
    tokens = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    codebook.temperature = 0.7

    def pooled(tokens, entries):
        return torch.func.functional_call(codebook, {"entries": entries}, (tokens, mask))

    assert torch.autograd.gradcheck(pooled, (tokens, codebook.entries))
    pooled(tokens, codebook.entries).square().sum().backward()
    assert not tokens.grad[~mask].any() and bool(codebook.entries.grad.any())


@pytest.mark.parametrize("entries", [256, 4096])
def test_at_the_start_as_large_a_share_of_a_small_book_is_used_as_of_the_papers(entries):
    torch.manual_seed(0)
    codebook, tokens = Codebook(entries, 64), torch.randn(4, 30, 64)
    weights = codebook.weights(tokens, torch.ones(4, 30, dtype=torch.bool))
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    assert 0.15 < float((weights > 0).float().mean()) < 0.6
    assert math.isclose(Codebook(4096, 2).temperature, 1000)
