"""A model and a manifest to numbers: retrieval trials, retrieval over the whole collection, zero-shot classification.

Every number is a fraction. Trials, classification and controls come with a 95 % bootstrap interval over speakers, then
their utterances (see `intervals`), never over the trials. Keys of the flat results:

    <corpus>/<prompts>/r@1, r@5, r@10, r@20, map@10       trials, mean over styles; `<prompts>` is seen or held_out
    <corpus>/<prompts>/collection/p@10, map               every clip of the split ranked, many are right
    <corpus>/<prompts>/<column>=<value>/r@1 …             trials whose positive has that gender or language
    <corpus>/zero_shot/accuracy, uar                      argmax over the styles present, seen prompts
    <corpus>/zero_shot_held_out/accuracy, uar             likewise, held-out prompts
    <corpus>/control/<name>/r@1 … accuracy                what simple cues give (`controls`)
    <key>_ci95                                            [low, high]
    <corpus>/n_clips, n_skipped, n_candidates, bootstrap  of a corpus
    n_trials, n_candidates, seed, seconds, level, split   of the whole; n_candidates is the smallest corpus's
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from esr_utils import acoustics, intervals, metrics, trials
from esr_utils.config import Level
from esr_utils.corpora import DEMO_FOLDER
from esr_utils.embedding import CACHE, Embeddings, embed
from esr_utils.manifests import load_corpora, read_manifest, to_cuts, with_root
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES, PromptBank
from esr_utils.text import TextBackbone

PROMPTS = ("seen", "held_out")
REPLICATES = 1000
_BREAKDOWNS = ("gender", "language")


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        results: the flat dict above, ready for results.json.
        per_style: one row per corpus, prompts and style, with the trials' means.
        confusion: corpus -> styles × styles counts, rows true, columns found (seen prompts).
        trials: corpus -> the trials used.
        embeddings: of all clips, in the manifest's order.
        skipped: clips that could not be used: utterance_id, reason.
    """

    results: dict = field(default_factory=dict)
    per_style: pd.DataFrame = field(default_factory=pd.DataFrame)
    confusion: dict[str, pd.DataFrame] = field(default_factory=dict)
    trials: dict[str, trials.Trials] = field(default_factory=dict)
    embeddings: Embeddings | None = None
    skipped: pd.DataFrame = field(default_factory=pd.DataFrame)


@torch.no_grad()
def style_queries(model: StyleRetriever, styles: list[str], prompts: str) -> NDArray[np.float32]:
    """(len(styles), d): the mean of the unit vectors of all of a style's prompts.

    The mean similarity over prompts, by which the paper ranks (ESR section IV-C), equals the similarity to this mean.
    """
    bank = PromptBank.load()
    return np.stack([model.encode_text(bank.all_prompts(s, prompts)).mean(0).cpu().numpy() for s in styles])


def evaluate(
    model: StyleRetriever,
    manifest: pd.DataFrame,
    split: str = "test",
    level: Level = "normalised",
    seed: int = 0,
    cache: Path | None = CACHE,
    n_trials: int = 1000,
) -> Evaluation:
    """Evaluates on each corpus of the manifest's split. Clips without a style are left out.

    Args:
        manifest: rows of `manifests.load_corpora`.
        seed: of the trials and the bootstrap.

    Raises:
        ValueError: the split has no labelled clip, or a corpus has fewer than two styles in it.
    """
    started = time.perf_counter()
    rows = manifest[(manifest["split"] == split) & (manifest["style"] != "")].reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"no clip of split {split!r} has a style; splits here: {sorted(manifest['split'].unique())}")
    embeddings = embed(model, to_cuts(rows), level, cache)
    vectors = pd.Series(list(embeddings.vectors), index=embeddings.utterance_ids)
    found = Evaluation(embeddings=embeddings, skipped=embeddings.skipped)
    per_style = []
    for corpus, clips in rows.groupby("corpus", sort=False):
        usable = clips[clips["utterance_id"].isin(vectors.index)].sort_values("utterance_id", ignore_index=True)
        if usable.empty:
            raise ValueError(
                f"{corpus}, split {split!r}: none of {len(clips)} clips could be used: {embeddings.skipped}"
            )
        matrix = np.stack(vectors[usable["utterance_id"]].to_list())
        drawn = trials.build_trials(usable, corpus, split, n_trials=n_trials, seed=seed)
        found.trials[corpus] = drawn
        styles = list(drawn.table)
        scorer = Scorer(usable, drawn, seed)
        for prompts in PROMPTS:
            scores = matrix @ style_queries(model, styles, prompts).T
            values, by_style = scorer.retrieval(scores)
            found.results |= _prefixed(f"{corpus}/{prompts}", values)
            zero_shot = f"{corpus}/zero_shot" + ("" if prompts == "seen" else f"_{prompts}")
            found.results |= _prefixed(zero_shot, scorer.classification(scores))
            per_style.append(by_style.assign(corpus=corpus, prompts=prompts))
            if prompts == "seen":
                found.confusion[corpus] = scorer.confusion(scores)
        found.results |= {
            f"{corpus}/n_clips": len(usable),
            f"{corpus}/n_skipped": len(clips) - len(usable),
            f"{corpus}/n_candidates": drawn.n_candidates,
            f"{corpus}/bootstrap": scorer.bootstrap,
        }
    found.per_style = pd.concat(per_style, ignore_index=True)
    found.results |= {
        "n_trials": n_trials,
        "n_candidates": min(drawn.n_candidates for drawn in found.trials.values()),
        "seed": seed,
        "seconds": time.perf_counter() - started,
        "level": level,
        "split": split,
    }
    return found


