"""FS-CLAP: the tokens of a pair are fused, separated again, and pooled to one vector each (FS-CLAP section 3.1).

speech frames (B, L, T, D) -> averaged n:1 over time -> standardised -> mixed over layers -> projected (B, N, d)   h_a
text's last hidden states (B, M, D) -> projected (B, M, d)                                                      h_t
    fusion:     h_f = [h_a; h_t], (B, N + M, d), through two multi-head residual self-attention blocks
    separation: h_f split into its two streams, each through a feed-forward network of its own
    pooling:    attention with one learned query a modality -> (B, d) each; their cosine is the score. Or MGA-CLAP's:
                both as mixtures of one codebook's entries

The paper names the parts and leaves open what stands in them. Here each residual branch begins with a layer norm; a
fusion block is attention alone, without a feed-forward network, for that is the separation's; fused tokens carry a
learned vector of their modality, else attention could not tell them apart; positions need no such vector, the
backbones' own are in the tokens. Without fusion, separation or both the rest stands as it is, so that a row of the
paper's Table 3 differs from the next by the named part only.

Fusion reads both sides of one pair, and so can read the answer off the question: `protocols` says how such a model may
be scored and how it may not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from esr_utils.codebook import Codebook
from esr_utils.config import FusionConfig
from esr_utils.retriever import Retriever, SpeechHead
from esr_utils.speech import SpeechBackbone
from esr_utils.text import TextBackbone, Tokens

Modality = Literal["speech", "text"]
Way = Literal["bi-encoder", "masked"]
MODALITIES = ("speech", "text")


def pool_frames(layers: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The mean over every n frames in a row, of the valid ones among them.

    Args:
        layers: (B, L, T, D).
        mask: (B, T).

    Returns:
        (B, L, ceil(T / n), D), zero where invalid, and the mask, True where any of the n is valid.
    """
    spare = -mask.shape[1] % n
    valid = F.pad(mask, (0, spare)).unflatten(1, (-1, n))
    grouped = F.pad(layers, (0, 0, 0, spare)).unflatten(2, (-1, n)) * valid[:, None, :, :, None]
    return grouped.sum(3) / valid.sum(2).clamp(min=1)[:, None, :, None], valid.any(2)


def pick(tokens: Tokens, index: Tensor) -> Tokens:
    """Some of the sequences, in an order of one's own, cut to the longest of them."""
    mask = tokens.mask[index]
    longest = int(mask.sum(1).max())
    return Tokens(tokens.values[index, :longest], mask[:, :longest])


@contextmanager
def half_precision(device: torch.device, enabled: bool) -> Iterator[None]:
    """Products in bf16. On a CPU attention is then made of plain products.

    torch's own attention kernel takes longer there than bf16 saves elsewhere: 0.6 s of a training step of 2.0 s, where
    plain products took under 0.1 s (96 pairs of 65 tokens, one thread of a CPU with AMX).
    """
    attention = sdpa_kernel(SDPBackend.MATH) if enabled and device.type == "cpu" else nullcontext()
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled), attention:
        yield


class FrameHead(nn.Module):
    """(B, L, T, D) frames -> (B, T, d) tokens: standardised and mixed as in `retriever.SpeechHead`, then projected."""

    def __init__(self, n_layers: int, width: int, config: FusionConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_layers, width))
        self.register_buffer("std", torch.ones(n_layers, width))
        self.mix = nn.Parameter(torch.zeros(n_layers)) if n_layers > 1 else None
        self.projection = nn.Sequential(nn.Linear(width, config.dim), nn.Dropout(config.dropout))

    @property
    def layer_weights(self) -> Tensor:
        """(L,), summing to 1."""
        return torch.ones_like(self.mean[:, 0]) if self.mix is None else (SpeechHead.GAIN * self.mix).softmax(0)

    def fit(self, frames: list[Tensor]) -> None:
        """Sets the standardisation to the statistics of all frames of clips (L, T, D)."""
        count = sum(one.shape[1] for one in frames)
        mean = sum(one.double().sum(1) for one in frames) / count
        variance = sum((one.double() - mean[:, None]).square().sum(1) for one in frames) / count
        self.mean.copy_(mean)
        self.std.copy_(variance.sqrt().clamp(min=1e-4))

    def forward(self, layers: Tensor, mask: Tensor) -> Tokens:
        standardised = (layers - self.mean[:, None]) / self.std[:, None]
        mixed = (
            standardised[:, 0] if self.mix is None else torch.einsum("bltd,l->btd", standardised, self.layer_weights)
        )
        return Tokens(self.projection(mixed) * mask[..., None], mask)


