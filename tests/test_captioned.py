"""Captioned retrieval: by hand, against a slow full sort, ties, repeated captions, intervals and paired tests."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from esr_utils.captioned import DIRECTIONS, KS, METRICS, CaptionScorer, sign_flip_p

# Three clips, four captions: 0 and 1 of clip 0, 2 of clips 1 and 2, 3 of clip 2 alone.
RELEVANT = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)
SCORES = np.array([[0.9, 0.2, 0.1], [0.3, 0.8, 0.3], [0.5, 0.4, 0.6], [0.7, 0.9, 0.2]])


def test_both_directions_by_hand():
    # t2a, a row a caption: 0 is first (1, AP 1); 1 is level with clip 2 for places 2 and 3 (0, AP (1/2 + 1/3)/2 =
    # 5/12); 2 has clip 2 first and clip 1 third (1, AP (1 + 2/3)/2 = 5/6) and counts twice; 3 is third (0, AP 1/3).
    # a2t, a column a clip: 0: captions 0 first, 1 fourth (1, AP (1 + 2/4)/2 = 3/4); 1: third (0, AP 1/3);
    # 2: caption 2 first, 3 third (1, AP 5/6).
    found = CaptionScorer(RELEVANT, ["a", "b", "c"]).retrieval(SCORES)
    assert found.values["t2a/r@1"] == pytest.approx((1 + 0 + 2 * 1 + 0) / 5)
    assert found.values["t2a/map@10"] == pytest.approx((1 + 5 / 12 + 2 * 5 / 6 + 1 / 3) / 5)
    assert found.values["a2t/r@1"] == pytest.approx(2 / 3)
    assert found.values["a2t/map@10"] == pytest.approx((3 / 4 + 1 / 3 + 5 / 6) / 3)
    assert found.values["t2a/r@5"] == found.values["a2t/r@10"] == 1
    counts = {name: value for name, value in found.values.items() if "/n_" in name}
    assert counts == {
        "t2a/n_queries": 5, "t2a/n_left_out": 0, "t2a/n_candidates": 3,
        "a2t/n_queries": 3, "a2t/n_left_out": 0, "a2t/n_candidates": 4,
    }  # fmt: skip
    rows = found.queries.set_index(["direction", "query"])
    assert rows.loc[("t2a", 2), ["times", "n_relevant", "r@1"]].tolist() == [2, 2, 1]
    assert found.results("toy", "masked")["toy/masked/a2t/r@1"] == found.values["a2t/r@1"]


def slow(scores: np.ndarray, relevant: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """Sorts every query's items in each order that its ties allow."""
    sums = dict.fromkeys(METRICS, 0.0)
    for row, right, count in zip(scores, relevant, times, strict=True):
        if not right.any():
            continue
        orders = [o for o in itertools.permutations(range(len(row))) if list(row[list(o)]) == sorted(row)[::-1]]
        for order in orders:
            hits = [bool(right[i]) for i in order]
            for k in KS:
                sums[f"r@{k}"] += count * any(hits[:k]) / len(orders)
            precision = sum(sum(hits[: r + 1]) / (r + 1) for r in range(min(10, len(hits))) if hits[r])
            sums["map@10"] += count * precision / min(10, int(right.sum())) / len(orders)
    asked = times[relevant.any(axis=1)].sum()
    return {name: total / asked for name, total in sums.items()}


@pytest.mark.parametrize("seed", range(4))
def test_the_slow_full_sort_says_the_same(seed):
    """Ties, several captions a clip, shared captions, and on either side some without a relevant item."""
    rng = np.random.default_rng(seed)
    relevant = rng.random((6, 7)) < 0.25
    relevant[0], relevant[:, 1], relevant[1, 0] = False, False, True
    written_for = relevant & (rng.random(relevant.shape) < 0.7)
    written_for[1, 0] = True
    scores = rng.integers(0, 4, relevant.shape) / 4
    found = CaptionScorer(relevant, list("abcdefg"), written_for=written_for).retrieval(scores).values
    sides = {"t2a": (scores, relevant, written_for.sum(axis=1)), "a2t": (scores.T, relevant.T, np.ones(7))}
    for direction, (of_queries, right, times) in sides.items():
        expected = slow(of_queries, right, times)
        assert {name: found[f"{direction}/{name}"] for name in METRICS} == pytest.approx(expected)
        assert found[f"{direction}/n_left_out"] == (~right.any(axis=1)).sum() > 0


def test_many_queries_are_ranked_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    relevant, scores = np.eye(50, dtype=bool), rng.random((50, 50)).round(1)
    scorer = CaptionScorer(relevant, np.arange(50) % 7)
    whole = scorer.retrieval(scores)
    monkeypatch.setattr("esr_utils.captioned._BLOCK", 150)
    pd.testing.assert_frame_equal(scorer.retrieval(scores).queries, whole.queries)


