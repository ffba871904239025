"""The losses: pure functions from embeddings to a scalar, and the two small networks that two of them need.

Embeddings are e_s = speech and e_t = text, (B, d), pair i in row i, not normalised unless said so. Each objective is
the mean over both directions and all rows, so that their weights compare.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NO_STYLE = -1  # label of a clip without a style: left out of the classification loss


def similarity(speech: Tensor, text: Tensor) -> Tensor:
    """Cosine similarity of every speech row with every text row, (B, B')."""
    return F.normalize(speech, dim=-1) @ F.normalize(text, dim=-1).T


def info_nce(logits: Tensor) -> Tensor:
    """Symmetric contrastive loss, ESR Eqs. (1) and (2): only pair i is right for row i.

    Same-style pairs in a batch are then each other's negatives; `multi_positive` differs in just that.

    Args:
        logits: (B, B) similarity / tau, rows speech, columns text.
    """
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def multi_positive(logits: Tensor, style: Tensor) -> Tensor:
    """InfoNCE whose target is uniform over all pairs of the row's style (Khosla et al. 2020, Eq. 2, across modalities).

    Equals `info_nce` when all styles in the batch differ. A pair without a style (-1) is right for itself only.

    Args:
        logits: (B, B) similarity / tau.
        style: (B,) int labels.
    """
    same = (style[:, None] == style) & (style != NO_STYLE)
    same = same | torch.eye(len(style), dtype=torch.bool, device=style.device)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def hard_negative(logits: Tensor, gamma: float = 0.15) -> Tensor:
    """Hard-negative guided loss, FS-CLAP Eqs. (1) and (2): negatives weigh by how close they are.

    alpha_ij = B exp(gamma S_ij) / sum_k exp(gamma S_ik), k over all pairs, and gradients flow through the weights.
    Eq. (1) sums over rows and directions; this is the mean, so the paper's value is 2B times this. gamma = 0 is
    `info_nce`.

    Args:
        logits: (B, B) similarity / tau = S.
    """

    def one_way(s: Tensor) -> Tensor:
        log_alpha = F.log_softmax(gamma * s, dim=1) + torch.tensor(float(len(s)), device=s.device).log()
        weights = log_alpha.masked_fill(torch.eye(len(s), dtype=torch.bool, device=s.device), 0.0)
        return (torch.logsumexp(s + weights, dim=1) - s.diagonal()).mean()

    return (one_way(logits) + one_way(logits.T)) / 2


def sigmoid(logits: Tensor, bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, SigLIP Eq. 1): each of the B^2 pairs is a yes or no of its own.

    Args:
        logits: (B, B) similarity / tau.
        bias: scalar, learned; starts at -10 because nearly all pairs are negatives.
    """
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * (logits + bias)).sum() / len(logits)


def contrastive(objective: str, logits: Tensor, style: Tensor, bias: Tensor) -> Tensor:
    """The contrastive term by its name in TrainConfig."""
    if objective == "infonce":
        return info_nce(logits)
    if objective == "multi-positive":
        return multi_positive(logits, style)
    if objective == "hard-negative":
        return hard_negative(logits)
    return sigmoid(logits, bias)


class _ReverseGradient(torch.autograd.Function):
    """Identity forward; times -weight backward (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return -ctx.weight * gradient, None


def reverse_gradient(x: Tensor, weight: float) -> Tensor:
    """x itself, but its gradient arrives multiplied by -weight."""
    return _ReverseGradient.apply(x, weight)


def two_layer(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """The shape of both the modality discriminator D and the style classifier C (ESR section III-C.2, 3)."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def modality(discriminator: nn.Module, speech: Tensor, text: Tensor, weight: float) -> Tensor:
    """Discriminator loss, ESR Eqs. (3) and (4), in one backward pass.

    The discriminator minimises it at weight 1; through the reversal the encoders receive -weight of its gradient,
    that is lambda_adv times the gradient of L_adv = -L_disc, and nothing else of it.

    Args:
        discriminator: (B, d) -> (B, 1) logit that an embedding is speech.
        weight: lambda_adv.
    """
    on_speech = discriminator(reverse_gradient(speech, weight)).squeeze(-1)
    on_text = discriminator(reverse_gradient(text, weight)).squeeze(-1)
    return -F.logsigmoid(on_speech).mean() - F.logsigmoid(-on_text).mean()


def classification(classifier: nn.Module, speech: Tensor, style: Tensor) -> Tensor:
    """Cross-entropy of the style classifier on speech embeddings (ESR section III-C.3); 0 if no clip has a style."""
    labelled = style != NO_STYLE
    if not bool(labelled.any()):
        return speech.sum() * 0.0
    return F.cross_entropy(classifier(speech[labelled]), style[labelled])
