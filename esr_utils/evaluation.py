"""A model and a manifest to numbers: retrieval trials, retrieval over the whole collection, classification.

A model ranks clips in up to three ways, its systems: by their similarity to the `seen` prompts of a style, to the
`held_out` ones, or by its style `classifier`'s logit for the style, which is the paper's baseline (ESR section IV-D).

Every number is a fraction. Trials, the collection and classification come with a 95 % bootstrap interval over speakers,
then their utterances (see `intervals`), never over the trials. Keys of the flat results:

    <corpus>/<system>/r@1, r@5, r@10, r@20, map@10        trials, mean over styles
    <corpus>/<system>/collection/p@10, map                every clip of the split ranked, many are right
    <corpus>/<system>/<column>=<value>/r@1 …              trials whose positive has that gender or language, or a style
                                                          that was (trained=yes) or was not (no) trained on;
                                                          clips, how many they are
    <corpus>/zero_shot/accuracy, uar                      highest score over the styles present, seen prompts
    <corpus>/zero_shot_held_out/accuracy, uar             likewise, held-out prompts
    <corpus>/classifier/accuracy, uar                     likewise, the classifier's logits for the styles present
    <corpus>/classifier/accuracy_of_22                    highest of all 22 logits, as the paper's baselines are scored
    <corpus>/seen/modality_gap, held_out/modality_gap     see `modality.gap`: no fraction, 0 to 2
    <corpus>/control/<name>/r@1 … accuracy                what simple cues give (`controls`)
    <key>_ci95                                            [low, high]
    <corpus>/n_clips, n_skipped, n_candidates, bootstrap  of a corpus
    n_trials, n_candidates, seed, seconds, level, split   of the whole; n_candidates is the smallest corpus's
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from esr_utils import intervals, metrics, modality, provenance, runs, scoring, trials
from esr_utils.config import Level, TrainConfig
from esr_utils.embedding import CACHE, Embeddings, embed
from esr_utils.manifests import to_cuts
from esr_utils.prompts import PromptBank
from esr_utils.retriever import Retriever
from esr_utils.styles import STYLES
from esr_utils.text import TextBackbone

PROMPTS = ("seen", "held_out")
SYSTEMS = (*PROMPTS, "classifier")
# system -> where the results of classification with it are
CLASSIFICATION = {"seen": "zero_shot", "held_out": "zero_shot_held_out", "classifier": "classifier"}


@dataclass
class Evaluation:
    """What `evaluate` found.

    Attributes:
        results: the flat dict above, ready for results.json.
        replicates: (R,) bootstrap values under the same keys as `results`, of each that has an interval.
        per_style: one row per corpus, system and style, with the trials' means and their intervals.
        confusion: corpus -> styles × styles counts, rows true, columns found (first system).
        scorers: corpus -> its clips, trials and replicates.
        scores: corpus -> system -> (N, S), as its scorer takes them.
        embeddings: of all clips, in the manifest's order.
        skipped: clips that could not be used: utterance_id, reason.
        systems: what ranked the clips, of SYSTEMS.
    """

    results: dict = field(default_factory=dict)
    replicates: scoring.Replicates = field(default_factory=dict)
    per_style: pd.DataFrame = field(default_factory=pd.DataFrame)
    confusion: dict[str, pd.DataFrame] = field(default_factory=dict)
    scorers: dict[str, scoring.Scorer] = field(default_factory=dict)
    scores: dict[str, dict[str, NDArray]] = field(default_factory=dict)
    embeddings: Embeddings | None = None
    skipped: pd.DataFrame = field(default_factory=pd.DataFrame)
    systems: tuple[str, ...] = ()

    @property
    def trials(self) -> dict[str, trials.Trials]:
        """Corpus -> the trials used."""
        return {corpus: scorer.trials for corpus, scorer in self.scorers.items()}


def options(settings: dict) -> dict:
    """How a run is to be evaluated, from its config.json: arguments of `evaluate`.

    A system that was never trained has no place in results: without text there are no prompts, and a classifier whose
    loss had no weight is a random one. `seen` prompts are those of the bank that the run was trained with.
    """
    config = TrainConfig.from_dict(settings["training"])
    if config.objective == "classifier":
        systems: tuple[str, ...] = ("classifier",)
    elif config.classification_weight == 0:
        systems = PROMPTS
    else:
        systems = SYSTEMS
    bank = provenance.bank_of_run(config)
    return {"level": config.level, "systems": systems, "held_out_styles": config.held_out_styles, "bank": bank}


def checkpoint(run: str | Path, settings: dict) -> str:
    """Which epoch a run's best retriever is of, and how many epochs the discriminator had taken part in by then.

    "Best" is the lowest validation loss, and that may come before the discriminator could do anything. "" for a
    retriever without the state of its training.
    """
    state = runs.run_folder(run) / "resume.json"
    if not state.is_file():
        return ""
    config, best = TrainConfig.from_dict(settings["training"]), runs.read_json(state)["best_epoch"]
    adversarial = sum(config.stage(epoch) == "adversarial" for epoch in range(best)) * (config.adversarial_weight > 0)
    return f"epoch {best} of {config.epochs}, {adversarial} with discriminator"


@torch.no_grad()
def style_queries(
    model: Retriever, styles: list[str], prompts: str, bank: PromptBank | None = None
) -> NDArray[np.float32]:
    """(len(styles), d): the mean of the unit vectors of all of a style's prompts.

    The mean similarity over prompts, by which the paper ranks (ESR section IV-C), equals the similarity to this mean.
    """
    bank = bank or PromptBank.load()
    return np.stack([model.encode_text(bank.all_prompts(s, prompts)).mean(0).cpu().numpy() for s in styles])


def evaluate(
    model: Retriever,
    manifest: pd.DataFrame,
    split: str = "test",
    level: Level = "normalised",
    seed: int = 0,
    cache: Path | None = CACHE,
    n_trials: int = 1000,
    systems: Sequence[str] = SYSTEMS,
    held_out_styles: Sequence[str] = (),
    bank: PromptBank | None = None,
    adapt: str = "",
) -> Evaluation:
    """Evaluates on each corpus of the manifest's split. Clips without a style are left out.

    Args:
        manifest: rows of `manifests.load_corpora`.
        seed: of the trials and the bootstrap.
        systems: those of SYSTEMS that the model was trained for (`options`); one without a classifier has no such.
        held_out_styles: styles that it was not trained on; results then tell them apart.
        bank: of the prompts; None is the project's.
        adapt: a column, such as `corpus` or `speaker`: the features of each corpus's clips that agree in it are
            standardised by their own statistics, without any label (see `adaptation`). Empty: by the training's.

    Raises:
        adaptation.AdaptationError: this retriever cannot adapt.
        ValueError: no such column, the split has no labelled clip, or a corpus has fewer than two styles in it.
    """
    started = time.perf_counter()
    systems = [system for system in systems if system != "classifier" or model.classifier is not None]
    rows = manifest[(manifest["split"] == split) & (manifest["style"] != "")].reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"no clip of split {split!r} has a style; splits here: {sorted(manifest['split'].unique())}")
    rows = rows.assign(trained=np.where(rows["style"].isin(held_out_styles), "no", "yes"))
    if adapt and adapt not in rows:
        raise ValueError(f"adapt is {adapt!r}, which is no column of the manifest; a usual one is corpus or speaker")
    groups = dict(zip(rows["utterance_id"], rows["corpus"] + "/" + rows[adapt], strict=True)) if adapt else None
    embeddings = embed(model, to_cuts(rows), level, cache, groups)
    position = pd.Series(range(len(embeddings.utterance_ids)), index=embeddings.utterance_ids)
    found = Evaluation(embeddings=embeddings, skipped=embeddings.skipped, systems=tuple(systems))
    per_style = []
    for corpus, clips in rows.groupby("corpus", sort=False):
        usable = clips[clips["utterance_id"].isin(position.index)].sort_values("utterance_id", ignore_index=True)
        if usable.empty:
            raise ValueError(
                f"{corpus}, split {split!r}: none of {len(clips)} clips could be used: {embeddings.skipped}"
            )
        scorer = scoring.Scorer(usable, trials.build_trials(usable, corpus, split, n_trials=n_trials, seed=seed), seed)
        found.scorers[corpus], found.scores[corpus] = scorer, {}
        chosen = position[usable["utterance_id"]]
        vectors, logits = embeddings.vectors[chosen], embeddings.logits[chosen]
        for system in systems:
            if system == "classifier":
                scores = logits[:, [STYLES.index(style) for style in scorer.styles]]
                right = metrics.votes(logits)[np.arange(len(usable)), [STYLES.index(s) for s in usable["style"]]]
                found.results[f"{corpus}/classifier/accuracy_of_22"] = float(metrics.accuracy(right))
            else:
                queries = style_queries(model, scorer.styles, system, bank)
                scores = vectors @ queries.T
                found.results |= _modality_gap(found, f"{corpus}/{system}/modality_gap", vectors, queries, scorer)
            per_style.append(_score(found, corpus, system, scores))
        found.confusion[corpus] = scorer.confusion(found.scores[corpus][systems[0]])
        found.results |= {
            f"{corpus}/n_clips": len(usable),
            f"{corpus}/n_skipped": len(clips) - len(usable),
            f"{corpus}/n_candidates": scorer.trials.n_candidates,
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


def _modality_gap(found: Evaluation, key: str, vectors: NDArray, queries: NDArray, scorer: scoring.Scorer) -> dict:
    value = modality.gap(vectors, queries)
    found.replicates[key] = modality.gap_replicates(vectors, queries, scorer.weights)
    bounds = (0.0, modality.LARGEST_GAP)
    return {key: value, f"{key}_ci95": intervals.interval(found.replicates[key], value, bounds)}


def _score(found: Evaluation, corpus: str, system: str, scores: NDArray) -> pd.DataFrame:
    """Adds what a system's scores give to `found`; returns its rows of `per_style`."""
    scorer = found.scorers[corpus]
    found.scores[corpus][system] = scores
    values, replicates, by_style = scorer.retrieval(scores)
    found.results |= _prefixed(f"{corpus}/{system}", values)
    found.replicates |= _prefixed(f"{corpus}/{system}", replicates)
    values, replicates = scorer.classification(scores)
    found.results |= _prefixed(f"{corpus}/{CLASSIFICATION[system]}", values)
    found.replicates |= _prefixed(f"{corpus}/{CLASSIFICATION[system]}", replicates)
    return by_style.assign(corpus=corpus, system=system)


