"""Telling a pair from hard negatives by a score of its own: mining the negatives, the loss (ALBEF, Li et al. 2021).

A model that mixes the two sides of a pair before it scores them cannot score all B^2 pairs of a batch in a step. So
each clip is fused with its caption and with one or two captions that are easily taken for it, and each caption with
such clips.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from esr_utils.losses import false_negatives

NOTHING = -1  # where a row has no negative left


@torch.no_grad()
def mine_negatives(logits: Tensor, relevant: Tensor | None, m: int, generator: torch.Generator) -> Tensor:
    """Hard negatives of each row, drawn without replacement with the chances of softmax(logits) over its negatives.

    A negative is neither the row's own pair nor relevant. For the other direction give `logits.T` and `relevant.T`.
    The draw is the m largest of logit + Gumbel noise (Vieira 2014), which is torch.multinomial's, but says when there
    is nothing left instead of drawing what has no chance.

    Args:
        logits: (B, B) similarity / tau of the model without fusion.
        relevant: (B, B) bool, as in `losses.info_nce`.
        m: how many a row, 1 or 2.
        generator: of the device of `logits`.

    Returns:
        (B, m) int64 columns; -1 at the end of a row that has fewer than m negatives. Such places may be fused with
        anything (`.clamp(min=0)`): `pair_matching` leaves them out.
    """
    noise = torch.empty_like(logits).exponential_(generator=generator).log()
    wrong = torch.eye(len(logits), dtype=torch.bool, device=logits.device) | false_negatives(logits, relevant)
    key, found = (logits - noise).masked_fill(wrong, -torch.inf).topk(min(m, len(logits)), dim=1)
    found = found.masked_fill(key == -torch.inf, NOTHING)
    return F.pad(found, (0, m - found.shape[1]), value=NOTHING)


def pair_matching(scores: Tensor, negatives: Tensor) -> Tensor:
    """Cross-entropy of the pair against its mined negatives.

    Args:
        scores: (B, 1 + m) fused similarity / tau, the pair first, then `negatives` in order.
        negatives: (B, m) as `mine_negatives` gives them.

    Returns:
        The mean over the rows that have a negative; 0 if none has.
    """
    absent = negatives == NOTHING
    log_chance = scores.masked_fill(F.pad(absent, (1, 0)), -torch.inf).log_softmax(dim=1)[:, 0]
    return -log_chance.sum() / (~absent).any(dim=1).sum().clamp_min(1)  # a row without a negative adds 0
