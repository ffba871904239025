"""Losses: numbers worked out by hand, gradients by finite differences, the reversal's sign and weight."""

import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esr_utils import config, losses
from esr_utils.losses import (
    Mixed,
    hard_negative,
    info_nce,
    mean_over_norm,
    modality,
    multi_positive,
    self_distillation,
    sigmoid,
)

ln = math.log


def logits(rows: list[list[float]]) -> torch.Tensor:
    """Given as exp(logit), so that softmax sums are whole numbers."""
    return torch.tensor(rows).log()


def random_logits(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Values -----------------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine_of_every_pair():
    # (3, 4)/5 with (1, 0) and (0, -2)/2; a length changes nothing.
    found = losses.similarity(torch.tensor([[3.0, 4.0], [30.0, 40.0]]), torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, -0.8], [0.6, -0.8]]))


def test_info_nce_2x2():
    # rows:    -ln 2/(2+1) = ln 3/2;  -ln 1/(3+1) = ln 4      mean ln(6)/2
    # columns: -ln 2/(2+3) = ln 5/2;  -ln 1/(1+1) = ln 2      mean ln(5)/2
    assert float(info_nce(logits([[2, 1], [3, 1]]))) == pytest.approx((ln(6) / 2 + ln(5) / 2) / 2, abs=1e-6)


STYLED = [[1, 2, 3], [4, 1, 1], [1, 1, 2]]


def test_multi_positive_3x3():
    # pairs 1 and 2 share a style: each of their rows and columns has the target (1/2, 1/2, 0)
    # rows:    1/6, 2/6 -> (ln 6 + ln 3)/2;   4/6, 1/6 -> (ln 3/2 + ln 6)/2;   2/4 -> ln 2
    # columns: 1/6, 4/6 -> (ln 6 + ln 3/2)/2; 2/4, 1/4 -> (ln 2 + ln 4)/2;     2/6 -> ln 3
    rows = ((ln(6) + ln(3)) / 2 + (ln(1.5) + ln(6)) / 2 + ln(2)) / 3
    columns = ((ln(6) + ln(1.5)) / 2 + (ln(2) + ln(4)) / 2 + ln(3)) / 3
    found = multi_positive(logits(STYLED), torch.tensor([5, 5, 0]))
    assert float(found) == pytest.approx((rows + columns) / 2, abs=1e-6)


@pytest.mark.parametrize("style", [[4, 0, 7], [-1, -1, -1], [-1, 3, -1]])
def test_multi_positive_is_info_nce_where_no_two_share_a_style(style):
    found = multi_positive(logits(STYLED), torch.tensor(style))
    torch.testing.assert_close(found, info_nce(logits(STYLED)))


def test_multi_positive_of_mixed_clips_2x2():
    # clip 1 has style 5, a quarter of it style 7, clip 2's: rows (3/4, 1/4), (0, 1); columns (1, 0), (1/5, 4/5)
    # rows:    1/3, 2/3 -> 3/4 ln 3 + 1/4 ln 3/2;   3/4, 1/4 -> ln 4
    # columns: 1/4, 3/4 -> ln 4;                    2/3, 1/3 -> 1/5 ln 3/2 + 4/5 ln 3
    rows = (0.75 * ln(3) + 0.25 * ln(1.5) + ln(4)) / 2
    columns = (ln(4) + 0.2 * ln(1.5) + 0.8 * ln(3)) / 2
    mixed = Mixed(torch.tensor([0.75, 1.0]), torch.tensor([7, 5]))
    found = multi_positive(logits([[1, 2], [3, 1]]), torch.tensor([5, 7]), mixed)
    assert float(found) == pytest.approx((rows + columns) / 2, abs=1e-6)
    of_themselves = Mixed(torch.ones(3), torch.tensor([-1, 0, 5]))  # all of themselves: not mixed
    styles = torch.tensor([5, 5, -1])
    torch.testing.assert_close(
        multi_positive(logits(STYLED), styles, of_themselves), multi_positive(logits(STYLED), styles)
    )


