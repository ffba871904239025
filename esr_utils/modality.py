"""Numbers for what the eye sees in a map of the joint space: do speech and text share one place (ESR Fig. 4)?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score

LARGEST_GAP = 2.0


def gap(speech: NDArray, text: NDArray) -> float:
    """Distance between the centroids of speech and text, (N, d) and (M, d) unit vectors or means of them.

    0 where the two share one centre, 2 (`LARGEST_GAP`) at most (Liang et al., "Mind the Gap", 2022). Compare it with
    `style_distance`: a gap as wide as two styles are apart is a gap.
    """
    return float(np.linalg.norm(speech.mean(axis=0) - text.mean(axis=0)))


def gap_replicates(speech: NDArray, text: NDArray, weights: NDArray) -> NDArray[np.floating]:
    """(R,) `gap` in each bootstrap replicate of the clips, weights (R, N); the sentences are what they are."""
    centroids = weights @ speech / weights.sum(axis=1, keepdims=True)
    return np.linalg.norm(centroids - text.mean(axis=0), axis=1)


def style_distance(vectors: NDArray, styles: Sequence[str]) -> float:
    """Mean distance between the centroids of two styles, (N, d) vectors of one modality: a measure for the gap."""
    centroids = pd.DataFrame(vectors).groupby(np.asarray(styles)).mean().to_numpy()
    apart = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
    return float(apart[np.triu_indices(len(centroids), 1)].mean())


def probe_accuracy(vectors: NDArray, styles: Sequence[str], modality: Sequence[str]) -> float:
    """How well a linear probe tells speech from text: 0.5 is chance, 1 is always.

    A logistic regression, cross-validated over 5 folds of styles, each modality weighing as much: balanced accuracy.
    All clips and sentences of a style are in one fold, so that none is near one of the other folds by being said by
    the same rule or made of the same words; what is left is a direction that tells the modalities apart in every
    style. It may fall below 0.5 where that direction turns round between styles.

    Raises:
        ValueError: fewer than 2 styles.
    """
    n_styles = len(set(styles))
    if n_styles < 2:
        raise ValueError(f"a probe needs 2 styles to train on one and be tested on the other; there are {n_styles}")
    probe = LogisticRegression(max_iter=2000, class_weight="balanced")
    folds = GroupKFold(min(5, n_styles))
    scores = cross_val_score(
        probe, vectors, np.asarray(modality), groups=np.asarray(styles), cv=folds, scoring="balanced_accuracy"
    )
    return float(scores.mean())
