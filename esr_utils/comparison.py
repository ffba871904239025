"""Several runs side by side, on the same clips, trials and bootstrap replicates: Tables II and III, Figure 3.

Two rows are compared by their paired difference: in each replicate both are scored on the same resampled clips, so what
makes a sample of speakers easy or hard for both cancels out. Runs that differ in their seed alone are one row, their
mean; its interval then covers other seeds too (`intervals.seed_weights`). Nothing is claimed of a difference whose
interval holds 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from esr_utils import evaluation, intervals, modality, paper, runs, training, trials
from esr_utils.config import ModelConfig, TrainConfig
from esr_utils.tables import Cell

DURATION_BINS = ("< 4 s", "4–6 s", "6–8 s", "8–10 s", "> 10 s")


@dataclass(frozen=True)
class Estimate:
    """A value, the mean over a row's seeds, and its bootstrap replicates (R,)."""

    value: float
    replicates: NDArray[np.floating]

    @classmethod
    def over_seeds(cls, values: Sequence[float], replicates: Sequence[NDArray]) -> Estimate:
        weights = intervals.seed_weights(len(values), len(replicates[0]))
        return cls(float(np.mean(values)), np.einsum("rs,sr->r", weights, np.stack(replicates)))

    def cell(self, largest: float = 1.0) -> Cell:
        return Cell(self.value, tuple(intervals.interval(self.replicates, self.value, (0.0, largest))))

    def cell_of_few(self, n_clips: int) -> Cell:
        """Of a share of so few clips that all of them may be found, or none (`intervals.interval_of_few`)."""
        return Cell(self.value, tuple(intervals.interval_of_few(self.replicates, self.value, n_clips)))

    def minus(self, other: Estimate) -> Cell:
        difference = self.value - other.value
        bounds = intervals.interval(self.replicates - other.replicates, difference, (-1.0, 1.0))
        return Cell(difference, tuple(bounds), difference=True, digits=3)


@dataclass(frozen=True)
class Entry:
    """A row: runs that differ in their seed alone, evaluated.

    Attributes:
        label: what the row is called.
        runs: their names or paths, in the order of their seeds.
        system: what ranks the clips: seen, held_out or classifier (`evaluation`).
        checkpoints: `evaluation.checkpoint` of each run.
    """

    label: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    system: str
    evaluations: tuple[evaluation.Evaluation, ...]
    checkpoints: tuple[str, ...]

    @property
    def seed_names(self) -> str:
        return ", ".join(map(str, self.seeds))

    @property
    def corpora(self) -> list[str]:
        return list(self.evaluations[0].scorers)

    def recall(self, corpus: str, k: int) -> Estimate:
        return self._estimate(f"{corpus}/{self.system}/r@{k}")

    def accuracy(self, corpus: str) -> Estimate:
        return self._estimate(f"{corpus}/{evaluation.CLASSIFICATION[self.system]}/accuracy")

    def modality_gap(self, corpus: str) -> Cell | str:
        """Mean over the seeds; "" for a classifier, which has no text."""
        key = f"{corpus}/{self.system}/modality_gap"
        if key not in self.evaluations[0].results:
            return ""
        return self._estimate(key).cell(modality.LARGEST_GAP)

    def _estimate(self, key: str) -> Estimate:
        values = [found.results[key] for found in self.evaluations]
        return Estimate.over_seeds(values, [found.replicates[key] for found in self.evaluations])


def listed(names: str) -> list[str]:
    """ "a+b, c" as a list of names."""
    return [name.strip() for name in names.replace(",", "+").split("+") if name.strip()]