# 2 x 2, gamma = 1, e = the entries. Weights of the one negative of each row and column:
# fs-clap: B e_ij / sum of the row, 2/3, 3/2, 6/5, 1; the others: the rest of the row, or the only negative.
HARD_2X2 = {
    # rows: 2/(2 + 2/3*1) -> ln 4/3; 1/(1 + 3/2*3) -> ln 11/2; columns: 2/(2 + 6/5*3) -> ln 14/5; 1/(1 + 1*1) -> ln 2
    "fs-clap": (ln(4 / 3) + ln(11 / 2) + ln(14 / 5) + ln(2)) / 4,
    # w = 1*e_ij/(sum - e_ij): 1/2, 3/1, 3/2, 1/1
    # rows: 2/(2 + 1/2*1) -> ln 5/4; 1/(1 + 3*3) -> ln 10; columns: 2/(2 + 3/2*3) -> ln 13/4; 1/(1 + 1*1) -> ln 2
    "mga-clap": (ln(5 / 4) + ln(10) + ln(13 / 4) + ln(2)) / 4,
    # one negative alone has the weight 1: InfoNCE of test_info_nce_2x2
    "robinson": (ln(6) / 2 + ln(5) / 2) / 2,
}
VARIANTS = list(HARD_2X2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_hard_negative_2x2(variant):
    found = hard_negative(logits([[2, 1], [3, 1]]), gamma=1.0, variant=variant)
    assert float(found) == pytest.approx(HARD_2X2[variant], abs=1e-6)


def test_robinson_3x3():
    # gamma = 1: the two negatives a, b of a row add up to 2 (a^2 + b^2) / (a + b).
    # rows:    1 | 2, 3: 2*13/5 = 26/5 -> ln 31/5;  1 | 4, 1: 2*17/5 = 34/5 -> ln 39/5;  2 | 1, 1: 2 -> ln 2
    # columns: 1 | 4, 1: 34/5 -> ln 39/5;  1 | 2, 1: 2*5/3 = 10/3 -> ln 13/3;  2 | 3, 1: 2*10/4 = 5 -> ln 7/2
    expected = (ln(31 / 5) + 2 * ln(39 / 5) + ln(2) + ln(13 / 3) + ln(7 / 2)) / 6
    assert float(hard_negative(logits(STYLED), 1.0, "robinson")) == pytest.approx(expected, abs=1e-6)


def slow_hard_negative(scores: torch.Tensor, gamma: float, variant: str, relevant: torch.Tensor) -> float:
    """Pair by pair, the sum over rows and directions, as FS-CLAP's Eq. (1) is."""
    total = 0.0
    for s, right in ((scores.tolist(), relevant.tolist()), (scores.T.tolist(), relevant.T.tolist())):
        for i, row in enumerate(s):
            negatives = [j for j in range(len(row)) if j != i and not right[i][j]]
            e = [math.exp(gamma * x) for x in row]
            kept = sum(e[k] for k in negatives) + e[i]
            below = math.exp(row[i])
            for j in negatives:
                weight = {
                    "fs-clap": (len(negatives) + 1) * e[j] / kept,
                    "mga-clap": len(negatives) * e[j] / (kept - e[j]),
                    "robinson": len(negatives) * e[j] / (kept - e[i]),
                }[variant]
                below += weight * math.exp(row[j])
            total -= math.log(math.exp(row[i]) / below)
    return total


# Clip 0 has all captions (a row of nothing but right pairs), 1 and 2 share one; the diagonal is not marked.
RELEVANT = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0]]).bool()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("relevant", [torch.zeros(5, 5, dtype=torch.bool), RELEVANT])
def test_hard_negative_is_the_formula_over_2b(variant, relevant):
    """FS-CLAP Eqs. (1) and (2) at its gamma, and at a large one, with and without false negatives."""
    for gamma in (0.15, 2.0, -0.5):
        found = hard_negative(random_logits(5), gamma, variant, relevant)
        assert float(found) == pytest.approx(slow_hard_negative(random_logits(5), gamma, variant, relevant) / 10)


