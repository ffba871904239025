"""Mining's arithmetic, by hand: Eq. 4 and 5, thresholds, speakers, merging, sentences, tags."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esr_utils.mining import speakers
from esr_utils.mining.annotation import Annotation, describe, parse
from esr_utils.mining.segments import Segment, marks_after, sentences
from esr_utils.prompts import PromptBank


def slow_similarity(vectors, labels) -> list[float]:
    """Eq. (4) and (5) as the paper writes them."""
    found = []
    for i, v in enumerate(vectors):
        others = [
            (v @ w / (np.linalg.norm(v) * np.linalg.norm(w)) + 1) / 2
            for j, w in enumerate(vectors)
            if j != i and labels[j] == labels[i]
        ]
        found.append(sum(others) / len(others) if others else math.nan)
    return found


# Eq. 4 and 5 ------------------------------------------------------------------------------------------------


def test_similarity_by_hand():
    """Of speaker 0: the first and third are one direction, the second stands upright on it. Speaker 1 has one clip."""
    vectors = np.array([[2.0, 0.0], [0.0, 5.0], [1.0, 0.0], [-1.0, 0.0]])
    found = speakers.mean_similarity(vectors, [0, 0, 0, 1])
    np.testing.assert_allclose(found, [0.75, 0.5, 0.75, np.nan])
    np.testing.assert_array_equal(speakers.is_kept(found), [True, False, True, True])
    np.testing.assert_array_equal(speakers.is_kept(found, keep_single=False), [True, False, True, False])


def test_similarity_is_the_papers_double_sum():
    rng = np.random.default_rng(0)
    vectors, labels = rng.normal(size=(40, 7)) * rng.uniform(0.1, 9, (40, 1)), rng.integers(0, 12, 40)
    np.testing.assert_allclose(speakers.mean_similarity(vectors, labels), slow_similarity(vectors, labels), atol=1e-12)


@pytest.mark.parametrize(("cosine", "kept"), [(0.3, True), (0.2999, False), (0.301, True), (-1.0, False), (1.0, True)])
def test_the_threshold_is_a_mean_cosine_of_03(cosine, kept):
    vectors = np.array([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]])
    found = speakers.mean_similarity(vectors, [4, 4])
    np.testing.assert_allclose(found, (cosine + 1) / 2)
    assert speakers.is_kept(found).tolist() == [kept, kept]


def test_no_clips_have_no_similarity():
    assert len(speakers.mean_similarity(np.zeros((0, 5)), [])) == 0
    assert len(speakers.is_kept(np.zeros(0))) == 0


@pytest.mark.parametrize("bad", [[0.0, 0.0], [np.nan, 1.0], [np.inf, 1.0]])
def test_a_vector_without_direction_is_refused(bad):
    with pytest.raises(ValueError, match="speaker vector"):
        speakers.mean_similarity(np.array([[1.0, 0.0], bad]), [0, 0])


# Speakers ---------------------------------------------------------------------------------------------------


def at_angles(*degrees: float) -> np.ndarray:
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_speakers_are_numbered_as_they_first_speak():
    assert speakers.cluster(at_angles(90, 0, 92, 3, 180), min_cosine=0.7).tolist() == [0, 1, 0, 1, 2]


@pytest.mark.parametrize(("min_cosine", "found"), [(0.49, [0, 0]), (0.51, [0, 1])])
def test_two_segments_are_one_speaker_above_the_cosine(min_cosine, found):
    assert speakers.cluster(at_angles(0, 60), min_cosine).tolist() == found  # cos 60° = 0.5


def test_groups_are_compared_by_their_mean_cosine():
    """20° from both of a pair that are 20° apart: (cos 20° + cos 40°) / 2 = 0.853."""
    assert speakers.cluster(at_angles(0, 20, 40), 0.85).tolist() == [0, 0, 0]
    assert len(set(speakers.cluster(at_angles(0, 20, 40), 0.86))) == 2


@pytest.mark.parametrize("n", [0, 1])
def test_few_segments_are_one_speaker(n):
    assert speakers.cluster(at_angles(*[0] * n), 0.7).tolist() == [0] * n


def merged(parts, labels, gap_s=0.5, max_s=10.0):
    clips, found, vectors = speakers.merge(parts, labels, at_angles(*range(0, 10 * len(parts), 10)), gap_s, max_s)
    assert len(clips) == len(found) == len(vectors)
    return [(clip.start_s, clip.end_s) for clip in clips], found.tolist(), vectors


def test_neighbours_of_one_speaker_become_one_clip():
    parts = [Segment(0, 1), Segment(1.5, 2.5), Segment(3.1, 4), Segment(4.2, 5), Segment(5.1, 6)]
    #                      0.5 apart: joined   0.6: not   another speaker      and back
    clips, labels, vectors = merged(parts, [0, 0, 0, 1, 0])
    assert clips == [(0, 2.5), (3.1, 4), (4.2, 5), (5.1, 6)] and labels == [0, 0, 1, 0]
    np.testing.assert_allclose(vectors[0], at_angles(5)[0])  # half way between 0° and 10°: both last 1 s


def test_a_clips_vector_weighs_its_parts_by_duration():
    _, _, vectors = speakers.merge([Segment(0, 3), Segment(3, 4)], [0, 0], np.eye(2) * 7, 0.5, 10)
    np.testing.assert_allclose(vectors, [[3 / math.sqrt(10), 1 / math.sqrt(10)]])


def test_clips_grow_no_longer_than_the_maximum():
    parts = [Segment(i, i + 1) for i in range(5)]
    assert merged(parts, [0] * 5, max_s=2.0)[0] == [(0, 2), (2, 4), (4, 5)]


def test_sentences_are_not_joined():
    parts = [Segment(0, 1, "One.", whole=True), Segment(1, 2, "Two.", whole=True)]
    assert merged(parts, [0, 0])[0] == [(0, 1), (1, 2)]


def test_nothing_merges_to_nothing():
    clips, labels, vectors = speakers.merge([], [], np.zeros((0, 1)), 0.5, 10)
    assert clips == [] and len(labels) == len(vectors) == 0


def test_purity_by_hand():
    """x: two of a, one of b; y: one of b."""
    assert speakers.purity(["x", "x", "x", "y"], ["a", "a", "b", "b"]) == 0.75
    assert math.isnan(speakers.purity([], []))


# Sentences --------------------------------------------------------------------------------------------------


def test_marks_are_found_after_their_words():
    words = ["你", "好", "吗", "okay", "it's", "3.5"]
    assert marks_after(words, "你好吗？Okay, it's 3.5.") == ["", "", "？", ",", "", "."]
    assert marks_after([], "") == []
    with pytest.raises(ValueError, match="'no'"):
        marks_after(["yes", "no"], "Yes, maybe.")
    with pytest.raises(ValueError, match="'no'"):
        marks_after(["yes", "no"], "Yes.")


def test_sentences_end_at_marks_and_pauses():
    words = ["你", "好", "today", "is", "fine", "yes", "no"]
    times = [(0, 0.5), (0.5, 1), (1.1, 1.5), (1.5, 2), (2, 2.5), (3.49, 4), (5.0, 5.2)]
    found = sentences(words, times, ["", "。", "，", "", "", "", ""])
    assert [(s.start_s, s.end_s, s.text) for s in found] == [
        (0, 1, "你好。"),
        (1.1, 4, "today，is fine yes"),  # a comma ends nothing, nor does a pause of 0.99 s
        (5.0, 5.2, "no"),  # a pause of 1 s does
    ]
    assert all(s.whole for s in found)


# Emotions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "heard", "style"),
    [
        ("<|zh|><|HAPPY|><|Speech|><|withitn|>你好。", Annotation("zh", "HAPPY", "", "你好。"), "happy"),
        ("<|yue|><|EMO_UNKNOWN|><|BGM|><|woitn|>la", Annotation("zh", "", "BGM", "la"), ""),
        ("<|en|><|ANGRY|><|Laughter|>Go <|Speech|>away", Annotation("en", "ANGRY", "Laughter", "Go away"), "angry"),
        ("<|nospeech|><|Event_UNK|>", Annotation(), ""),
        ("no tags", Annotation(text="no tags"), ""),
        ("", Annotation(), ""),
    ],
)
def test_sensevoice_tags(said, heard, style):
    assert parse(said) == heard and heard.style == style


def test_descriptions_are_of_the_bank_and_stay_the_same():
    bank = PromptBank.load()
    found = [describe("sad", f"corpus/{i}", bank) for i in range(30)]
    assert set(found) <= set(bank.all_prompts("sad")) and len(set(found)) > 10
    assert found == [describe("sad", f"corpus/{i}", bank) for i in range(30)]
    assert describe("", "corpus/0", bank) == ""
