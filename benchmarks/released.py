"""The released retriever, models/esr-tiny, and the figures of its card: three seeds, on held-out speakers.

    python benchmarks/released.py            trains and evaluates, prints the table
    python benchmarks/released.py --write    and writes models/esr-tiny from the run of seed 0

With $ESR_DATA = <folder with ravdess, emodb, nemo>. Each run is what 03_train makes of the command in the card, and one
that is there already, in runs/esr-tiny/, is taken. Which seed is released was settled before any was tested.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from esr_utils import evaluation, manifests, runs, tables, training
from esr_utils.config import ModelConfig, TrainConfig

CORPORA = "ravdess+emodb+nemo+demo"
SEEDS = (0, 1, 2)
RUN = runs.RUNS / "esr-tiny"
CARD = Path(__file__).with_name("esr-tiny.md")  # the card, but for its table
ABOUT = ("kind", "model", "training", "corpora", "clips", "prompts_sha256", "manifest_sha256", "versions")


def evaluated(seed: int, adapt: str) -> dict:
    """Results on the test split of each corpus. The run is trained unless it is there; another recipe's is refused."""
    folder, recipe = RUN / f"seed{seed}", (ModelConfig.released(), TrainConfig.released().but(seed=seed))
    path = folder / (f"results-{adapt}.json" if adapt else "results.json")
    if not path.is_file() or recipe != made_by(folder):
        clips = manifests.load_corpora(CORPORA)
        model = training.fit(clips, folder, *recipe)
        runs.write_json(path, evaluation.evaluate(model, clips, adapt=adapt).results)
    return runs.read_json(path)


def made_by(folder: Path) -> tuple[ModelConfig, TrainConfig]:
    settings = runs.read_json(folder / "config.json")
    return ModelConfig.from_dict(settings["model"]), TrainConfig.from_dict(settings["training"])


def table(adapt: str) -> pd.DataFrame:
    """The mean over the seeds of each value and of the ends of its interval, a row for each corpus and prompts."""
    results = [evaluated(seed, adapt) for seed in SEEDS]
    merged = dict(results[0])
    for key, value in results[0].items():
        if isinstance(value, float) or key.endswith("_ci95"):
            merged[key] = np.mean([result[key] for result in results], axis=0).tolist()
    rows = tables.headline(merged).reset_index()
    rows = rows[rows["ranked by"] != "classifier"].rename(columns={"ranked by": "prompts"})
    rows.insert(2, "standardised by", adapt or "training")
    return rows[["corpus", "prompts", "standardised by", "r@1", "r@10", "accuracy"]]


def write(figures: str) -> None:
    """models/esr-tiny: the retriever, the settings of its run without this machine's paths, and the card."""
    source, target = RUN / f"seed{SEEDS[0]}", runs.RELEASED
    (target / "best").mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "config.json"):  # the weights first: the settings name their hash
        shutil.copyfile(source / "best" / name, target / "best" / name)
    settings = runs.read_json(source / "config.json")
    runs.write_json(target / "config.json", {name: settings[name] for name in ABOUT} | {"roots": []})
    card = CARD.read_text(encoding="utf-8").replace("{figures}", figures)
    (target / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    both = pd.concat([table(""), table("speaker")]).sort_values(["corpus", "prompts"], ascending=False, kind="stable")
    figures = both.to_markdown(index=False)
    print(figures)
    if "--write" in sys.argv[1:]:
        write(figures)
