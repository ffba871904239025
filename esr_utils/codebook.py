"""MGA-CLAP's modality-shared codebook (Li et al. 2024, Eqs. 2, 3): both modalities as mixtures of the same vectors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

PUBLISHED_ENTRIES, PUBLISHED_TEMPERATURE = 4096, 1000.0


def sparsemax(x: Tensor) -> Tensor:
    """The point of the simplex that is nearest to x, over the last dimension (Martins & Astudillo 2016, Alg. 1).

    Like softmax, but most results are exactly 0. With z sorted downwards and k the largest number for which
    1 + k z_k > z_1 + … + z_k, it is max(0, x - (z_1 + … + z_k - 1) / k).
    """
    x = x - x.amax(dim=-1, keepdim=True).detach()  # a shift changes nothing; keeps the sums small
    descending = x.sort(dim=-1, descending=True).values
    sums = descending.cumsum(dim=-1)
    counts = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    support = (1 + counts * descending > sums).sum(dim=-1, keepdim=True)
    threshold = (sums.gather(-1, support - 1) - 1) / support
    return (x - threshold).clamp_min(0)


class Codebook(nn.Module):
    """Shared entries, of which a sequence takes a sparse mixture: the pooling of MGA-CLAP, the same for both sides.

    An entry's score is its product with the token that it fits best; sparsemax makes weights of the scores; their
    mixture of entries stands for the sequence. In the published code a padded token scores 0, which may be the most;
    here it is left out.
    """

    def __init__(self, entries: int, dim: int) -> None:
        """
        Args:
            entries: how many; 4096 in the paper.
            dim: d, of tokens and entries.
        """
        super().__init__()
        self.entries = nn.Parameter(torch.randn(entries, dim))
        # With more entries a weight is smaller, so scores must lie closer for as large a share of them to be used.
        self.temperature = PUBLISHED_TEMPERATURE * entries / PUBLISHED_ENTRIES

    def weights(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d) tokens, (B, T) bool mask of real ones, at least one a row -> (B, entries), rows that sum to 1."""
        scores = tokens @ self.entries.T / math.sqrt(self.entries.shape[1])  # (B, T, entries)
        best = scores.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)
        return sparsemax(best / self.temperature)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, T, d), (B, T) -> (B, d), not normalised."""
        return self.weights(tokens, mask) @ self.entries
