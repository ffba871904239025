"""What some parts of the released retriever's recipe is worth on a corpus that was left out of the training.

    python benchmarks/recipes.py [recipe ...]      with $ESR_DATA = <folder with ravdess, emodb, nemo>

Each recipe is `ModelConfig.released()` and `TrainConfig.released()` but for one part. It is trained three times (seeds
0-2; that which tunes the backbone, once) without each of the three corpora, and tested on the training and validation
speakers of the one left out: no test split is read. Prints Markdown: differences from the released recipe, paired by
replicate (speakers, then their utterances, and seeds), with 95 % intervals; `mean` is that of the corpora. Most of the
released recipe was chosen on speakers of RAVDESS and EmoDB who are among those tested here, which flatters it. Keeps
runs in runs/recipes/ and runs/adaptation/; interrupted, it goes on where it was. Recipes that are named are trained,
and nothing is printed: so several processes can share them.
"""

from __future__ import annotations

import sys
from functools import cache

import adaptation
import attentive
import numpy as np
import pandas as pd
import tuned
from adaptation import CORPORA, METRICS, SEEDS

from esr_utils import runs
from esr_utils.config import ModelConfig, TrainConfig

# Changes to the model's settings, and to the training's.
RECIPES: dict[str, tuple[dict, dict]] = {
    "released": ({}, {}),
    "Whisper tiny": ({"speech_backbone": "whisper-tiny"}, {}),
    "batches of any corpora": ({}, {"batches": "any"}),
    "without mixup": ({}, {"mixup": 0.0}),
    "without speeds": ({}, {"speeds": ()}),
    "a mix of layers": ({"concat_layers": False}, {}),
    "training's statistics": ({}, {"standardise": "training"}),
    "one positive a clip": ({}, {"objective": "infonce", "mixup": 0.0}),
    "attentive pooling": ({}, {}),
    "tuned afterwards": ({}, {}),
}
TRAINED_BY = {"attentive pooling": attentive.left_out, "tuned afterwards": tuned.left_out}
SEEDS_OF = {"tuned afterwards": SEEDS[:1]}  # half an hour a training on two cores
WAYS = ("training", "speaker")


@cache
def measured(recipe: str, seeds: tuple[int, ...] = SEEDS) -> dict[tuple[str, str], tuple[dict, dict]]:
    """By corpus and way: values, and replicates; of corpus `mean`, their means."""
    model, training = RECIPES[recipe]
    folder = adaptation.FOLDER if recipe == "released" else runs.RUNS / "recipes" / runs.slug(recipe)
    configs = ModelConfig.released().but(**model), TrainConfig.released().but(**training)
    left_out, found = TRAINED_BY.get(recipe, adaptation.left_out), {}
    for corpus in CORPORA:
        trained = [left_out(corpus, seed, folder, *configs) for seed in seeds]
        found |= {(corpus, way): adaptation.measured(trained, way) for way in WAYS}
    for way in WAYS:
        of_corpora = [found[corpus, way] for corpus in CORPORA]
        found["mean", way] = tuple({name: np.mean([one[i][name] for one in of_corpora], 0) for name in METRICS}
                                   for i in (0, 1))  # fmt: skip
    return found


def row(recipe: str, way: str, metric: str) -> dict:
    seeds = SEEDS_OF.get(recipe, SEEDS)
    found: dict = {"recipe": recipe, "seeds": len(seeds)}
    for corpus in ("mean", *CORPORA):
        before, drawn_before = measured("released", seeds)[corpus, way]
        after, drawn = measured(recipe, seeds)[corpus, way]
        one = adaptation.gained(before[metric], after[metric], drawn_before[metric], drawn[metric])
        found[corpus] = f"{after[metric]:.2f}" if recipe == "released" else one
    return found


if __name__ == "__main__":
    if unknown := set(named := sys.argv[1:]) - set(RECIPES):
        sys.exit(f"no recipe {', '.join(unknown)}; there are: {', '.join(RECIPES)}")
    for recipe in named:
        measured(recipe, SEEDS_OF.get(recipe, SEEDS))
    for way in () if named else WAYS:
        for metric in ("r@10", "accuracy"):
            rows = pd.DataFrame([row(recipe, way, metric) for recipe in RECIPES])
            adaptation.show(f"{metric}, features standardised by the {way}'s statistics", rows)
