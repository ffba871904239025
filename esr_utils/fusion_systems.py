"""FS-CLAP, its ablations and its baselines, trained here under one setting (Tables 1 to 3); each is a run folder.

What is compared is the recipe: all have the same backbones, tokens, captions, schedule and seeds. So "CLAP" is CLAP's
recipe, a dual encoder under InfoNCE, not the weights of that name; those enter the tables through an embeddings file.
FS-CLAP is trained for every protocol at once: for vectors made past the fusion and through it, and for fused pairs.
FS-CLAP-M is the same model trained for one, `masked`, so that no other loss pulls at its blocks; unpooled, each frame
is a token, which says what averaging them costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from esr_utils import checkpoints, embedding, fusion_training, provenance, runs, weights
from esr_utils.attributes import Thresholds
from esr_utils.captions import Captioned, check_language, of_manifest
from esr_utils.config import FusionConfig, FusionTrainConfig
from esr_utils.manifests import load_corpora


@dataclass(frozen=True)
class System:
    """What makes a system of the common settings.

    Attributes:
        teacher: the system, trained before with the same seed, whose similarities it learns from.
    """

    model: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    teacher: str = ""


_DUAL = {"fusion": False, "separation": False}
_HARD = {"objective": "hard-negative", "regulariser_weight": 1.0}
_PLAIN = {"objective": "infonce", "regulariser_weight": 0.0}
_WHOLE = {"fusion": True, "separation": True}
_ALONE = _HARD | {"bi_encoder": False, "matching_weight": 0.0}
SYSTEMS = {
    "CLAP": System(_DUAL, _PLAIN),
    "RA-CLAP": System(_DUAL, _PLAIN, teacher="CLAP"),
    "MGA-CLAP": System(_DUAL | {"codebook": 512}, _PLAIN | {"objective": "hard-negative-mga-clap"}),
    "FU": System({"fusion": True, "separation": False}, _PLAIN),
    "SE": System({"fusion": False, "separation": True}, _PLAIN),
    "HN": System(_DUAL, _HARD),
    "FU-SE": System(_WHOLE, _PLAIN),
    "FS-CLAP": System(_WHOLE, _HARD),
    "FS-CLAP-M": System(_WHOLE, _ALONE),
    "FS-CLAP-M unpooled": System(_WHOLE | {"frames_per_token": 1}, _ALONE),
}
DEFAULT_SYSTEMS = tuple(SYSTEMS)[:-1]  # without the last, which takes some three times as long as any other
FUSING = tuple(name for name, system in SYSTEMS.items() if system.model["fusion"])
THRESHOLDS = "thresholds.json"
DEFAULT_RUN = "fsclap"  # what 08 writes and 09 reads, unless told otherwise
TABLE_THREE = ("CLAP", "FU", "SE", "HN", "FU-SE", "FS-CLAP", "FS-CLAP-M")  # the paper's order; the last is ours


def train_all(
    manifest: pd.DataFrame,
    captioned: Captioned,
    run: str | Path,
    model_config: FusionConfig,
    config: FusionTrainConfig,
    seeds: Sequence[int] = (0,),
    systems: Sequence[str] = DEFAULT_SYSTEMS,
    objective: str = "",
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> dict[str, list[Path]]:
    """Trains systems with each seed: system -> its run folders, `<run>/<system>/seed<k>`.

    Those that are finished are taken as they are, one that was stopped goes on. A teacher is trained where it is not
    there, asked for or not. `<run>/thresholds.json` keeps what is low and high in captions of measured attributes.

    Args:
        model_config, config: what all have in common; its seed is not used.
        objective: for all systems in place of their own; empty: each its own.

    Raises:
        ValueError: no such system, or no seed.
        provenance.RunExists: a folder holds a run with other settings.
    """
    if unknown := [name for name in systems if name not in SYSTEMS]:
        raise ValueError(f"no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    if not seeds:
        raise ValueError("no seed: at least one must be trained")
    teachers = [SYSTEMS[name].teacher for name in systems if SYSTEMS[name].teacher]
    for name in sorted({*systems, *teachers}, key=list(SYSTEMS).index):
        for seed in seeds:
            settings = _settings(name, seed, model_config, config, objective)
            _train(manifest, captioned, folder_of(run, name, seed), *settings, device, cache)
    if captioned.thresholds:
        captioned.thresholds.save(runs.run_folder(run) / THRESHOLDS)
    return {name: [folder_of(run, name, seed) for seed in seeds] for name in systems}


def _settings(
    name: str, seed: int, model_config: FusionConfig, config: FusionTrainConfig, objective: str = ""
) -> tuple[FusionConfig, FusionTrainConfig]:
    """Those of a system among common ones."""
    system = SYSTEMS[name]
    own = system.training | ({"objective": objective} if objective else {})
    # From the run's folder, so that a grid can be moved.
    teacher = f"../../{runs.slug(system.teacher)}/seed{seed}" if system.teacher else ""
    return model_config.but(**system.model), config.but(**own, teacher=teacher, seed=seed)


def load_grid(
    run: str | Path = DEFAULT_RUN, systems: Sequence[str] = (), device: str = "auto"
) -> dict[str, list[Path]]:
    """The systems that a grid holds, finished, with their seeds: system -> its run folders.

    The default grid, and only that, is trained first (demo corpus, default settings) where there is nothing yet, or
    where its training was interrupted.

    Args:
        systems: which; empty: all.

    Raises:
        weights.WeightsError: none is there, or one that is asked for is not.
    """
    if str(run) == DEFAULT_RUN and _is_unfinished_default(runs.run_folder(run)):
        manifest = load_corpora("demo")
        train_all(manifest, of_manifest(manifest), run, FusionConfig(), FusionTrainConfig(), device=device)
    folders = {name: sorted((runs.run_folder(run) / runs.slug(name)).glob("seed*")) for name in SYSTEMS}
    found = {name: [one for one in there if checkpoints.finished(one)] for name, there in folders.items()}
    if not any(found.values()):
        raise weights.WeightsError(f"{runs.run_folder(run)} holds no finished system: run notebook 08_fsclap_train")
    found = {name: there for name, there in found.items() if there}
    if missing := set(systems) - set(found):
        raise weights.WeightsError(f"{run} holds no {', '.join(sorted(missing))}; it holds {', '.join(found)}")
    return {name: found[name] for name in systems or found}


def _is_unfinished_default(folder: Path) -> bool:
    """Whether a folder holds no run, or a grid of default settings that was interrupted."""
    begun = [path.parent for path in folder.glob("*/seed*/config.json")]
    return all(map(_is_default, begun)) and not (begun and all(map(checkpoints.finished, begun)))


def _is_default(folder: Path) -> bool:
    """Whether the run in a folder is one of the default grid's, at any seed."""
    there = runs.read_json(folder / "config.json")
    found = FusionConfig.from_dict(there["model"]), FusionTrainConfig.from_dict(there["training"])
    given = found[1].seed, FusionConfig(), FusionTrainConfig()
    names = [name for name in SYSTEMS if runs.slug(name) == folder.parent.name]
    return there["corpora"] == ["demo"] and found in [_settings(name, *given) for name in names]