def test_info_nce_leaves_false_negatives_out():
    scores, total = random_logits(5), 0.0
    for s, right in ((scores.tolist(), RELEVANT.tolist()), (scores.T.tolist(), RELEVANT.T.tolist())):
        for i, row in enumerate(s):
            total -= row[i] - ln(sum(math.exp(x) for j, x in enumerate(row) if j == i or not right[i][j]))
    assert float(info_nce(scores, RELEVANT)) == pytest.approx(total / 10)
    assert float(info_nce(scores, torch.ones(5, 5).bool())) == 0  # nothing is wrong
    torch.testing.assert_close(info_nce(scores, torch.eye(5).bool()), info_nce(scores))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hard_negative_without_gamma_is_info_nce(variant):
    scores = random_logits(6)
    torch.testing.assert_close(hard_negative(scores, 0.0, variant), info_nce(scores))
    torch.testing.assert_close(
        hard_negative(scores[:5, :5], 0.0, variant, RELEVANT), info_nce(scores[:5, :5], RELEVANT)
    )
    distances = [float(hard_negative(scores, gamma, variant) - info_nce(scores)) for gamma in (0.15, 1e-2, 1e-4)]
    assert distances[0] > 1e-3 and distances[0] > distances[1] > distances[2] > 0 and distances[2] < 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_hard_negative_of_extreme_scores_and_tiny_batches_is_finite(variant):
    """Similarity 1 at tau 0.01 is a logit of 100: exp overflows in float32, and a row's rest is lost beside it."""
    scores = (random_logits(6).float() * 100).requires_grad_()
    for logits_, relevant in ((scores, None), (scores, torch.ones(6, 6).bool()), (scores[:1, :1], None)):
        found = hard_negative(logits_, 1.0, variant, relevant)
        (gradient,) = torch.autograd.grad(found, scores)
        assert bool(found.isfinite()) and bool(gradient.isfinite().all())
    exact = hard_negative(scores.double(), 1.0, variant)
    torch.testing.assert_close(hard_negative(scores, 1.0, variant).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_learned_gamma_and_tau_have_gradients(variant):
    similarity = random_logits(5) / 3

    def loss(scale, gamma):
        return hard_negative(similarity * scale, gamma, variant, RELEVANT)

    inputs = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (3.0, 0.15)]
    assert torch.autograd.gradcheck(loss, inputs)
    loss(*inputs).backward()
    assert float(inputs[1].grad) > 1e-3  # so that going down the loss makes gamma smaller


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match="'clap'; it must be fs-clap, mga-clap or robinson"):
        hard_negative(random_logits(2), variant="clap")


def test_sigmoid_2x2():
    # bias ln 2 makes the logits ln 6, ln 2 | ln 2, ln 2/3
    # positives: -ln 6/7, -ln 2/5; negatives: -ln 1/3 twice; the sum over 4 pairs is divided by the 2 rows
    expected = (ln(7 / 6) + ln(5 / 2) + 2 * ln(3)) / 2
    found = sigmoid(logits([[3, 1], [1, 1 / 3]]), torch.tensor(ln(2)))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_self_distillation_2x2():
    # Student as in test_info_nce_2x2; teacher's softmax at temperature 1: rows (3/4, 1/4), (1/3, 2/3).
    # share 1/2: targets (7/8, 1/8), (1/6, 5/6); columns of exp(teacher): (3, 1) -> (7/8, 1/8); (1, 2) -> (1/6, 5/6)
    teacher = logits([[3, 1], [1, 2]])
    rows = 7 / 8 * ln(3 / 2) + 1 / 8 * ln(3) + 1 / 6 * ln(4 / 3) + 5 / 6 * ln(4)
    columns = 7 / 8 * ln(5 / 2) + 1 / 8 * ln(5 / 3) + 1 / 6 * ln(2) + 5 / 6 * ln(2)
    found = self_distillation(logits([[2, 1], [3, 1]]), teacher, temperature=1.0, share=0.5)
    assert float(found) == pytest.approx((rows + columns) / 4, abs=1e-6)


def test_self_distillation_between_info_nce_and_the_teacher():
    scores, teacher = random_logits(4), random_logits(4, seed=1).requires_grad_()
    torch.testing.assert_close(self_distillation(scores, teacher, share=0.0), info_nce(scores))
    sure = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(self_distillation(scores, sure, 1e-3, share=1.0), info_nce(scores))
    # The student that is the teacher has the least loss that there is.
    alike = self_distillation(teacher / 0.5, teacher, 0.5, share=1.0)
    for change in (scores, -scores):
        assert bool(self_distillation(teacher / 0.5 + change / 50, teacher, 0.5, share=1.0) > alike)
    (gradient,) = torch.autograd.grad(alike, teacher)
    assert float(gradient.abs().max()) < 1e-12  # through the student; the target passes none


