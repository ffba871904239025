"""Retrieval and zero-shot metrics, as expectations over the order of equal scores.

Equal scores have no order: breaking them by position in an array makes a metric depend on how the clips were
listed, and lets a model that scores everything alike look perfect. Every function here therefore returns the
mean over all orders of the tied clips, in closed form (McSherry & Najork, "Computing Information Retrieval
Performance Measures Efficiently in the Presence of Tied Scores", ECIR 2008). Higher scores rank first; ranks
count from 1; all results are fractions, not percent; a NaN score raises ValueError, since it would compare as
neither above nor below anything.

Three situations, in the order of this file:

1. one relevant clip among distractors: the trials of ESR (Kang & Roy 2025, section IV-C), sampled or in
closed form;
2. many relevant clips in one ranking: search over a collection, captioned retrieval;
3. zero-shot classification.

Intervals are in `intervals`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

Floats = NDArray[np.floating]
Counts = NDArray[np.integer]

# 1. One relevant clip -------------------------------------------------------------------------------------


def recall_at_k(positive: ArrayLike, distractors: ArrayLike, ks: Sequence[int]) -> Floats:
    """Expected Recall@k of each trial: the chance that its one relevant clip ranks k-th or better.

    With g distractors above the positive and t level with it, its rank is uniform on g+1 … g+t+1, so
    P(rank ≤ k) = clip((k − g) / (t + 1), 0, 1). Equal scores throughout give chance, k / (1 + m).

    positive: (n,); distractors: (n, m). Returns (n, len(ks)).
    """
    above, tied = _above_and_tied(positive, distractors)
    return np.clip((_cutoffs(ks) - above[:, None]) / (tied[:, None] + 1), 0, 1)


def reciprocal_rank(positive: ArrayLike, distractors: ArrayLike, k: int = 10) -> Floats:
    """Expected 1/rank of each trial's positive, counted as 0 beyond rank k.

    With a single relevant clip this is its average precision cut at k: the mean over trials is mAP@k.

    positive: (n,); distractors: (n, m). Returns (n,).
    """
    above, tied = _above_and_tied(positive, distractors)
    (k,) = _cutoffs([k])
    harmonic = _from_zero(1 / np.arange(1, k + 1))  # harmonic[r] = 1 + 1/2 + … + 1/r
    return (harmonic[np.minimum(above + tied + 1, k)] - harmonic[np.minimum(above, k)]) / (tied + 1)


def expected_trial_recall(
    scores: ArrayLike,
    is_target: ArrayLike,
    n_distractors: int,
    ks: Sequence[int],
    weights: ArrayLike | None = None,
) -> Floats:
    """Recall@k of one style, averaged over every trial that could be drawn, without drawing any.

    What `recall_at_k` estimates from 1000 trials; see `trial_rank_distribution` for the arguments.

    Returns (len(ks),), or (R, len(ks)) for weights of shape (R, N).
    """
    return recall_from_ranks(trial_rank_distribution(scores, is_target, n_distractors, max(ks), weights), ks)


def trial_rank_distribution(
    scores: ArrayLike,
    is_target: ArrayLike,
    n_distractors: int,
    max_rank: int = 20,
    weights: ArrayLike | None = None,
) -> Floats:
    """P(rank = 1 … max_rank) of the positive of a random trial of one style, exactly.

    A trial draws one positive among the style's clips and n = min(n_distractors, M) of the M other clips
    without replacement (ESR, section IV-C). If K of the M score above the positive, the number X of them in
    the trial is hypergeometric, P(X = x) = C(K, x) C(M−K, n−x) / C(M, n), and the rank is X + 1. If T others
    are level with the positive, a random order of the ties puts 0 … T of them above it with equal chance, and
    any subset keeps that order: so the result is the mean over K … K+T. The style's value is the mean over
    its positives.

    `weights` are how often each clip occurs, for bootstrap replicates: a clip of weight 2 is two clips, as a
    positive and as a distractor. A positive is no distractor of its own style, so weight 0 for all of the
    style's clips but one group (women, say) gives the result for that group. A replicate that has no
    positive, or no other clip, is NaN.

    scores: (N,) similarity of each clip to the style's query; is_target: (N,) bool, the clips of the style;
    weights: (N,) or (R, N) non-negative integers. Returns (max_rank,) or (R, max_rank).
    """
    scores, is_target = _checked(scores), np.asarray(is_target, dtype=bool)
    if is_target.all() or not is_target.any():
        raise ValueError("a trial needs a clip of the style and a clip of another style")
    counts = np.ones(scores.shape, dtype=np.int64) if weights is None else np.asarray(weights)
    if counts.dtype.kind not in "iu":
        raise ValueError(f"weights count clips: integers, not {counts.dtype}")
    replicates = np.atleast_2d(counts)  # (R, N)
    others, above, tied = _others_above(scores, is_target, replicates)
    targets = replicates[:, is_target]  # (R, P)
    distribution = np.full((len(replicates), max_rank), np.nan)
    defined = (others > 0) & (targets.sum(axis=1) > 0)
    draws = _Draws(others.max(), n_distractors, max_rank)
    for population in np.unique(others[defined]):  # replicates with the same M share one table
        rows = np.flatnonzero(defined & (others == population))
        summed = _from_zero(draws.table(population))  # (M + 2, max_rank): a sum over K … K+T is a difference
        first, size = above[rows], tied[rows] + 1  # (rows, P)
        per_positive = (summed[first + size] - summed[first]) / size[..., None]  # (rows, P, max_rank)
        share = targets[rows] / targets[rows].sum(axis=1, keepdims=True)
        distribution[rows] = np.einsum("rp,rpk->rk", share, per_positive)
    return distribution[0] if counts.ndim == 1 else distribution


def recall_from_ranks(distribution: ArrayLike, ks: Sequence[int]) -> Floats:
    """Recall@k from P(rank = 1 … max_rank): (…, max_rank ≥ max(ks)) → (…, len(ks))."""
    cumulative = np.cumsum(_up_to_rank(max(ks), distribution), axis=-1)
    return np.minimum(cumulative, 1.0)[..., _cutoffs(ks) - 1]  # rounding can pass 1 by 1e-13


def reciprocal_rank_from_ranks(distribution: ArrayLike, k: int = 10) -> Floats:
    """mAP@k of trials with one relevant clip, Σ P(rank = r) / r over r ≤ k. (…, max_rank ≥ k) → (…)."""
    return _up_to_rank(k, distribution) @ (1 / np.arange(1, k + 1))


def _up_to_rank(k: int, distribution: ArrayLike) -> Floats:
    distribution = np.asarray(distribution)
    if distribution.shape[-1] < k:
        raise ValueError(f"ranks up to {k} are needed; the distribution stops at {distribution.shape[-1]}")
    return distribution[..., :k]


def _above_and_tied(positive: ArrayLike, distractors: ArrayLike) -> tuple[Counts, Counts]:
    """How many of each trial's distractors score above its positive, and level with it: (n,), (n,)."""
    positive, distractors = _checked(positive)[:, None], _checked(distractors)
    return (distractors > positive).sum(axis=1), (distractors == positive).sum(axis=1)