def by_settings(names: Sequence[str]) -> dict[str, list[str]]:
    """Runs grouped by all that they were trained with but the seed: label -> runs, in the order of their seeds.

    A label is the text and the speech backbone, as in the paper's Table II; where groups share it, the settings that
    tell them apart are added. A run that is named twice counts once.

    Raises:
        ValueError: a run is not there, or two runs of a group have the same seed.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    about: dict[str, dict[str, str]] = {}  # of each group, its settings
    for folder, name in {runs.run_folder(name): name for name in names}.items():
        if not (folder / "config.json").is_file():
            raise ValueError(f"there is no run {name!r} (looked in {folder}): train it with notebook 03_train")
        settings = runs.read_json(folder / "config.json")
        # Through the configs, so that a setting that an older run does not know has its default.
        configs = ModelConfig.from_dict(settings["model"]), TrainConfig.from_dict(settings["training"])
        flat = {**configs[0].to_dict(), **configs[1].to_dict(), "corpora": "+".join(settings["corpora"])}
        flat |= {"manifest": settings["manifest_sha256"][:8], "prompts": settings["prompts_sha256"][:8]}
        seed = flat.pop("seed")
        same = json.dumps(flat, sort_keys=True)
        groups.setdefault(same, []).append((seed, name))
        about[same] = flat
    found = {}
    for label, group in zip(_labels(list(about.values())), groups.values(), strict=True):
        if len({seed for seed, _ in group}) < len(group):
            raise ValueError(f"{', '.join(name for _, name in group)}: same settings, and a seed occurs twice")
        found[label] = [name for _, name in sorted(group)]
    return found


def _labels(groups: list[dict]) -> list[str]:
    """A label for each group's settings, each another."""
    short = [_backbones(settings) for settings in groups]
    found = []
    for label, settings in zip(short, groups, strict=True):
        alike = [other for name, other in zip(short, groups, strict=True) if name == label]
        telling = [key for key in settings if any(other[key] != settings[key] for other in alike)]
        words = ", ".join(f"{key} {settings[key]}".replace("_", " ") for key in telling)
        found.append(f"{label} ({words})" if words else label)
    return found


def _backbones(settings: dict) -> str:
    text, speech = (settings[f"{side}_backbone"].rsplit("/", 1)[-1] for side in ("text", "speech"))
    return f"Baseline: {speech} classifier" if settings["objective"] == "classifier" else f"{text} + {speech}"


def evaluate_groups(
    groups: Mapping[str, Sequence[str | Path]],
    clips: pd.DataFrame,
    split: str = "test",
    prompts: str = "seen",
    seed: int = 0,
    device: str = "auto",
) -> list[Entry]:
    """Evaluates every run of every group (label -> runs) on the same clips and trials.

    Args:
        clips: a manifest, as `evaluation.evaluate` takes it.
        prompts: seen or held_out; a baseline, which reads no prompt, is ranked by its classifier.
        seed: of trials and bootstrap.

    Raises:
        ValueError: a run could not use a clip that another could.
    """
    entries = []
    for label, names in groups.items():
        found, seeds, checkpoints = [], [], []
        for name in names:
            model, settings = training.load_run(name, device)
            found.append(evaluation.evaluate(model, clips, split, seed=seed, **evaluation.options(settings)))
            seeds.append(settings["training"]["seed"])
            checkpoints.append(evaluation.checkpoint(name, settings))
        system = "classifier" if settings["training"]["objective"] == "classifier" else prompts
        entries.append(Entry(label, tuple(map(str, names)), tuple(seeds), system, tuple(found), tuple(checkpoints)))
    first = entries[0].evaluations[0]
    for entry in entries:
        for name, found in zip(entry.runs, entry.evaluations, strict=True):
            if found.trials != first.trials:
                odd = set(first.embeddings.utterance_ids) ^ set(found.embeddings.utterance_ids)
                raise ValueError(
                    f"{name} and {entries[0].runs[0]} cannot use the same clips, so their trials differ: "
                    f"leave {', '.join(sorted(odd)[:5])}{' …' * (len(odd) > 5)} out of the manifest"
                )
    return entries


def evaluation_of(entries: Sequence[Entry], run: str) -> evaluation.Evaluation:
    """What was found of one run."""
    entry = entry_of(entries, run)
    return entry.evaluations[list(map(runs.run_folder, entry.runs)).index(runs.run_folder(run))]


def entry_of(entries: Sequence[Entry], run: str) -> Entry:
    """The row that holds a run; the first one for "".

    Raises:
        ValueError: no row holds it.
    """
    for entry in entries:
        if not run or runs.run_folder(run) in map(runs.run_folder, entry.runs):
            return entry
    named = ", ".join(name for entry in entries for name in entry.runs)
    raise ValueError(f"reference is {run!r}; it must be one of the runs compared: {named}")


def recall_table(entries: Sequence[Entry]) -> pd.DataFrame:
    """The form of Table II: a row per entry, columns (corpus, R@k).

    Where ESD or Expresso are among the corpora, the paper's own rows stand below, marked as the paper's, in columns of
    the test sets that they are of.
    """
    table = _table(entries, lambda entry, corpus, k: entry.recall(corpus, k).cell())
    families = {corpus.split("-")[0] for corpus in entries[0].corpora}  # expresso-paper is of expresso
    if shared := [corpus for corpus in paper.CORPORA if corpus.split("-")[0] in families]:
        table = pd.concat([table, paper.table_two()[shared]]).fillna("")
    return table.rename_axis("model")


