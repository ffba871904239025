"""95 % bootstrap intervals over speakers, then their utterances; and over training seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Counts = NDArray[np.integer]

MIN_SPEAKERS = 5  # with fewer, resampling speakers says nothing about other speakers


def speaker_bootstrap_weights(speakers: ArrayLike, n_replicates: int, rng: np.random.Generator) -> tuple[Counts, str]:
    """How often each clip occurs in each bootstrap replicate of a test set, and the level resampled.

    Clips of one speaker resemble each other, so resampling clips alone gives intervals that are too narrow
    for new speakers. A replicate draws as many speakers as there are, with replacement, and for each draw as
    many clips of that speaker as it has, with replacement (the two-stage bootstrap: Davison & Hinkley 1997,
    section 3.8). With fewer than 5 speakers it draws clips alone, and the level says so: the interval then
    holds for these speakers only.

    speakers: (N,) names, an empty name counting as one speaker. Returns counts (R, N) and "speaker" or
    "utterance".
    """
    names, speaker_of = np.unique(np.asarray(speakers).astype(str), return_inverse=True)
    n = len(speaker_of)
    if len(names) < MIN_SPEAKERS:
        return rng.multinomial(n, np.full(n, 1 / n), size=n_replicates), "utterance"
    share = np.full(len(names), 1 / len(names))
    draws = rng.multinomial(len(names), share, size=n_replicates)  # (R, speakers)
    weights = np.zeros((n_replicates, n), dtype=np.int64)
    for speaker in range(len(names)):
        clips = np.flatnonzero(speaker_of == speaker)
        share = np.full(len(clips), 1 / len(clips))
        weights[:, clips] = rng.multinomial(draws[:, speaker] * len(clips), share)
    return weights, "speaker"


def seed_weights(n_seeds: int, n_replicates: int) -> NDArray[np.floating]:
    """The share of each training seed in each bootstrap replicate: (R, n_seeds), rows that sum to 1.

    A configuration that was trained with several seeds is the mean over them, and a replicate takes all seeds' values
    on the same resampled clips, then n - 1 of the n seeds with replacement: drawing n would make the spread between
    seeds too small by (n - 1) / n, which at n = 3 is a third (McCarthy & Snowden 1985). One seed is taken as it is:
    the interval then holds for that run only. The draws depend on n alone, so that two configurations with as many
    seeds are compared seed by seed.
    """
    if n_seeds == 1:
        return np.ones((n_replicates, 1))
    rng = np.random.default_rng(n_seeds)
    return rng.multinomial(n_seeds - 1, np.full(n_seeds, 1 / n_seeds), size=n_replicates) / (n_seeds - 1)


def interval(values: ArrayLike, estimate: float, bounds: tuple[float, float] = (0.0, 1.0)) -> list[float]:
    """95 % interval [low, high] from bootstrap values (R,), centred on the estimate.

    The spread is the bootstrap's; its centre is not. A replicate holds about 63 % of the clips, some of them twice,
    so the hardest distractors are often missing and its Recall@1 is higher than that of as many different clips: on
    RAVDESS the plain percentile interval of an R@1 of 0.23 was [0.22, 0.40]. The mean shift is therefore taken out
    (the bootstrap's estimate of bias, Davison & Hinkley 1997, section 2.2.1). Where there is no bias, as for
    accuracy, this is the percentile interval. It always holds the estimate. Undefined (NaN) values are left out.

    bounds: what the quantity cannot exceed; (-1, 1) for a difference of two fractions.
    """
    values = np.asarray(values, dtype=float)
    shifted = np.nanpercentile(values, [2.5, 97.5]) - np.nanmean(values) + estimate
    low, high = np.clip(shifted, *bounds)
    return [float(min(low, estimate)), float(max(high, estimate))]


def spread_of_none(value: float, n_clips: int) -> list[float]:
    """95 % interval of a share of clips that is 0 or 1, where the bootstrap, which can draw nothing else, has none.

    The exact binomial bound (Clopper & Pearson 1934): 2 of 2 clips found says 0.16 to 1; 16 of 16, 0.79 to 1.
    """
    bound = 0.025 ** (1 / n_clips)
    return [bound, 1.0] if value == 1 else [0.0, 1 - bound]


def interval_of_few(values: ArrayLike, estimate: float, n_clips: int) -> list[float]:
    """`interval` of a share of clips so few that all of them may be found, or none; then it is `spread_of_none`."""
    low, high = interval(values, estimate)
    if estimate in (0, 1) and high - low < 1e-9:  # sums of exact shares may be off by less
        return spread_of_none(estimate, n_clips)
    return [low, high]
