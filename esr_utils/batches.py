"""Cuts to batches: clips decoded, checked, resampled to 16 kHz mono, levelled, and padded side by side.

A clip that cannot be used (corrupt, empty, silent, NaN, too short) is named with its reason in the batch's `skipped`,
and the rest of the batch goes on.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler, SimpleCutSampler
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from esr_utils.config import SAMPLE_RATE, Level
from esr_utils.losses import NO_STYLE
from esr_utils.styles import STYLES

TARGET_DBFS = -26.0  # RMS level after normalisation, the customary active speech level of test material (ITU-T P.56)
SILENCE_DBFS = -70.0  # RMS; quieter is taken for silence
MIN_SECONDS = 0.025  # one analysis window of the backbones
WHOLE_S = 30.0  # a clip up to this long is embedded whole; a longer one as windows of at most WINDOW_S
WINDOW_S = 8.0


class BadAudio(ValueError):
    """A clip that cannot be used; the message is the reason."""


def load_waveform(cut: Cut, level: Level = "normalised") -> Tensor:
    """One clip as (S,) float32, 16 kHz, mono (channels averaged).

    Args:
        level: `normalised` scales to -26 dBFS RMS; `recorded` leaves the gain alone.

    Raises:
        BadAudio: unreadable, empty, shorter than 25 ms, silent, or holding NaN or infinite samples.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            audio = cut.resample(SAMPLE_RATE).load_audio()
    except Exception as error:  # decoders raise their own kinds; each means that this clip cannot be read
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadAudio(f"cannot be decoded: {reason[:200]}") from None
    waveform = torch.from_numpy(audio).float().mean(dim=0)
    if len(waveform) < MIN_SECONDS * SAMPLE_RATE:
        raise BadAudio(f"{len(waveform) / SAMPLE_RATE:.3f} s long; the shortest allowed is {MIN_SECONDS} s")
    if not bool(torch.isfinite(waveform).all()):
        raise BadAudio("has NaN or infinite samples")
    power = float(waveform.square().mean())
    if power < 10 ** (SILENCE_DBFS / 10):
        raise BadAudio(f"silent: below {SILENCE_DBFS:g} dBFS RMS")
    return waveform * math.sqrt(10 ** (TARGET_DBFS / 10) / power) if level == "normalised" else waveform


def utterance_id(cut: Cut) -> str:
    """The utterance a cut belongs to; several pieces of one long clip share it."""
    return cut.custom["utterance_id"]


def pieces(cuts: CutSet, whole_s: float = WHOLE_S, window_s: float = WINDOW_S) -> CutSet:
    """Cuts longer than `whole_s` seconds become equal windows of at most `window_s`, so that none is a short rest."""
    return CutSet.from_cuts(piece for cut in cuts for piece in _windows(cut, whole_s, window_s))


def _windows(cut: Cut, whole_s: float, window_s: float) -> Iterator[Cut]:
    if cut.duration <= whole_s:
        yield cut
        return
    count = math.ceil(cut.duration / window_s)
    size = cut.duration / count
    for i in range(count):
        window = cut.truncate(offset=i * size, duration=min(size, cut.duration - i * size), preserve_id=True)
        yield window.with_id(f"{cut.id}#{i}")


def style_label(cut: Cut) -> int:
    """Index into STYLES, or -1 without a style."""
    style = cut.custom.get("style") or ""
    return STYLES.index(style) if style else NO_STYLE


class _Clips(Dataset):
    """Indexed by a CutSet (lhotse's way): gives the whole batch. With a crop, a random part of each longer cut."""

    def __init__(self, level: Level, crop_s: float | None = None, rng: np.random.Generator | None = None) -> None:
        self.level, self.crop_s, self.rng = level, crop_s, rng

    def __getitem__(self, cuts: CutSet) -> dict:
        waveforms, kept, skipped = [], [], []
        for cut in cuts:
            try:
                waveforms.append(load_waveform(self._crop(cut), self.level))
                kept.append(cut)
            except BadAudio as reason:
                skipped.append((utterance_id(cut), str(reason)))
        return {
            "waveform": pad_sequence(waveforms, batch_first=True) if waveforms else torch.zeros(0, 0),
            "n_samples": torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.int64),
            "style": torch.tensor([style_label(cut) for cut in kept], dtype=torch.int64),
            "utterance_id": [utterance_id(cut) for cut in kept],
            "cut_id": [cut.id for cut in kept],
            "skipped": skipped,
        }

    def _crop(self, cut: Cut) -> Cut:
        if self.crop_s is None or cut.duration <= self.crop_s:
            return cut
        offset = self.rng.random() * (cut.duration - self.crop_s)
        return cut.truncate(offset=offset, duration=self.crop_s, preserve_id=True)


class WaveformClips:
    """Clips decoded as they are needed, for a backbone that is trained."""

    def __init__(self, cuts: CutSet, batch_size: int, crop_s: float, level: Level) -> None:
        self.cuts, self.batch_size, self.crop_s, self.level = cuts, batch_size, crop_s, level

    def __len__(self) -> int:
        return len(self.cuts)

    def epoch(self, rng: np.random.Generator) -> Iterator[dict]:
        """Every clip once, cropped at random to `crop_s`, in shuffled batches of clips of like duration.

        Yields batches, still without prompts: `waveform` (B, S) float32 at 16 kHz, `n_samples` (B,),
        `style` (B,), `utterance_id`, and `skipped`, a list of (utterance_id, reason).
        """
        if not len(self.cuts):
            return
        seed, buckets = int(rng.integers(2**31)), len(self.cuts) // (4 * self.batch_size)
        options = {"max_cuts": self.batch_size, "shuffle": True, "seed": seed}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lhotse advises lazy manifests, which cannot be shuffled exactly
            if buckets < 2:  # too few clips to sort by length
                sampler = SimpleCutSampler(self.cuts, **options)
            else:
                sampler = DynamicBucketingSampler(self.cuts, num_buckets=min(10, buckets), **options)
        yield from DataLoader(_Clips(self.level, self.crop_s, rng), sampler=sampler, batch_size=None)


def ordered_batches(cuts: CutSet, batch_size: int, level: Level) -> Iterator[dict]:
    """Every cut whole, shortest first, so that little is padded. Batches as those of `WaveformClips`."""
    clips = _Clips(level)
    by_length = sorted(cuts, key=lambda cut: (cut.duration, cut.id))
    for start in range(0, len(by_length), batch_size):
        yield clips[CutSet.from_cuts(by_length[start : start + batch_size])]
