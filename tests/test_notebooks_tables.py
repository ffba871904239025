"""Notebooks 04 to 07, headless, in small."""

import pandas as pd
import pytest
from notebook_runs import execute, exported

from esr_utils import evaluation, manifests, runs, training
from esr_utils.config import ABLATIONS, TrainConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def tiny(folder, manifest, data_root, tiny_config):
    """Two seeds of a tiny retriever and a baseline on "mini": the notebooks' parameters to evaluate them."""
    config = TrainConfig().but(epochs=3, classify_epochs=1, align_epochs=1, batch_size=6)
    for name, changes in (("tiny0", {}), ("tiny1", {"seed": 1}), ("base", {"objective": "classifier"})):
        training.fit(manifest, folder / name, tiny_config, config.but(**changes))
    return {"run": str(folder / "tiny0"), "data_root": str(data_root)}


def test_evaluation_notebook_writes_results_where_told_and_compares_runs(tiny, folder):
    others = f"{folder / 'tiny1'}+{folder / 'base'}"
    shown = execute("04_evaluate", folder, cwd=folder, **tiny, runs_compared=others, results="my_results.json")
    results, run = runs.read_json(folder / "my_results.json"), folder / "tiny0"
    assert "mini/control/loudness/r@10" in results and "mini/classifier/r@1" in results
    assert (run / "trials_mini.json.gz").is_file()
    assert exported(run / "figures", "recall", "confusion_mini", kinds=("png", "svg"))
    assert exported(run / "tables", "headline", "table_two", "table_two_differences", "table_two_paper", "groups")
    rows = pd.read_csv(run / "tables" / "table_two.csv", index_col="model")
    assert rows["seeds"].tolist() == ["0, 1", "0"] and list(rows.index)[1].startswith("Baseline: ")
    model, clips = training.load_run(folder / "tiny1")[0], manifests.load_corpora("mini", tiny["data_root"])
    other = evaluation.evaluate(model, clips)
    mean = (results["mini/seen/r@5"] + other.results["mini/seen/r@5"]) / 2
    assert rows["mini R@5"].iloc[0] == pytest.approx(mean)
    assert "RoBERTa + emotion2vec (paper)" in shown and "n.s." in shown


def test_ablations_notebook_trains_every_variant_and_compares_them(folder, data_root, tiny_text, tiny_whisper):
    run = folder / "ablations"
    shown = execute(
        "05_ablations", folder, corpora="mini", data_root=str(data_root), run=str(run), backbone=tiny_text,
        speech_backbone=tiny_whisper, max_steps=3,
    )  # fmt: skip
    assert {path.name for path in run.iterdir()} - {"tables"} == {runs.slug(variant) for variant in ABLATIONS}
    assert exported(run / "tables", "table_three", "table_three_differences")
    rows = pd.read_csv(run / "tables" / "table_three.csv")
    assert rows["model"].tolist()[: len(ABLATIONS)] == list(ABLATIONS)
    said = (run / "tables" / "table_three_in_words.md").read_text("utf-8")
    assert said.count("- mini, ") == len(ABLATIONS) - 1 and "w/o pre-training" in shown


def test_duration_notebook_shows_empty_bins(tiny, folder):
    execute("06_duration_buckets", folder, **tiny, runs_compared=str(folder / "base"))
    assert exported(folder / "tiny0" / "tables", "duration")
    assert exported(folder / "tiny0" / "figures", "duration", kinds=("png", "svg"))
    rows = pd.read_csv(folder / "tiny0" / "tables" / "duration.csv")
    assert len(rows) == 2 * 5 and rows["clips"].sum() == 2 * 18
    assert rows.loc[rows["clips"] == 0, "R@1"].isna().all() and rows.loc[rows["clips"] > 0, "R@1"].notna().all()


def test_map_notebook_draws_both_maps_with_and_without_the_discriminator(tiny, folder):
    execute("07_embedding_maps", folder, **tiny)
    other = runs.read_json(folder / "tiny0-without-modality-discriminator" / "config.json")
    assert other["training"]["adversarial_weight"] == 0
    assert exported(folder / "tiny0" / "figures", "joint_tsne", "joint_umap", kinds=("png", "svg"))
    rows = pd.read_csv(folder / "tiny0" / "tables" / "modality.csv", index_col="space")
    assert list(rows.index) == ["with discriminator", "without discriminator"]
    assert rows["linear probe, accuracy"].between(0, 1).all() and (rows["modality gap"] > 0).all()