def test_equal_scores_are_chance_and_not_perfect():
    found = CaptionScorer(np.eye(40, dtype=bool), np.arange(40)).retrieval(np.zeros((40, 40))).values
    for direction in DIRECTIONS:
        assert [found[f"{direction}/r@{k}"] for k in KS] == pytest.approx([1 / 40, 5 / 40, 10 / 40])


# Repeated captions ------------------------------------------------------------------------------------------


def test_a_perfect_system_is_perfect_only_if_shared_captions_count():
    """20 clips, 4 texts, five clips each: what finds the right text cannot know which copy is meant."""
    text = np.arange(20) % 4
    same = (text[:, None] == text).astype(float)
    of_text = np.arange(4)[:, None] == text
    found = CaptionScorer(of_text, text).retrieval(of_text.astype(float)).values
    assert all(found[f"{direction}/{name}"] == 1 for direction in DIRECTIONS for name in METRICS)
    assert (found["t2a/n_queries"], found["t2a/n_candidates"], found["a2t/n_candidates"]) == (20, 20, 4)
    diagonal = CaptionScorer(np.eye(20, dtype=bool), text).retrieval(same).values
    assert diagonal["t2a/r@1"] == pytest.approx(1 / 5)


# Reranking --------------------------------------------------------------------------------------------------


def test_a_shortlists_ceiling_and_reranking_within_it():
    scorer = CaptionScorer(RELEVANT, ["a", "b", "c"])
    # Two of three clips: caption 0 yes; 1 level for the second place, 1/2; 2 yes; 3 no. Two of four captions: yes, no,
    # yes.
    ceiling = scorer.ceiling(SCORES, 2)
    assert ceiling["t2a/ceiling@2"] == pytest.approx((1 + 1 / 2 + 2 + 0) / 5)
    assert ceiling["a2t/ceiling@2"] == pytest.approx(2 / 3)
    low, high = ceiling["a2t/ceiling@2_ci95"]
    assert 0 <= low < 2 / 3 < high <= 1

    def reranked(axis: int) -> np.ndarray:
        """The first two along the axis scored by an oracle, all else out."""
        place = np.argsort(np.argsort(-SCORES, axis=axis), axis=axis)
        return np.where(place < 2, RELEVANT.astype(float), -np.inf)

    found = scorer.retrieval(reranked(1), a2t=reranked(0)).values
    assert found["a2t/r@1"] == pytest.approx(ceiling["a2t/ceiling@2"])
    assert found["t2a/r@1"] in (pytest.approx(3 / 5), pytest.approx(4 / 5))  # by who of the level clips is second


# Intervals and tests ----------------------------------------------------------------------------------------


def test_speakers_are_drawn_where_there_are_five():
    relevant = np.eye(10, dtype=bool)
    assert CaptionScorer(relevant, np.arange(10) % 5).bootstrap == "speaker"
    few = CaptionScorer(relevant, np.arange(10) % 4)
    assert few.bootstrap == "utterance"
    again = CaptionScorer(relevant, np.arange(10) % 4)
    assert (few.weights == again.weights).all()
    assert not (few.weights == CaptionScorer(relevant, np.arange(10) % 4, seed=1).weights).all()


def test_a_replicate_is_the_metric_of_the_queries_drawn():
    """Slowly: every query listed as often as its clips were drawn, then the mean."""
    rng = np.random.default_rng(1)
    written_for = np.zeros((5, 6), dtype=bool)  # one text for clips 0 and 1, two for clip 2, none for clip 5
    written_for[[0, 0, 1, 2, 3, 4], [0, 1, 2, 2, 3, 4]] = True
    relevant = written_for.copy()
    relevant[1:4, 2:4] = True
    scorer = CaptionScorer(relevant, list("abcdef"), written_for=written_for)
    found = scorer.retrieval(rng.random(relevant.shape))
    for direction in DIRECTIONS:
        rows = found.queries[found.queries["direction"] == direction].set_index("query")["map@10"]
        for r in range(20):
            listed = []
            for clip, times in enumerate(scorer.weights[r]):
                asked = [clip] if direction == "a2t" else np.flatnonzero(written_for[:, clip])
                listed += [rows[q] for q in asked if q in rows] * times
            assert found.replicates[f"{direction}/map@10"][r] == pytest.approx(np.mean(listed))


def test_intervals_cover_what_they_say():
    """R@10 of noise among 40 is 1/4: about 95 of 100 intervals hold it, by clips and by speakers."""
    for speakers in (np.zeros(40), np.arange(40) % 20):
        held, width = 0, []
        for seed in range(100):
            scores = np.random.default_rng(seed).random((40, 40))
            low, high = CaptionScorer(np.eye(40, dtype=bool), speakers, seed).retrieval(scores).values["a2t/r@10_ci95"]
            held += low <= 0.25 <= high
            width.append(high - low)
        assert 86 <= held <= 100 and 0.2 < np.mean(width) < 0.4


