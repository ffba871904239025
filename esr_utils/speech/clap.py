"""LAION CLAP's audio encoder, HTSAT (Chen et al. 2022; Wu et al. 2023), by transformers' own classes.

It takes exactly 10 s at 48 kHz and no mask. So each clip becomes windows of its own: up to 10 s, one, in which the clip
is repeated and the rest is silence, as CLAP was trained ("repeatpad"), and of which the frames of the first round are
kept; longer, a window every 10 s, the last one ending with the clip, of which the frames not yet had are kept. Nothing
is drawn at random, unlike CLAP's own cut of longer clips, and nothing depends on the batch.

Waveforms come at 16 kHz here and are resampled: above 8 kHz, where CLAP's mel filters reach 14 kHz, there is nothing.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F
from transformers import ClapFeatureExtractor, ClapModel

from esr_utils import weights
from esr_utils.config import SAMPLE_RATE
from esr_utils.speech.interface import SpeechBackbone, length_mask


class ClapBackbone(SpeechBackbone):
    """HTSAT's last layer, averaged over its bins of frequency: of clap-htsat-unfused 32 frames of 768 in 10 s."""

    n_layers, max_samples = 1, 60 * SAMPLE_RATE

    def __init__(self, model: ClapModel, extractor: ClapFeatureExtractor) -> None:
        """
        Raises:
            ValueError: windows that do not divide into whole samples a frame.
        """
        super().__init__()
        self.encoder = encoder = model.audio_model.audio_encoder
        self.rate, self.window = extractor.sampling_rate, extractor.nb_max_samples  # Hz; samples at that rate
        self.n_fft, self.stft_hop = extractor.fft_window_size, extractor.hop_length
        # Two filter banks, as its authors had them: which one depends on how longer clips were cut.
        filters = extractor.mel_filters_slaney if extractor.truncation == "rand_trunc" else extractor.mel_filters
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        self.register_buffer("hann", torch.hann_window(self.n_fft), persistent=False)
        self.dim = encoder.num_features
        columns = encoder.spec_size // 2 ** (encoder.num_layers - 1) // encoder.patch_stride[1]
        self.per_window = columns * encoder.freq_ratio  # frames
        samples = extractor.max_length_s * SAMPLE_RATE
        if samples % self.per_window or self.window % self.per_window or self.rate % SAMPLE_RATE:
            raise ValueError(f"{self.per_window} frames in {extractor.max_length_s} s at {self.rate} Hz")
        self.hop = samples // self.per_window

    def train(self, mode: bool = True) -> ClapBackbone:
        """The norm over the batch keeps its statistics, else a clip's frames would depend on the others."""
        super().train(mode)
        self.encoder.batch_norm.eval()
        return self

    def n_frames(self, n_samples: Tensor) -> Tensor:
        return -(-n_samples // self.hop)

    def depth(self, parameter_name: str) -> int:
        return 0  # one layer is given, so all below it is of one depth

    def layers(self, waveform: Tensor, n_samples: Tensor, last_only: bool = False) -> tuple[Tensor, Tensor]:
        self.check_lengths(n_samples)
        with torch.autocast(waveform.device.type, enabled=False):
            silent_after = waveform.float().masked_fill(~length_mask(n_samples, waveform.shape[1]), 0.0)
            resampled = torchaudio.functional.resample(silent_after, SAMPLE_RATE, self.rate)
            lengths = (n_samples * (self.rate // SAMPLE_RATE)).tolist()
            clips = [self._windows(one[:n]) for one, n in zip(resampled, lengths, strict=True)]
            mel = self._log_mel(torch.stack([window for windows, _ in clips for window in windows]))
        found = self.run(self._frames, mel).split([len(windows) for windows, _ in clips])
        mask = length_mask(self.n_frames(n_samples), max(sum(counts) for _, counts in clips))
        frames = found[0].new_zeros(*mask.shape, self.dim)
        for i, (parts, (_, counts)) in enumerate(zip(found, clips, strict=True)):
            # The last window of a long clip ends with it, so its last frames are the ones not yet had.
            kept = [part[-n:] if len(counts) > 1 else part[:n] for part, n in zip(parts, counts, strict=True)]
            frames[i, : sum(counts)] = torch.cat(kept)
        return frames[:, None], mask

    def _windows(self, clip: Tensor) -> tuple[list[Tensor], list[int]]:
        """A clip's windows, each (window,), and how many frames are kept of each."""
        if len(clip) <= self.window:
            rounds = clip.repeat(self.window // len(clip))
            return [F.pad(rounds, (0, self.window - len(rounds)))], [self._share(len(clip))]
        whole = len(clip) // self.window
        windows = list(clip[: whole * self.window].split(self.window))
        rest = len(clip) - whole * self.window
        if not rest:
            return windows, [self.per_window] * whole
        return [*windows, clip[-self.window :]], [self.per_window] * whole + [self._share(rest)]

    def _share(self, samples: int) -> int:
        """Frames that cover so many samples of a window."""
        return math.ceil(samples * self.per_window / self.window)

    def _log_mel(self, windows: Tensor) -> Tensor:
        """(W, window) -> (W, 1, M, n_mels), in dB: as ClapFeatureExtractor computes it, which takes one at a time."""
        spectrum = torch.stft(
            windows, self.n_fft, self.stft_hop, window=self.hann, return_complex=True, pad_mode="reflect", center=True
        )
        mel = self.filters.T @ spectrum.abs().square()
        return 10.0 * mel.clamp(min=1e-10).log10().transpose(1, 2)[:, None]

    def _frames(self, mel: Tensor) -> Tensor:
        """(W, 1, M, n_mels) -> (W, T, D)."""
        return self.encoder(mel).last_hidden_state.mean(dim=2).transpose(1, 2)


def load_clap(folder: Path) -> ClapBackbone:
    """From a folder with a ClapModel and its preprocessor_config.json.

    Raises:
        weights.WeightsError: the model is damaged, or of a kind that is not supported.
    """
    model = weights.load_pretrained(ClapModel, folder)
    if model.config.audio_config.enable_fusion:
        raise weights.WeightsError(f"{folder}: CLAP with fused crops is not supported; use laion/clap-htsat-unfused")
    try:
        extractor = ClapFeatureExtractor.from_pretrained(folder)
        return ClapBackbone(model, extractor)
    except (OSError, ValueError, TypeError) as error:
        raise weights.WeightsError(f"{folder / 'preprocessor_config.json'} does not fit: {error}") from None
