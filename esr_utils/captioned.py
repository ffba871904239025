"""Captioned retrieval: scores of captions for clips -> R@k and mAP@10 both ways, intervals, and paired tests.

text→audio (t2a): a caption is the query, clips are ranked. audio→text (a2t): a clip is the query, captions are ranked.
R@k is the share of queries that have at least one relevant item among the first k, whether one is relevant or many: the
convention of Clotho and AudioCaps, where a clip has five captions, and of FS-CLAP, where clips share one. mAP@10 is
`metrics.average_precision` cut at 10, which a perfect ranking brings to 1. Both are expected values under ties.

Captions repeat, and an attribute caption describes every clip of its attributes. `Captions` therefore holds each text
once: as a candidate it takes one place in a ranking, where ten copies of one wrong text would fill the first ten; and
all clips that it describes are right for it. As a query it counts once for each clip that it was written for.

Keys of the flat results, under <corpus>/<protocol>/: t2a/r@1, r@5, r@10, map@10, each with `_ci95`; t2a/n_queries,
n_left_out (queries without a relevant item, which have no recall: they stay candidates), n_candidates; a2t likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from esr_utils import intervals, metrics
from esr_utils.scoring import REPLICATES, Replicates

KS = (1, 5, 10)
MAP_K = 10
METRICS = (*(f"r@{k}" for k in KS), f"map@{MAP_K}")
DIRECTIONS = ("a2t", "t2a")
_BLOCK = 2**22  # scores ranked at a time, to bound memory
_EXACT = 12  # up to so many clusters every pattern of signs is counted; beyond, some are drawn
_DRAWN = 9999


@dataclass(frozen=True)
class Captions:
    """Distinct captions of N clips.

    Attributes:
        texts: C captions, sorted.
        relevant: (C, N) bool, the caption describes the clip.
        written_for: (C, N) bool, it was written for the clip; then it is relevant too.
    """

    texts: list[str]
    relevant: NDArray[np.bool_]
    written_for: NDArray[np.bool_]


@dataclass(frozen=True)
class Found:
    """What a system's scores come to.

    Attributes:
        values: the flat results, without <corpus>/<protocol>/.
        replicates: of each metric, (R,).
        queries: a row per query: direction, query (row or column of the scores), times (how often it counts),
            n_relevant, and each metric.
        by_clip: of each metric, (N,) the sum of the values of the queries at each clip.
    """

    values: dict
    replicates: Replicates
    queries: pd.DataFrame
    by_clip: dict[str, NDArray[np.floating]]

    def results(self, corpus: str, protocol: str) -> dict:
        """The values under their keys in results.json."""
        return {f"{corpus}/{protocol}/{name}": value for name, value in self.values.items()}


class CaptionScorer:
    """The clips and captions of a test set, and the bootstrap replicates that all systems share.

    The bootstrap draws queries, and leaves what is ranked as it is. It draws by speaker, then clip, where there are 5
    speakers (`intervals.speaker_bootstrap_weights`); a caption comes along with the clips that it was written for.

    Attributes:
        weights: (R, N), how often each clip occurs in each replicate.
        bootstrap: "speaker" or "utterance", what is resampled.
    """

    def __init__(
        self, relevant: ArrayLike, speakers: ArrayLike, seed: int = 0, written_for: ArrayLike | None = None
    ) -> None:
        """
        Args:
            relevant: (C, N) bool, caption c is right for clip n; distinct captions.
            speakers: (N,) of the clips.
            seed: of bootstrap and permutation.
            written_for: (C, N) bool (`Captions`); by default what is relevant.
        """
        self.relevant = np.asarray(relevant, dtype=bool)
        if self.relevant.ndim != 2 or self.relevant.shape[1] != len(np.asarray(speakers)):
            raise ValueError(
                f"relevant is of shape {self.relevant.shape}; there are {len(np.asarray(speakers))} speakers"
            )
        written_for = self.relevant if written_for is None else np.asarray(written_for, dtype=bool)
        if (written_for & ~self.relevant).any():
            raise ValueError("a caption was written for a clip that it is not relevant to")
        self.seed, n_clips = seed, self.relevant.shape[1]
        self.weights, self.bootstrap = intervals.speaker_bootstrap_weights(
            speakers, REPLICATES, np.random.default_rng(seed)
        )
        names = np.asarray(speakers).astype(str) if self.bootstrap == "speaker" else np.arange(n_clips)
        self._cluster = np.unique(names, return_inverse=True)[1]
        # (queries, N): how often a query counts at each clip.
        at_clip = {"a2t": sparse.eye_array(n_clips, format="csr"), "t2a": sparse.csr_array(written_for.astype(float))}
        asked = {"a2t": self.relevant.T, "t2a": self.relevant}
        self._asked = {direction: rows.any(axis=1) for direction, rows in asked.items()}
        self._right = {direction: asked[direction][self._asked[direction]] for direction in DIRECTIONS}
        self._at_clip = {direction: at_clip[direction][self._asked[direction]] for direction in DIRECTIONS}
        for direction, right in self._right.items():
            if not len(right):
                raise ValueError(f"{direction}: no query has a relevant item")

    def retrieval(self, scores: ArrayLike, a2t: ArrayLike | None = None) -> Found:
        """Metrics of both directions.

        Args:
            scores: (C, N), higher is better.
            a2t: (C, N) for audio→text, where that direction has scores of its own, as after reranking. What is not on
                a shortlist scores -inf.
        """
        values, replicates, tables, by_clip = {}, {}, [], {}
        for direction, of_queries in self._of_queries(scores, a2t):
            right, at_clip = self._right[direction], self._at_clip[direction]
            found = pd.concat(
                [_query_values(rows, relevant) for rows, relevant in _blocks(of_queries, right)], ignore_index=True
            )
            for name in METRICS:
                by_clip[f"{direction}/{name}"] = at_clip.T @ found[name].to_numpy()
            values |= self._measured(direction, by_clip, replicates)
            asked = self._asked[direction]
            values[f"{direction}/n_queries"] = int(at_clip.sum())
            values[f"{direction}/n_left_out"] = int((~asked).sum())
            values[f"{direction}/n_candidates"] = right.shape[1]
            found.insert(0, "direction", direction)
            found.insert(1, "query", np.flatnonzero(asked))
            found.insert(2, "times", at_clip.sum(axis=1).astype(int))
            found.insert(3, "n_relevant", right.sum(axis=1))
            tables.append(found)
        return Found(values, replicates, pd.concat(tables, ignore_index=True), by_clip)

    def ceiling(self, scores: ArrayLike, k: int, a2t: ArrayLike | None = None) -> dict:
        """What no reranking of the first k can exceed, at any R@j: the share of queries with a relevant item on their
        shortlist. Keys <direction>/ceiling@k, with `_ci95`; arguments as in `retrieval`."""
        values = {}
        for direction, of_queries in self._of_queries(scores, a2t):
            blocks = _blocks(of_queries, self._right[direction])
            recall = np.concatenate([metrics.retrieval_recall(rows, relevant, [k]) for rows, relevant in blocks])
            name = f"{direction}/ceiling@{k}"
            values |= self._measured(direction, {name: self._at_clip[direction].T @ recall[:, 0]}, {})
        return values

    def difference(self, ours: Sequence[Found], theirs: Sequence[Found]) -> pd.DataFrame:
        """Ours minus theirs, on the same queries and replicates; each the mean over its runs, one for each seed.

        The interval is the bootstrap's (over seeds too, where there are several: `intervals.seed_weights`). p is
        two-sided, of the permutation that swaps the two systems on all queries of a cluster (speaker, or clip where
        the bootstrap is over those): with few speakers it cannot be small, 2 / 2^5 = 0.06 at five.

        Returns:
            Columns direction, metric, difference, low, high, p.
        """
        rows = []
        for name in [f"{direction}/{metric}" for direction in DIRECTIONS for metric in METRICS]:
            sides = [_over_seeds(found, name) for found in (ours, theirs)]
            difference = sides[0][0] - sides[1][0]
            low, high = intervals.interval(sides[0][1] - sides[1][1], difference, (-1.0, 1.0))
            sums = np.bincount(self._cluster, weights=sides[0][2] - sides[1][2])
            p = sign_flip_p(sums, np.random.default_rng(self.seed))
            rows.append([*name.split("/"), difference, low, high, p])
        return pd.DataFrame(rows, columns=["direction", "metric", "difference", "low", "high", "p"])

    def _of_queries(self, scores: ArrayLike, a2t: ArrayLike | None) -> Iterator[tuple[str, NDArray]]:
        """Each direction's scores, a row per query that is asked."""
        for direction, given in (("a2t", scores if a2t is None else a2t), ("t2a", scores)):
            given = np.asarray(given)
            if given.shape != self.relevant.shape:
                raise ValueError(
                    f"{direction}: scores of shape {given.shape}; (captions, clips) is {self.relevant.shape}"
                )
            yield direction, (given.T if direction == "a2t" else given)[self._asked[direction]]

    def _measured(self, direction: str, by_clip: dict, replicates: Replicates) -> dict:
        """The values of one direction with their intervals; adds their replicates to `replicates`."""
        times = self._at_clip[direction].sum(axis=0)  # (N,) queries at each clip
        drawn_times = self.weights @ times
        drawn_times = np.where(drawn_times > 0, drawn_times, np.nan)
        values = {}
        for name, sums in by_clip.items():
            if name.startswith(direction):
                values[name] = float(sums.sum() / times.sum())
                replicates[name] = self.weights @ sums / drawn_times
                values[f"{name}_ci95"] = intervals.interval_of_few(replicates[name], values[name], int(times.sum()))
        return values


