"""Retrieval trials: one clip of a style to be found among distractors of other styles (ESR, section IV-C).

For each style, 1000 trials draw one positive and 400 distractors each from the same corpus and split:
"1-in-401". The paper's code keeps them as pickled row numbers, which point at other clips once a manifest is
sorted anew; here they hold utterance ids, are rebuilt exactly from their seed, and a saved file is refused if
it was cut or changed.

A model scores every clip once for each style; trials then only look the scores up.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from esr_utils.metrics import recall_at_k, reciprocal_rank
from esr_utils.runs import atomic_path

FORMAT = "esr-trials-1"
KS = (1, 5, 10, 20)  # the paper's cut-offs
MAP_K = 10

# what reading a cut, foreign or edited file can raise
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError, OverflowError)


@dataclass(frozen=True, eq=False)
class Trials:
    """The trials of one corpus and split.

    `table[style][i]` is trial i of a style, as positions in `utterances`: the positive in column 0, then the
    distractors in ascending order. Two Trials are equal if they hold the same trials of the same clips.
    """

    corpus: str
    split: str
    seed: int
    utterances: tuple[str, ...]  # sorted ids of all clips of the split that have a style
    table: dict[str, NDArray[np.int32]]  # style → (n_trials, 1 + n_distractors)

    def __post_init__(self) -> None:
        if len(set(self.utterances)) != len(self.utterances):
            raise ValueError("an utterance id occurs twice")
        for style, rows in self.table.items():
            if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] < 2:
                raise ValueError(f"trials of {style!r} have shape {rows.shape}, not (n, 1 + distractors)")
            if rows.min() < 0 or rows.max() >= len(self.utterances):
                raise ValueError(f"a trial of style {style!r} points at a clip that is not listed")

    @property
    def candidates_by_style(self) -> dict[str, int]:
        """Clips in a trial of each style: fewer than 401 where the other styles have fewer than 400 clips."""
        return {style: rows.shape[1] for style, rows in self.table.items()}

    @property
    def n_candidates(self) -> int:
        """Clips in a trial, of the style that has most; `protocol` names the range where styles differ."""
        return max(self.candidates_by_style.values())

    @property
    def protocol(self) -> str:
        """For titles: "1-in-401", or "1-in-141 to 1-in-176" where a small collection limits some styles."""
        fewest = min(self.candidates_by_style.values())
        most = f"1-in-{self.n_candidates}"
        return most if fewest == self.n_candidates else f"1-in-{fewest} to {most}"

    @property
    def sha256(self) -> str:
        """Hash of everything the trials hold."""
        header = [self.corpus, self.split, self.seed, self.utterances, list(self.candidates_by_style.items())]
        digest = hashlib.sha256(json.dumps(header).encode())
        for rows in self.table.values():
            digest.update(np.ascontiguousarray(rows, dtype="<i4").tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Trials) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def save(self, path: str | Path) -> None:
        """Writes gzip JSON, atomically: the ids once, then each trial as positions in that list."""
        content = {
            "format": FORMAT,
            "corpus": self.corpus,
            "split": self.split,
            "seed": self.seed,
            "sha256": self.sha256,
            "utterances": self.utterances,
            "table": {style: rows.tolist() for style, rows in self.table.items()},
        }
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        with atomic_path(path) as temporary:
            # Rising numbers: level 1 already makes them small. No time stamp: the same bytes each time.
            temporary.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=1, mtime=0))

    @classmethod
    def load(cls, path: str | Path) -> Trials:
        """Reads what `save` wrote.

        Raises ValueError naming the file if it is cut short, is not a trials file, or was changed after it
        was saved.
        """
        packed = Path(path).read_bytes()
        try:
            content = json.loads(gzip.decompress(packed))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            table = {style: np.array(rows, dtype=np.int32) for style, rows in content["table"].items()}
            utterances = tuple(content["utterances"])
            trials = cls(content["corpus"], content["split"], content["seed"], utterances, table)
            if trials.sha256 != content["sha256"]:
                raise ValueError("it was changed after it was saved")
        except UNREADABLE as error:
            raise ValueError(f"{path} is not a whole trials file: {error or type(error).__name__}") from error
        return trials


def build_trials(
    manifest: pd.DataFrame,
    corpus: str,
    split: str,
    n_trials: int = 1000,
    n_distractors: int = 400,
    seed: int = 0,
) -> Trials:
    """Draws the trials of every style of a corpus and split.

    For each trial the positive is any clip of the style, with equal chance, and the distractors are
    n_distractors different clips of other styles, or all of them if there are fewer. Clips without a style
    are left out: they could be of any. The ids are sorted first, so the order of the manifest's rows changes
    nothing.

    manifest: at least the columns utterance_id, corpus, split, style. Raises ValueError if one is missing, if
    an id occurs twice, or if the split has fewer than two styles.
    """
    utterances, styles = _candidates(manifest, corpus, split)
    rng = np.random.default_rng(seed)
    table = {}
    for style in np.unique(styles):
        positives, others = np.flatnonzero(styles == style), np.flatnonzero(styles != style)
        first = rng.choice(positives, size=(n_trials, 1))
        distractors = others[_subsets(len(others), min(n_distractors, len(others)), n_trials, rng)]
        table[str(style)] = np.hstack([first, distractors]).astype(np.int32)
    return Trials(corpus, split, int(seed), tuple(utterances), table)


def trial_values(trials: Trials, scores: Mapping[str, NDArray[np.floating]], ks: Sequence[int] = KS) -> pd.DataFrame:
    """The metrics of every single trial: a row each with style, utterance_id (its positive), r@k …, map@10.

    Joined with a manifest on utterance_id this gives results by gender, language, length or intensity of the
    clip to be found. Ties count as in `metrics.recall_at_k`.

    scores: for each style (N,), the similarity of its query to each of `trials.utterances`, in that order.
    Raises ValueError for a style without scores, a wrong number of scores, or a NaN.
    """
    ids = np.array(trials.utterances, dtype=object)
    frames = []
    for style, rows in trials.table.items():
        found = _scores_of(style, scores, len(ids))[rows]  # (n_trials, 1 + n_distractors)
        recall = recall_at_k(found[:, 0], found[:, 1:], ks)
        columns = {"style": style, "utterance_id": ids[rows[:, 0]]}
        columns |= {f"r@{k}": recall[:, i] for i, k in enumerate(ks)}
        columns[f"map@{MAP_K}"] = reciprocal_rank(found[:, 0], found[:, 1:], MAP_K)
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def evaluate_trials(trials: Trials, scores: Mapping[str, NDArray[np.floating]], ks: Sequence[int] = KS) -> pd.DataFrame:
    """Mean of `trial_values` over each style's trials: a row each with style, n_trials, n_candidates, r@k …

    The paper's figure for a corpus is the mean of the rows. Equal scores everywhere give chance, k /
    n_candidates.
    """
    return style_means(trials, trial_values(trials, scores, ks))


def style_means(trials: Trials, values: pd.DataFrame) -> pd.DataFrame:
    """What `evaluate_trials` returns, from the `trial_values` that are there already."""
    means = values.drop(columns="utterance_id").groupby("style", sort=False).mean().reset_index()
    means.insert(1, "n_trials", [len(trials.table[style]) for style in means["style"]])
    means.insert(2, "n_candidates", means["style"].map(trials.candidates_by_style))
    return means


def _candidates(manifest: pd.DataFrame, corpus: str, split: str) -> tuple[list[str], NDArray]:
    """Sorted ids and their styles, of the clips of one corpus and split that have a style."""
    missing = {"utterance_id", "corpus", "split", "style"} - set(manifest.columns)
    if missing:
        raise ValueError(f"the manifest has no column {', '.join(sorted(missing))}")
    chosen = manifest[(manifest["corpus"] == corpus) & (manifest["split"] == split)]
    style = chosen["style"].fillna("").astype(str)
    chosen = chosen.assign(style=style)[style != ""].sort_values("utterance_id")
    found = sorted(set(chosen["style"]))
    if len(found) < 2:
        has = f"only the style {found[0]!r}" if found else "no clip with a style"
        raise ValueError(f"{corpus!r}, split {split!r}, has {has}: trials need a second style")
    if chosen["utterance_id"].duplicated().any():
        twice = chosen.loc[chosen["utterance_id"].duplicated(), "utterance_id"].iloc[0]
        raise ValueError(f"utterance id {twice!r} occurs twice in {corpus!r}, split {split!r}")
    return chosen["utterance_id"].astype(str).tolist(), chosen["style"].to_numpy(dtype=str)


def _subsets(population: int, size: int, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """n random subsets of 0 … population − 1, each of `size` different numbers, ascending: (n, size).

    The first steps of a Fisher-Yates shuffle, for all n at once, pick what is taken or what is left,
    whichever is less: 400 of 420 clips cost 20 steps.
    """
    picks = min(size, population - size)
    decks, row = np.tile(np.arange(population, dtype=np.int32), (n, 1)), np.arange(n)
    for step, card in enumerate(rng.integers(np.arange(picks), population, size=(n, picks)).T):
        decks[row, card], decks[:, step] = decks[:, step].copy(), decks[row, card]
    chosen = np.full((n, population), picks < size)
    chosen[row[:, None], decks[:, :picks]] = picks == size
    return np.nonzero(chosen)[1].reshape(n, size)


def _scores_of(style: str, scores: Mapping[str, NDArray[np.floating]], n: int) -> NDArray[np.floating]:
    if style not in scores:
        raise ValueError(f"there are no scores for style {style!r}")
    found = np.asarray(scores[style])
    if found.shape != (n,):
        raise ValueError(f"scores of style {style!r} have shape {found.shape}; the trials have {n} clips")
    return found
