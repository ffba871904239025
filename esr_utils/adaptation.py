"""An index that adapts to what it holds: pooled features standardised by its own statistics, not by the training's.

Rooms, microphones and speakers differ more between corpora than styles do, and most of that is a shift and a scale of
the pooled features. A StyleRetriever standardises them by the mean and deviation of its training clips (`SpeechHead`);
here the clips to be searched stand in for those, as a whole or group by group (corpus, speaker). No label is used; but
a clip's vector then depends on the other clips (it is transductive), so it is computed anew when these change.

    training = adaptation.of_training(model)
    own = adaptation.gather((groups, pooled) for groups, pooled in batches_of_rows)
    vectors = adaptation.vectors(model, pooled, adaptation.shrunk(own[group], training))
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:  # its backbones' libraries take seconds to import
    from esr_utils.retriever import Retriever, StyleRetriever

FEW_STYLES = 4.0  # fewer `effective_styles` of 22: perhaps too few to adapt (`benchmarks/adaptation.py`)
_KIND = "style"  # of StyleRetriever, which alone has pooled features
MIN_CLIPS = 50  # with fewer in all, the statistics of the training are used
MIN_GROUP = 10  # with fewer in a group, for that group: an index would keep nearly as many statistics as clips
AT_ONCE = 256  # clips whose pooled features are in full precision at a time: 7 MB with Whisper base
PRIOR = 10  # clips of the training, as many as whose statistics stand beside a group's own


class AdaptationError(ValueError):
    """A retriever whose features cannot be standardised otherwise; the message says which can."""


@dataclass(frozen=True)
class Statistics:
    """Of pooled features, layer by layer and dimension by dimension.

    Attributes:
        count: clips; 0 for those of the training, which are not of the clips at hand.
        mean, std: (L, P) float32.
    """

    count: int
    mean: NDArray[np.float32]
    std: NDArray[np.float32]


class Mixture:
    """For training: every clip by statistics drawn anew each epoch, the whole split's, its corpus's or its speaker's.

    A retriever trained so is used to features that are standardised by what is searched.
    """

    def __init__(self, names: Sequence[str], groups: Sequence[Sequence[str]], pooled: NDArray, training: Statistics):
        """
        Args:
            names: of N clips, or windows of clips.
            groups: of each kind, the group of each clip, named differently in each.
            pooled: (N, L, P).
            training: for groups with under MIN_CLIPS clips.
        """
        self.of = {name: [training] for name in names}
        for kind in groups:
            found = gather([(kind, pooled)])
            for name, group in zip(names, kind, strict=True):
                self.of[name].append(found[group] if found[group].count >= MIN_CLIPS else training)

    def draw(self, names: Sequence[str], rng: np.random.Generator) -> dict[str, Statistics]:
        """One of each clip's statistics."""
        return {name: self.of[name][rng.integers(len(self.of[name]))] for name in names}