def _others_above(scores: Floats, is_target: NDArray[np.bool_], weights: Counts) -> tuple[Counts, Counts, Counts]:
    """Weighted counts of other-style clips: all (R,), above each positive (R, P), level with it (R, P)."""
    order = np.argsort(scores[~is_target])
    ascending = scores[~is_target][order]
    below = _from_zero(weights[:, ~is_target][:, order].T).T  # (R, N − P + 1): weight of the first j others
    strictly_below = below[:, np.searchsorted(ascending, scores[is_target], side="left")]
    not_above = below[:, np.searchsorted(ascending, scores[is_target], side="right")]
    return below[:, -1], below[:, -1:] - not_above, not_above - strictly_below


class _Draws:
    """P(X = 0 … max_rank − 1) when n of M clips are drawn and X of the K marked ones are among them.

    C(K, x) and C(M−K, n−x) are tabulated once, in logarithms: they serve every M up to `largest`.
    """

    def __init__(self, largest: int, n: int, max_rank: int) -> None:
        self.n, self.max_rank = n, max_rank
        self.log_factorial = gammaln(np.arange(largest + 1) + 1)
        clips, x = np.arange(largest + 1)[:, None], np.arange(max_rank)
        self.marked = self._log_choose(clips, x)  # (largest + 1, max_rank), by K
        self.unmarked = self._log_choose(clips, n - x)  # likewise, by M − K

    def table(self, population: int) -> Floats:
        """(population + 1, max_rank): a row for each K. Where all clips are drawn, X = K."""
        if population <= self.n:
            return np.eye(population + 1, self.max_rank)
        log_ways = self.marked[: population + 1] + self.unmarked[population::-1]
        return np.exp(log_ways - self._log_choose(np.array(population), np.array(self.n)))

    def _log_choose(self, n: Counts, k: Counts) -> Floats:
        possible = (k >= 0) & (k <= n)
        k = np.where(possible, k, 0)
        ways = self.log_factorial[n] - self.log_factorial[k] - self.log_factorial[n - k]
        return np.where(possible, ways, -np.inf)