def test_mean_over_norm_by_hand():
    # (3, -4): 3.5 / 5 = 0.7; (0, 2): 1 / 2 = 0.5; zeros: 0
    h = torch.tensor([[3.0, -4.0], [0.0, 2.0], [0.0, 0.0]])
    assert float(mean_over_norm(h)) == pytest.approx((0.7 + 0.5) / 3)
    h = random_logits(6)
    published = F.normalize(h).abs().mean() / F.normalize(h).square().sum().sqrt()  # MGA-CLAP, over the whole matrix
    assert float(mean_over_norm(h)) == pytest.approx(float(published) * math.sqrt(6))
    assert torch.autograd.gradcheck(mean_over_norm, h.requires_grad_())


def test_the_objectives_by_name():
    scores, style, bias = random_logits(4).float(), torch.tensor([1, 1, 2, 3]), torch.tensor(-3.0)
    expected = {
        "infonce": info_nce(scores),
        "multi-positive": multi_positive(scores, style),
        "hard-negative": hard_negative(scores, 0.15),
        "hard-negative-mga-clap": hard_negative(scores, 0.15, "mga-clap"),
        "hard-negative-robinson": hard_negative(scores, 0.15, "robinson"),
        "sigmoid": sigmoid(scores, bias),
    }
    assert {*expected, "classifier"} == set(get_args(config.Objective))
    assert len({round(float(value), 4) for value in expected.values()}) == 6
    for name, value in expected.items():
        torch.testing.assert_close(losses.contrastive(name, scores, style, bias), value)


# Gradients --------------------------------------------------------------------------------------------------

STYLE = torch.tensor([2, 2, 0, -1])
TEACHER = torch.eye(4, dtype=torch.float64) + random_logits(4, seed=1) / 10
OBJECTIVES = {
    "infonce": info_nce,
    "multi-positive": lambda s: multi_positive(s, STYLE),
    "mixed": lambda s: multi_positive(s, STYLE, Mixed(torch.tensor([0.5, 0.7, 0.9, 1.0]), torch.tensor([0, 2, 2, 0]))),
    "hard-negative": lambda s: hard_negative(s, 0.5),
    "hard-negative-mga-clap": lambda s: hard_negative(s, 0.5, "mga-clap"),
    "hard-negative-robinson": lambda s: hard_negative(s, 0.5, "robinson"),
    "relevant": lambda s: info_nce(s, RELEVANT[:4, :4]),
    "relevant, hard-negative": lambda s: hard_negative(s, 0.5, "fs-clap", RELEVANT[:4, :4]),
    "relevant, mga-clap": lambda s: hard_negative(s, 0.5, "mga-clap", RELEVANT[:4, :4]),
    "relevant, robinson": lambda s: hard_negative(s, 0.5, "robinson", RELEVANT[:4, :4]),
    "self-distillation": lambda s: self_distillation(s, TEACHER, 0.5, 0.3),
    "sigmoid": lambda s: sigmoid(s, torch.tensor(-1.0, dtype=s.dtype)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_by_finite_differences(name):
    assert torch.autograd.gradcheck(OBJECTIVES[name], random_logits(4).requires_grad_())


def test_the_sigmoid_bias_has_a_gradient():
    bias = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: sigmoid(random_logits(3), b), bias)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_lower_loss_means_better_matched_pairs(name):
    scores = random_logits(4).requires_grad_()
    OBJECTIVES[name](scores).backward()
    assert bool((scores.grad.diagonal() < 0).all())  # going down the gradient raises the matched pairs


def test_reversal_is_the_identity_forward_and_minus_weight_backward():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = losses.reverse_gradient(x, 0.1)
    torch.testing.assert_close(y, x)
    (y * torch.tensor([3.0, 5.0])).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-0.3, -0.5]))


