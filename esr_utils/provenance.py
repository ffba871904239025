"""What a run came from: its settings, clips and prompts, written to config.json, compared, and found again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from esr_utils import runs
from esr_utils.config import ConfigError, FusionConfig, FusionTrainConfig, ModelConfig, TrainConfig
from esr_utils.corpora import DEMO_FOLDER, reading
from esr_utils.manifests import load_corpora, read_manifest, with_root
from esr_utils.prompts import PROMPTS_PATH, PromptBank

# What a run trains, by the kind in its config.json: its model's settings and its training's.
KINDS = {"style": (ModelConfig, TrainConfig), "fusion": (FusionConfig, FusionTrainConfig)}


class RunExists(ValueError):
    """The run folder holds a run with other settings, or another process trains it; the message says which."""


def begin(
    manifest: pd.DataFrame,
    run: str | Path,
    model_config: ModelConfig | FusionConfig,
    config: TrainConfig | FusionTrainConfig,
    captions: pd.DataFrame | None = None,
) -> None:
    """Writes a run's config.json, or checks that the one there says the same; `go_on` trains it.

    A config.json that no epoch has followed is written anew.

    Args:
        captions: what a run of kind `fusion` is trained on; one of kind `style` has its prompt bank.

    Raises:
        RunExists: the folder holds a run with other settings.
        ConfigError: one corpus in two readings (expresso+expresso-paper), or no such prompt bank.
    """
    folder = runs.run_folder(run)
    corpora = [reading(corpus)[0] for corpus in manifest["corpus"].unique()]
    if twice := sorted({corpus for corpus in corpora if corpora.count(corpus) > 1}):
        raise ConfigError(f"corpora: {', '.join(twice)} in two readings: train on one of them")
    split = manifest["split"].value_counts()
    kind = next(kind for kind, configs in KINDS.items() if isinstance(config, configs[1]))
    texts = bank_of_run(config).sha256 if captions is None else runs.text_sha256(captions.to_csv(index=False))
    settings = {
        "kind": kind,
        "model": model_config.to_dict(),
        "training": config.to_dict(),
        "corpora": manifest["corpus"].unique().tolist(),  # in their order, which the fingerprint depends on
        "roots": sorted(manifest["root"].unique()),
        "clips": {name: int(split.get(name, 0)) for name in ("train", "val", "test")},
        "prompts_sha256" if captions is None else "captions_sha256": texts,
        "manifest_sha256": fingerprint(manifest),
    }
    path = folder / "config.json"
    changed = _changed(runs.read_json(path), json.loads(json.dumps(settings))) if path.is_file() else ["nothing there"]
    if not changed:  # nor is there anything to write: several processes of one run come by here at once
        return
    if path.is_file() and (not _is_run(runs.read_json(path)) or (folder / "resume.json").is_file()):
        raise RunExists(
            f"{folder} holds another run ({'; '.join(changed)}): choose another `run`, or delete that folder"
        )
    with held(folder):
        runs.write_json(path, settings | {"versions": runs.versions()})


def _is_run(settings: object) -> bool:
    return isinstance(settings, dict) and {"model", "training"} <= set(settings)


def _changed(there: dict, now: dict) -> list[str]:
    """Where the settings of two runs differ, in words. A setting that the older one does not know has its default."""
    if not _is_run(there):
        return ["not a run's config.json"]
    if (kind := there.get("kind", "style")) != now["kind"]:
        return [f"kind: {kind!r} there, {now['kind']!r} now"]
    changed = []
    for part, config in zip(("model", "training"), KINDS[kind], strict=True):
        before = json.loads(json.dumps(config.from_dict(there[part]).to_dict()))
        changed += [f"{part}.{k}: {before[k]!r} there, {v!r} now" for k, v in now[part].items() if before[k] != v]
    whole = ("corpora", "prompts_sha256", "captions_sha256", "manifest_sha256")
    return changed + [f"{key}: other than now" for key in whole if there.get(key) != now.get(key)]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Only one process at a time writes a run's folder; the lock ends with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunExists(f"another process trains {folder}: wait for it, or choose another `run`") from None


def clips_of_run(settings: dict, corpora: str = "", manifest: str = "", data_root: str = "") -> pd.DataFrame:
    """The manifest of a run: a CSV if given, else named corpora, else those that the run was trained on.

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


def bank_of_run(config: TrainConfig) -> PromptBank:
    """The prompts that a run draws from.

    Raises:
        ConfigError: no such file.
    """
    try:
        return PromptBank.load(config.prompt_bank or PROMPTS_PATH)
    except OSError as error:
        raise ConfigError(f"prompt_bank: {error}") from None


def fingerprint(manifest: pd.DataFrame) -> str:
    """sha256 over what of a manifest decides a training."""
    decisive = ["utterance_id", "path", "start_s", "end_s", "channel", "split", "style", "caption"]
    return runs.text_sha256(manifest[decisive].to_csv(index=False))