# 2. Many relevant clips -----------------------------------------------------------------------------------


def average_precision(scores: ArrayLike, relevant: ArrayLike, k: int | None = None) -> Floats:
    """Expected average precision over random orders of ties, cut at rank k if given.

    In a block of c tied clips at ranks s+1 … s+c with r relevant ones and R relevant above it, rank s+j holds
    a relevant clip with chance r/c, and then R + 1 + (j−1)(r−1)/(c−1) relevant ones are expected up to it
    (McSherry & Najork 2008). Summed over ranks and divided by the relevant clips that fit, min(relevant, k),
    so that a perfect ranking scores 1 at any cut-off; with one relevant clip this is its reciprocal rank.

    scores, relevant: (…, N), one query a row. Returns (…). Raises ValueError when a query has no relevant
    clip.
    """
    relevant = _checked_relevant(relevant)
    rank, start, size, hits_before, hits = _tie_blocks(_checked(scores), relevant)  # each (…, N)
    among_ties = (rank - start - 1) * (hits - 1) / np.maximum(size - 1, 1)
    expected = hits / size * (hits_before + 1 + among_ties) / rank
    k = relevant.shape[-1] if k is None else _cutoffs([k])[0]
    return expected[..., :k].sum(axis=-1) / np.minimum(relevant.sum(axis=-1), k)


def precision_at_k(scores: ArrayLike, relevant: ArrayLike, k: int) -> Floats:
    """Expected share of relevant clips in the first k; a collection shorter than k is filled up with misses.

    scores, relevant: (…, N), one query a row. Returns (…). Raises ValueError when a query has no relevant
    clip.
    """
    _, _, size, _, hits = _tie_blocks(_checked(scores), _checked_relevant(relevant))
    (k,) = _cutoffs([k])
    return (hits / size)[..., :k].sum(axis=-1) / k


def mean_average_precision(similarity: ArrayLike, relevant: ArrayLike, k: int | None = 10) -> float:
    """mAP@k: the mean over queries of `average_precision`. similarity, relevant: (Q, N), a row a query."""
    return float(average_precision(similarity, relevant, k).mean())


def retrieval_recall(similarity: ArrayLike, relevant: ArrayLike, ks: Sequence[int]) -> Floats:
    """Expected Recall@k of each query where several clips are right: a hit if any is among the first k.

    This is the R@k of text-to-audio retrieval (FS-CLAP), where clips that share a caption are all right. Let
    g clips, none relevant, score above the best relevant one, and r relevant and t other clips be level with
    it. The first k − g of those level miss with chance C(t, k−g) / C(t+r, k−g); the query is a hit otherwise.

    similarity, relevant: (Q, N), a row for each query. Returns (Q, len(ks)). Raises ValueError when a query
    has no relevant clip.
    """
    similarity, relevant = _checked(similarity), _checked_relevant(relevant)
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)  # (Q, 1)
    above = (similarity > best).sum(axis=1, keepdims=True)
    level = similarity == best
    n_level = level.sum(axis=1, keepdims=True)
    n_wrong = (level & ~relevant).sum(axis=1, keepdims=True)
    places = _cutoffs(ks) - above  # (Q, len(ks)): ranks left for those level with the best
    can_miss = (places > 0) & (places <= n_wrong)
    taken = np.where(can_miss, places, 0)
    log_miss = gammaln(n_wrong + 1) - gammaln(n_wrong - taken + 1)
    log_miss = log_miss - gammaln(n_level + 1) + gammaln(n_level - taken + 1)
    return np.where(can_miss, 1 - np.exp(log_miss), (places > 0).astype(float))