def clips_of_grid(
    grid: dict[str, list[Path]], corpora: str = "", manifest: str = "", data_root: str = ""
) -> tuple[pd.DataFrame, Captioned]:
    """The manifest that a grid was trained on, or another (`provenance.clips_of_run`), and its captions.

    Where another has corpora without a train split, what is low and high is told by the grid's own thresholds.

    Raises:
        ValueError: those know nothing of a corpus; or captions in a language that the grid's text backbone does not
            know.
    """
    folder = next(iter(grid.values()))[0]
    settings = runs.read_json(folder / "config.json")
    clips = provenance.clips_of_run(settings, corpora, manifest, data_root)
    captioned = of_manifest(clips, thresholds=_thresholds(clips, folder.parents[1] / THRESHOLDS))
    check_language(captioned.table, settings["model"]["text_backbone"])
    return clips, captioned


def _thresholds(clips: pd.DataFrame, saved: Path) -> Thresholds | None:
    """The grid's own, where a corpus that needs some has no train split to fit them on; else None."""
    measured = set(clips["corpus"]) - set(clips.loc[clips["caption"] != "", "corpus"])
    if not (testing := measured - set(clips.loc[clips["split"] == "train", "corpus"])):
        return None
    known = Thresholds.load(saved) if saved.is_file() else Thresholds({}, {})
    if unknown := measured - set(known.tertiles):
        raise ValueError(
            f"{', '.join(sorted(testing))}: no train clips to tell low from high by, and the grid has no thresholds of "
            f"{', '.join(sorted(unknown))} ({saved}): give a manifest with a train split"
        )
    return known


def summary(trained: dict[str, list[Path]]) -> pd.DataFrame:
    """A row per run: which epoch is in best/, the validation losses of it, tau and seconds."""
    rows = {}
    for name, folders in trained.items():
        for folder in folders:
            lines, state = runs.read_metrics(folder), runs.read_json(folder / "resume.json")
            best = lines[state["best_epoch"] - 1]
            row = {"best epoch": f"{state['best_epoch']} of {state['epoch']}"}
            row |= {key: round(value, 3) for key, value in best.items() if key.startswith("val_")}
            rows[name, folder.name] = row | {
                "tau": round(best["tau"], 3),
                "seconds": round(sum(x["seconds"] for x in lines)),
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["system", "run"]).fillna("")


def folder_of(run: str | Path, system: str, seed: int) -> Path:
    """The run folder of a system and seed."""
    return runs.run_folder(run) / runs.slug(system) / f"seed{seed}"


def _train(manifest, captioned, folder: Path, model_config, config, device: str, cache: Path) -> None:
    """`fusion_training.fit`, which even of a finished run loads the backbones, only where needed."""
    fusion_training.begin(manifest, captioned, folder, model_config, config)
    if not checkpoints.finished(folder):
        fusion_training.fit(manifest, captioned, folder, model_config, config, device, cache)
