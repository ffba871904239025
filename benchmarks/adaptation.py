"""What adapting an index to what it holds brings, and where it harms: each corpus left out of the training in turn.

    python benchmarks/adaptation.py      with $ESR_DATA = <folder with ravdess, emodb, nemo>

Trained on the other two and the demo corpus, seeds 0-2; tested on the left-out one's training and validation speakers,
none of whom was heard, and its styles that the others have: its test split takes no part in what is chosen here.
Prints Markdown, and keeps runs in runs/adaptation/. Interrupted, it goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from esr_utils import adaptation, embedding, evaluation, manifests, release, runs, training
from esr_utils.adaptation import Statistics
from esr_utils.retriever import StyleRetriever

SEEDS = (0, 1, 2)
CORPORA = ("ravdess", "emodb", "nemo")
FOLDER = runs.RUNS / "adaptation"
WAYS = ("training", "corpus", "speaker")  # whose statistics
SIZES = (10, 20, 50, 100, 200)
DRAWS = 20  # of clips, of each size and seed


@dataclass
class LeftOut:
    """A corpus and a retriever that has not met it.

    Attributes:
        clips: sorted by utterance_id, those of styles that were trained on.
        pooled: (N, L, P) fp16, as an index keeps them.
    """

    model: StyleRetriever
    clips: pd.DataFrame
    pooled: np.ndarray

    def scores(self, rows: np.ndarray, statistics: Statistics) -> np.ndarray:
        """(len(rows), S), to the seen prompts of each style."""
        queries = evaluation.style_queries(self.model, self.styles, "seen")
        return adaptation.vectors(self.model, self.pooled[rows], statistics) @ queries.T

    @property
    def styles(self) -> list[str]:
        return sorted(set(self.clips["style"]))

    @property
    def truth(self) -> np.ndarray:
        return self.clips["style"].map(self.styles.index).to_numpy()

    def own(self, rows: np.ndarray) -> Statistics:
        """The statistics of some rows, however few."""
        return adaptation.gather([(["all"] * len(rows), self.pooled[rows])])["all"]

    def adapted(self, way: str) -> np.ndarray:
        """(N, S), every clip by the statistics of its group."""
        training_own = adaptation.of_training(self.model)
        groups = {"training": [""] * len(self.clips), "corpus": self.clips["corpus"], "speaker": self.clips["speaker"]}
        groups, found = np.asarray(groups[way]), np.zeros((len(self.clips), len(self.styles)), np.float32)
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            by = training_own if way == "training" else adaptation.usable(self.own(rows), training_own)
            found[rows] = self.scores(rows, by)
        return found


def left_out(corpus: str, seed: int) -> LeftOut:
    others = manifests.load_corpora([*(name for name in CORPORA if name != corpus), "demo"])
    configs = release.MODEL, release.TRAINING.but(seed=seed)
    model = training.fit(others, FOLDER / f"without-{corpus}-{seed}", *configs)
    clips = manifests.load_corpora(corpus)
    known = set(others.loc[others["corpus"] != "demo", "style"])  # the demo's styles are by rule
    clips = clips[(clips["split"] != "test") & clips["style"].isin(known)].sort_values("utterance_id")
    clips = clips.assign(split="left out")
    features = embedding.frozen_features(model, manifests.to_cuts(clips), configs[1].level)
    clips = clips.set_index("utterance_id", drop=False).loc[features.cut_ids].reset_index(drop=True)
    return LeftOut(model, clips, features.pooled.half().numpy())
