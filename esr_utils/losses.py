"""The losses: pure functions from embeddings to a scalar, and the two small networks that two of them need.

Embeddings are e_s = speech and e_t = text, (B, d), pair i in row i, not normalised unless said so. Each objective is
the mean over both directions and all rows, so that their weights compare.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NO_STYLE = -1  # label of a clip without a style: left out of the classification loss
HARD_NEGATIVES = {  # objective in TrainConfig -> variant
    "hard-negative": "fs-clap",
    "hard-negative-mga-clap": "mga-clap",
    "hard-negative-robinson": "robinson",
}


def similarity(speech: Tensor, text: Tensor) -> Tensor:
    """Cosine similarity of every speech row with every text row, (B, B')."""
    return F.normalize(speech, dim=-1) @ F.normalize(text, dim=-1).T


def info_nce(logits: Tensor, relevant: Tensor | None = None) -> Tensor:
    """Symmetric contrastive loss, ESR Eqs. (1) and (2): only pair i is right for row i.

    Same-style pairs in a batch are then each other's negatives; `multi_positive` differs in just that. With `relevant`
    they are neither: what is right for a row and is not its own pair is left out of its denominator.

    Args:
        logits: (B, B) similarity / tau, rows speech, columns text.
        relevant: (B, B) bool, clip i is right for caption j; the diagonal counts as True whatever it holds.
    """
    target = torch.arange(len(logits), device=logits.device)
    logits = logits.masked_fill(false_negatives(logits, relevant), -torch.inf)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def false_negatives(logits: Tensor, relevant: Tensor | None) -> Tensor:
    """(B, B) bool: pairs off the diagonal that are right nonetheless; none without `relevant`."""
    if relevant is None:
        return torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    return relevant & ~_diagonal(logits)


def _diagonal(logits: Tensor) -> Tensor:
    return torch.eye(len(logits), dtype=torch.bool, device=logits.device)


class Mixed(NamedTuple):
    """Of clips whose features are mixed with another's (mixup: Zhang et al. 2018), that is of a batch's B:

    Attributes:
        share: (B,) of the clip itself, the rest is the other's.
        style: (B,) int labels, the other's.
    """

    share: Tensor
    style: Tensor


def multi_positive(logits: Tensor, style: Tensor, mixed: Mixed | None = None) -> Tensor:
    """InfoNCE whose target is uniform over all pairs of the row's style (Khosla et al. 2020, Eq. 2, across modalities).

    Equals `info_nce` when all styles in the batch differ. A pair without a style (-1) is right for itself only. A mixed
    clip has both its styles for a target, and a text the clips that have its style, each by their share.

    Args:
        logits: (B, B) similarity / tau, rows speech, columns text.
        style: (B,) int labels.
        mixed: where the clips are mixed; who has no style is not, nor with whom (share 1).
    """
    own = torch.eye(len(style), dtype=torch.bool, device=style.device)
    target = _uniform(((style[:, None] == style) & (style != NO_STYLE)) | own)
    if mixed:
        other = _uniform(((mixed.style[:, None] == style) & (style != NO_STYLE)) | (own & (mixed.share == 1)))
        target = mixed.share[:, None] * target + (1 - mixed.share[:, None]) * other
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, _uniform(target.T))) / 2


def _uniform(right: Tensor) -> Tensor:
    """Rows that sum to 1."""
    return right / right.sum(1, keepdim=True)


def hard_negative(
    logits: Tensor,
    gamma: float | Tensor = 0.15,
    variant: Literal["fs-clap", "mga-clap", "robinson"] = "fs-clap",
    relevant: Tensor | None = None,
) -> Tensor:
    """InfoNCE whose negatives weigh by how close they are: -log e^S_ii / (e^S_ii + sum_{j != i} w_ij e^S_ij).

    With e_ij = exp(gamma S_ij), k over the n pairs of row i that are not left out (n = B without `relevant`):

        fs-clap    w_ij = n e_ij / sum_k e_ik                     FS-CLAP Eqs. (1) and (2): the positive is among the k
        mga-clap   w_ij = (n - 1) e_ij / (sum_k e_ik - e_ij)      what MGA-CLAP (Li et al. 2024) means: all but j
        robinson   w_ij = (n - 1) e_ij / sum_{k != i} e_ik        Robinson et al. 2021, Eq. 4, tau+ = 0: negatives only

    Gradients flow through the weights, in each. This is the mean over rows and directions, as in MGA-CLAP; FS-CLAP's
    Eq. (1) sums, so its value is 2B times this. gamma = 0 makes every weight 1, and is `info_nce` to the constant 1.
    MGA-CLAP's published code differs from its formula: it divides by the sum of row j where row i's is meant.

    A larger gamma gives a larger loss (for robinson always: its derivative is the mean of S over the negatives at
    exponent 1 + gamma less that at gamma). So a gamma that is learned by going down the loss falls to InfoNCE, and
    below 0 to preferring easy negatives: whoever learns it keeps it from falling, and looks at where it goes.

    Args:
        logits: (B, B) similarity / tau = S.
        gamma: a number, or a scalar tensor that receives a gradient.
        relevant: (B, B) bool, as in `info_nce`; a row in which all is right adds 0.
    """
    left_out = false_negatives(logits, relevant)
    sides = (logits, left_out), (logits.T, left_out.T)
    return sum(_hard_negative_one_way(s, gamma, variant, out) for s, out in sides) / 2


