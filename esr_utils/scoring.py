"""Scores of clips for styles -> metrics with intervals, for one corpus and split."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from esr_utils import intervals, metrics, trials

REPLICATES = 1000
Replicates = dict[str, NDArray[np.floating]]
_BREAKDOWNS = ("gender", "language", "trained")


class Scorer:
    """The clips of a corpus and split, their trials, and the bootstrap replicates that all systems share.

    Its methods take scores (N, S): row n the clip `clips.iloc[n]` (sorted by utterance_id), column s the style
    `styles[s]`. It does not matter whether a retriever or a classifier gave them. Replicates, (R,) a metric, are drawn
    from the clips and the seed alone, so that two systems are compared replicate by replicate.

    Attributes:
        weights: (R, N), how often each clip occurs in each replicate.
        bootstrap: "speaker" or "utterance", what is resampled (`intervals.speaker_bootstrap_weights`).
    """

    def __init__(self, clips: pd.DataFrame, drawn: trials.Trials, seed: int) -> None:
        self.clips, self.trials = clips, drawn
        self.styles = list(drawn.table)
        self.truth = clips["style"].map(self.styles.index).to_numpy()
        rng = np.random.default_rng(seed)
        self.weights, self.bootstrap = intervals.speaker_bootstrap_weights(clips["speaker"], REPLICATES, rng)

    def retrieval(self, scores: NDArray) -> tuple[dict, Replicates, pd.DataFrame]:
        """(N, S) -> the trials' and the collection's metrics, their replicates, and one row per style.

        A style's row has `clips`, and each metric with `<metric> low` and `<metric> high`, its 95 % interval.
        """
        singles = trials.trial_values(self.trials, self._by_style(scores))
        per_style = trials.style_means(self.trials, singles)
        names = [name for name in singles if name not in ("style", "utterance_id")]
        values = {name: float(per_style[name].mean()) for name in names}
        of_style = self._rank_replicates(scores)
        replicates = _from_ranks(_over_styles(of_style))
        relevant = self.truth[:, None] == np.arange(len(self.styles))
        values["collection/p@10"] = float(metrics.precision_at_k(scores.T, relevant.T, 10).mean())
        values["collection/map"] = metrics.mean_average_precision(scores.T, relevant.T, None)
        ranked = [collection_replicates(scores[:, s], relevant[:, s], self.weights, 10) for s in range(len(relevant.T))]
        for i, name in enumerate(("p@10", "map")):
            replicates[f"collection/{name}"] = _over_styles(np.stack([one[i] for one in ranked]))
        columns = [c for c in _BREAKDOWNS if c in self.clips and self.clips[c].replace("", None).nunique() > 1]
        singles = singles.merge(self.clips[["utterance_id", *columns]], on="utterance_id")
        for column in columns:
            means = singles[singles[column] != ""].groupby([column, "style"])[names].mean().groupby(level=0).mean()
            for value, mean in means.iterrows():
                inside = (self.clips[column] == value).to_numpy()
                drawn = _from_ranks(_over_styles(self._rank_replicates(scores, inside)))
                values |= {f"{column}={value}/{name}": float(mean[name]) for name in names}
                values[f"{column}={value}/clips"] = int(inside.sum())
                replicates |= {f"{column}={value}/{name}": drawn[name] for name in names}
        return with_intervals(values, replicates), replicates, self._with_intervals_of_styles(per_style, of_style)

    def _with_intervals_of_styles(self, per_style: pd.DataFrame, of_style: NDArray) -> pd.DataFrame:
        clips = np.bincount(self.truth, minlength=len(self.styles))
        per_style = per_style.assign(clips=per_style["style"].map(dict(zip(self.styles, clips, strict=True))))
        for style, drawn in zip(self.styles, map(_from_ranks, of_style), strict=True):
            row = per_style.index[per_style["style"] == style][0]
            for name, replicates in drawn.items():
                bounds = intervals.interval_of_few(replicates, per_style.loc[row, name], per_style.loc[row, "clips"])
                per_style.loc[row, [f"{name} low", f"{name} high"]] = bounds
        return per_style

    def classification(self, scores: NDArray) -> tuple[dict, Replicates]:
        """(N, S) -> accuracy and unweighted average recall of the highest score, and their replicates."""
        correct = metrics.votes(scores)[np.arange(len(scores)), self.truth]
        values = {
            "accuracy": float(metrics.accuracy(correct)),
            "uar": float(metrics.unweighted_average_recall(self.truth, correct)),
        }
        replicates = {
            "accuracy": metrics.accuracy(correct, self.weights),
            "uar": metrics.unweighted_average_recall(self.truth, correct, self.weights),
        }
        return with_intervals(values, replicates), replicates

    def confusion(self, scores: NDArray) -> pd.DataFrame:
        """Clips, rows the true style, columns the one found; a clip with t styles level at the top counts 1/t each."""
        counts = np.zeros((len(self.styles), len(self.styles)))
        np.add.at(counts, self.truth, metrics.votes(scores))
        return pd.DataFrame(counts, index=self.styles, columns=self.styles)

    def by_bin(self, scores: NDArray, bins: NDArray[np.integer], n_bins: int) -> tuple[pd.DataFrame, NDArray]:
        """The trials by a bin of the clip to be found.

        Averaged over the bins, weighted by their trials, the values are those of `retrieval`.

        Args:
            bins: (N,) the bin of each clip, 0 … n_bins - 1.

        Returns:
            A row per bin: clips, trials, and r@k, NaN in a bin without a trial. And the replicates of r@k,
            (n_bins, R, len(KS)), NaN where a replicate has no clip in the bin.
        """
        singles = trials.trial_values(self.trials, self._by_style(scores))
        of_clip = pd.Series(bins, index=self.clips["utterance_id"])
        groups = singles.groupby(of_clip[singles["utterance_id"]].to_numpy())
        table = groups[[f"r@{k}" for k in trials.KS]].mean().reindex(range(n_bins))
        table.insert(0, "clips", np.bincount(bins, minlength=n_bins))
        table.insert(1, "trials", groups.size().reindex(range(n_bins), fill_value=0))
        return table, np.stack([self._bin_replicates(scores, bins == i) for i in range(n_bins)])

    def _bin_replicates(self, scores: NDArray, inside: NDArray[np.bool_]) -> NDArray:
        """(R, len(KS)): of all trials, each style with as many, those whose positive is inside."""
        found, share = np.zeros((len(self.weights), len(trials.KS))), np.zeros((len(self.weights), 1))
        for s in np.unique(self.truth[inside]):
            of_style = self.truth == s
            weights = np.where(of_style & ~inside, 0, self.weights)
            part = weights[:, of_style].sum(1) / np.maximum(self.weights[:, of_style].sum(1), 1)
            part = np.where(weights[:, ~of_style].any(axis=1), part, 0)  # without another clip there is no trial
            recall = metrics.recall_from_ranks(self._ranks(scores, s, weights), trials.KS)
            found += np.nan_to_num(recall) * part[:, None]
            share += part[:, None]
        return np.where(share > 0, found / np.maximum(share, 1e-12), np.nan)

    def _rank_replicates(self, scores: NDArray, inside: NDArray[np.bool_] | None = None) -> NDArray:
        """(S, R, max rank): of each style's trials, or of those whose positive is inside; NaN where there is none.

        By the exact expectation over all possible trials, so that drawing trials adds no noise to the bootstrap.
        """
        inside = np.ones(len(scores), dtype=bool) if inside is None else inside
        found = np.full((len(self.styles), len(self.weights), max(trials.KS)), np.nan)
        for s in np.unique(self.truth[inside]):
            found[s] = self._ranks(scores, s, np.where((self.truth == s) & ~inside, 0, self.weights))
        return found

    def _ranks(self, scores: NDArray, s: int, weights: NDArray) -> NDArray:
        """(R, max rank): `metrics.trial_rank_distribution` of one style."""
        distractors = self.trials.candidates_by_style[self.styles[s]] - 1
        return metrics.trial_rank_distribution(scores[:, s], self.truth == s, distractors, max(trials.KS), weights)

    def _by_style(self, scores: NDArray) -> dict[str, NDArray]:
        return {style: scores[:, s] for s, style in enumerate(self.styles)}


def _over_styles(of_style: NDArray) -> NDArray:
    """(S, …) -> (…), the mean over the styles that a replicate has not lost; NaN where it has lost all."""
    with np.errstate(invalid="ignore"):
        return np.nansum(of_style, axis=0) / (~np.isnan(of_style)).sum(axis=0)


def _from_ranks(ranks: NDArray) -> Replicates:
    """(R, max rank) -> r@k and map@10, (R,) each."""
    recall = metrics.recall_from_ranks(ranks, trials.KS)
    found = {f"r@{k}": recall[:, i] for i, k in enumerate(trials.KS)}
    return found | {f"map@{trials.MAP_K}": metrics.reciprocal_rank_from_ranks(ranks, trials.MAP_K)}


def collection_replicates(
    scores: NDArray, relevant: NDArray[np.bool_], weights: NDArray, k: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """`metrics.precision_at_k` and uncut `metrics.average_precision` of one query, in each bootstrap replicate.

    A clip that a replicate holds w times is w clips level with each other. Clips of equal score are one block, and the
    sum over its ranks has a closed form: with H(n) = 1 + 1/2 + … + 1/n, ranks s+1 … s+c give sum_j 1 / (s+j) =
    H(s+c) - H(s), and sum_j (j-1) / (s+j) = c - (s+1) (H(s+c) - H(s)).

    Args:
        scores, relevant: (N,).
        weights: (R, N), how often each clip occurs.

    Returns:
        (R,), (R,); NaN where a replicate holds no relevant clip.
    """
    order = np.argsort(-scores)
    first = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # of each block
    size = np.add.reduceat(weights[:, order], first, axis=1)  # (R, blocks)
    hits = np.add.reduceat(weights[:, order] * relevant[order], first, axis=1)
    end, hits_until = size.cumsum(axis=1), hits.cumsum(axis=1)
    start, share = end - size, hits / np.maximum(size, 1)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, end.max() + 1))])
    span = harmonic[end] - harmonic[start]
    among_ties = (hits - 1) / np.maximum(size - 1, 1) * (size - (start + 1) * span)
    n_relevant = np.where(hits_until[:, -1] > 0, hits_until[:, -1], np.nan)
    average_precision = (share * ((hits_until - hits + 1) * span + among_ties)).sum(axis=1) / n_relevant
    precision = (share * (np.minimum(end, k) - np.minimum(start, k))).sum(axis=1) / k
    return np.where(np.isnan(n_relevant), np.nan, precision), average_precision


def with_intervals(values: dict[str, float], replicates: Replicates) -> dict:
    """Adds `<name>_ci95`, [low, high], to each value that has replicates."""
    found = dict(values)
    for name, drawn in replicates.items():
        found[f"{name}_ci95"] = intervals.interval(drawn, values[name])
    return found
