"""The convolutions of speech transformers, clip by clip: the front end over the waveform, and the positional one.

As products of matrices with time along the rows; on a CPU that is several times as fast as conv1d, whose kernels
rearrange their inputs and are slow in the backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from esr_utils.speech.kernels import linear, product

_CHUNK = 1024  # output rows of the second convolution at a time: their 4 MB of input stay in the cache


def conv_frames(n_samples: Tensor, kernels: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Frames after convolutions without padding: (n - kernel) // stride + 1 for each."""
    for kernel, stride in zip(kernels, strides, strict=True):
        n_samples = torch.div(n_samples - kernel, stride, rounding_mode="floor") + 1
    return n_samples


@dataclass(frozen=True)
class ConvLayer:
    """conv1d without padding over rows (n, D), then a layer norm if there is one, then GELU.

    Attributes:
        taps: the weight (out, D, kernel) as matrices (out, up to `stride` taps x D), see `_windows`.
        kernel, stride: in rows.
        norm: weight and bias of the layer norm, or None.
    """

    taps: tuple[Tensor, ...]
    bias: Tensor | None
    kernel: int
    stride: int
    norm: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, conv: nn.Conv1d, norm: nn.LayerNorm | None, dtype: torch.dtype) -> ConvLayer:
        """A convolution's parameters in `dtype`, arranged once for all clips."""
        (kernel,), (stride,) = conv.kernel_size, conv.stride
        rows = conv.weight.to(dtype).permute(0, 2, 1).flatten(1)
        taps = tuple(part.contiguous() for part in rows.split(stride * conv.in_channels, dim=1))
        bias = None if conv.bias is None else conv.bias.to(dtype)
        return cls(taps, bias, kernel, stride, None if norm is None else (norm.weight, norm.bias))


def _windows(x: Tensor, kernel: int, stride: int) -> list[Tensor]:
    """Rows (n, D) to views (M, up to `stride` taps x D) whose products with `ConvLayer.taps` add up to the convolution.

    Neighbouring rows lie side by side in memory, so the first `stride` taps of all windows are one matrix without
    overlap, and so are the next: nothing is copied.
    """
    width, n_out = x.shape[1], (x.shape[0] - kernel) // stride + 1
    return [
        x.as_strided((n_out, min(stride, kernel - tap) * width), (stride * width, 1), x.storage_offset() + tap * width)
        for tap in range(0, kernel, stride)
    ]


def _conv(x: Tensor, taps: tuple[Tensor, ...], bias: Tensor | None, kernel: int, stride: int) -> Tensor:
    first, *rest = zip(_windows(x, kernel, stride), taps, strict=True)
    y = product(*first, bias)
    for view, weight in rest:
        y += product(view, weight)
    return y


def _conv_backward(dy: Tensor, x: Tensor, taps: tuple[Tensor, ...], kernel: int, stride: int):
    """Gradients for the input (n, D) and for the taps."""
    dtaps = [product(dy.t(), view.contiguous().t()) for view in _windows(x, kernel, stride)]
    dx = torch.zeros_like(x)
    for view, weight in zip(_windows(dx, kernel, stride), taps, strict=True):
        view += product(dy, weight.t())
    return dx, dtaps


def _activate(z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None) -> Tensor:
    """gelu(z), or gelu(layer_norm(z)), the norm in fp32."""
    if norm_weight is None:
        return F.gelu(z)
    return F.gelu(F.layer_norm(z.float(), z.shape[-1:], norm_weight, norm_bias)).to(z.dtype)


def _activate_backward(dx: Tensor, z: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None):
    """Gradients for z and for the norm's weight and bias."""
    if norm_weight is None:
        return torch.ops.aten.gelu_backward(dx, z), None, None
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_() for one in (z, norm_weight, norm_bias)]
        return torch.autograd.grad(_activate(*leaves), leaves, dx)