@torch.no_grad()
def joint_space(
    model: Retriever,
    embeddings: Embeddings,
    manifest: pd.DataFrame,
    prompts: str = "held_out",
    bank: PromptBank | None = None,
) -> tuple[NDArray[np.float32], pd.DataFrame]:
    """Speech and text vectors of the same styles, stacked: (N + M, d), and a row each.

    Columns: style; modality; speaker, by corpus, of a clip.
    """
    clips = manifest.set_index("utterance_id").loc[embeddings.utterance_ids]
    style, speaker = clips["style"], clips["corpus"] + "/" + clips["speaker"]
    bank = bank or PromptBank.load()
    texts = [(s, prompt) for s in sorted(set(style) - {""}) for prompt in bank.all_prompts(s, prompts)]
    vectors = model.encode_text([prompt for _, prompt in texts]).cpu().numpy()
    about = pd.DataFrame(
        {
            "style": [*style, *(s for s, _ in texts)],
            "modality": ["speech"] * len(style) + ["text"] * len(texts),
            "speaker": [*speaker, *[""] * len(texts)],
        }
    )
    return np.vstack([embeddings.vectors, vectors]), about


def prompt_space(backbone: TextBackbone, bank: PromptBank | None = None) -> tuple[NDArray[np.float32], pd.DataFrame]:
    """All prompts of a bank (the project's own if not given) in a text backbone's own space, before any training.

    Returns (N, D) unit vectors, and a row each with `style`, `prompt` and `modality`, which is seen or held_out.
    """
    bank = bank or PromptBank.load()
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
