"""What takes the time in a speech transformer, done faster or with less kept for the backward than by the plain form.

Each function names the plain form that it equals, gradients included. Clips are not padded: frames stand one clip after
the other in one matrix (N, D), and what looks sideways (convolutions, attention) is run clip by clip. So nothing is
spent on padding, a clip cannot see it, and on a CPU a clip's intermediate results stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a (M, K) @ b (N, K).T + bias. In fp32 on a CPU by oneDNN, on AMD's twice as fast as MKL, F.linear's choice."""
    if not _ONEDNN or a.device.type != "cpu" or a.dtype != torch.float32:
        return F.linear(a, b, bias)
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # oneDNN has only a slow reference for other strides
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = product(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dweight = product(dy.t(), x.t()) if ctx.needs_input_grad[1] else None
        return dx, dweight, dy.sum(0) if ctx.has_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of rows (N, K) in the dtype of `x`."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    return _Linear.apply(x, weight, bias)


class _GeluLinear(Function):
    @staticmethod
    def forward(ctx, z: Tensor, weight: Tensor, bias: Tensor, keep: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(z, weight, keep)
        ctx.scale = scale
        return product(_dropped(F.gelu(z), keep, scale), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        z, weight, keep = ctx.saved_tensors
        dy = dy.contiguous()
        dweight = product(dy.t(), _dropped(F.gelu(z), keep, ctx.scale).t())
        dx = _dropped(product(dy, weight.t()), keep, ctx.scale)
        return torch.ops.aten.gelu_backward(dx, z), dweight, dy.sum(0), None, None


def gelu_linear(z: Tensor, weight: Tensor, bias: Tensor, p: float) -> Tensor:
    """F.linear(F.dropout(F.gelu(z), p), weight, bias) of rows, keeping only z: its GELU is computed again."""
    keep, scale = keep_mask(z, p)
    return _GeluLinear.apply(z, weight.to(z.dtype), bias.to(z.dtype), keep, scale)


# Dropout ----------------------------------------------------------------------------------------------------


def keep_mask(x: Tensor, p: float) -> tuple[Tensor | None, float]:
    """Which elements dropout keeps, with probability 1 - p, and what they are multiplied by; (None, 1.0) if p is 0.

    Four 16-bit numbers are cut from each 64-bit draw of torch's global generator: eight times as fast as F.dropout's
    mask. p is met to 1/65536.
    """
    if not p:
        return None, 1.0
    threshold = round(p * 65536)
    low = torch.iinfo(torch.int64).min
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(low, None)
    keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - 32768
    return keep, 65536 / (65536 - threshold) if threshold < 65536 else 0.0


def _dropped(x: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """In place: x is ours."""
    return x if keep is None else x.mul_(keep).mul_(scale)


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * keep).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        return (dy * ctx.saved_tensors[0]).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout(x, p, training=True)."""
    keep, scale = keep_mask(x, p)
    return x if keep is None else _Dropout.apply(x, keep, scale)


# Packing ----------------------------------------------------------------------------------------------------


def unpack(packed: Tensor, lengths: list[int]) -> Tensor:
    """(N, D), the frames of all clips -> (B, T, D), zero past each clip's end."""
    return pad_sequence(packed.split(lengths), batch_first=True)