class Scorer:
    """Scores of clips for styles -> metrics with intervals, for one corpus and split.

    `retrieval` and `classification` take (N, S): row n the clip `clips.iloc[n]` (sorted by utterance_id), column s the
    style `list(trials.table)[s]`. It does not matter whether a retriever or a classifier gave them.
    """

    def __init__(self, clips: pd.DataFrame, drawn: trials.Trials, seed: int) -> None:
        self.clips, self.trials = clips, drawn
        self.styles = list(drawn.table)
        self.truth = clips["style"].map(self.styles.index).to_numpy()
        rng = np.random.default_rng(seed)
        self.weights, self.bootstrap = intervals.speaker_bootstrap_weights(clips["speaker"], REPLICATES, rng)

    def retrieval(self, scores: NDArray) -> tuple[dict, pd.DataFrame]:
        """(N, S) -> the trials' and the collection's metrics, and one row per style."""
        by_style = {style: scores[:, s] for s, style in enumerate(self.styles)}
        singles = trials.trial_values(self.trials, by_style)
        names = [name for name in singles if name not in ("style", "utterance_id")]
        per_style = trials.evaluate_trials(self.trials, by_style)
        values = {name: float(per_style[name].mean()) for name in names}
        values |= {f"{name}_ci95": interval for name, interval in self._trial_intervals(scores).items()}
        relevant = self.truth[:, None] == np.arange(len(self.styles))
        values["collection/p@10"] = float(metrics.precision_at_k(scores.T, relevant.T, 10).mean())
        values["collection/map"] = metrics.mean_average_precision(scores.T, relevant.T, None)
        columns = [c for c in _BREAKDOWNS if self.clips[c].replace("", None).nunique() > 1]
        singles = singles.merge(self.clips[["utterance_id", *columns]], on="utterance_id")
        for column in columns:
            means = singles[singles[column] != ""].groupby([column, "style"])[names].mean().groupby(level=0).mean()
            for value, mean in means.iterrows():
                values |= {f"{column}={value}/{name}": float(mean[name]) for name in names}
        return values, per_style

    def _trial_intervals(self, scores: NDArray) -> dict[str, list[float]]:
        """By the exact expectation over all possible trials, so that drawing trials adds no noise to the bootstrap."""
        whole = np.ones((1, len(self.clips)), dtype=np.int64)
        ranks = [
            metrics.trial_rank_distribution(
                scores[:, s],
                self.truth == s,
                self.trials.candidates_by_style[style] - 1,
                max(trials.KS),
                np.vstack([whole, self.weights]),
            )
            for s, style in enumerate(self.styles)
        ]
        ranks = np.nanmean(ranks, axis=0)  # (1 + R, max rank); a style that a replicate has lost is left out
        recall = metrics.recall_from_ranks(ranks, trials.KS)
        reciprocal = metrics.reciprocal_rank_from_ranks(ranks, trials.MAP_K)
        columns = [f"r@{k}" for k in trials.KS] + [f"map@{trials.MAP_K}"]
        found = np.column_stack([recall, reciprocal])
        return {name: intervals.interval(found[1:, i], found[0, i]) for i, name in enumerate(columns)}

    def classification(self, scores: NDArray) -> dict:
        """(N, S) -> accuracy and unweighted average recall of the argmax, with intervals."""
        chosen = scores.argmax(axis=1)
        values: dict = {}
        for name, measure in (("accuracy", metrics.accuracy), ("uar", metrics.unweighted_average_recall)):
            values[name] = float(measure(self.truth, chosen))
            values[f"{name}_ci95"] = intervals.interval(measure(self.truth, chosen, self.weights), values[name])
        return values

    def confusion(self, scores: NDArray) -> pd.DataFrame:
        """Counts, rows the true style, columns the one found."""
        counts = confusion_matrix(self.truth, scores.argmax(axis=1), labels=range(len(self.styles)))
        return pd.DataFrame(counts, index=self.styles, columns=self.styles)