class _Stage(Function):
    """conv1d(act(z)), keeping only z: the activation is computed again for the backward."""

    @staticmethod
    def forward(ctx, z, norm_weight, norm_bias, bias, kernel, stride, *taps):
        ctx.save_for_backward(z, norm_weight, norm_bias, *taps)
        ctx.shape, ctx.has_bias = (kernel, stride), bias is not None
        return _conv(_activate(z, norm_weight, norm_bias), taps, bias, kernel, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        z, norm_weight, norm_bias, *taps = ctx.saved_tensors
        dy = dy.contiguous()
        dx, dtaps = _conv_backward(dy, _activate(z, norm_weight, norm_bias), taps, *ctx.shape)
        dbias = dy.sum(0) if ctx.has_bias else None
        return *_activate_backward(dx, z, norm_weight, norm_bias), dbias, None, None, *dtaps


class _Stem(Function):
    """conv1d(act(linear(windows))): the first two convolutions, of which only the waveform's windows are kept.

    The first has one channel in and half of all activations out, so it is cheaper to run again than to keep. It is done
    in fp32 whatever the dtype of the second, and both in chunks of rows.
    """

    @staticmethod
    def _chunks(n_rows: int, kernel: int, stride: int):
        """Slices of output rows, and of the input rows that they read."""
        n_out = (n_rows - kernel) // stride + 1
        for start in range(0, n_out, _CHUNK):
            stop = min(start + _CHUNK, n_out)
            yield slice(start, stop), slice(start * stride, (stop - 1) * stride + kernel)

    @staticmethod
    def forward(ctx, windows, stem_weight, stem_bias, norm_weight, norm_bias, bias, kernel, stride, *taps):
        ctx.save_for_backward(windows, stem_weight, stem_bias, norm_weight, norm_bias, *taps)
        ctx.shape, ctx.has_bias = (kernel, stride), bias is not None
        y = []
        for _, rows in _Stem._chunks(len(windows), kernel, stride):
            x = _activate(product(windows[rows], stem_weight, stem_bias), norm_weight, norm_bias)
            y.append(_conv(x.to(taps[0].dtype), taps, bias, kernel, stride))
        return torch.cat(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        windows, stem_weight, stem_bias, norm_weight, norm_bias, *taps = ctx.saved_tensors
        dy, sums = dy.contiguous(), None
        for rows_out, rows in _Stem._chunks(len(windows), *ctx.shape):
            z = product(windows[rows], stem_weight, stem_bias)
            x = _activate(z, norm_weight, norm_bias).to(dy.dtype)
            dx, dtaps = _conv_backward(dy[rows_out], x, taps, *ctx.shape)
            dz, *dnorm = _activate_backward(dx.float(), z, norm_weight, norm_bias)
            dstem_bias = None if stem_bias is None else dz.sum(0)
            new = [product(windows[rows].t(), dz.t()).t(), dstem_bias, *dnorm, *(dtap.float() for dtap in dtaps)]
            sums = new if sums is None else [a if a is None else a.add_(b) for a, b in zip(sums, new, strict=True)]
        dbias = dy.sum(0) if ctx.has_bias else None
        return None, *sums[:4], dbias, None, None, *(dtap.to(dy.dtype) for dtap in sums[4:])


def conv_stack(waveform: Tensor, first: tuple[nn.Conv1d, nn.Module | None], layers: list[ConvLayer]) -> Tensor:
    """The convolutions of a wav2vec 2.0 front end over one clip.

    Args:
        waveform: (S,) float32; it receives no gradient.
        first: the first convolution, of one channel, and the norm after it: a layer norm, a group norm over time of one
            channel a group, or None.
        layers: the others, at least one.

    Returns:
        (T, D) of the layers' dtype.
    """
    conv, norm = first
    windows = waveform.unfold(0, conv.kernel_size[0], conv.stride[0]).contiguous()
    stem = (conv.weight[:, 0], conv.bias)
    if isinstance(norm, nn.GroupNorm):
        stem, norm = _with_group_norm(windows, conv.weight[:, 0], norm), None
    before = (None, None) if norm is None else (norm.weight, norm.bias)
    z = None
    for layer in layers:
        settings = (*before, layer.bias, layer.kernel, layer.stride, *layer.taps)
        z = _Stem.apply(windows, *stem, *settings) if z is None else _Stage.apply(z, *settings)
        before = layer.norm or (None, None)
    return _activate(z, *before)


def _with_group_norm(windows: Tensor, weight: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias that give group_norm(linear(windows, weight)) at once; a bias of the linear map would cancel.

    Mean and variance over time of a linear map follow from those of its input. In double precision, as neighbouring
    samples are much alike and their differences count.
    """
    exact = torch.float32 if windows.device.type == "mps" else torch.float64  # Apple's have no double
    windows, wide = windows.to(exact), weight.to(exact)
    mean = windows.mean(0)
    centred = windows - mean
    covariance = centred.T @ centred / len(windows)
    variance = ((wide @ covariance) * wide).sum(1)
    scale = norm.weight / (variance + norm.eps).sqrt()
    return (wide * scale[:, None]).float(), (norm.bias - scale * (wide @ mean)).float()


def grouped_conv(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, lengths: list[int], dtype: torch.dtype
) -> Tensor:
    """conv1d of each clip alone with half a kernel of zeros on both sides, as many frames out as in.

    Args:
        x: (N, D) fp32, the frames of all clips.
        weight: (D, D / groups, kernel).
        lengths: frames of each clip; they sum to N.
        dtype: of the products; but a long kernel on a CPU is run in fp32, be it through a Fourier transform or not.

    Returns:
        (N, D) fp32
    """
    if x.device.type == "cpu" and weight.shape[2] >= 64:
        dtype = torch.float32
        if len(lengths) >= 4:  # the transform of the weight is paid once for all clips
            return _spectral_conv(x, weight, groups, lengths) + bias
    weight, bias, padding = weight.to(dtype), bias.to(dtype), weight.shape[2] // 2
    clips = [clip.T.contiguous()[None] for clip in x.to(dtype).split(lengths)]
    done = [F.conv1d(clip, weight, bias, padding=padding, groups=groups)[0, :, : clip.shape[2]] for clip in clips]
    return torch.cat(done, dim=1).T.float()


@lru_cache(maxsize=4)
def _fourier(kernel: int) -> tuple[Tensor, Tensor]:
    """Of blocks of 2 `kernel` samples: the transform (2 F, 2 kernel), cosines then sines, and its inverse.

    The inverse (kernel + 1, 2 F) gives only the outputs that no wrapping round has touched.
    """
    size, n_bins = 2 * kernel, kernel + 1
    angle = 2 * math.pi / size * torch.outer(torch.arange(n_bins), torch.arange(size)).double()
    forward = torch.cat([angle.cos(), -angle.sin()])
    share = torch.full((n_bins, 1), 2.0 / size, dtype=torch.float64)
    share[0], share[-1] = 1 / size, 1 / size
    return forward.float(), (forward * share.repeat(2, 1)).T[: kernel + 1].float().contiguous()


def _spectral_conv(x: Tensor, weight: Tensor, groups: int, lengths: list[int]) -> Tensor:
    """`grouped_conv` without bias through Fourier transforms of overlapping blocks (overlap-save).

    With WavLM's kernel of 128 that is a twentieth of the multiplications, and oneDNN's direct form is slow in the
    backward.
    """
    width, inputs, kernel = weight.shape
    step, size = kernel + 1, 2 * kernel
    counts = [-(-n // step) for n in lengths]
    blocks = [
        F.pad(clip, (0, 0, kernel // 2, count * step + kernel - 1 - n - kernel // 2)).unfold(0, size, step)
        for clip, n, count in zip(x.split(lengths), lengths, counts, strict=True)
    ]
    blocks = torch.cat(blocks)
    parts = [_spectral_group(*part) for part in zip(blocks.chunk(groups, 1), weight.chunk(groups), strict=True)]
    y = torch.cat(parts, dim=2)
    clips = zip(y.split(counts), lengths, strict=True)
    return torch.cat([clip.reshape(-1, width)[:n] for clip, n in clips])


def _spectral_group(blocks: Tensor, weight: Tensor) -> Tensor:
    """Blocks (B, inputs, 2 kernel) and weight (outputs, inputs, kernel) -> (B, kernel + 1, outputs).

    The transforms are matrix products: as such they come out in the order in which they are needed.
    """
    n_blocks, inputs, size = blocks.shape
    kernel = size // 2
    transform, inverse = _fourier(kernel)
    spectrum = linear(transform, blocks.reshape(-1, size)).view(2, kernel + 1, n_blocks, inputs)
    spectrum = torch.cat([spectrum[0], spectrum[1]], dim=1)  # real above imaginary
    response = linear(transform[:, :kernel].contiguous(), weight.reshape(-1, kernel))
    by_real, by_imaginary = (
        torch.bmm(spectrum, part.view(kernel + 1, -1, inputs).transpose(1, 2)) for part in response.split(kernel + 1)
    )
    # times the conjugate of the response, as conv1d is a correlation
    real = by_real[:, :n_blocks] + by_imaginary[:, n_blocks:]
    imaginary = by_real[:, n_blocks:] - by_imaginary[:, :n_blocks]
    y = linear(inverse, torch.cat([real, imaginary]).view(2 * (kernel + 1), -1).t())
    return y.view(kernel + 1, n_blocks, -1).transpose(0, 1)
