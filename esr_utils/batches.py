"""Cuts to batches: clips decoded, checked, resampled to 16 kHz mono, levelled, and padded side by side.

A clip that cannot be used (corrupt, empty, silent, NaN, too short) is named with its reason in the batch's `skipped`,
and the rest of the batch goes on.
"""

from __future__ import annotations

import itertools
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
    return prepared(torch.from_numpy(audio).float().mean(dim=0), level)


def prepared(waveform: Tensor, level: Level = "normalised") -> Tensor:
    """(S,) samples at 16 kHz, checked and levelled as `load_waveform` does.

    Raises:
        BadAudio: as `load_waveform`.
    """
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


def at_speeds(cuts: CutSet, speeds: tuple[float, ...]) -> CutSet:
    """Each cut, and again at other speeds, where pitch and tempo change together (Ko et al. 2015): as if another voice
    said it, which `speaker` says. They belong to the same utterance, as several windows of it do."""
    return CutSet.from_cuts(one for cut in cuts for one in (cut, *(_at_speed(cut, speed) for speed in speeds)))


def _at_speed(cut: Cut, speed: float) -> Cut:
    found = cut.perturb_speed(speed)
    found.custom = cut.custom | {"speaker": f"{cut.custom['speaker']}@{speed:g}"}
    return found


def style_label(cut: Cut) -> int:
    """Index into STYLES, or -1 without a style."""
    style = cut.custom.get("style") or ""
    return STYLES.index(style) if style else NO_STYLE


def about(cuts: list[Cut]) -> dict:
    """The part of a batch that needs no audio: `style` (B,) int64, `utterance_id` and `cut_id`."""
    return {
        "style": torch.tensor([style_label(cut) for cut in cuts], dtype=torch.int64),
        "utterance_id": [utterance_id(cut) for cut in cuts],
        "cut_id": [cut.id for cut in cuts],
    }


def batched(cuts: list[Cut], size: int) -> list[list[Cut]]:
    """Consecutive batches of `size`; the last may be smaller."""
    return [cuts[start : start + size] for start in range(0, len(cuts), size)]


def by_corpus(cuts: list[Cut], size: int, rng: np.random.Generator) -> list[list[Cut]]:
    """As many batches as of `batched`, each of one corpus, drawn with chances like their numbers of speakers.

    What tells clips of one corpus apart is then how they are said, and not the room or the language they are in; and a
    corpus counts by its voices, over which a style is to be learned, not by how often each was recorded. A corpus that
    has run out begins anew.
    """
    of: dict[str, list[Cut]] = {}
    for cut in cuts:
        of.setdefault(cut.custom["corpus"], []).append(cut)
    names, reels = sorted(of), {corpus: itertools.cycle(own) for corpus, own in of.items()}
    voices = np.array([len({cut.custom["speaker"] for cut in of[name]}) for name in names])
    drawn = rng.choice(names, math.ceil(len(cuts) / size), p=voices / voices.sum()) if names else []
    return [list(itertools.islice(reels[corpus], min(size, len(of[corpus])))) for corpus in drawn]


def load_batch(cuts: list[Cut], level: Level) -> dict:
    """`waveform` (B, S) float32 at 16 kHz, `n_samples` (B,), `style` (B,), `utterance_id`, `cut_id`, and `skipped`:
    a list of (utterance_id, reason) of the cuts that cannot be used and are not in the rest."""
    waveforms, kept, skipped = [], [], []
    for cut in cuts:
        try:
            waveforms.append(load_waveform(cut, level))
            kept.append(cut)
        except BadAudio as reason:
            skipped.append((utterance_id(cut), str(reason)))
    return {
        "waveform": pad_sequence(waveforms, batch_first=True) if waveforms else torch.zeros(0, 0),
        "n_samples": torch.tensor([len(waveform) for waveform in waveforms], dtype=torch.int64),
        **about(kept),
        "skipped": skipped,
    }


class _Planned(Dataset):
    """The batches of a plan by number, for a DataLoader and its workers."""

    def __init__(self, plan: list[list[Cut]], level: Level) -> None:
        self.plan, self.level = plan, level

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, number: int) -> dict:
        return load_batch(self.plan[number], self.level)


class WaveformClips:
    """Clips decoded as they are needed, for a backbone that is trained.

    What an epoch consists of is drawn first (`plan`) and decoded later (`load`), so that it does not depend on how many
    workers or processes share the decoding, nor on which clips turn out to be damaged.

    Attributes:
        workers: processes that decode ahead; 0 decodes in this one.
    """

    def __init__(self, cuts: CutSet, batch_size: int, crop_s: float, level: Level, workers: int = 0) -> None:
        self.cuts, self.batch_size, self.crop_s, self.level, self.workers = cuts, batch_size, crop_s, level, workers

    def __len__(self) -> int:
        return len(self.cuts)

    def plan(self, rng: np.random.Generator) -> list[list[Cut]]:
        """Every clip once, cropped at random to `crop_s`, in shuffled batches of clips of like duration."""
        if not len(self.cuts):
            return []
        seed, buckets = int(rng.integers(2**31)), len(self.cuts) // (4 * self.batch_size)
        # Left alone, lhotse's samplers deal the cuts out among the processes of a distributed run.
        options = {"max_cuts": self.batch_size, "shuffle": True, "seed": seed, "world_size": 1, "rank": 0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lhotse advises lazy manifests, which cannot be shuffled exactly
            if buckets < 2:  # too few clips to sort by length
                sampler = SimpleCutSampler(self.cuts, **options)
            else:
                sampler = DynamicBucketingSampler(self.cuts, num_buckets=min(10, buckets), **options)
            return [[self._crop(cut, rng) for cut in cuts] for cuts in sampler]

    def _crop(self, cut: Cut, rng: np.random.Generator) -> Cut:
        if cut.duration <= self.crop_s:
            return cut
        offset = rng.random() * (cut.duration - self.crop_s)
        return cut.truncate(offset=offset, duration=self.crop_s, preserve_id=True)

    def load(self, plan: list[list[Cut]]) -> Iterator[dict]:
        """The batches of a plan, in its order; see `load_batch`."""
        yield from DataLoader(_Planned(plan, self.level), batch_size=None, shuffle=False, num_workers=self.workers)


def ordered_batches(cuts: CutSet, batch_size: int, level: Level) -> Iterator[dict]:
    """Every cut whole, shortest first, so that little is padded. Batches as those of `load_batch`."""
    by_length = sorted(cuts, key=lambda cut: (cut.duration, cut.id))
    for part in batched(by_length, batch_size):
        yield load_batch(part, level)
