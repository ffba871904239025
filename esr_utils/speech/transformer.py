"""The transformer of speech models over packed clips: frames (N, D) one clip after the other, attention within each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esr_utils.config import SAMPLE_RATE
from esr_utils.speech.convolutions import conv_frames
from esr_utils.speech.interface import SpeechBackbone, compute_dtype, length_mask
from esr_utils.speech.kernels import dropout, gelu_linear, keep_mask, linear, unpack

_PIECE = 2**22  # attention weights at a time: a long clip's heads are done one after the other


def _pieces(lengths: list[int], n_heads: int):
    """(rows, heads) slices that cover all clips."""
    start = 0
    for n in lengths:
        step = min(n_heads, max(1, _PIECE // n**2))
        for head in range(0, n_heads, step):
            yield slice(start, start + n), slice(head, min(head + step, n_heads))
        start += n


class _Attend(Function):
    @staticmethod
    def _scores(qkv, bias, gate, rows, heads) -> Tensor:
        """softmax(q k' + gate bias), (heads, n, n) fp32."""
        q, k = qkv[0, heads, rows], qkv[1, heads, rows]
        scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).float()
        if bias is not None:
            own = bias[heads, : len(scores[0]), : len(scores[0])]
            scores = scores + own if gate is None else scores.addcmul_(gate[heads, rows, None], own)
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx, packed, lengths, n_heads, bias, gate, p):
        qkv = packed.view(len(packed), 3, n_heads, -1).permute(1, 2, 0, 3)  # (3, H, N, D / H)
        out = packed.new_empty(n_heads, *qkv.shape[2:])
        keeps, scale = [], 1.0
        for rows, heads in _pieces(lengths, n_heads):
            attention = _Attend._scores(qkv, bias, gate, rows, heads)
            keep, scale = keep_mask(attention, p)
            keeps.append(keep)
            attention = attention if keep is None else attention.mul_(keep)
            torch.bmm(attention.to(out.dtype), qkv[2, heads, rows] * scale, out=out[heads, rows])
        out = out.transpose(0, 1).reshape(len(packed), -1)
        ctx.save_for_backward(packed, bias, gate, out, *keeps)
        ctx.lengths, ctx.n_heads, ctx.scale = lengths, n_heads, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        packed, bias, gate, out, *keeps = ctx.saved_tensors
        n_heads = ctx.n_heads
        qkv = packed.view(len(packed), 3, n_heads, -1).permute(1, 2, 0, 3)
        dpacked = torch.empty_like(packed)
        dqkv = dpacked.view(len(packed), 3, n_heads, -1).permute(1, 2, 0, 3)
        dbias = None if bias is None else torch.zeros_like(bias)
        dgate = None if gate is None else torch.empty_like(gate)
        # Of softmax's backward: sum_j P_ij dP_ij = dO_i O_i, dropout or not.
        shared = (dout.float() * out.float()).view(len(out), n_heads, -1).sum(-1).T[..., None]
        dout = dout.view(len(out), n_heads, -1).transpose(0, 1) * ctx.scale
        for (rows, heads), keep in zip(_pieces(ctx.lengths, n_heads), keeps, strict=True):
            attention = _Attend._scores(qkv, bias, gate, rows, heads)
            q, k, v, do = qkv[0, heads, rows], qkv[1, heads, rows], qkv[2, heads, rows], dout[heads, rows]
            kept = attention if keep is None else attention * keep
            dqkv[2, heads, rows] = torch.bmm(kept.to(do.dtype).transpose(1, 2), do)
            d = torch.bmm(do, v.transpose(1, 2)).float()
            d = d if keep is None else d.mul_(keep)
            d = d.sub_(shared[heads, rows]).mul_(attention)
            if bias is not None:
                n = d.shape[1]
                if gate is None:
                    dbias[heads, :n, :n] += d
                else:
                    dgate[heads, rows] = (d * bias[heads, :n, :n]).sum(-1)
                    dbias[heads, :n, :n].addcmul_(d, gate[heads, rows, None])
            d = d.to(q.dtype)
            dqkv[0, heads, rows] = torch.bmm(d, k) * q.shape[-1] ** -0.5
            dqkv[1, heads, rows] = torch.bmm(d.transpose(1, 2), q * q.shape[-1] ** -0.5)
        return dpacked, None, None, dbias, dgate, None


