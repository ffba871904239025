"""Ablations: what is trained and what is reused, the table, and sentences that follow from the numbers."""

from __future__ import annotations

import copy
import functools
import shutil

import numpy as np
import pytest

from esr_utils import ablations, evaluation, provenance, retriever, runs, training, trials
from esr_utils.comparison import Entry
from esr_utils.config import ABLATIONS, TrainConfig
from esr_utils.manifests import load_corpora

CONFIG = TrainConfig().but(epochs=3, classify_epochs=1, align_epochs=1, batch_size=6, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path_factory):
    """Backbones are read from disk once; frames are kept apart from those of real runs; few trials."""
    cache = tmp_path_factory.getbasetemp() / "ablations-cache"
    for name in ("load_speech_backbone", "load_text_backbone"):
        monkeypatch.setattr(retriever, name, READ.setdefault(name, functools.cache(getattr(retriever, name))))
        load = getattr(retriever, name)
        monkeypatch.setattr(retriever, name, lambda backbone, load=load: copy.deepcopy(load(backbone)))
    monkeypatch.setattr(training, "fit", functools.partial(training.fit, cache=cache))
    monkeypatch.setattr(evaluation, "evaluate", functools.partial(evaluation.evaluate, cache=cache, n_trials=20))


READ: dict = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ablations")


def test_names_as_folders():
    assert runs.slug("w/o pre-training") == "without-pre-training"
    assert len({runs.slug(variant) for variant in ABLATIONS}) == len(ABLATIONS)


def test_every_variant_and_seed_is_trained_once(manifest, tiny_config, folder, monkeypatch):
    few = {name: ABLATIONS[name] for name in ("full", "w/o modality discriminator")}
    monkeypatch.setattr(ablations, "ABLATIONS", few)
    trained = ablations.train_all(manifest, folder, tiny_config, CONFIG, seeds=2)
    assert trained == {
        "full": [folder / "full" / "seed0", folder / "full" / "seed1"],
        "w/o modality discriminator": [
            folder / "without-modality-discriminator" / "seed0",
            folder / "without-modality-discriminator" / "seed1",
        ],
    }
    for variant, folders in trained.items():
        for seed, run in enumerate(folders):
            settings = TrainConfig.from_dict(runs.read_json(run / "config.json")["training"])
            assert settings == CONFIG.but(seed=seed, **few[variant])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(training, "fit", None)  # nothing is left to train
    assert ablations.train_all(manifest, folder, tiny_config, CONFIG, seeds=2) == trained
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(provenance.RunExists, match="holds another run"):
        ablations.train_all(manifest, folder, tiny_config, CONFIG.but(epochs=4), seeds=1)
    with pytest.raises(ValueError, match="seeds is 0"):
        ablations.train_all(manifest, folder, tiny_config, CONFIG, seeds=0)


def test_a_run_that_was_stopped_goes_on(manifest, tiny_config, folder, monkeypatch):
    monkeypatch.setattr(ablations, "ABLATIONS", {"full": {}})
    state = runs.read_json(folder / "full" / "seed0" / "resume.json")
    runs.write_json(folder / "full" / "seed0" / "resume.json", state | {"finished": False})
    ablations.train_all(manifest, folder, tiny_config, CONFIG, seeds=1)
    assert runs.read_json(folder / "full" / "seed0" / "resume.json")["finished"]


def test_a_counterpart_has_the_runs_settings_but_one(data_root, manifest, folder):
    run = folder / "full" / "seed1"
    other = ablations.counterpart(run, "w/o modality discriminator", str(data_root))
    assert other == folder / "full" / "seed1-without-modality-discriminator"
    ours, theirs = (runs.read_json(path / "config.json") for path in (run, other))
    assert theirs["training"] == ours["training"] | {"adversarial_weight": 0.0} and theirs["model"] == ours["model"]
    assert theirs["manifest_sha256"] == ours["manifest_sha256"]
    with pytest.raises(ValueError, match="is itself a run w/o modality discriminator"):
        ablations.counterpart(other, "w/o modality discriminator", str(data_root))


def test_a_counterpart_is_refused_where_the_corpus_has_changed(own_corpus, tiny_config, tmp_path):
    run = tmp_path / "run"
    training.fit(own_corpus, run, tiny_config, CONFIG)
    rows = (tmp_path / "mini" / "manifest.csv").read_text().splitlines(keepends=True)
    (tmp_path / "mini" / "manifest.csv").write_text("".join(rows[:-1]))
    with pytest.raises(ValueError, match="the clips of mini are not those that .* was trained on"):
        ablations.counterpart(run, "w/o modality discriminator")
    assert not (tmp_path / "run-without-modality-discriminator" / "resume.json").exists()


def test_corpora_keep_the_order_they_were_given_in(own_corpus, tiny_config, tmp_path):
    """Else the counterpart of a run on mini+another would be refused: sorted, its manifest is another."""
    shutil.copytree(tmp_path / "mini", tmp_path / "another")
    text = (tmp_path / "another" / "manifest.csv").read_text().replace("mini", "another")
    (tmp_path / "another" / "manifest.csv").write_text(text)
    training.fit(load_corpora("mini+another", tmp_path), tmp_path / "run", tiny_config, CONFIG)
    other = ablations.counterpart(tmp_path / "run", "w/o modality discriminator", str(tmp_path))
    assert runs.read_json(other / "config.json")["corpora"] == ["mini", "another"]


