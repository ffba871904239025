"""The log-mel spectrogram: Whisper's input, and a backbone of its own with nothing learned."""

from __future__ import annotations

import math

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from esr_utils.config import SAMPLE_RATE
from esr_utils.speech.interface import SpeechBackbone, length_mask


class LogMel(nn.Module):
    """Log-mel spectrogram as Whisper computes it, cut to the clip (Radford et al. 2022, section 2.2).

    25 ms Hann windows every 10 ms, Slaney mel filters, log10 floored 8 below the clip's own maximum, then (x + 4) / 4.
    """

    window, hop = 400, 160  # samples

    def __init__(self, n_mels: int = 80) -> None:
        super().__init__()
        filters = torchaudio.functional.melscale_fbanks(
            self.window // 2 + 1, 0.0, SAMPLE_RATE / 2, n_mels, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    def n_frames(self, n_samples: Tensor) -> Tensor:
        return -(-n_samples // self.hop)  # ceiling: a frame at every multiple of the hop inside the clip

    def forward(self, waveform: Tensor, n_samples: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S), (B,) -> (B, n_mels, M) zero where invalid, and the mask (B, M)."""
        valid = length_mask(n_samples, waveform.shape[1])
        # Zeros after the end, for the last window to run into: the same ones alone and in a batch.
        padded = F.pad(waveform.float().masked_fill(~valid, 0.0), (0, self.window))
        spectrum = torch.stft(
            padded, self.window, self.hop, window=self.hann, return_complex=True, pad_mode="reflect", center=True
        )
        n_frames = self.n_frames(n_samples)
        mask = length_mask(n_frames, int(n_frames.max()))
        power = spectrum[..., : mask.shape[1]].abs().square()
        mel = (self.filters.T @ power).clamp(min=1e-10).log10()
        loudest = mel.masked_fill(~mask[:, None], -math.inf).amax(dim=(1, 2), keepdim=True)
        mel = (torch.maximum(mel, loudest - 8.0) + 4.0) / 4.0
        return mel * mask[:, None], mask


class LogMelBackbone(SpeechBackbone):
    """The plain log-mel spectrogram, 100 frames a second, nothing learned: what pretraining must beat."""

    n_layers, dim, hop, max_samples = 1, 80, LogMel.hop, 60 * SAMPLE_RATE

    def __init__(self) -> None:
        super().__init__()
        self.log_mel = LogMel(self.dim)

    def n_frames(self, n_samples: Tensor) -> Tensor:
        return self.log_mel.n_frames(n_samples)

    def depth(self, parameter_name: str) -> int:
        raise KeyError(f"log-mel has no parameter {parameter_name!r}: nothing in it is learned")

    def layers(self, waveform: Tensor, n_samples: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        self.check_lengths(n_samples)
        with torch.autocast(waveform.device.type, enabled=False):
            mel, mask = self.log_mel(waveform, n_samples)
        return mel.transpose(1, 2)[:, None], mask