def difference_table(entries: Sequence[Entry], reference: Entry) -> pd.DataFrame:
    """Each row of `recall_table` minus the reference's, paired; empty where there is no other row."""
    others = [entry for entry in entries if entry is not reference]
    table = _table(others, lambda entry, corpus, k: entry.recall(corpus, k).minus(reference.recall(corpus, k)))
    return table.rename_axis(f"minus {reference.label}")


def _table(entries: Sequence[Entry], measure) -> pd.DataFrame:
    corpora = entries[0].corpora if entries else []
    columns = pd.MultiIndex.from_tuples([("seeds", ""), *((c, f"R@{k}") for c in corpora for k in trials.KS)])
    rows = [[entry.seed_names, *(measure(entry, c, k) for c in corpora for k in trials.KS)] for entry in entries]
    return pd.DataFrame(rows, [entry.label for entry in entries], columns)


def duration_bin(duration_s: ArrayLike) -> NDArray[np.integer]:
    """(N,) seconds -> the bin of DURATION_BINS, 0 … 4: [0, 4), [4, 6), [6, 8), [8, 10], (10, …).

    The paper's "< 4 s" and "> 10 s" (ESR section V-B) are strict, so 4 and 10 belong to the bins between them; a
    recording cut into pieces of 10 s has many of just 10. Durations count to the millisecond.
    """
    duration = np.round(np.asarray(duration_s, dtype=float), 3)
    return (duration >= 4).astype(int) + (duration >= 6) + (duration >= 8) + (duration > 10)


def duration_table(entries: Sequence[Entry]) -> pd.DataFrame:
    """The numbers of Figure 3: a row per corpus, model and bin of the target's duration.

    Columns: clips and trials in the bin, R@k with intervals; "" where a bin has none.
    """
    rows = {}
    for corpus in entries[0].corpora:
        for entry in entries:
            binned = [_by_duration(found, corpus, entry.system) for found in entry.evaluations]
            for i, name in enumerate(DURATION_BINS):
                row: dict = {column: int(binned[0][0].loc[i, column]) for column in ("clips", "trials")}
                for j, k in enumerate(trials.KS):
                    values = [table.loc[i, f"r@{k}"] for table, _ in binned]
                    drawn = [replicates[i, :, j] for _, replicates in binned]
                    row[f"R@{k}"] = (
                        Estimate.over_seeds(values, drawn).cell_of_few(row["clips"]) if row["trials"] else ""
                    )
                rows[corpus, entry.label, name] = row
    index = pd.MultiIndex.from_tuples(rows, names=["corpus", "model", "duration"])
    return pd.DataFrame(list(rows.values()), index)


def _by_duration(found: evaluation.Evaluation, corpus: str, system: str) -> tuple[pd.DataFrame, NDArray]:
    scorer = found.scorers[corpus]
    bins = duration_bin(scorer.clips["duration_s"])
    return scorer.by_bin(found.scores[corpus][system], bins, len(DURATION_BINS))


def protocols(entries: Sequence[Entry]) -> dict[str, str]:
    """Corpus -> "1-in-401", for titles."""
    return {corpus: scorer.trials.protocol for corpus, scorer in entries[0].evaluations[0].scorers.items()}


def caption(entries: Sequence[Entry], ranked_by: str = "") -> str:
    """How the numbers of a table came about, in a sentence for each matter.

    Args:
        ranked_by: what ranked the clips, where it is not what the rows of `entries` are of.
    """
    found = entries[0].evaluations[0]
    of_corpus = [
        f"{corpus}: {scorer.trials.protocol}, {len(scorer.clips)} clips of {scorer.clips['speaker'].nunique()} speakers"
        f", intervals over {scorer.bootstrap}s"
        for corpus, scorer in found.scorers.items()
    ]
    systems = ranked_by or ", ".join(dict.fromkeys(entry.system.replace("_", "-") for entry in entries))
    alone = "the intervals of one seed do not speak for another"
    if any(len(entry.seeds) > 1 for entry in entries):
        alone = f"a row of several seeds is their mean, with an interval over seeds too; {alone}"
    return (
        f"Recall@k, {found.results['split']} split, ranked by: {systems}. {'; '.join(of_corpus)}. "
        f"95 % bootstrap intervals; n.s.: holds 0; {alone}."
    )