# The table and the sentences, from made-up numbers ------------------------------------------------------------

BASE = np.array([0.5, 0.6, 0.7, 0.8])


class Drawn:
    candidates_by_style = {"angry": 101, "calm": 101}


def entry(label: str, gains, spread: float = 0.01, corpus: str = "expresso") -> Entry:
    """An entry whose R@1, 5, 10, 20 are BASE + gains; `spread` is the deviation of what the bootstrap adds."""
    found = evaluation.Evaluation()
    noise = np.random.default_rng(len(label)).standard_normal(1000) * spread
    common = np.random.default_rng(0).standard_normal(1000) * 0.05  # easy and hard clips: the same for every row
    for k, value in zip(trials.KS, BASE + gains, strict=True):
        found.results[f"{corpus}/seen/r@{k}"] = float(value)
        found.replicates[f"{corpus}/seen/r@{k}"] = value + noise + common
    found.results |= {f"{corpus}/zero_shot/accuracy": 0.5, f"{corpus}/seen/modality_gap": 0.25}
    found.replicates[f"{corpus}/zero_shot/accuracy"] = 0.5 + noise
    found.replicates[f"{corpus}/seen/modality_gap"] = 0.25 + noise
    scorer = type("Scorer", (), {"trials": Drawn()})()
    found.scorers[corpus] = scorer
    return Entry(label, (label,), (0,), "seen", (found,), ("epoch 9 of 40, 0 with discriminator",))


def test_the_table_has_the_papers_rows_below():
    table = ablations.table([entry("full", 0 * BASE), entry("w/o pre-training", -0.1 + 0 * BASE)])
    assert str(table.loc[("expresso", "w/o pre-training"), "R@5"]).startswith("0.50 [")
    assert table.loc[("expresso", "full"), "modality gap"].value == 0.25
    assert str(table.loc[("expresso", "full"), "modality gap"]) == "0.25 [0.23, 0.27]"
    assert table.loc[("expresso", "full"), "checkpoint"] == "epoch 9 of 40, 0 with discriminator"
    assert str(table.loc[("expresso-paper", "w/o pre-training (paper)"), "R@5"]) == "0.9196"
    assert (table.loc["expresso-paper"]["accuracy"] == "").all() and len(table) == 2 + 5


def sentence(label: str, gains, **options) -> str:
    (found,) = ablations.verdicts([entry("full", 0 * BASE), entry(label, np.array(gains), **options)])
    return found


def test_a_loss_as_in_the_paper_is_called_one():
    said = sentence("w/o pre-training", [-0.05, -0.05, -0.05, -0.001])
    assert said == (
        "expresso, w/o pre-training: lower than the full model at R@1, 5, 10; not told from the full model at R@20. "
        "In the paper -0.037, -0.063, -0.005, -0.008 at R@1, 5, 10, 20: the same sign here at R@1, 5, 10, 20, "
        "told from 0 at R@1, 5, 10. A difference as large as the paper's is outside the interval at R@10."
    )


def test_what_goes_against_the_paper_is_said():
    said = sentence("w/o prompt augmentation", [0.1, 0.1, 0.0, -0.001])
    assert "higher than the full model at R@1, 5; not told from the full model at R@10, 20" in said
    assert "the same sign here at R@20, told from 0 at none." in said
    assert "It goes against the paper at R@1, 5." in said
    assert "outside the interval at R@1, 5." in said


def test_nothing_is_claimed_where_the_interval_is_wide():
    said = sentence("w/o pre-training", [-0.05, -0.05, 0.05, 0.05], spread=0.2)
    assert "not told from the full model at R@1, 5, 10, 20." in said and "told from 0 at none." in said
    assert "against" not in said and "outside" not in said


def test_the_papers_collapse_is_compared_with_chance():
    said = sentence("w/o style classification", 0 * BASE)
    assert "In the paper it collapsed; here it did not, and finds more than chance: R@1 0.50 [" in said
    assert "against 0.010" in said
    at_chance = np.array([1, 5, 10, 20]) / 101 - BASE
    assert "here it is at chance too" in sentence("w/o style classification", at_chance)


def test_variants_beyond_the_paper_are_called_so_and_the_discriminators_share_is_named():
    assert sentence("multi-positive targets", 0 * BASE).endswith("Not in the paper.")
    said = sentence("published code", 0 * BASE)
    assert "Not in the paper. (Checkpoints: full, epoch 9 of 40, 0 with discriminator; here, epoch 9" in said


def test_the_checkpoint_says_how_long_the_discriminator_took_part(tmp_path):
    runs.write_json(tmp_path / "resume.json", {"best_epoch": 13})
    settings = {"training": TrainConfig().but(epochs=40, classify_epochs=5, align_epochs=5).to_dict()}
    assert evaluation.checkpoint(tmp_path, settings) == "epoch 13 of 40, 3 with discriminator"
    settings["training"]["adversarial_weight"] = 0.0
    assert evaluation.checkpoint(tmp_path, settings) == "epoch 13 of 40, 0 with discriminator"
    assert evaluation.checkpoint(tmp_path / "released", settings) == ""