def _hard_negative_one_way(s: Tensor, gamma: float | Tensor, variant: str, left_out: Tensor) -> Tensor:
    """In logarithms, so that no exp(gamma S) overflows. A row without a negative uses none of its weights."""
    own, kept = _diagonal(s), (~left_out).sum(dim=1, keepdim=True).to(s.dtype)
    harder = gamma * s  # log e_ij
    if variant == "fs-clap":
        log_sum, log_count = harder.masked_fill(left_out, -torch.inf).logsumexp(1, keepdim=True), kept.log()
    elif variant == "mga-clap":
        log_sum, log_count = _log_sum_of_others(harder, left_out), (kept - 1).clamp_min(1).log()
    elif variant == "robinson":
        log_sum = harder.masked_fill(left_out | own, -torch.inf).logsumexp(1, keepdim=True)
        log_count = (kept - 1).clamp_min(1).log()
    else:
        raise ValueError(f"hard-negative variant {variant!r}; it must be fs-clap, mga-clap or robinson")
    log_weight = (harder - log_sum + log_count).masked_fill(own, 0.0)
    return (torch.logsumexp((s + log_weight).masked_fill(left_out, -torch.inf), dim=1) - s.diagonal()).mean()


def _log_sum_of_others(x: Tensor, left_out: Tensor) -> Tensor:
    """(B, B): log of the sum of exp(x_ik) over the k that are neither j nor left out.

    Taking exp(x_ij) from the row's sum is exact unless it is the largest, whose rest is summed by itself.
    """
    x = x.masked_fill(left_out, -torch.inf)
    largest = F.one_hot(x.argmax(dim=1), x.shape[1]).bool()
    rest = x.masked_fill(largest, -torch.inf).logsumexp(1, keepdim=True)
    share = x.softmax(dim=1).masked_fill(largest, 0.0)  # at most 1/2
    return torch.where(largest, rest, x.logsumexp(1, keepdim=True) + torch.log1p(-share))


def self_distillation(
    logits: Tensor, teacher: Tensor, temperature: float = 0.07, share: float = 0.5, relevant: Tensor | None = None
) -> Tensor:
    """RA-CLAP's second stage (Sun et al. 2025): what the teacher finds alike is a match in part, not a negative.

    The target of a row is (1 - share) times its own pair + share times softmax(teacher / temperature) of that row; of
    a column likewise. The mean of both cross-entropies; its least value is the targets' entropy, not 0. share = 0 is
    `info_nce`; a teacher that tells pairs apart without doubt comes to the same. The mixture with the own pair is that
    of Hinton et al. 2015; how RA-CLAP weighs the two is not in what was at hand.

    Args:
        logits: (B, B) the student's similarity / tau.
        teacher: (B, B) the teacher's cosine similarities; no gradient reaches them.
        temperature: above tau it softens the teacher.
        share: 0 … 1, of the target that the teacher gives.
        relevant: (B, B) bool, as in `info_nce`: such pairs are neither targets nor negatives.
    """
    own, left_out = _diagonal(logits).to(logits.dtype), false_negatives(logits, relevant)
    # Far below all else, but finite: a target of 0 times a logit of -inf would be NaN.
    logits, teacher = (x.masked_fill(left_out, -1e4) for x in (logits, teacher.detach() / temperature))

    def one_way(s: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(s, (1 - share) * own + share * t.softmax(dim=1))

    return (one_way(logits, teacher) + one_way(logits.T, teacher.T)) / 2


def mean_over_norm(h: Tensor) -> Tensor:
    """The regulariser of FS-CLAP Eq. (3) for one modality: mean |h| / ||h||_2 of each vector, then the mean of those.

    Of the pooled vectors whose cosine is taken, before they are normalised. Row by row the length cancels: normalised
    ones give the same, and MGA-CLAP's code, which takes both over the whole normalised (B, d) matrix, gives this over
    sqrt(B). It lies between 1/d (one element alone) and 1/sqrt(d) (all alike), so going down it makes vectors sparse.

    Args:
        h: (B, d) speech or text vectors; one of zeros counts 0.
    """
    return (h.abs().mean(dim=-1) / h.norm(dim=-1).clamp_min(torch.finfo(h.dtype).tiny)).mean()


def sigmoid(logits: Tensor, bias: Tensor) -> Tensor:
    """Pairwise sigmoid loss (Zhai et al. 2023, SigLIP Eq. 1): each of the B^2 pairs is a yes or no of its own.

    Args:
        logits: (B, B) similarity / tau.
        bias: scalar, learned; starts at -10 because nearly all pairs are negatives.
    """
    sign = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(sign * (logits + bias)).sum() / len(logits)


def contrastive(objective: str, logits: Tensor, style: Tensor, bias: Tensor, mixed: Mixed | None = None) -> Tensor:
    """The contrastive term by its name in TrainConfig; only `multi-positive` knows of mixed clips."""
    if objective == "infonce":
        return info_nce(logits)
    if objective == "multi-positive":
        return multi_positive(logits, style, mixed)
    if objective in HARD_NEGATIVES:
        return hard_negative(logits, variant=HARD_NEGATIVES[objective])
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


def classification(classifier: nn.Module, speech: Tensor, style: Tensor, mixed: Mixed | None = None) -> Tensor:
    """Cross-entropy of the style classifier on speech embeddings (ESR section III-C.3); 0 if no clip has a style. A
    mixed clip's is that of both its styles, by their shares."""
    labelled = style != NO_STYLE
    if not bool(labelled.any()):
        return speech.sum() * 0.0
    logits, style = classifier(speech[labelled]), style[labelled]
    if mixed is None:
        return F.cross_entropy(logits, style)
    share, other = mixed.share[labelled], mixed.style[labelled]
    other = torch.where(share == 1, style, other)
    own = share * F.cross_entropy(logits, style, reduction="none")
    return (own + (1 - share) * F.cross_entropy(logits, other, reduction="none")).mean()