class Adversaries:
    """Two encoders and a discriminator in float64, and L_disc of ESR Eq. (3) without any reversal."""

    def __init__(self):
        torch.manual_seed(0)
        self.discriminator = losses.two_layer(4, 6, 1).double()
        self.speech_encoder, self.text_encoder = nn.Linear(3, 4).double(), nn.Linear(5, 4).double()
        self.speech, self.text = torch.randn(7, 3).double(), torch.randn(7, 5).double()

    def plain(self) -> torch.Tensor:
        on_speech = torch.sigmoid(self.discriminator(self.speech_encoder(self.speech)))
        on_text = torch.sigmoid(self.discriminator(self.text_encoder(self.text)))
        return -on_speech.log().mean() - (1 - on_text).log().mean()

    def reversed(self, weight: float) -> torch.Tensor:
        speech, text = self.speech_encoder(self.speech), self.text_encoder(self.text)
        return modality(self.discriminator, speech, text, weight)

    @torch.no_grad()
    def finite_difference(self, parameter: torch.Tensor, index: int, step: float = 1e-6) -> float:
        """d L_disc / d parameter[index], by moving it."""
        values, flat = [], parameter.view(-1)
        for move in (step, -2 * step):
            flat[index] += move
            values.append(float(self.plain()))
        flat[index] += step
        return (values[0] - values[1]) / (2 * step)


def test_the_adversarial_terms_value_is_the_discriminators_loss():
    game = Adversaries()
    torch.testing.assert_close(game.reversed(0.1), game.plain())


@pytest.mark.parametrize("weight", [0.1, 1.1])
def test_discriminator_learns_at_weight_1_and_encoders_at_minus_lambda(weight):
    """Passed back twice through the reversal, the encoders would receive -1.1 where -0.1 is meant."""
    game = Adversaries()
    game.reversed(weight).backward()
    sides = [(game.discriminator, 1.0), (game.speech_encoder, -weight), (game.text_encoder, -weight)]
    checked = 0
    for module, factor in sides:
        for parameter in module.parameters():
            for index in range(parameter.numel()):
                expected = factor * game.finite_difference(parameter, index)
                assert float(parameter.grad.view(-1)[index]) == pytest.approx(expected, abs=1e-8)
                checked += abs(expected) > 1e-4
    assert checked > 40  # most of these gradients are not zero


# Classification ---------------------------------------------------------------------------------------------


def test_clips_without_a_style_are_left_out_of_classification():
    torch.manual_seed(0)
    classifier, speech = losses.two_layer(4, 6, 3), torch.randn(4, 4, requires_grad=True)
    found = losses.classification(classifier, speech, torch.tensor([2, -1, 0, -1]))
    torch.testing.assert_close(found, F.cross_entropy(classifier(speech[[0, 2]]), torch.tensor([2, 0])))
    found.backward()
    assert bool((speech.grad[[1, 3]] == 0).all()) and bool((speech.grad[[0, 2]] != 0).any())


def test_a_mixed_clip_is_classified_as_both_by_their_shares():
    torch.manual_seed(0)
    classifier, speech = losses.two_layer(4, 6, 3), torch.randn(4, 4)
    mixed = Mixed(torch.tensor([0.75, 1.0, 1.0, 0.5]), torch.tensor([1, 2, -1, 2]))
    found = losses.classification(classifier, speech, torch.tensor([2, -1, 0, 1]), mixed)
    logs = classifier(speech).log_softmax(1)
    expected = -(0.75 * logs[0, 2] + 0.25 * logs[0, 1] + logs[2, 0] + 0.5 * logs[3, 1] + 0.5 * logs[3, 2]) / 3
    torch.testing.assert_close(found, expected)


def test_classification_of_a_batch_without_any_style_is_zero_and_can_be_passed_back():
    classifier, speech = losses.two_layer(4, 6, 3), torch.randn(2, 4, requires_grad=True)
    found = losses.classification(classifier, speech, torch.tensor([-1, -1]))
    found.backward()
    assert float(found.detach()) == 0 and float(speech.grad.abs().sum()) == 0


def test_what_is_true_of_another_is_neither_target_nor_negative_of_a_student():
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    teacher, relevant = torch.randn(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.bool)
    relevant[0, 2] = True
    losses.self_distillation(logits, teacher, relevant=relevant).backward()
    assert logits.grad[0, 2] == 0 and (logits.grad != 0).sum() == 15
    nothing = losses.self_distillation(logits, teacher, relevant=torch.zeros(4, 4, dtype=torch.bool))
    torch.testing.assert_close(losses.self_distillation(logits, teacher), nothing)
