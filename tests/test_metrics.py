"""Metrics against naive references: every order of ties written out, every trial drawn, numbers by hand."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score

from esr_utils import intervals, metrics

# Whole numbers from a small range: most drawn rankings have ties, and monotone maps of them are exact.
levels = st.integers(-2, 2)
few = settings(max_examples=50, deadline=None)


@st.composite
def rankings(draw, max_clips=6):
    """Scores and relevance of one query, with at least one relevant clip."""
    scores = draw(st.lists(levels, min_size=1, max_size=max_clips))
    relevant = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    assume(any(relevant))
    return np.array(scores, dtype=float), np.array(relevant)


@st.composite
def collections(draw):
    """Scores, membership in the style and bootstrap counts of so few clips that every trial can be drawn."""
    n = draw(st.integers(2, 6))
    scores = draw(st.lists(levels, min_size=n, max_size=n))
    is_target = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    weights = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    scores, is_target, weights = np.array(scores, float), np.array(is_target), np.array(weights)
    assume(weights[is_target].sum() > 0 and 0 < weights[~is_target].sum() <= 6)
    return scores, is_target, weights


def orders(scores):
    """Every ranking that the scores allow, as lists of positions."""
    return [list(p) for p in permutations(range(len(scores))) if np.all(np.diff(scores[list(p)]) <= 0)]


def mean_over_orders(metric, scores, relevant):
    return np.mean([metric(relevant[order]) for order in orders(scores)])


def naive_average_precision(ranked, k):
    hits = [ranked[: i + 1].mean() for i in range(min(k, len(ranked))) if ranked[i]]
    return sum(hits) / min(ranked.sum(), k)


def naive_trial_ranks(scores, is_target, n_distractors, max_rank):
    """P(rank) over every positive, every subset of distractors and every order of ties."""
    distribution = np.zeros(max_rank)
    others = np.flatnonzero(~is_target)
    subsets = list(combinations(others, min(n_distractors, len(others))))
    for positive in np.flatnonzero(is_target):
        for subset in subsets:
            drawn = scores[[positive, *subset]]
            ranks = [order.index(0) for order in orders(drawn)]
            for rank in ranks:
                if rank < max_rank:
                    distribution[rank] += 1 / len(ranks) / len(subsets) / is_target.sum()
    return distribution


# One relevant clip ------------------------------------------------------------------------------------------


def test_recall_at_k_by_hand():
    positive = [0.5, 0.5, 0.9]
    distractors = [
        [0.9, 0.5, 0.5, 0.1],  # one above, two level: rank 2, 3 or 4
        [0.9, 0.8, 0.7, 0.6],  # rank 5
        [0.9, 0.0, 0.0, 0.0],  # rank 1 or 2
    ]
    expected = [[0, 1 / 3, 2 / 3, 1, 1], [0, 0, 0, 0, 1], [1 / 2, 1, 1, 1, 1]]
    np.testing.assert_allclose(metrics.recall_at_k(positive, distractors, [1, 2, 3, 4, 5]), expected)
    np.testing.assert_allclose(
        metrics.reciprocal_rank(positive, distractors, k=10), [(1 / 2 + 1 / 3 + 1 / 4) / 3, 1 / 5, 3 / 4]
    )
    found = metrics.reciprocal_rank(positive, distractors, k=3)
    np.testing.assert_allclose(found, [(1 / 2 + 1 / 3) / 3, 0, 3 / 4])


def test_a_model_that_scores_all_alike_is_at_chance():
    recall = metrics.recall_at_k(np.zeros(3), np.zeros((3, 400)), [1, 5, 10, 20])
    np.testing.assert_allclose(recall, np.tile(np.array([1, 5, 10, 20]) / 401, (3, 1)))


@few
@given(rankings(), st.integers(1, 8))
def test_one_relevant_clip_equals_the_mean_over_all_orders(ranking, k):
    scores, _ = ranking
    relevant = np.arange(len(scores)) == 0
    positive, distractors = scores[:1], scores[None, 1:]
    recall = mean_over_orders(lambda ranked: ranked[:k].any(), scores, relevant)
    np.testing.assert_allclose(metrics.recall_at_k(positive, distractors, [k])[0, 0], recall)
    reciprocal = mean_over_orders(lambda ranked: ranked[:k].any() / (ranked.argmax() + 1), scores, relevant)
    np.testing.assert_allclose(metrics.reciprocal_rank(positive, distractors, k)[0], reciprocal)


@few
@given(st.integers(0, 2**32 - 1))
def test_without_ties_recall_equals_a_full_sort(seed):
    scores = np.random.default_rng(seed).permutation(200).reshape(4, 50).astype(float)
    rank = (-scores).argsort(axis=1).argsort(axis=1)[:, 0] + 1
    found = metrics.recall_at_k(scores[:, 0], scores[:, 1:], [1, 5, 10])
    np.testing.assert_array_equal(found, rank[:, None] <= [1, 5, 10])


# Every trial that could be drawn ----------------------------------------------------------------------------


def test_expected_trial_recall_by_hand():
    # The positive (score 2) has one clip above it and two below; trials hold 2 of these 3, so 2 of 3 trials
    # hold the one above.
    scores, is_target = [2, 3, 1, 0], [True, False, False, False]
    found = metrics.expected_trial_recall(scores, is_target, n_distractors=2, ks=[1, 2])
    np.testing.assert_allclose(found, [1 / 3, 1])
    # A second positive, on top: it is always first.
    found = metrics.expected_trial_recall([2, 3, 1, 0, 9], [True, False, False, False, True], 2, [1, 2])
    np.testing.assert_allclose(found, [2 / 3, 1])
    # Level with one of the three: that one is in 2 of 3 trials, and then first half of the time.
    found = metrics.expected_trial_recall([2, 2, 1, 0], is_target, 2, [1, 2])
    np.testing.assert_allclose(found, [2 / 3, 1])


@few
@given(collections(), st.integers(1, 7))
def test_closed_form_equals_every_trial_written_out(collection, n_distractors):
    scores, is_target, weights = collection
    found = metrics.trial_rank_distribution(scores, is_target, n_distractors, 7, weights)
    repeated = np.repeat(scores, weights), np.repeat(is_target, weights)  # a clip of weight 2 is two clips
    np.testing.assert_allclose(found, naive_trial_ranks(*repeated, n_distractors, 7), atol=1e-12)
    np.testing.assert_allclose(found.sum(), 1)


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 500))
def test_closed_form_equals_scipy_at_real_sizes(seed, n_distractors):
    rng = np.random.default_rng(seed)
    scores, is_target = rng.normal(size=440), np.arange(440) < 3
    m, n = 437, min(n_distractors, 437)
    above = [(scores[3:] > scores[i]).sum() for i in range(3)]
    expected = np.mean([hypergeom(m, k, n).cdf([0, 4, 9, 19]) for k in above], axis=0)
    found = metrics.expected_trial_recall(scores, is_target, n_distractors, [1, 5, 10, 20])
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_replicates_are_independent_rows():
    rng = np.random.default_rng(0)
    scores, is_target = rng.integers(0, 9, 60).astype(float), np.arange(60) % 5 == 0
    weights = rng.integers(0, 4, (50, 60))
    together = metrics.trial_rank_distribution(scores, is_target, 20, 20, weights)
    alone = [metrics.trial_rank_distribution(scores, is_target, 20, 20, row) for row in weights]
    np.testing.assert_allclose(together, alone, atol=1e-12)


def test_weight_zero_for_other_positives_gives_one_group():
    scores = np.array([5.0, 1.0, 4.0, 3.0, 2.0, 0.0])
    is_target = np.array([True, True, False, False, False, False])
    second_only = np.array([0, 1, 1, 1, 1, 1])
    by_weight = metrics.expected_trial_recall(scores, is_target, 2, [1, 2], second_only)
    np.testing.assert_allclose(by_weight, metrics.expected_trial_recall(scores[1:], is_target[1:], 2, [1, 2]))


def test_undefined_replicates_are_nan_and_impossible_trials_are_refused():
    scores, is_target = [3.0, 2.0, 1.0], [True, False, False]
    weights = np.array([[1, 1, 1], [0, 2, 1], [3, 0, 0]])  # whole; no positive; no distractor
    recall = metrics.expected_trial_recall(scores, is_target, 400, [1, 20], weights)
    np.testing.assert_array_equal(np.isnan(recall), [[False] * 2, [True] * 2, [True] * 2])
    assert intervals.interval(recall[:, 0], 1.0) == [1.0, 1.0]
    with pytest.raises(ValueError, match="another style"):
        metrics.expected_trial_recall(scores, [True] * 3, 400, [1])
    with pytest.raises(ValueError, match="integers"):
        metrics.expected_trial_recall(scores, is_target, 400, [1], np.full(3, 0.5))


def test_metrics_from_ranks_by_hand():
    distribution = np.array([[0.5, 0.0, 0.3], [0.0, 1.0, 0.0]])
    np.testing.assert_allclose(metrics.recall_from_ranks(distribution, [1, 3]), [[0.5, 0.8], [0, 1]])
    np.testing.assert_allclose(metrics.reciprocal_rank_from_ranks(distribution, 3), [0.6, 0.5])
    for too_far in (metrics.reciprocal_rank_from_ranks, lambda d, k: metrics.recall_from_ranks(d, [1, k])):
        with pytest.raises(ValueError, match="stops at 3"):
            too_far(distribution, 4)


# Many relevant clips ----------------------------------------------------------------------------------------


def test_average_precision_by_hand():
    scores, relevant = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    np.testing.assert_allclose(metrics.average_precision(scores, relevant), (1 + 2 / 3) / 2)
    np.testing.assert_allclose(metrics.average_precision(scores, relevant, k=2), 1 / 2)
    np.testing.assert_allclose(metrics.average_precision(scores, relevant, k=1), 1)
    np.testing.assert_allclose(metrics.precision_at_k(scores, relevant, 3), 2 / 3)
    np.testing.assert_allclose(metrics.precision_at_k(scores, relevant, 8), 2 / 8)
    # Two clips level, one of them relevant: 1 or 1/2.
    np.testing.assert_allclose(metrics.average_precision([1, 1], [True, False]), 3 / 4)
    # Three level, two of them relevant: (1 + 1), (1 + 2/3), (1/2 + 2/3), each halved.
    np.testing.assert_allclose(metrics.average_precision([1, 1, 1], [1, 0, 1]), (2 + 5 / 3 + 7 / 6) / 6)


@few
@given(rankings(), st.integers(1, 8))
def test_many_relevant_clips_equal_the_mean_over_all_orders(ranking, k):
    scores, relevant = ranking
    recall = metrics.retrieval_recall(scores[None], relevant[None], [k])[0, 0]
    checks = [
        (metrics.average_precision(scores, relevant, k), lambda ranked: naive_average_precision(ranked, k)),
        (metrics.precision_at_k(scores, relevant, k), lambda ranked: ranked[:k].sum() / k),
        (recall, lambda ranked: ranked[:k].any()),
    ]
    for found, metric in checks:
        np.testing.assert_allclose(found, mean_over_orders(metric, scores, relevant), atol=1e-12)


def test_queries_are_rows():
    rng = np.random.default_rng(0)
    similarity, relevant = rng.integers(0, 5, (20, 30)).astype(float), rng.random((20, 30)) < 0.2
    relevant[:, 0] = True
    for k in (None, 1, 10):
        each = [metrics.average_precision(s, r, k) for s, r in zip(similarity, relevant, strict=True)]
        np.testing.assert_allclose(metrics.average_precision(similarity, relevant, k), each)
        np.testing.assert_allclose(metrics.mean_average_precision(similarity, relevant, k), np.mean(each))
    each = [metrics.precision_at_k(s, r, 5) for s, r in zip(similarity, relevant, strict=True)]
    np.testing.assert_allclose(metrics.precision_at_k(similarity, relevant, 5), each)


def test_average_precision_equals_scikit_learn_without_ties():
    rng = np.random.default_rng(1)
    scores, relevant = rng.permutation(300), rng.random(300) < 0.1
    expected = average_precision_score(relevant, scores)
    np.testing.assert_allclose(metrics.average_precision(scores, relevant), expected)


def test_the_families_meet_where_one_clip_is_relevant():
    rng = np.random.default_rng(2)
    similarity, relevant = rng.integers(0, 8, (40, 40)).astype(float), np.eye(40, dtype=bool)
    positive, distractors = similarity[relevant], similarity[~relevant].reshape(40, 39)
    np.testing.assert_allclose(
        metrics.retrieval_recall(similarity, relevant, [1, 5, 10]),
        metrics.recall_at_k(positive, distractors, [1, 5, 10]),
        atol=1e-12,
    )
    np.testing.assert_allclose(
        metrics.mean_average_precision(similarity, relevant, 10),
        metrics.reciprocal_rank(positive, distractors, 10).mean(),
    )


def test_one_hot_encoder():
    """Three styles, three clips each; the encoder takes the last clip of style 2 for style 0."""
    truth = np.repeat([0, 1, 2], 3)
    heard = np.array([0, 0, 0, 1, 1, 1, 2, 2, 0])
    similarity = np.eye(3) @ np.eye(3)[heard].T  # (3 queries, 9 clips)
    relevant = truth == np.arange(3)[:, None]
    # Style 0: four clips level at the top, three right. Style 1: perfect. Style 2: two right ones on top, and
    # the third level with the six wrong ones.
    recall = metrics.retrieval_recall(similarity, relevant, [1, 2])
    np.testing.assert_allclose(recall, [[3 / 4, 1], [1, 1], [1, 1]])
    np.testing.assert_allclose(metrics.precision_at_k(similarity, relevant, 3), [3 / 4, 1, (2 + 1 / 7) / 3])
    third = np.mean([3 / rank for rank in range(3, 10)])
    np.testing.assert_allclose(metrics.average_precision(similarity[2], relevant[2]), (2 + third) / 3)
    # As trials, all six others as distractors: style 0 is first half of the time, and the lost clip of style
    # 2 is anywhere among seven.
    recall = [metrics.expected_trial_recall(similarity[i], relevant[i], 400, [1])[0] for i in range(3)]
    np.testing.assert_allclose(recall, [1 / 2, 1, (2 + 1 / 7) / 3])
    assert metrics.accuracy(metrics.votes(similarity.T)[np.arange(9), truth]) == pytest.approx(8 / 9)


# What holds for all of them ---------------------------------------------------------------------------------


def all_metrics(scores, relevant):
    """Every metric of one ranking; the trial ones where another style is there."""
    found = [metrics.average_precision(scores, relevant, k) for k in (None, 1, 3)]
    found += [metrics.precision_at_k(scores, relevant, k) for k in (1, 3)]
    found += list(metrics.retrieval_recall(scores[None], relevant[None], [1, 2, 3])[0])
    if not relevant.all():
        found += list(metrics.trial_rank_distribution(scores, relevant, 2, 3))
    return np.array(found)


@few
@given(rankings(12), st.randoms(use_true_random=False))
def test_the_order_of_clips_and_monotone_maps_of_scores_change_nothing(ranking, random):
    scores, relevant = ranking
    found = all_metrics(scores, relevant)
    shuffled = random.sample(range(len(scores)), len(scores))
    np.testing.assert_allclose(all_metrics(scores[shuffled], relevant[shuffled]), found, atol=1e-12)
    for mapped in (3 * scores + 1, np.exp(scores), scores**3):
        np.testing.assert_allclose(all_metrics(mapped, relevant), found, atol=1e-12)
    assert np.all(found >= 0) and np.all(found <= 1 + 1e-12)


@few
@given(rankings(12))
def test_recall_grows_with_k(ranking):
    scores, relevant = ranking
    ks = range(1, 14)
    recalls = [metrics.retrieval_recall(scores[None], relevant[None], ks)[0]]
    recalls += [metrics.recall_at_k(scores[:1], scores[None, 1:], ks)[0]]
    if not relevant.all():
        recalls += [metrics.expected_trial_recall(scores, relevant, 4, ks)]
    for recall in recalls:
        assert np.all(np.diff(recall) >= -1e-12) and recall[-1] == pytest.approx(1)


def test_nan_and_missing_relevance_are_refused():
    nan, relevant = np.array([[0.5, np.nan]]), np.array([[True, False]])
    calls = [
        lambda: metrics.recall_at_k(nan[:, 1], nan[:, :1], [1]),
        lambda: metrics.recall_at_k(nan[:, 0], nan[:, 1:], [1]),
        lambda: metrics.expected_trial_recall(nan[0], relevant[0], 1, [1]),
        lambda: metrics.average_precision(nan, relevant),
        lambda: metrics.precision_at_k(nan, relevant, 1),
        lambda: metrics.retrieval_recall(nan, relevant, [1]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="NaN"):
            call()
    nothing = np.zeros((1, 2), dtype=bool)
    for metric in (metrics.average_precision, metrics.mean_average_precision):
        with pytest.raises(ValueError, match="no relevant clip"):
            metric(np.ones((1, 2)), nothing)
    with pytest.raises(ValueError, match="no relevant clip"):
        metrics.retrieval_recall(np.ones((1, 2)), nothing, [1])
    with pytest.raises(ValueError, match="count from 1"):
        metrics.recall_at_k([1.0], [[0.0]], [0])


# Zero-shot --------------------------------------------------------------------------------------------------


def test_zero_shot_by_hand_and_as_in_scikit_learn():
    truth = np.array(["sad", "sad", "sad", "happy"])
    predicted = np.array(["sad", "sad", "angry", "sad"])
    assert metrics.accuracy(truth == predicted) == 2 / 4
    assert metrics.unweighted_average_recall(truth, truth == predicted) == pytest.approx((2 / 3 + 0) / 2)
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 5, 200), rng.integers(0, 5, 200)
    weights = rng.integers(0, 3, (20, 200))
    np.testing.assert_allclose(
        metrics.accuracy(truth == predicted, weights),
        [accuracy_score(truth, predicted, sample_weight=row) for row in weights],
    )
    np.testing.assert_allclose(
        metrics.unweighted_average_recall(truth, truth == predicted, weights),
        [balanced_accuracy_score(truth, predicted, sample_weight=row) for row in weights],
    )


def test_votes_by_hand():
    scores = [[0.3, 0.1, 0.2], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0]]
    np.testing.assert_allclose(metrics.votes(scores), [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    with pytest.raises(ValueError, match="NaN"):
        metrics.votes([[0.1, np.nan]])


def test_votes_are_argmax_averaged_over_orders_of_the_styles():
    """An argmax that takes the first of equal scores favours the style that is listed first; the mean does not."""
    scores = np.random.default_rng(1).integers(0, 3, (12, 3)).astype(float)
    truth = np.arange(12) % 3
    argmax = [np.mean(np.array(order)[scores[:, order].argmax(1)] == truth) for order in permutations(range(3))]
    assert len(set(argmax)) > 1
    assert metrics.accuracy(metrics.votes(scores)[np.arange(12), truth]) == pytest.approx(np.mean(argmax))


def test_a_style_that_a_replicate_lost_does_not_count():
    weights = np.array([[1, 1, 0], [0, 0, 2]])
    found = metrics.unweighted_average_recall(["a", "a", "b"], [1, 0, 1], weights)
    np.testing.assert_allclose(found, [1 / 2, 1])


# Intervals --------------------------------------------------------------------------------------------------


def test_bootstrap_resamples_speakers_then_their_clips():
    speakers = np.array(list("aaaaaabbbccdde"))
    weights, level = intervals.speaker_bootstrap_weights(speakers, 500, np.random.default_rng(0))
    assert level == "speaker" and weights.shape == (500, 14) and weights.min() == 0
    sizes = {name: (speakers == name).sum() for name in "abcde"}
    drawn = np.array([weights[:, speakers == name].sum(axis=1) / size for name, size in sizes.items()])
    np.testing.assert_array_equal(drawn, drawn.round())  # whole speakers
    np.testing.assert_array_equal(drawn.sum(axis=0), 5)  # as many as there are
    assert drawn.min() == 0 and drawn.max() >= 3  # with replacement
    np.testing.assert_allclose(drawn.mean(axis=1), 1, atol=0.2)  # each as often
    np.testing.assert_allclose(weights.mean(axis=0), 1, atol=0.25)  # and each clip
    assert (weights[:, :6].max(axis=1) > drawn[0]).any()  # clips within a speaker are resampled too


def test_bootstrap_resamples_clips_where_speakers_are_few():
    weights, level = intervals.speaker_bootstrap_weights(list("aabbccdd"), 200, np.random.default_rng(0))
    assert level == "utterance"
    np.testing.assert_array_equal(weights.sum(axis=1), 8)
    assert len(set(weights[:, :2].sum(axis=1))) > 2  # speakers are not kept whole


def test_bootstrap_is_reproducible():
    speakers = list("abcdeabcde")
    first, _ = intervals.speaker_bootstrap_weights(speakers, 20, np.random.default_rng(3))
    second, _ = intervals.speaker_bootstrap_weights(speakers, 20, np.random.default_rng(3))
    np.testing.assert_array_equal(first, second)


def test_clips_alone_would_give_too_narrow_an_interval():
    speakers = np.repeat(np.arange(8), 30)
    recognised = speakers % 2  # all clips of a speaker, or none
    by_speaker, _ = intervals.speaker_bootstrap_weights(speakers, 1000, np.random.default_rng(0))
    by_clip, _ = intervals.speaker_bootstrap_weights(np.zeros(240), 1000, np.random.default_rng(0))
    wide = intervals.interval(metrics.accuracy(recognised, by_speaker), 0.5)
    narrow = intervals.interval(metrics.accuracy(recognised, by_clip), 0.5)
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    assert wide[1] - wide[0] > 4 * (narrow[1] - narrow[0])


def test_interval_is_the_percentiles_where_there_is_no_bias():
    fractions = np.arange(101) / 100
    np.testing.assert_allclose(intervals.interval(fractions, 0.5), [0.025, 0.975])
    np.testing.assert_allclose(intervals.interval([np.nan, *fractions, np.nan], 0.5), [0.025, 0.975])
    assert intervals.interval(fractions, 0.9) == [pytest.approx(0.425), 1.0]  # a fraction stays one


def test_interval_of_a_difference_may_be_negative():
    differences = np.linspace(-0.3, -0.1, 101)
    assert intervals.interval(differences, -0.2, (-1.0, 1.0)) == pytest.approx([-0.295, -0.105])


def test_seed_weights_give_the_spread_of_a_mean_over_seeds():
    """The variance of a mean of n values is their variance, with n - 1 below the line, over n."""
    values = np.array([0.1, 0.4, 0.3])
    weights = intervals.seed_weights(3, 20_000)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    drawn = weights @ values
    assert drawn.mean() == pytest.approx(values.mean(), abs=2e-3)
    assert drawn.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.03)
    np.testing.assert_array_equal(intervals.seed_weights(1, 4), np.ones((4, 1)))
    np.testing.assert_array_equal(intervals.seed_weights(3, 20_000), weights)  # two rows of as many seeds are paired


def test_interval_of_recall_holds_the_truth_about_as_often_as_it_says():
    # 60 collections of 8 speakers from one law: R@1 over a bootstrap is biased upwards (missing distractors), so the
    # plain percentiles lie too high; the centred ones must cover the expectation.
    rng, inside, plain = np.random.default_rng(0), 0, 0
    speakers = np.repeat(np.arange(8), 16)
    is_target = np.tile(np.arange(16) < 4, 8)
    draw = lambda: rng.normal(size=128) + 1.5 * is_target + 0.3 * rng.normal(size=8)[speakers]  # noqa: E731
    recall = lambda scores, weights=None: metrics.expected_trial_recall(scores, is_target, 90, [1], weights)  # noqa: E731
    truth = np.mean([recall(draw())[0] for _ in range(2000)])
    for _ in range(60):
        scores = draw()
        weights, _ = intervals.speaker_bootstrap_weights(speakers, 200, rng)
        values = recall(scores, weights)[:, 0]
        low, high = intervals.interval(values, recall(scores)[0])
        inside += low <= truth <= high
        low, high = np.nanpercentile(values, [2.5, 97.5])
        plain += low <= truth <= high
    assert inside >= 50
    assert inside > plain
