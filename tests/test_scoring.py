"""Scores to metrics: numbers worked out by hand with a tie, intervals, and the trials by a bin of the clip."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from esr_utils import intervals, metrics, trials
from esr_utils.scoring import Scorer

CLIPS = pd.DataFrame(
    {
        "utterance_id": [f"toy/{i}" for i in range(5)],
        "corpus": "toy",
        "split": "test",
        "style": ["angry", "angry", "calm", "calm", "sad"],
        "speaker": ["a", "b", "a", "b", "c"],
        "gender": ["female", "male", "female", "male", "female"],
        "language": "en",
    }
)
# rows the clips, columns angry, calm, sad
SCORES = np.array(
    [
        [0.9, 0.5, 0.85],
        [0.9, 0.6, 0.4],
        [0.9, 0.8, 0.1],  # level with the angry clips in the first column
        [0.1, 0.7, 0.2],
        [0.2, 0.1, 0.3],
    ]
)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    """Every trial takes all clips of other styles: 3, 3 and 4 of them, so nothing is left to the draw."""
    return Scorer(CLIPS, trials.build_trials(CLIPS, "toy", "test", n_trials=60, seed=0), seed=0)


def test_retrieval_by_hand(scorer):
    # angry: one of three distractors is level, so rank 1 or 2   R@1 1/2   1/rank (1 + 1/2)/2 = 3/4
    # calm:  each positive is above all distractors              R@1 1     1/rank 1
    # sad:   0.85 and 0.4 are above 0.3, so rank 3               R@1 0     1/rank 1/3
    values, _, per_style = scorer.retrieval(SCORES)
    assert values["r@1"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert values["map@10"] == pytest.approx((3 / 4 + 1 + 1 / 3) / 3)
    assert values["r@5"] == values["r@10"] == values["r@20"] == 1
    rows = per_style.set_index("style")
    assert rows["r@1"].to_dict() == pytest.approx({"angry": 0.5, "calm": 1.0, "sad": 0.0})
    assert rows["n_candidates"].to_dict() == {"angry": 4, "calm": 4, "sad": 5}


def test_the_whole_collection_by_hand(scorer):
    # P@10 of 5 clips: 2/10, 2/10, 1/10.
    # AP of angry, 2 right among 3 level ones: at ranks 1, 2: 1; at 1, 3: 5/6; at 2, 3: 7/12; mean 29/36.
    # AP of calm 1, of sad 1/3.
    values, _, _ = scorer.retrieval(SCORES)
    assert values["collection/p@10"] == pytest.approx(0.5 / 3)
    assert values["collection/map"] == pytest.approx((29 / 36 + 1 + 1 / 3) / 3)


def test_by_gender_of_the_clip_to_be_found_by_hand(scorer):
    # female: angry 1/2, calm 1, sad 0.  male: angry 1/2, calm 1, and no sad clip.
    values, _, _ = scorer.retrieval(SCORES)
    assert values["gender=female/r@1"] == pytest.approx(1.5 / 3)
    assert values["gender=male/r@1"] == pytest.approx(1.5 / 2)
    assert not [key for key in values if key.startswith("language=")]  # there is but one


def test_classification_by_hand(scorer):
    # found: angry, angry, angry (wrong), calm, sad
    values, _ = scorer.classification(SCORES)
    assert values["accuracy"] == pytest.approx(4 / 5)
    assert values["uar"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    confusion = scorer.confusion(SCORES)
    assert confusion.to_numpy().tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert list(confusion.index) == list(confusion.columns) == ["angry", "calm", "sad"]
    assert confusion.sum(axis=1).to_dict() == CLIPS["style"].value_counts().to_dict()


def test_styles_level_at_the_top_share_the_clip():
    """Were the first to take it, the style that comes first in the alphabet would be favoured."""
    scorer = Scorer(CLIPS, trials.build_trials(CLIPS, "toy", "test", n_trials=5), seed=0)
    scores = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 0], [0, 0, 1.0]])
    values, _ = scorer.classification(scores)
    assert values["accuracy"] == pytest.approx((1 / 2 + 1 + 1 / 3 + 1 + 1) / 5)
    assert values["uar"] == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    expected = [[1.5, 0.5, 0], [1 / 3, 4 / 3, 1 / 3], [0, 0, 1]]
    np.testing.assert_allclose(scorer.confusion(scores).to_numpy(), expected)


def test_every_interval_holds_its_value(scorer):
    values = scorer.retrieval(SCORES)[0] | scorer.classification(SCORES)[0]
    of_trials = ("r@1", "r@5", "r@10", "r@20", "map@10")
    groups = [f"gender={gender}/{name}" for gender in ("female", "male") for name in of_trials]
    for name in (*of_trials, *groups, "collection/p@10", "collection/map", "accuracy", "uar"):
        low, high = values[f"{name}_ci95"]
        assert 0 <= low <= values[name] <= high <= 1
    low, high = values["r@1_ci95"]
    assert high - low > 0.1  # five clips say little


def test_an_interval_holds_its_value_where_few_replicates_differ():
    low, high = intervals.interval(np.array([0.5] * 98 + [1.0] * 2), 0.5)
    assert low <= 0.5 <= high


def test_scores_that_are_all_alike_are_chance(scorer):
    values, _, _ = scorer.retrieval(np.zeros((5, 3)))
    assert values["r@1"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 5) / 3)


def test_intervals_are_of_trials_of_the_same_size():
    """Of 30 others a trial takes 5: among equal scores the chance is 1/6, in every replicate too."""
    rows = pd.DataFrame({"utterance_id": [f"toy/{i:02d}" for i in range(45)], "corpus": "toy", "split": "test"})
    rows = rows.assign(style=["angry", "calm", "sad"] * 15, speaker="a", gender="", language="")
    drawn = trials.build_trials(rows, "toy", "test", n_trials=20, n_distractors=5)
    values, _, _ = Scorer(rows, drawn, 0).retrieval(np.zeros((45, 3)))
    assert values["r@1"] == pytest.approx(1 / 6)
    assert values["r@1_ci95"] == pytest.approx([1 / 6, 1 / 6])


def test_intervals_are_over_speakers_where_there_are_five():
    many = pd.concat([CLIPS] * 3, ignore_index=True)
    many["utterance_id"] = [f"toy/{i:02d}" for i in range(15)]
    few = Scorer(many, trials.build_trials(many, "toy", "test", n_trials=5), 0)
    many["speaker"] = [f"s{i % 5}" for i in range(15)]
    enough = Scorer(many, trials.build_trials(many, "toy", "test", n_trials=5), 0)
    assert (few.bootstrap, enough.bootstrap) == ("utterance", "speaker")


def test_replicates_of_the_whole_collection_are_those_of_the_clips_drawn(scorer):
    """Each replicate written out, with ties, by the plain functions."""
    _, replicates, _ = scorer.retrieval(SCORES)
    lost = 0
    for r in range(60):
        clips = np.repeat(np.arange(5), scorer.weights[r])
        there = [s for s in range(3) if (scorer.truth[clips] == s).any()]
        lost += len(there) < 3
        ranked = [(SCORES[clips, s], scorer.truth[clips] == s) for s in there]
        precision = np.mean([metrics.precision_at_k(*one, 10) for one in ranked])
        whole = np.mean([metrics.average_precision(*one) for one in ranked])
        assert replicates["collection/p@10"][r] == pytest.approx(precision)
        assert replicates["collection/map"][r] == pytest.approx(whole)
    assert lost


def test_replicates_of_a_group_are_those_of_the_clips_drawn(scorer):
    """Trials whose positive is of a woman, among the other styles' clips of all: the mean over the styles left."""
    values, replicates, _ = scorer.retrieval(SCORES)
    women = (CLIPS["gender"] == "female").to_numpy()
    for r in range(60):
        times, found = scorer.weights[r], []
        for s in range(3):
            own = scorer.truth == s
            others = np.repeat(SCORES[~own, s], times[~own])
            positives = np.repeat(SCORES[own & women, s], times[own & women])
            if len(others) and len(positives):
                # Each trial holds at most as many others as the original has: with so few it is all of them.
                few = scorer.trials.candidates_by_style[scorer.styles[s]] - 1
                trials_of = list(itertools.combinations(others, min(few, len(others))))
                hits = [metrics.recall_at_k([p], [drawn], [1])[0, 0] for p in positives for drawn in trials_of]
                found.append(np.mean(hits))
        expected = np.mean(found) if found else np.nan
        assert replicates["gender=female/r@1"][r] == pytest.approx(expected, nan_ok=True)
    low, high = values["gender=female/r@1_ci95"]
    assert low < values["gender=female/r@1"] < high


