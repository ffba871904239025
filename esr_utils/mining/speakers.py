"""Whose voice each segment is, and which clips are unlike the rest of their speaker (FS-CLAP, Eq. 4 and 5).

Arithmetic alone: no model and no file. Speakers are told apart within a file; nobody is recognised in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import AgglomerativeClustering

from esr_utils.mining.segments import Segment

THRESHOLD = 0.65  # of Eq. (5); a mean cosine of 0.30


def unit(vectors: NDArray) -> NDArray[np.float64]:
    """(N, D) scaled to length 1.

    Raises:
        ValueError: one is 0 or not a number, and so has no direction.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ValueError("a speaker vector is 0 or not a number")
    return vectors / lengths


def mean_similarity(vectors: NDArray, speakers: Sequence[int]) -> NDArray[np.float64]:
    """(N,) Eq. (5): the mean of (cos + 1) / 2 (Eq. 4) from each clip to the other clips of its speaker.

    A mean of cosines with unit vectors is a cosine with their sum, so the N x N of Eq. (4) is never made.

    Returns:
        0 to 1; NaN for the only clip of a speaker, which has no other.
    """
    speakers, found = np.asarray(speakers), np.full(len(vectors), np.nan)
    directions = unit(vectors) if len(vectors) else np.zeros((0, 1))
    for speaker in np.unique(speakers):
        own = np.flatnonzero(speakers == speaker)
        if len(own) > 1:
            cosines = directions[own] @ directions[own].sum(axis=0) - 1  # 1 is the clip with itself
            found[own] = (cosines / (len(own) - 1) + 1) / 2
    return found


def is_kept(similarity: NDArray, threshold: float = THRESHOLD, keep_single: bool = True) -> NDArray[np.bool_]:
    """(N,) whether a clip is like the others of its speaker; a speaker's only clip (NaN) as `keep_single` says."""
    similarity = np.asarray(similarity, dtype=np.float64)
    # Equal counts as reached, also where the sum of cosines is rounded.
    return np.where(np.isnan(similarity), keep_single, similarity >= threshold - 1e-9)


def cluster(vectors: NDArray, min_cosine: float) -> NDArray[np.int64]:
    """(N,) speakers from 0, in the order in which they first speak.

    Agglomerative: the two groups whose clips have the highest mean cosine become one, until none reaches `min_cosine`.
    """
    if len(vectors) < 2:
        return np.zeros(len(vectors), dtype=np.int64)
    cosines = np.clip(unit(vectors) @ unit(vectors).T, -1, 1)
    merging = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1 - min_cosine
    )
    _, first, labels = np.unique(merging.fit_predict(1 - cosines), return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels]


def merge(
    segments: Sequence[Segment], speakers: Sequence[int], vectors: NDArray, gap_s: float, max_s: float
) -> tuple[list[Segment], NDArray[np.int64], NDArray[np.float64]]:
    """Neighbours of one speaker become one clip, if no more than `gap_s` apart and `max_s` seconds long together.

    Whole sentences stay as they are.

    Args:
        segments: in order of time.
        vectors: (N, D); a clip's vector is the mean of its parts', by their duration, of unit length.
    Returns:
        Clips, their speakers (M,) and vectors (M, D).
    """
    groups: list[list[int]] = []
    for i, segment in enumerate(segments):
        if groups and _joins(segments, groups[-1], segment, gap_s, max_s) and speakers[groups[-1][0]] == speakers[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    clips = [_joined([segments[i] for i in group]) for group in groups]
    if not groups:
        return [], np.zeros(0, np.int64), np.zeros((0, np.shape(vectors)[-1] if np.ndim(vectors) == 2 else 0))
    directions = unit(vectors)
    means = [np.average(directions[g], axis=0, weights=[segments[i].duration_s for i in g]) for g in groups]
    return clips, np.array([speakers[group[0]] for group in groups]), unit(np.stack(means))


def _joins(segments: Sequence[Segment], group: list[int], segment: Segment, gap_s: float, max_s: float) -> bool:
    first, last = segments[group[0]], segments[group[-1]]
    near = segment.start_s - last.end_s <= gap_s + 1e-9
    return near and segment.end_s - first.start_s <= max_s and not (last.whole or segment.whole)


def _joined(parts: list[Segment]) -> Segment:
    text = " ".join(part.text for part in parts if part.text)
    return replace(parts[0], end_s=parts[-1].end_s, text=text)


def purity(found: Sequence, true: Sequence) -> float:
    """The share of clips whose speaker is the most frequent true one among those given the same name; NaN of none.

    It is 1 if every clip is a speaker of its own, so the number of speakers goes with it.
    """
    found, true = np.asarray(found), np.asarray(true)
    if not len(found):
        return float("nan")
    counts = [np.unique(true[found == name], return_counts=True)[1].max() for name in np.unique(found)]
    return float(np.sum(counts) / len(found))
