"""Mining of hard negatives and the matching loss: by hand, against chances, and where there is nothing to mine."""

import math

import pytest
import torch

from esr_utils.matching import NOTHING, mine_negatives, pair_matching


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_negative_is_neither_its_own_pair_nor_relevant():
    relevant = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    scores = torch.eye(4) * 50 + relevant * 40  # what must not be drawn scores far above the rest
    for seed in range(20):
        found = mine_negatives(scores, relevant, 2, generator(seed))
        assert found.shape == (4, 2) and found.dtype == torch.int64
        for i, row in enumerate(found.tolist()):
            assert len(set(row)) == 2 and not relevant[i, row].any() and i not in row


def test_mining_draws_with_the_chances_of_the_softmax_without_replacement():
    """Row 0, exp(logit) 1 : 2 : 5 for its negatives: first 1/8, 2/8, 5/8; second after first by what is left."""
    scores = torch.tensor([9.0, 1.0, 2.0, 5.0]).log().repeat(4, 1)
    pairs, drawing = torch.zeros(4, 4), generator()
    for _ in range(4000):
        first, second = mine_negatives(scores, None, 2, drawing)[0].tolist()
        pairs[first, second] += 1 / 4000
    chances = {1: 1 / 8, 2: 2 / 8, 3: 5 / 8}
    for a, chance in chances.items():
        assert float(pairs[a].sum()) == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 4000))
        for b in set(chances) - {a}:
            both = chance * chances[b] / (1 - chance)
            assert float(pairs[a, b]) == pytest.approx(both, abs=4 * math.sqrt(both / 4000))
    assert float(pairs[0].sum() + pairs[:, 0].sum()) == 0


def test_rows_with_too_few_negatives_say_so():
    relevant = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]]).bool()
    found = mine_negatives(torch.randn(3, 3, generator=generator()), relevant, 2, generator())
    assert found[0].tolist() == [NOTHING, NOTHING] and found[1].tolist() == [0, NOTHING]
    assert sorted(found[2].tolist()) == [0, 1]
    assert mine_negatives(torch.zeros(1, 1), None, 2, generator()).tolist() == [[NOTHING, NOTHING]]


def test_mining_is_the_generators_and_takes_no_gradient():
    scores = torch.randn(6, 6, generator=generator(), requires_grad=True)
    first, again = (mine_negatives(scores, None, 2, generator(3)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, mine_negatives(scores, None, 2, generator(4)))


def test_pair_matching_by_hand():
    # exp(scores) 2 | 1, 1: ln 2;  1 | 3 and one that is absent: ln 4;  nothing to tell it from: left out
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 3.0, 100.0], [1.0, 5.0, 5.0]]).log()
    negatives = torch.tensor([[1, 2], [0, NOTHING], [NOTHING, NOTHING]])
    assert float(pair_matching(scores, negatives)) == pytest.approx((math.log(2) + math.log(4)) / 2, abs=1e-6)


def test_pair_matching_passes_gradients_to_what_is_there_alone():
    negatives = torch.tensor([[1, 2], [0, NOTHING], [NOTHING, NOTHING]])
    scores = torch.randn(3, 3, generator=generator(), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: pair_matching(s, negatives), scores)
    pair_matching(scores, negatives).backward()
    assert bool((scores.grad[:2, 0] < 0).all()) and float(scores.grad[1, 2]) == 0 and not scores.grad[2].any()
    nothing = pair_matching(scores, torch.full((3, 2), NOTHING))
    assert float(nothing.detach()) == 0 and not torch.autograd.grad(nothing, scores)[0].any()