def test_all_found_is_not_known_without_doubt():
    found = CaptionScorer(np.eye(30, dtype=bool), np.arange(30)).retrieval(np.eye(30)).values
    assert found["t2a/r@1"] == 1 and found["t2a/r@1_ci95"] == pytest.approx([0.025 ** (1 / 30), 1])


def system(relevant: np.ndarray, strength: float, seed: int) -> np.ndarray:
    return relevant * strength + np.random.default_rng(seed).standard_normal(relevant.shape)


def test_paired_differences():
    relevant, speakers = np.eye(80, dtype=bool), np.arange(80) % 8
    scorer = CaptionScorer(relevant, speakers)
    strong, weak = (scorer.retrieval(system(relevant, strength, 0)) for strength in (3.0, 1.0))
    table = scorer.difference([strong], [weak]).set_index(["direction", "metric"])
    assert len(table) == len(DIRECTIONS) * len(METRICS)
    for (direction, metric), row in table.iterrows():
        name = f"{direction}/{metric}"
        assert row["difference"] == pytest.approx(strong.values[name] - weak.values[name])
        assert 0 < row["low"] < row["difference"] < row["high"]
        assert row["p"] == pytest.approx(2 / 2**8)  # all eight speakers go the same way
    alone = np.subtract(*reversed(strong.values["t2a/map@10_ci95"])) + np.subtract(
        *reversed(weak.values["t2a/map@10_ci95"])
    )
    paired = table.loc[("t2a", "map@10")]
    assert paired["high"] - paired["low"] < alone  # what both find hard cancels out
    same = scorer.difference([strong], [strong])
    assert (same["difference"] == 0).all() and (same["p"] == 1).all() and (same[["low", "high"]] == 0).all(axis=None)


def test_differences_of_equal_systems_are_seldom_significant():
    relevant, small = np.eye(48, dtype=bool), 0
    scorer = CaptionScorer(relevant, np.arange(48) % 12)
    for seed in range(60):
        pair = [scorer.retrieval(system(relevant, 2.0, 2 * seed + i)) for i in range(2)]
        table = scorer.difference(pair[:1], pair[1:]).set_index(["direction", "metric"])
        small += table.loc[("a2t", "map@10"), "p"] < 0.05
    assert small <= 9  # 3 expected; more than 9 is a chance of 1 in 1000


def test_several_seeds_are_a_mean_whose_interval_covers_seeds():
    relevant = np.eye(60, dtype=bool)
    scorer = CaptionScorer(relevant, np.arange(60) % 6)
    ours = [scorer.retrieval(system(relevant, strength, 1)) for strength in (1.0, 2.0, 4.0)]
    theirs = [scorer.retrieval(system(relevant, 1.0, seed)) for seed in range(3)]
    row = scorer.difference(ours, theirs).set_index(["direction", "metric"]).loc[("t2a", "r@1")]
    means = [np.mean([found.values["t2a/r@1"] for found in side]) for side in (ours, theirs)]
    assert row["difference"] == pytest.approx(means[0] - means[1])
    middle = scorer.difference(ours[1:2], theirs[1:2]).set_index(["direction", "metric"]).loc[("t2a", "r@1")]
    assert row["high"] - row["low"] > middle["high"] - middle["low"]  # these seeds differ a lot


def test_sign_flips_by_hand():
    rng = np.random.default_rng(0)
    # 3, 1, -1: |sum| 3; of 8 patterns |±3 ±1 ±1| is at least 3 in 6
    assert sign_flip_p([3, 1, -1, 0], rng) == pytest.approx(6 / 8)
    assert sign_flip_p([1, 1, 1, 1, 1], rng) == pytest.approx(2 / 32)
    assert sign_flip_p([0, 0], rng) == 1
    assert sign_flip_p(np.ones(40), rng) == pytest.approx(1 / 10_000)  # the one seen; none of those drawn
    wide = rng.standard_normal(14)
    exact = np.mean([abs(np.dot(s, wide)) >= abs(wide.sum()) for s in itertools.product((-1, 1), repeat=14)])
    assert sign_flip_p(wide, rng) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: CaptionScorer(RELEVANT, ["a", "b"]), "3\\); there are 2 speakers"),
        (lambda: CaptionScorer(np.zeros((2, 2)), ["a", "b"]), "no query has a relevant item"),
        (lambda: CaptionScorer(RELEVANT, list("abc"), written_for=~RELEVANT), "not relevant to"),
        (lambda: CaptionScorer(RELEVANT, list("abc")).retrieval(SCORES.T), "shape \\(3, 4\\)"),
        (lambda: CaptionScorer(RELEVANT, list("abc")).retrieval(SCORES * np.nan), "NaN"),
    ],
)
def test_what_cannot_be_scored_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        change()