def _tie_blocks(scores: Floats, relevant: NDArray[np.bool_]) -> tuple[Counts, ...]:
    """For every rank of each row, the block of equal scores it lies in; each array (…, N), best rank first.

    Returns rank (from 1), start (ranks before the block), size, relevant clips before the block, and within
    it.
    """
    order = np.argsort(-scores, axis=-1)
    ranked = np.take_along_axis(scores, order, axis=-1)
    hits_until = np.cumsum(np.take_along_axis(relevant, order, axis=-1), axis=-1)
    hits_until = np.concatenate([np.zeros_like(hits_until[..., :1]), hits_until], axis=-1)  # (…, N + 1)
    n = scores.shape[-1]
    rank = np.broadcast_to(np.arange(1, n + 1), scores.shape)
    changes = ranked[..., 1:] != ranked[..., :-1]
    edge = np.ones_like(ranked[..., :1], dtype=bool)
    opens, closes = np.concatenate([edge, changes], axis=-1), np.concatenate([changes, edge], axis=-1)
    start = np.maximum.accumulate(np.where(opens, rank - 1, 0), axis=-1)
    end = np.flip(np.minimum.accumulate(np.flip(np.where(closes, rank, n), axis=-1), axis=-1), axis=-1)
    before = np.take_along_axis(hits_until, start, axis=-1)
    return rank, start, end - start, before, np.take_along_axis(hits_until, end, axis=-1) - before


# 3. Zero-shot classification ------------------------------------------------------------------------------


def votes(scores: ArrayLike) -> Floats:
    """Each clip's one vote: 1 for the style that scores highest, 1/t each for t styles level at the top.

    scores: (N, S). Returns (N, S), rows that sum to 1: what argmax gives on average over orders of the styles.
    """
    scores = _checked(scores)
    top = scores == scores.max(axis=1, keepdims=True)
    return top / top.sum(axis=1, keepdims=True)


def accuracy(correct: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Share of clips whose style is recognised; with weights (R, N), one value for each bootstrap replicate.

    correct: (N,) the vote that each clip gives its own style, 0 to 1 (`votes`). Returns a scalar, or (R,).
    """
    correct = np.asarray(correct, dtype=float)
    counts = np.ones(correct.shape) if weights is None else np.asarray(weights)
    return counts @ correct / counts.sum(axis=-1)


def unweighted_average_recall(truth: ArrayLike, correct: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Mean over the styles present in `truth` of the share of their clips that is recognised.

    Unlike accuracy, it does not reward guessing the most frequent style. scikit-learn's balanced_accuracy_score takes
    no ties and no bootstrap replicates. A style that a replicate has lost is left out.

    truth: (N,) labels; correct: (N,) as in `accuracy`; weights: (N,) or (R, N). Returns a scalar, or (R,).
    """
    truth, correct = np.asarray(truth), np.asarray(correct, dtype=float)
    counts = np.ones(correct.shape) if weights is None else np.asarray(weights)
    of_style = (truth[:, None] == np.unique(truth)).astype(float)  # (N, styles)
    total = counts @ of_style  # (…, styles)
    recall = counts @ (of_style * correct[:, None]) / np.maximum(total, 1)  # 0 for a style that is absent
    return recall.sum(axis=-1) / (total > 0).sum(axis=-1)


# Shared ---------------------------------------------------------------------------------------------------


def _checked(scores: ArrayLike) -> Floats:
    scores = np.asarray(scores)
    scores = scores if scores.dtype.kind == "f" else scores.astype(np.float64)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN: it has no rank")
    return scores


def _checked_relevant(relevant: ArrayLike) -> NDArray[np.bool_]:
    relevant = np.asarray(relevant, dtype=bool)
    if not relevant.any(axis=-1).all():
        raise ValueError("a query has no relevant clip: its metric is undefined")
    return relevant


def _cutoffs(ks: Sequence[int]) -> Counts:
    ks = np.asarray(ks, dtype=np.int64)
    if (ks < 1).any():
        raise ValueError(f"cut-off ranks count from 1, not {ks.min()}")
    return ks


def _from_zero(values: NDArray) -> NDArray:
    """Running sums down the first axis, from an empty sum on: row j is the sum of the first j rows."""
    return np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, axis=0)])
