"""models/esr-tiny: whole, small, made by the recipe in the code, without a trace of where, and as good as its card."""

from __future__ import annotations

import builtins
import json
import re

import nbformat
import numpy as np
import pytest

from esr_utils import retriever, runs, weights
from esr_utils.config import ModelConfig, TrainConfig, with_settings
from esr_utils.embedding import embed
from esr_utils.evaluation import style_queries
from esr_utils.manifests import load_corpora, to_cuts

CARD = (runs.RELEASED / "README.md").read_text("utf-8")
SETTINGS = runs.read_json(runs.RELEASED / "config.json")


@pytest.fixture(scope="module")
def released() -> retriever.Retriever:
    return retriever.load(runs.RELEASED / "best")


def test_it_is_made_by_the_recipe_in_the_code():
    assert ModelConfig.from_dict(SETTINGS["model"]) == ModelConfig.released()
    assert TrainConfig.from_dict(SETTINGS["training"]) == TrainConfig.released().but(seed=0)
    assert SETTINGS["corpora"] == ["ravdess", "emodb", "nemo", "demo"]


def test_the_command_on_its_card_is_that_recipe():
    given = dict(re.findall(r"-p (\w+) \"?([^\s\"]+)", CARD))
    source = nbformat.read(runs.PROJECT / "notebooks" / "03_train.ipynb", as_version=4).cells[1].source
    kinds = dict(re.findall(r"^(\w+): (\w+) =", source, re.M))
    assert set(given) <= set(kinds) and given["corpora"] == "+".join(SETTINGS["corpora"])
    own = {name: getattr(builtins, kinds[name])(value) for name, value in given.items()}
    changes = {name: own[name] for name in ("objective", "epochs", "batch_size", "adversarial_weight")}
    model = ModelConfig(speech_backbone=own["speech_backbone"])
    made = with_settings(own["settings"], model, TrainConfig.demo().but(**changes))
    assert made == (ModelConfig.released(), TrainConfig.released())


def test_it_is_small_and_says_nothing_of_where_it_was_made():
    assert sum(file.stat().st_size for file in runs.RELEASED.rglob("*")) < 25e6
    assert SETTINGS["roots"] == [] and '"/' not in json.dumps(SETTINGS)


def test_both_backbones_are_named_and_not_in_it(released):
    about = runs.read_json(runs.RELEASED / "best" / "config.json")
    assert not about["speech_backbone_tuned"] and about["speech_backbone_sha256"] == weights.fingerprint(
        released.speech
    )
    assert about["text_backbone_sha256"] == released.text.sha256
    state = weights.read_state(runs.RELEASED / "best" / "model.safetensors")
    assert not [name for name in state if name.startswith(("speech.", "text."))]
    assert released.speech_head.is_fitted  # an index can adapt


def test_it_is_as_good_as_its_card_on_some_clips_of_speakers_it_has_not_heard(released, tmp_path):
    """Every eighth test clip of the demo corpus, one in 22 styles: 55 clips, whose share has a deviation of 0.064."""
    (row,) = re.findall(r"^\| demo +\| seen +\| training .*$", CARD, flags=re.MULTILINE)
    claimed = float(row.split("|")[-2].split()[0])
    clips = load_corpora("demo")
    clips = clips[clips["split"] == "test"].iloc[::8]
    found = embed(released, to_cuts(clips), SETTINGS["training"]["level"], tmp_path)
    styles = sorted(set(clips["style"]))
    nearest = (found.vectors @ style_queries(released, styles, "seen").T).argmax(axis=1)
    right = np.array(styles)[nearest] == clips.set_index("utterance_id").loc[found.utterance_ids, "style"]
    assert abs(right.mean() - claimed) < 0.2 and claimed > 0.4


def test_the_card_says_what_must_be_said():
    for word in ("CC BY-NC-SA 4.0", "RAVDESS", "EmoDB", "nEMO", "not good for", "03_train", "benchmarks/released.py"):
        assert word in CARD, word
    assert "{figures}" not in CARD
