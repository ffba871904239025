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
        """(N, S) -> the trials' and the collection's metrics, the trials' replicates, and one row per style."""
        singles = trials.trial_values(self.trials, self._by_style(scores))
        per_style = trials.style_means(self.trials, singles)
        names = [name for name in singles if name not in ("style", "utterance_id")]
        replicates = self._trial_replicates(scores)
        values = with_intervals({name: float(per_style[name].mean()) for name in names}, replicates)
        relevant = self.truth[:, None] == np.arange(len(self.styles))
        values["collection/p@10"] = float(metrics.precision_at_k(scores.T, relevant.T, 10).mean())
        values["collection/map"] = metrics.mean_average_precision(scores.T, relevant.T, None)
        columns = [c for c in _BREAKDOWNS if c in self.clips and self.clips[c].replace("", None).nunique() > 1]
        singles = singles.merge(self.clips[["utterance_id", *columns]], on="utterance_id")
        for column in columns:
            means = singles[singles[column] != ""].groupby([column, "style"])[names].mean().groupby(level=0).mean()
            for value, mean in means.iterrows():
                values |= {f"{column}={value}/{name}": float(mean[name]) for name in names}
        return values, replicates, per_style

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

    def _trial_replicates(self, scores: NDArray) -> Replicates:
        """By the exact expectation over all possible trials, so that drawing trials adds no noise to the bootstrap."""
        of_style = np.stack([self._ranks(scores, s, self.weights) for s in range(len(self.styles))])
        with np.errstate(invalid="ignore"):  # a replicate of one style alone is NaN
            # (R, max rank), the mean over the styles that a replicate has not lost
            ranks = np.nansum(of_style, axis=0) / (~np.isnan(of_style)).sum(axis=0)
        recall = metrics.recall_from_ranks(ranks, trials.KS)
        found = {f"r@{k}": recall[:, i] for i, k in enumerate(trials.KS)}
        return found | {f"map@{trials.MAP_K}": metrics.reciprocal_rank_from_ranks(ranks, trials.MAP_K)}

    def _ranks(self, scores: NDArray, s: int, weights: NDArray) -> NDArray:
        """(R, max rank): `metrics.trial_rank_distribution` of one style."""
        distractors = self.trials.candidates_by_style[self.styles[s]] - 1
        return metrics.trial_rank_distribution(scores[:, s], self.truth == s, distractors, max(trials.KS), weights)

    def _by_style(self, scores: NDArray) -> dict[str, NDArray]:
        return {style: scores[:, s] for s, style in enumerate(self.styles)}


def with_intervals(values: dict[str, float], replicates: Replicates) -> dict:
    """Adds `<name>_ci95`, [low, high], to each value that has replicates."""
    found = dict(values)
    for name, drawn in replicates.items():
        found[f"{name}_ci95"] = intervals.interval(drawn, values[name])
    return found
