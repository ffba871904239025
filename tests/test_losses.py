"""Losses: numbers worked out by hand, gradients by finite differences, the reversal's sign and weight."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esr_utils import losses
from esr_utils.losses import hard_negative, info_nce, modality, multi_positive, sigmoid

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


def test_hard_negative_2x2():
    # gamma = 1, so alpha_ij = 2 e_ij / (row sum); the positive itself is not weighted.
    # row 1:    alpha = 2*1/3 = 2/3: -ln 2/(2 + 2/3*1) = ln 4/3
    # row 2:    alpha = 2*3/4 = 3/2: -ln 1/(1 + 3/2*3) = ln 11/2
    # column 1: alpha = 2*3/5 = 6/5: -ln 2/(2 + 6/5*3) = ln 14/5
    # column 2: alpha = 2*1/2 = 1:   -ln 1/(1 + 1*1) = ln 2
    expected = (ln(4 / 3) + ln(11 / 2) + ln(14 / 5) + ln(2)) / 4
    assert float(hard_negative(logits([[2, 1], [3, 1]]), gamma=1.0)) == pytest.approx(expected, abs=1e-6)


def test_hard_negative_is_the_papers_formula_over_2b():
    """FS-CLAP Eqs. (1) and (2), term by term, at its gamma."""
    scores, gamma = random_logits(5), 0.15
    total = 0.0
    for s in (scores.tolist(), scores.T.tolist()):
        for i, row in enumerate(s):
            alpha = [5 * math.exp(gamma * x) / sum(math.exp(gamma * y) for y in row) for x in row]
            below = math.exp(row[i]) + sum(alpha[j] * math.exp(row[j]) for j in range(5) if j != i)
            total -= math.log(math.exp(row[i]) / below)
    assert float(hard_negative(scores, gamma)) == pytest.approx(total / 10, abs=1e-6)


def test_hard_negative_without_gamma_is_info_nce():
    scores = random_logits(6)
    torch.testing.assert_close(hard_negative(scores, gamma=0.0), info_nce(scores), atol=1e-6, rtol=0)
    assert float(hard_negative(scores, gamma=0.15)) > float(info_nce(scores)) + 1e-3


def test_sigmoid_2x2():
    # bias ln 2 makes the logits ln 6, ln 2 | ln 2, ln 2/3
    # positives: -ln 6/7, -ln 2/5; negatives: -ln 1/3 twice; the sum over 4 pairs is divided by the 2 rows
    expected = (ln(7 / 6) + ln(5 / 2) + 2 * ln(3)) / 2
    found = sigmoid(logits([[3, 1], [1, 1 / 3]]), torch.tensor(ln(2)))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_the_objectives_by_name():
    scores, style, bias = random_logits(4).float(), torch.tensor([1, 1, 2, 3]), torch.tensor(-3.0)
    expected = {
        "infonce": info_nce(scores),
        "multi-positive": multi_positive(scores, style),
        "hard-negative": hard_negative(scores, 0.15),
        "sigmoid": sigmoid(scores, bias),
    }
    assert len({round(float(value), 4) for value in expected.values()}) == 4
    for name, value in expected.items():
        torch.testing.assert_close(losses.contrastive(name, scores, style, bias), value)


# Gradients --------------------------------------------------------------------------------------------------

STYLE = torch.tensor([2, 2, 0, -1])
OBJECTIVES = {
    "infonce": info_nce,
    "multi-positive": lambda s: multi_positive(s, STYLE),
    "hard-negative": lambda s: hard_negative(s, 0.5),
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


def test_classification_of_a_batch_without_any_style_is_zero_and_can_be_passed_back():
    classifier, speech = losses.two_layer(4, 6, 3), torch.randn(2, 4, requires_grad=True)
    found = losses.classification(classifier, speech, torch.tensor([-1, -1]))
    found.backward()
    assert float(found.detach()) == 0 and float(speech.grad.abs().sum()) == 0