def attend(
    qkv: Tensor,
    lengths: list[int],
    n_heads: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Self-attention within each clip: dropout(softmax(q k' / sqrt(D / H) + gate bias), p) v.

    On a CPU clip by clip, and the attention weights are computed again for the backward; elsewhere padded, at once.

    Args:
        qkv: (N, 3 D), queries, keys and values of all clips.
        lengths: frames of each clip; they sum to N.
        bias: (H, T, T) fp32 with T the longest clip, or None.
        gate: (H, N) fp32 that multiplies the rows of `bias`, or None for 1.
        p: dropout of the attention weights.

    Returns:
        (N, D)
    """
    if qkv.device.type == "cpu":
        return _Attend.apply(qkv, lengths, n_heads, bias, gate, p)
    return attend_padded(qkv, lengths, n_heads, bias, gate, p)


def attend_padded(
    qkv: Tensor, lengths: list[int], n_heads: int, bias: Tensor | None, gate: Tensor | None, p: float
) -> Tensor:
    """`attend` in one call over padded clips, with the padding masked."""
    q, k, v = unpack(qkv, lengths).unflatten(-1, (3, n_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, D / H)
    valid = torch.arange(q.shape[2], device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    mask = torch.zeros(valid.shape, device=q.device).masked_fill(~valid, -math.inf)[:, None, None]
    if bias is not None:
        gates = 1.0 if gate is None else unpack(gate.T, lengths).transpose(1, 2)[..., None]
        mask = mask + gates * bias
    out = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout_p=p)
    return out.transpose(1, 2).flatten(2)[valid]


@dataclass(frozen=True)
class TransformerLayer:
    """One layer: its weights, and in training its dropout.

    Attributes:
        qkv_weight: (3 D, D), the projections to queries, keys and values one below the other.
        norm_first: whether each branch is normalised at its start (`norm1`, `norm2`), or each sum after it.
        dropout: of the attention weights, the attention's output, between the linear layers, and of their output.
    """

    n_heads: int
    qkv_weight: Tensor
    qkv_bias: Tensor
    out: nn.Linear
    norm1: nn.LayerNorm
    inner: nn.Linear
    outer: nn.Linear
    norm2: nn.LayerNorm
    norm_first: bool
    dropout: tuple[float, float, float, float] | None

    def __call__(
        self,
        x: Tensor,
        lengths: list[int],
        dtype: torch.dtype,
        bias: Tensor | None = None,
        gate: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """(N, D) fp32 -> (N, D) fp32; products are in `dtype`.

        Args:
            bias: (H, T, T), see `attend`.
            gate: from what the attention reads, (N, D) of `dtype`, to its (H, N), see `attend`.
        """
        p_attention, p_out, p_inner, p_outer = self.dropout or (0.0, 0.0, 0.0, 0.0)
        y = (self.norm1(x) if self.norm_first else x).to(dtype)
        gates = None if gate is None else gate(y)
        y = linear(y, self.qkv_weight, self.qkv_bias)
        y = attend(y, lengths, self.n_heads, bias, gates, p_attention)
        x = x + dropout(linear(y, self.out.weight, self.out.bias).float(), p_out)
        if not self.norm_first:
            x = self.norm1(x)
        y = linear((self.norm2(x) if self.norm_first else x).to(dtype), self.inner.weight, self.inner.bias)
        x = x + dropout(gelu_linear(y, self.outer.weight, self.outer.bias, p_inner).float(), p_outer)
        return x if self.norm_first else self.norm2(x)


class ConvTransformer(SpeechBackbone):
    """Convolutions over the waveform, then a transformer: the shape of wav2vec 2.0 and data2vec 2.0.

    A subclass defines the three steps. Each clip goes alone through what looks sideways, so its frames cannot depend on
    its batch; what works on single frames runs over all clips at once.

    Attributes:
        n_extra: tokens that the transformer has before each clip's frames.
    """

    def __init__(self, n_blocks: int, dim: int, kernels: tuple[int, ...], strides: tuple[int, ...], n_extra: int = 0):
        super().__init__()
        self.n_layers, self.dim, self.n_extra = n_blocks + 1, dim, n_extra
        self.kernels, self.strides = tuple(kernels), tuple(strides)
        self.hop = math.prod(strides)
        self.max_samples = 60 * SAMPLE_RATE

    def front_end(self, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        """The convolutions, a function from one clip (S,) fp32 to (T, features) of `dtype`."""
        raise TypeError(f"{type(self).__name__} does not define front_end")

    def embed(self, features: Tensor, lengths: list[int], dtype: torch.dtype) -> Tensor:
        """What enters the transformer: (N, features) -> (N, D) fp32, with `n_extra` rows before each clip's."""
        raise TypeError(f"{type(self).__name__} does not define embed")

    def transformer(self, hidden: Tensor, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
        """(N, D) fp32 before the transformer and after each of its layers; `lengths` count the extra rows."""
        raise TypeError(f"{type(self).__name__} does not define transformer")

    def n_frames(self, n_samples: Tensor) -> Tensor:
        return conv_frames(n_samples, self.kernels, self.strides)

    def layers(self, waveform: Tensor, n_samples: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        self.check_lengths(n_samples)
        dtype = compute_dtype(waveform)
        lengths = self.n_frames(n_samples).tolist()
        with torch.autocast(waveform.device.type, enabled=False):  # each step says itself what is in which dtype
            front_end = self.front_end(dtype)
            clips = [clip[:n].float() for clip, n in zip(waveform, n_samples.tolist(), strict=True)]
            features = torch.cat([self.run(front_end, clip) for clip in clips])
            hidden = self.embed(features, lengths, dtype)
            lengths = [n + self.n_extra for n in lengths]
            outputs = self.transformer(hidden, lengths, dtype)[-1 if last_only else 0 :]
        frames = torch.stack([unpack(one, lengths)[:, self.n_extra :] for one in outputs], dim=1)
        return frames, length_mask(self.n_frames(n_samples), frames.shape[2])