def stacked(statistics: Sequence[Statistics]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (B, L, P) of clips that are standardised each by its own."""
    means, stds = zip(*((one.mean, one.std) for one in statistics), strict=True)
    return torch.from_numpy(np.stack(means)), torch.from_numpy(np.stack(stds))


class Running:
    """Mean and variance of rows that come in batches, in float64 (Chan, Golub & LeVeque 1983): all at once, the same.

    Attributes:
        count: rows so far.
    """

    def __init__(self) -> None:
        self.count, self._mean, self._squares = 0, 0.0, 0.0

    def add(self, rows: NDArray[np.floating]) -> None:
        """Rows (N, L, P) of any precision."""
        if not len(rows):
            return
        rows = np.asarray(rows, dtype=np.float64)
        mean, total = rows.mean(0), self.count + len(rows)
        apart = mean - self._mean
        self._squares = self._squares + ((rows - mean) ** 2).sum(0) + apart**2 * (self.count * len(rows) / total)
        self._mean, self.count = self._mean + apart * (len(rows) / total), total

    def statistics(self) -> Statistics:
        """What `SpeechHead.fit` would make of the same rows.

        Raises:
            ValueError: there was no row.
        """
        if not self.count:
            raise ValueError("no clip, no statistics")
        std = np.sqrt(self._squares / self.count).clip(min=1e-4)
        return Statistics(self.count, self._mean.astype(np.float32), std.astype(np.float32))


def gather(parts: Iterable[tuple[Sequence[str], NDArray[np.floating]]]) -> dict[str, Statistics]:
    """The statistics of each group.

    Args:
        parts: batches of rows: the group of each, and their pooled features (N, L, P).
    """
    running: dict[str, Running] = {}
    for groups, pooled in parts:
        groups = np.asarray(groups)
        for group in np.unique(groups):
            running.setdefault(str(group), Running()).add(pooled[groups == group])
    return {group: found.statistics() for group, found in running.items()}


def of_training(model: Retriever) -> Statistics:
    """What the retriever standardises by without adaptation; `count` is 0.

    Raises:
        AdaptationError: it does not standardise pooled features.
    """
    _check(model)
    return Statistics(0, model.speech_head.mean.cpu().numpy(), model.speech_head.std.cpu().numpy())


def is_possible(model: Retriever) -> bool:
    """Whether the retriever standardises pooled features, so that it can be by other statistics."""
    return model.kind == _KIND and model.speech_head.is_fitted


def shrunk(own: Statistics, training: Statistics) -> Statistics:
    """What a group's features are standardised by: the statistics of its own clips and of PRIOR of the training's.

    So the fewer clips a group has, the more it stays by the training's, since few clips' own are noisy (MAP adaptation
    with a relevance factor: Gauvain & Lee 1994). With under MIN_GROUP it does so altogether.
    """
    if own.count < MIN_GROUP:
        return training
    share = own.count / (own.count + PRIOR)
    mean = share * own.mean + (1 - share) * training.mean
    apart = share * (1 - share) * (own.mean - training.mean) ** 2
    std = np.sqrt(share * own.std**2 + (1 - share) * training.std**2 + apart)
    return Statistics(own.count, mean.astype(np.float32), std.astype(np.float32))


def batch(model: Retriever, pooled: NDArray[np.floating], statistics: Statistics) -> dict:
    """What `encode_speech` and `speech_vectors` take, of pooled features (N, L, P): the model stays as it is.

    Raises:
        AdaptationError: as `of_training`.
    """
    _check(model)
    by = torch.from_numpy(statistics.mean), torch.from_numpy(statistics.std)
    return {"pooled": torch.from_numpy(np.asarray(pooled, dtype=np.float32)), "statistics": by}


@torch.no_grad()
def vectors(model: Retriever, pooled: NDArray[np.floating], statistics: Statistics) -> NDArray[np.float32]:
    """Unit vectors (N, d) of pooled features (N, L, P), standardised by `statistics`.

    Raises:
        AdaptationError: as `of_training`.
    """
    starts = range(0, max(1, len(pooled)), AT_ONCE)
    return np.concatenate(
        [model.encode_speech(batch(model, pooled[i : i + AT_ONCE], statistics)).cpu().numpy() for i in starts]
    )


def style_counts(model: Retriever, pooled: NDArray[np.floating], queries: NDArray[np.floating]) -> NDArray[np.int64]:
    """(S,) of how many clips each style is the nearest, by the statistics of the training.

    Args:
        pooled: (N, L, P).
        queries: (S, d), one a style (`evaluation.style_queries`).
    """
    nearest = (vectors(model, pooled, of_training(model)) @ queries.T).argmax(axis=1)
    return np.bincount(nearest, minlength=len(queries))


def effective_styles(counts: NDArray[np.integer]) -> float:
    """How many styles some clips seem to have, by their `style_counts`: 1, all alike, to S, spread evenly.

    The exponential of the entropy, with Miller's (1955) correction for what few clips cannot show of it. Few
    (`FEW_STYLES`) are a warning: where there is but one style, it is what the clips' own mean and deviation take out.
    They are no proof, since a strange room makes clips look alike too.
    """
    n, seen = counts.sum(), counts[counts > 0]
    return float(np.exp(-(seen / n * np.log(seen / n)).sum() + (len(seen) - 1) / (2 * n)))


def adapted(model: Retriever, statistics: Statistics) -> StyleRetriever:
    """The model with these statistics for the training's; all else is shared.

    Raises:
        AdaptationError: as `of_training`.
    """
    _check(model)
    head = copy.deepcopy(model.speech_head)
    head.mean.copy_(torch.from_numpy(statistics.mean))
    head.std.copy_(torch.from_numpy(statistics.std))
    twin = copy.copy(model)
    twin._modules = {**model._modules, "speech_head": head}
    return twin


def _check(model: Retriever) -> None:
    if model.kind != _KIND:
        raise AdaptationError(
            f"a retriever of kind {model.kind!r} has no pooled features to standardise: adaptation is for kind "
            f"{_KIND!r}, which notebook 03_train makes"
        )
    if not model.speech_head.is_fitted:
        raise AdaptationError(
            "this retriever takes its features as they are (finetune full): adaptation is for one trained with "
            "finetune frozen, which standardises them"
        )
