"""What every speech backbone gives: the frames of all its layers, and which of them are valid."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MIN_SAMPLES = 400  # 25 ms, one analysis window; nothing shorter is taken


class SpeechBackbone(nn.Module):
    """The interface. A subclass sets the four numbers and defines `n_frames`, `layers` and, where it learns, `depth`.

    Attributes:
        n_layers: L, how many layers' frames it gives.
        dim: D, width of a frame.
        hop: samples at 16 kHz from one frame to the next.
        max_samples: longest waveform it takes, in samples at 16 kHz.
        recompute: whether each layer's intermediate results are computed again in the backward instead of being kept
            (gradient checkpointing): the same gradients from less memory, at a third more time.
    """

    n_layers: int
    dim: int
    hop: int
    max_samples: int
    recompute: bool = False

    def n_frames(self, n_samples: Tensor) -> Tensor:
        """Valid frames of clips of so many samples at 16 kHz: exact integer arithmetic, any shape."""
        raise TypeError(f"{type(self).__name__} does not define n_frames")

    def layers(self, waveform: Tensor, n_samples: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Frames of every layer.

        Args:
            waveform: (B, S) float32 at 16 kHz; what lies past a clip's end is ignored.
            n_samples: (B,) valid samples of each clip, at least 400.
            last_only: gives the last layer alone, L = 1; stacking all of them would take L times the memory.

        Returns:
            (B, L, T, D) frames, zero where invalid, and the mask (B, T), True where valid.

        Raises:
            ValueError: a clip is shorter than 400 samples or longer than `max_samples`.
        """
        raise TypeError(f"{type(self).__name__} does not define layers")

    def depth(self, parameter_name: str) -> int:
        """How deep a parameter of `named_parameters` lies: 0 before the first transformer layer, L - 1 in the last."""
        raise TypeError(f"{type(self).__name__} does not define depth")

    def set_trainable(self, trainable: bool) -> None:
        """Whether training may change the backbone; what its authors fixed stays fixed."""
        self.requires_grad_(trainable)

    def run(self, part: Callable, *inputs):
        """part(*inputs), with its intermediate results kept or computed again as `recompute` says."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(part, *inputs, use_reentrant=False)
        return part(*inputs)

    def check_lengths(self, n_samples: Tensor) -> None:
        shortest, longest = int(n_samples.min()), int(n_samples.max())
        if shortest < MIN_SAMPLES:
            raise ValueError(f"a clip of {shortest} samples; the shortest allowed is {MIN_SAMPLES} (25 ms)")
        if longest > self.max_samples:
            raise ValueError(f"a clip of {longest} samples; {type(self).__name__} takes at most {self.max_samples}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """What products are computed in: autocast's dtype where it is on, else that of `x`."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) lengths -> (B, size) bool, True at positions below the length."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def active_frames(waveform: Tensor, n_samples: Tensor, hop: int, size: int) -> Tensor:
    """Which frames carry speech: within 35 dB of the clip's loudest, or within two frames of such a one.

    The silence around an acted sentence says nothing of its style, but moves the mean of its frames.

    Args:
        waveform: (B, S); what lies past a clip's end is ignored.
        hop: samples from one frame to the next.
        size: T, frames of the longest clip.

    Returns:
        (B, T) bool; every clip has at least one.
    """
    power = waveform.float().masked_fill(~length_mask(n_samples, waveform.shape[1]), 0.0).square()
    power = F.pad(power, (0, max(0, size * hop - power.shape[1])))[:, : size * hop]
    power = power.view(len(power), size, hop).mean(-1)
    power = F.max_pool1d(power[:, None], kernel_size=5, stride=1, padding=2)[:, 0]
    return power >= power.amax(dim=1, keepdim=True) * 10**-3.5