def test_a_style_has_its_clips_and_an_interval(scorer):
    _, _, per_style = scorer.retrieval(SCORES)
    rows = per_style.set_index("style")
    assert rows["clips"].to_dict() == {"angry": 2, "calm": 2, "sad": 1}
    for name in ("r@1", "r@5", "r@10", "r@20", "map@10"):
        assert ((rows[f"{name} low"] <= rows[name]) & (rows[name] <= rows[f"{name} high"])).all()
    # Both calm clips are always found, which says little of others: as 2 of 2.
    assert rows.loc["calm", ["r@1 low", "r@1 high"]].tolist() == pytest.approx([0.025**0.5, 1])
    assert rows.loc["angry", "r@1 low"] < 0.5 < rows.loc["angry", "r@1 high"]


# By the length of the clip to be found ----------------------------------------------------------------------


def test_recall_by_bin_by_hand(scorer):
    """As in `test_retrieval_by_hand`: angry clips are found half of the time, calm ones always, the sad one never."""
    table, replicates = scorer.by_bin(SCORES, np.array([0, 2, 0, 2, 2]), 4)
    assert table["clips"].tolist() == [2, 0, 3, 0] and table["trials"].sum() == 180
    n = table["trials"]
    angry, calm = (scorer.trials.table[style][:, 0] for style in ("angry", "calm"))
    first = (angry == 0).sum(), (calm == 2).sum()
    assert n[0] == sum(first) and n[1] == n[3] == 0
    assert table.loc[0, "r@1"] == pytest.approx((first[0] / 2 + first[1]) / n[0])
    assert table.loc[2, "r@1"] == pytest.approx(((60 - first[0]) / 2 + 60 - first[1]) / n[2])
    assert table.loc[[1, 3], "r@1"].isna().all() and np.isnan(replicates[[1, 3]]).all()
    values, _, _ = scorer.retrieval(SCORES)
    assert np.nansum(table["r@1"] * n) / 180 == pytest.approx(values["r@1"])


def test_replicates_by_bin_are_those_of_the_clips_drawn(scorer):
    """Each replicate written out: its clips, each as often as it was drawn, and the mean over a style's positives."""
    inside = np.array([True, False, True, False, True])
    _, replicates = scorer.by_bin(SCORES, np.where(inside, 0, 1), 2)
    for r in range(40):
        times, hits, share = scorer.weights[r], 0.0, 0.0
        for s, style in enumerate(scorer.styles):
            own = scorer.truth == s
            others = np.repeat(SCORES[~own, s], times[~own])
            if not times[own].sum() or not len(others):
                continue
            n = min(scorer.trials.candidates_by_style[style] - 1, len(others))
            for clip in np.flatnonzero(own & inside & (times > 0)):
                drawn = np.array(list(itertools.combinations(others, n)))
                first = (drawn <= SCORES[clip, s]).all(axis=1) / (1 + (drawn == SCORES[clip, s]).sum(axis=1))
                hits += times[clip] / times[own].sum() * first.mean()
            share += times[own & inside].sum() / times[own].sum()
        if share:
            assert replicates[0, r, 0] == pytest.approx(hits / share)
        else:
            assert np.isnan(replicates[0, r, 0])