def controls(manifest: pd.DataFrame, corpus: str, split: str = "test", seed: int = 0, n_trials: int = 1000) -> dict:
    """What simple cues give on the same trials: how far a corpus gives its styles away without any listening.

    A logistic regression, trained on the corpus's own train split, ranks clips by its log-probability of the style,
    from loudness as recorded; from pitch, energy and tempo; or from the words alone (TF-IDF). And chance.

    Returns keys `<corpus>/control/<name>/…` for results; without a train split, chance only.
    """
    clips = manifest[(manifest["corpus"] == corpus) & (manifest["style"] != "")]
    test = clips[clips["split"] == split]
    train = clips[(clips["split"] == "train") & clips["style"].isin(test["style"].unique())]
    measured = acoustics.measure(to_cuts(pd.concat([train, test])))
    usable = measured.index.intersection(test["utterance_id"]).sort_values()
    test = test.set_index("utterance_id").loc[usable].reset_index()
    train = train[train["utterance_id"].isin(measured.index)]
    drawn = trials.build_trials(test, corpus, split, n_trials=n_trials, seed=seed)
    scorer = Scorer(test, drawn, seed)
    sizes = np.array(list(drawn.candidates_by_style.values()))
    found = {f"{corpus}/control/chance/r@{k}": float(np.minimum(1, k / sizes).mean()) for k in trials.KS}
    found[f"{corpus}/control/chance/accuracy"] = 1 / len(scorer.styles)
    if set(scorer.styles) - set(train["style"]):
        return found
    for name, columns in (("loudness", acoustics.LOUDNESS), ("prosody", acoustics.PROSODY), ("text", None)):
        classifier = LogisticRegression(max_iter=2000, class_weight="balanced")
        if columns:
            pipe = make_pipeline(StandardScaler(), classifier)
            sides = [measured.loc[side["utterance_id"], list(columns)].to_numpy() for side in (train, test)]
        else:
            pipe = make_pipeline(TfidfVectorizer(token_pattern=r"\S+"), classifier)
            sides = [side["text"].where(side["text"] != "", "-").to_numpy() for side in (train, test)]
        pipe.fit(sides[0], train["style"])
        scores = pipe.predict_log_proba(sides[1])[:, [list(pipe.classes_).index(s) for s in scorer.styles]]
        values = scorer.retrieval(scores)[0] | scorer.classification(scores)
        kept = [key for key in values if not key.startswith(("gender=", "language=", "collection/"))]
        found |= _prefixed(f"{corpus}/control/{name}", {key: values[key] for key in kept})
    return found


def clips_of_run(settings: dict, corpora: str = "", manifest: str = "", data_root: str = "") -> pd.DataFrame:
    """The manifest to evaluate a run on: a CSV if given, else named corpora, else those that the run was trained on.

    Args:
        settings: the run's config.json; says where its corpora were, which is where others are looked for too.
        corpora: "ravdess+emodb".
        manifest: path of a manifest CSV, whose audio is beside it.
        data_root: folder of the corpora, if not where the run had them and not $ESR_DATA.

    Raises:
        ManifestError, CorpusError: see `manifests.load_corpora`.
    """
    if manifest:
        return with_root(read_manifest(manifest), Path(manifest).parent)
    trained_in = [str(Path(root).parent) for root in settings["roots"] if Path(root) != DEMO_FOLDER]
    roots = [data_root, os.environ.get("ESR_DATA"), *trained_in]
    return load_corpora(corpora or settings["corpora"], next(filter(None, roots), None))


@torch.no_grad()
def joint_space(
    model: StyleRetriever, embeddings: Embeddings, manifest: pd.DataFrame, prompts: str = "held_out"
) -> tuple[NDArray[np.float32], pd.DataFrame]:
    """Speech and text vectors of the same styles, stacked: (N + M, d), and a row each with `style` and `modality`."""
    style = manifest.set_index("utterance_id")["style"].loc[embeddings.utterance_ids]
    bank = PromptBank.load()
    texts = [(s, prompt) for s in sorted(set(style) - {""}) for prompt in bank.all_prompts(s, prompts)]
    vectors = model.encode_text([prompt for _, prompt in texts]).cpu().numpy()
    about = pd.DataFrame(
        {
            "style": [*style, *(s for s, _ in texts)],
            "modality": ["speech"] * len(style) + ["text"] * len(texts),
        }
    )
    return np.vstack([embeddings.vectors, vectors]), about


def prompt_space(backbone: TextBackbone) -> tuple[NDArray[np.float32], pd.DataFrame]:
    """All prompts of the bank in a text backbone's own space, before any training.

    Returns (N, D) unit vectors, and a row each with `style`, `prompt` and `modality`, which is seen or held_out.
    """
    bank = PromptBank.load()
    rows = [(s, prompt, prompts) for prompts in PROMPTS for s in STYLES for prompt in bank.all_prompts(s, prompts)]
    about = pd.DataFrame(rows, columns=["style", "prompt", "modality"])
    return F.normalize(backbone.embed(list(about["prompt"])), dim=-1).cpu().numpy(), about


def nearest_style(vectors: NDArray, prompts: pd.DataFrame) -> pd.DataFrame:
    """For each held-out prompt of `prompt_space`, the style whose seen prompts are nearest on average (`nearest`)."""
    seen = (prompts["modality"] == "seen").to_numpy()
    centres = np.stack([vectors[seen & (prompts["style"] == style).to_numpy()].mean(axis=0) for style in STYLES])
    nearest = (vectors[~seen] @ centres.T).argmax(axis=1)
    return prompts[~seen].assign(nearest=np.array(STYLES)[nearest]).reset_index(drop=True)


def _prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}/{name}": value for name, value in values.items()}