def sign_flip_p(sums: ArrayLike, rng: np.random.Generator) -> float:
    """Two-sided p of a sum of cluster differences (n,), if each were as likely to be the other way round.

    Counted over all 2^n signs where n is at most 12, else over 9999 drawn ones and the one seen.
    """
    sums = np.asarray(sums, dtype=float)
    sums = sums[sums != 0]  # these change no sum
    if not len(sums):
        return 1.0
    if len(sums) <= _EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1)
    else:
        signs = np.vstack([np.ones(len(sums)), rng.choice([-1, 1], (_DRAWN, len(sums)))])
    rounding = 1e-9 * np.abs(sums).sum()
    return float((np.abs(signs @ sums) >= abs(sums.sum()) - rounding).mean())


def _over_seeds(found: Sequence[Found], name: str) -> tuple[float, NDArray, NDArray]:
    """A metric's value, replicates (R,) and sums by clip (N,), as means over runs."""
    drawn = np.stack([one.replicates[name] for one in found])
    replicates = np.einsum("rs,sr->r", intervals.seed_weights(*drawn.shape), drawn)
    values, sums = [one.values[name] for one in found], [one.by_clip[name] for one in found]
    return float(np.mean(values)), replicates, np.mean(sums, axis=0)


def _query_values(scores: NDArray, relevant: NDArray[np.bool_]) -> pd.DataFrame:
    """(Q, M) -> a row per query, a column per metric."""
    table = pd.DataFrame(metrics.retrieval_recall(scores, relevant, KS), columns=METRICS[: len(KS)])
    return table.assign(**{METRICS[-1]: metrics.average_precision(scores, relevant, MAP_K)})


def _blocks(scores: NDArray, relevant: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
    step = max(1, _BLOCK // scores.shape[1])
    for start in range(0, len(scores), step):
        yield scores[start : start + step], relevant[start : start + step]
