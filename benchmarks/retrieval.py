"""The README's tables on real speech: RAVDESS + EmoDB over three seeds, controls, and each corpus left out of training.

    make results ESR_DATA=<folder with ravdess, emodb, nemo>

Prints Markdown, and writes it with every run folder to runs/retrieval/. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from esr_utils import controls, evaluation, manifests, runs, tables, training
from esr_utils.config import TrainConfig

SEEDS = (0, 1, 2)
FOLDER = runs.RUNS / "retrieval"
CORPORA = ("ravdess", "emodb", "nemo")


def evaluated(name: str, train: pd.DataFrame, test: pd.DataFrame, config: TrainConfig) -> dict:
    """Results of one run, trained and evaluated unless they are there already."""
    path = FOLDER / name / "results.json"
    if not path.is_file():
        model = training.fit(train, FOLDER / name, config=config)
        runs.write_json(path, evaluation.evaluate(model, test, level=config.level).results)
    return runs.read_json(path)


def mean_over_seeds(results: list[dict]) -> tuple[dict, dict]:
    """Each value and each bound of an interval, averaged over the seeds; and the range of each value."""
    merged, ranges = dict(results[0]), {}
    for key in results[0]:
        values = [result[key] for result in results]
        if key.endswith("_ci95"):
            merged[key] = np.mean(values, axis=0).tolist()
        elif isinstance(values[0], float):
            merged[key] = float(np.mean(values))
            ranges[key] = f"{min(values):.2f} to {max(values):.2f}"
    return merged, ranges


def shared_styles(test: pd.DataFrame, train: pd.DataFrame) -> pd.DataFrame:
    return test[test["style"].isin(set(train["style"]))]


def show(title: str, table: pd.DataFrame) -> None:
    text = f"\n### {title}\n\n{table.reset_index().to_markdown(index=False)}\n"
    print(text, flush=True)
    with (FOLDER / "tables.md").open("a", encoding="utf-8") as file:
        file.write(text)


def both_corpora() -> None:
    clips = manifests.load_corpora("ravdess+emodb")
    for level in ("normalised", "recorded"):
        config = TrainConfig.demo().but(level=level)
        of_seeds = [evaluated(f"both-{level}-{seed}", clips, clips, config.but(seed=seed)) for seed in SEEDS]
        merged, ranges = mean_over_seeds(of_seeds)
        if level == "normalised":
            path = FOLDER / "controls.json"
            if not path.is_file():
                runs.write_json(path, {k: v for c in CORPORA[:2] for k, v in controls.simple_cues(clips, c).items()})
            merged |= json.loads(path.read_text())
        show(f"Trained on RAVDESS + EmoDB, level {level}, mean of seeds 0-2", tables.headline(merged))
        show(f"Over the whole collection, level {level}", tables.collection(merged))
        show(f"By group, level {level}", tables.groups(merged))
        wanted = [key for key in ranges if key.endswith(("seen/r@1", "seen/r@10", "zero_shot/accuracy"))]
        show(f"Range over seeds, level {level}", pd.DataFrame({"range": [ranges[k] for k in wanted]}, index=wanted))
        show(f"Protocol, level {level}", tables.protocol(merged))


def one_left_out() -> None:
    results: dict = {}
    for left_out in CORPORA:
        train = manifests.load_corpora([corpus for corpus in CORPORA if corpus != left_out])
        test = shared_styles(manifests.load_corpora(left_out), train)
        runs_of = [evaluated(f"without-{left_out}-{s}", train, test, TrainConfig.demo().but(seed=s)) for s in SEEDS]
        results |= {k: v for k, v in mean_over_seeds(runs_of)[0].items() if k.startswith(left_out)}
    show(
        "Trained on the other two corpora, tested on this one's shared styles, mean of seeds 0-2",
        tables.headline(results),
    )


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    Path(FOLDER / "tables.md").unlink(missing_ok=True)
    both_corpora()
    one_left_out()