class FusionBlock(nn.Module):
    """A multi-head residual self-attention block: x + attention(norm(x))."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.attention = nn.MultiheadAttention(config.dim, config.heads, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, unread: Tensor) -> Tensor:
        """(B, T, d) and (B, T), True at tokens that none may look at."""
        normed = self.norm(x)
        return x + self.dropout(self.attention(normed, normed, normed, unread, need_weights=False)[0])


class FeedForward(nn.Module):
    """The separation's network of one modality: x + ffn(norm(x)), token by token."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, 2 * config.dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(2 * config.dim, config.dim),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class AttentionPooling(nn.Module):
    """(B, T, d) tokens, (B, T) mask with at least one a row -> (B, d): what one learned query finds among them."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, config.dim) * config.dim**-0.5)
        self.norm = nn.LayerNorm(config.dim)
        self.attention = nn.MultiheadAttention(config.dim, config.heads, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm(x)
        query = self.query.expand(len(x), -1, -1)
        return self.attention(query, normed, normed, ~mask, need_weights=False)[0][:, 0]


def unread_tokens(mask: Tensor) -> Tensor:
    """Padding, which no token looks at; of a row of nothing else none, for a softmax over nothing is NaN."""
    return ~mask & mask.any(1, keepdim=True)


class FusionSeparation(nn.Module):
    """See the module's docstring. Tokens of width d in, one vector a modality out, not normalised.

    The vector of a clip or text without a token is zero.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.blocks = self.modality = self.separation = None
        if config.fusion:
            self.blocks = nn.ModuleList(FusionBlock(config) for _ in range(2))
            self.modality = nn.Parameter(0.02 * torch.randn(len(MODALITIES), config.dim))
        if config.separation:
            self.separation = nn.ModuleDict({name: FeedForward(config) for name in MODALITIES})
        if config.codebook:
            self.codebook, self.pooling = Codebook(config.codebook, config.dim), None
        else:
            self.codebook, self.pooling = None, nn.ModuleDict({name: AttentionPooling(config) for name in MODALITIES})

    def pair(self, speech: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        """Row i of the one fused with row i of the other: (B, d) and (B, d)."""
        if self.blocks is not None:
            speech, text = self._fused(speech, text)
        return self._pooled(speech, "speech"), self._pooled(text, "text")

    def alone(self, tokens: Tokens, modality: Modality, way: Way) -> Tensor:
        """One modality, nothing known of the other: (B, d).

        Args:
            way: `masked`, through the fusion blocks with the other modality absent, which is fusion under a
                block-diagonal mask; `bi-encoder`, past the blocks.

        Raises:
            ValueError: no such modality or way.
        """
        if modality not in MODALITIES or way not in ("bi-encoder", "masked"):
            raise ValueError(f"modality {modality!r}, way {way!r}: speech or text, bi-encoder or masked")
        if self.blocks is not None and way == "masked":
            (tokens,) = self._fused(**{modality: tokens})
        return self._pooled(tokens, modality)

    def _fused(self, speech: Tokens | None = None, text: Tokens | None = None) -> list[Tokens]:
        """The given modalities through the blocks as one sequence, and split again."""
        given = [(row, tokens) for row, tokens in enumerate((speech, text)) if tokens is not None]
        x = torch.cat([tokens.values + self.modality[row] for row, tokens in given], dim=1)
        unread = unread_tokens(torch.cat([tokens.mask for _, tokens in given], dim=1))
        for block in self.blocks if x.shape[1] else ():
            x = block(x, unread)
        parts = x.split([tokens.mask.shape[1] for _, tokens in given], dim=1)
        return [Tokens(part, tokens.mask) for part, (_, tokens) in zip(parts, given, strict=True)]

    def _pooled(self, tokens: Tokens, modality: Modality) -> Tensor:
        if not tokens.mask.shape[1]:  # attention takes no sequence without a place
            tokens = Tokens(F.pad(tokens.values, (0, 0, 0, 1)), F.pad(tokens.mask, (0, 1)))
        values = tokens.values if self.separation is None else self.separation[modality](tokens.values)
        pooling = self.codebook or self.pooling[modality]
        return pooling(values, ~unread_tokens(tokens.mask)) * tokens.mask.any(1, keepdim=True)


class FusionRetriever(Retriever):
    """FS-CLAP on any two backbones; see the module's docstring.

    As a Retriever (`encode_speech`, `encode_text`, the search index) it is the `masked` way: each side alone. `pair` is
    the fused way, for pairs that are known to be candidates.
    """

    kind, config_type = "fusion", FusionConfig

    def __init__(self, config: FusionConfig, speech: SpeechBackbone, text: TextBackbone) -> None:
        super().__init__(config, speech, text)
        self.raw_gamma = nn.Parameter(torch.tensor(float(config.gamma)))
        self.speech_head = FrameHead(speech.n_layers, speech.dim, config)
        self.text_head = nn.Sequential(
            nn.LayerNorm(text.dim), nn.Linear(text.dim, config.dim), nn.Dropout(config.dropout)
        )
        self.fusion = FusionSeparation(config)

    @property
    def gamma(self) -> Tensor:
        """The hard-negative loss's scaling ratio, FS-CLAP Eq. (2), where it is learned; at least 0."""
        return self.raw_gamma - self.raw_gamma.clamp(max=0.0).detach()  # at 0 it still has a gradient, to come back by

    def speech_tokens(self, batch: dict) -> Tokens:
        """(B, N, d) of a batch with `waveform` and `n_samples`, or with what a frozen backbone gave.

        That is `frames` (B, L, N, D), already averaged over `frames_per_token`, and their `mask` (B, N), as
        `embedding.padded_frames` makes them.
        """
        if "frames" in batch:
            return self.speech_head(batch["frames"].to(self.device).float(), batch["mask"].to(self.device))
        waveform, n_samples = batch["waveform"].to(self.device), batch["n_samples"].to(self.device)
        layers, mask = self.speech.layers(waveform, n_samples)
        return self.speech_head(*pool_frames(layers.float(), mask, self.config.frames_per_token))

    def text_tokens(self, texts: list[str]) -> Tokens:
        """(B, M, d)."""
        values, mask = self.text.sequences(list(texts))
        return Tokens(self.text_head(values) * mask[..., None], mask)

    def alone(self, tokens: Tokens, modality: Modality, way: Way = "masked") -> Tensor:
        """(B, d), not normalised; see `FusionSeparation.alone`."""
        return self.fusion.alone(tokens, modality, way)

    def pair(self, speech: Tokens, text: Tokens) -> tuple[Tensor, Tensor]:
        """(B, d) and (B, d), not normalised: what the losses take; see `FusionSeparation.pair`."""
        return self.fusion.pair(speech, text)

    def pair_score(self, speech: Tokens, text: Tokens) -> Tensor:
        """(B,) cosines of the fused pairs."""
        return F.cosine_similarity(*self.pair(speech, text), dim=-1)

    def speech_vectors(self, batch: dict) -> Tensor:
        """(B, d), not normalised, the `masked` way; see `speech_tokens` for the batch."""
        return self.alone(self.speech_tokens(batch), "speech")

    def text_vectors(self, texts: list[str]) -> Tensor:
        """(B, d), not normalised, the `masked` way."""
        return self.alone(self.text_tokens(texts), "text")
