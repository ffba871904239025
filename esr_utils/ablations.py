"""Table III: the full model and the same with one thing changed, trained, compared and put into words (ESR V-C)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from esr_utils import checkpoints, paper, provenance, runs, training, trials
from esr_utils.comparison import Entry
from esr_utils.config import ABLATIONS, ModelConfig, TrainConfig


def train_all(
    manifest: pd.DataFrame,
    run: str | Path,
    model_config: ModelConfig,
    config: TrainConfig,
    seeds: int = 1,
    device: str = "auto",
) -> dict[str, list[Path]]:
    """Trains every variant of `config.ABLATIONS` with seeds 0 … seeds - 1: variant -> its run folders.

    A run is `<run>/<variant>/seed<k>`. Those that are finished are taken as they are, one that was stopped goes on.

    Args:
        config: of the full model; its seed is not used.

    Raises:
        ValueError: seeds is below 1.
        provenance.RunExists: a folder holds a run with other settings.
    """
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; at least one must be trained")
    found: dict[str, list[Path]] = {}
    for variant, changes in ABLATIONS.items():
        found[variant] = [runs.run_folder(run) / runs.slug(variant) / f"seed{seed}" for seed in range(seeds)]
        for seed, folder in enumerate(found[variant]):
            _train(manifest, folder, model_config, config.but(**changes, seed=seed), device)
    return found


def counterpart(run: str | Path, variant: str, data_root: str = "", device: str = "auto") -> Path:
    """A run's settings, seed and clips with one variant's change, trained if it is not there: `<run>-<variant>`.

    Raises:
        ValueError: its corpora are not what it was trained on, or it is that variant itself.
    """
    folder = runs.run_folder(run)
    settings = runs.read_json(folder / "config.json")
    manifest = provenance.clips_of_run(settings, data_root=data_root)
    model_config, config = ModelConfig.from_dict(settings["model"]), TrainConfig.from_dict(settings["training"])
    changed = config.but(**ABLATIONS[variant])
    if changed == config:
        raise ValueError(f"{run} is itself a run {variant}: there is nothing to compare it with")
    counterpart = folder.with_name(f"{folder.name}-{runs.slug(variant)}")
    provenance.begin(manifest, counterpart, model_config, changed)
    if runs.read_json(counterpart / "config.json")["manifest_sha256"] != settings["manifest_sha256"]:
        raise ValueError(f"the clips of {'+'.join(settings['corpora'])} are not those that {run} was trained on")
    _train(manifest, counterpart, model_config, changed, device)
    return counterpart


def _train(manifest: pd.DataFrame, folder: Path, model_config: ModelConfig, config: TrainConfig, device: str) -> None:
    """`training.fit`, which even of a finished run loads the backbones and embeds all prompts, only where needed."""
    provenance.begin(manifest, folder, model_config, config)
    if not checkpoints.finished(folder):
        training.fit(manifest, folder, model_config, config, device)


def table(entries: Sequence[Entry]) -> pd.DataFrame:
    """The form of Table III: a row per corpus and entry, and the paper's own rows, marked as the paper's.

    Columns: R@k; accuracy over the styles present; modality gap; which epoch the checkpoint is of.
    """
    rows = {}
    for corpus in entries[0].corpora:
        for entry in entries:
            row: dict = {"seeds": entry.seed_names} | {f"R@{k}": entry.recall(corpus, k).cell() for k in trials.KS}
            row |= {"accuracy": entry.accuracy(corpus).cell(), "modality gap": entry.modality_gap(corpus)}
            rows[corpus, entry.label] = row | {"checkpoint": "; ".join(entry.checkpoints)}
    index = pd.MultiIndex.from_tuples(rows, names=["corpus", "model"])
    return pd.concat([pd.DataFrame(list(rows.values()), index), paper.table_three()]).fillna("")


def verdicts(entries: Sequence[Entry]) -> list[str]:
    """For each corpus and entry after the first, the full model: what its difference to that one says, in words.

    And whether it is what the paper found: the same sign or another, told from 0 or not, and whether a difference as
    large as the paper's (of other clips and another model) is within the interval.
    """
    full = entries[0]
    return [
        f"{corpus}, {entry.label}: {_verdict(entry, full, corpus)}{_weight_of_discriminator(entry, full)}"
        for corpus in full.corpora
        for entry in entries[1:]
    ]


def _weight_of_discriminator(entry: Entry, full: Entry) -> str:
    """Of variants that change it: how long the discriminator took part in the checkpoints that are compared."""
    if "adversarial_weight" not in ABLATIONS.get(entry.label, {}):
        return ""
    return f" (Checkpoints: full, {'; '.join(full.checkpoints)}; here, {'; '.join(entry.checkpoints)}.)"


def _verdict(entry: Entry, full: Entry, corpus: str) -> str:
    cells = {k: entry.recall(corpus, k).minus(full.recall(corpus, k)) for k in trials.KS}
    said = "; ".join(
        f"{what} the full model at {_at(ks)}"
        for what, ks in (
            ("lower than", [k for k, cell in cells.items() if cell.settled and cell.value < 0]),
            ("higher than", [k for k, cell in cells.items() if cell.settled and cell.value > 0]),
            ("not told from", [k for k, cell in cells.items() if not cell.settled]),
        )
        if ks
    )
    theirs = paper.differences(entry.label)
    if theirs is None:
        return f"{said}. Not in the paper."
    if not theirs:
        return f"{said}. In the paper it collapsed; {_collapse(entry, corpus)}."
    same = [k for k in trials.KS if cells[k].value * theirs[k] > 0]
    confirmed = [k for k in same if cells[k].settled]
    against = [k for k in trials.KS if cells[k].settled and k not in same]
    beyond = [k for k in trials.KS if not cells[k].interval[0] <= theirs[k] <= cells[k].interval[1]]
    in_paper = ", ".join(f"{difference:+.3f}" for difference in theirs.values())
    said += f". In the paper {in_paper} at {_at(list(theirs))}: the same sign here at {_at(same)}"
    said += f", told from 0 at {_at(confirmed)}." if same else "."
    said += f" It goes against the paper at {_at(against)}." if against else ""
    return said + (f" A difference as large as the paper's is outside the interval at {_at(beyond)}." if beyond else "")


def _collapse(entry: Entry, corpus: str) -> str:
    """Whether a model is at chance."""
    sizes = np.array(list(entry.evaluations[0].trials[corpus].candidates_by_style.values()))
    found = {k: (entry.recall(corpus, k).cell(), float(np.minimum(1, k / sizes).mean())) for k in trials.KS}
    above = [k for k, (cell, chance) in found.items() if cell.interval[0] > chance]
    numbers = ", ".join(f"R@{k} {cell} against {chance:.3f}" for k, (cell, chance) in found.items())
    return ("here it did not, and finds more than chance" if above else "here it is at chance too") + f": {numbers}"


def _at(ks: Sequence[int]) -> str:
    return "R@" + ", ".join(map(str, ks)) if ks else "none"
