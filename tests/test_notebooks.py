"""Every notebook, headless, in small; and what all notebooks have in common."""

import json
import re
import shutil

import nbformat
import pandas as pd
import pytest
from papermill import execute_notebook
from papermill.exceptions import PapermillExecutionError

from esr_utils import attributes, evaluation, manifests, runs, text_tables, training
from esr_utils.config import ABLATIONS, TrainConfig

NOTEBOOKS = sorted((runs.PROJECT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def trained(folder):
    """A run folder as 03 writes it, from the notebooks' own folder as working directory."""
    run = folder / "train"
    execute("03_train", folder, cwd=runs.PROJECT / "notebooks", run=str(run), max_steps=30, epochs=8)
    return run


def execute(name, folder, cwd=runs.PROJECT, **parameters):
    """Runs a notebook and returns the text of all its outputs."""
    path = runs.PROJECT / "notebooks" / f"{name}.ipynb"
    done = execute_notebook(path, folder / f"{name}.ipynb", parameters, cwd=str(cwd), progress_bar=False)
    return json.dumps([cell.get("outputs", []) for cell in done.cells])


def test_quickstart_trains_evaluates_plots_searches_and_can_be_heard(folder):
    run = folder / "quick"
    shown = execute("00_quickstart", folder, run=str(run), max_steps=40)
    results = runs.read_json(run / "results.json")
    assert results["demo/n_candidates"] == 401
    assert 0 <= results["demo/seen/r@1"] <= results["demo/seen/r@10"] <= 1
    assert (run / "best" / "model.safetensors").is_file()
    figures = {path.name for path in (run / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in ("training", "recall", "joint_space") for kind in ("png", "svg")}
    assert shown.count("<audio controls") == 3 * 6  # five sentences and one example, three players each


def test_data_notebook_shows_every_style_and_corpus(folder):
    shown = execute("01_data_prep", folder, run=str(folder / "data"))
    assert (folder / "data" / "table_one.csv").is_file()
    assert shown.count("<audio controls") == 22 + 6  # one a style, and three captions of each grammar
    table = text_tables.read_table(folder / "data" / "captions.csv")
    assert len(table) > 3500 and set(table["grammar"]) == {"seen", "held_out"}
    assert set(attributes.Thresholds.load(folder / "data" / "thresholds.json").tertiles) == {"demo"}
    assert all(corpus in shown for corpus in ("RAVDESS", "EmoDB", "nEMO"))


def test_data_notebook_describes_a_captioned_corpus(folder, data_root):
    root = folder / "captioned"
    shutil.copytree(data_root / "mini", root / "promptspeech")
    clips = pd.read_csv(root / "promptspeech" / "manifest.csv")
    (root / "promptspeech" / "manifest.csv").unlink()
    pd.DataFrame({"wav_fp": clips["path"], "style_prompt": "A " + clips["style"] + " voice", "volume": "low"}).to_csv(
        root / "promptspeech" / "all.csv", index=False
    )
    (root / "mini").symlink_to(data_root / "mini")
    options = {"corpora": "promptspeech", "captions_of": "mini", "data_root": str(root), "run": str(folder / "told")}
    shown = execute("01_data_prep", folder, **options)
    assert "A whispered voice" in shown and shown.count("<audio controls") == 1 + 6
    assert len(pd.read_csv(root / "promptspeech" / "manifest.csv")) == 33


def test_prompt_notebook_finds_no_clash_and_writes_the_map(folder):
    shown = execute("02_prompt_generation", folder, run=str(folder / "prompts"))
    assert "'0 clashes'" in shown
    assert (folder / "prompts" / "prompt_space.png").stat().st_size > 10_000


def test_training_notebook_writes_a_run_that_others_read(trained):
    config = runs.read_json(trained / "config.json")
    assert config["corpora"] == ["demo"] and config["training"]["max_steps"] == 30
    assert [line["stage"] for line in runs.read_metrics(trained)][0] == "classify"


@pytest.fixture(scope="module")
def tiny(folder, manifest, data_root, tiny_config):
    """Two seeds of a tiny retriever and a baseline on "mini": the notebooks' parameters to evaluate them."""
    config = TrainConfig().but(epochs=3, classify_epochs=1, align_epochs=1, batch_size=6)
    for name, changes in (("tiny0", {}), ("tiny1", {"seed": 1}), ("base", {"objective": "classifier"})):
        training.fit(manifest, folder / name, tiny_config, config.but(**changes))
    return {"run": str(folder / "tiny0"), "data_root": str(data_root)}


def exported(folder, *stems, kinds=("csv", "md", "tex")) -> bool:
    return all((folder / f"{stem}.{kind}").stat().st_size for stem in stems for kind in kinds)


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


@pytest.fixture(scope="module")
def fsclap(folder, data_root, tiny_text, tiny_whisper):
    """A grid as 08 writes it, on "mini" with tiny backbones."""
    run = folder / "fsclap"
    shown = execute(
        "08_fsclap_train", folder, corpora="mini", data_root=str(data_root), run=str(run), backbone=tiny_text,
        speech_backbone=tiny_whisper, epochs=2, batch_size=8, systems="CLAP+MGA-CLAP+FS-CLAP", seeds=2,
    )  # fmt: skip
    return run, shown


def test_fsclap_training_notebook_writes_a_run_for_each_system_and_seed(fsclap):
    run, shown = fsclap
    assert exported(run / "figures", "training", kinds=("png", "svg")) and "<audio controls" in shown
    for system in ("clap", "mga-clap", "fs-clap"):
        assert {path.name for path in (run / system).iterdir()} == {"seed0", "seed1"}
    assert (run / "captions.csv").stat().st_size and (run / "thresholds.json").stat().st_size


def test_fsclap_evaluation_notebook_gives_the_papers_tables_the_map_and_the_leak(fsclap, folder, data_root):
    run, _ = fsclap
    shown = execute(
        "09_fsclap_evaluate", folder, run=str(run), data_root=str(data_root), k=4, noise_steps=5, speech_steps=2,
        protocol="bi-encoder+masked+rerank+all-pairs",
    )  # fmt: skip
    shown_in = run / "test-held_out"
    assert exported(shown_in / "tables", "table_1", "table_2", "table_3", "differences", "costs", "noise", "leak")
    assert exported(shown_in / "tables", "limits", "read_rightly", "naive_mini")
    assert exported(shown_in / "figures", "joint_umap_mini", "leak", "leak_mini", kinds=("png", "svg"))
    rows = pd.read_csv(shown_in / "tables" / "table_1.csv")
    fs_clap = rows[rows["system"] == "FS-CLAP"]
    assert fs_clap["protocol"].tolist() == ["bi-encoder", "masked", "rerank", "all-pairs"]
    assert "matched" not in rows["protocol"].tolist() and "LEAKY: diagnosis only" in shown
    assert "systems/embed.py clap-microsoft" in shown
    results = runs.read_json(run / "fs-clap" / "seed1" / "results.json")
    assert 0 <= results["mini/rerank/t2a/map@10"] <= 1 and "mini/masked/a2t/r@1_ci95" in results


def test_data_construction_notebook_mines_an_episode_and_files_of_ones_own(folder):
    run = folder / "mined"
    shown = execute("10_data_construction", folder, cwd=folder, run=str(run))
    assert "No separator: " in shown and "No emotion model: " in shown
    assert exported(run / "figures", "timeline", "similarities", kinds=("png", "svg"))
    corpus = manifests.load_corpora("mined", folder)
    assert len(corpus) >= 15 and corpus["speaker"].nunique() == 3
    own = folder / "own files"
    own.mkdir()
    shutil.copy(next((folder / "mined-media").glob("*.wav")), own / "a talk.wav")
    (own / "broken.wav").write_text("no audio")
    execute("10_data_construction", folder, run=str(folder / "own"), media=str(own), language="en", min_clip_s=2)
    assert pd.read_csv(folder / "own" / "failures.csv")["file"].tolist() == ["broken.wav"]
    own = manifests.load_corpora("own", folder)
    assert set(own["source"]) == {"a talk.wav"} and set(own["language"]) == {"en"} and own["duration_s"].min() >= 2


def test_unknown_parameter_stops_the_run_with_the_known_ones(folder):
    with pytest.raises(
        PapermillExecutionError, match="unknown parameter 'bckbone'; known are: backbone, speech_backbone"
    ):
        execute("03_train", folder, bckbone="minilm")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebook_is_committed_as_it_should_be(path):
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert cells[0].cell_type == "markdown" and "**Question.**" in cells[0].source
    assert "**Reads**" in cells[0].source and "**Writes**" in cells[0].source
    assert code[0].metadata.tags == ["parameters"] and cells[1] is code[0]
    assert "check_parameters" in code[1].source
    assert not any(cell.outputs or cell.execution_count for cell in code)
    for line in code[0].source.splitlines():
        assert re.match(r"\w+: (str|int|float|bool) = .+  # |seed: int = 0$", line), f"untyped or uncommented: {line}"
    for cell in code:
        assert not re.search(r"^(class |def |!|%pip|import sys)|sys\.path", cell.source, re.M)
        assert cell.source.count("\n") < 25


def test_parameters_that_scripts_rely_on():
    declared = {}
    for path in NOTEBOOKS:
        source = nbformat.read(path, as_version=4).cells[1].source
        declared[path.stem] = set(re.findall(r"^(\w+):", source, re.M))
    assert declared["03_train"] >= {
        "backbone", "speech_backbone", "corpora", "data_root", "run", "seed", "device", "level", "finetune",
        "objective", "epochs", "max_steps",
    }  # fmt: skip
    assert declared["04_evaluate"] >= {
        "run", "corpora", "manifest", "data_root", "split", "results", "runs_compared", "reference",
    }  # fmt: skip
    assert declared["05_ablations"] >= {
        "corpora", "data_root", "run", "backbone", "speech_backbone", "seeds", "epochs", "max_steps",
    }  # fmt: skip
    assert declared["08_fsclap_train"] >= declared["03_train"] & {
        "backbone", "speech_backbone", "corpora", "data_root", "run", "seed", "device", "level", "finetune",
        "objective", "epochs", "max_steps",
    }  # fmt: skip
    assert declared["09_fsclap_evaluate"] >= {
        "run", "corpora", "manifest", "data_root", "split", "results", "protocol",
    }  # fmt: skip
    assert declared["06_duration_buckets"] >= {"run", "runs_compared", "corpora", "data_root", "split"}
    assert declared["10_data_construction"] >= {
        "media", "run", "separator", "diariser", "emotion", "threshold", "keep_single", "device",
    }  # fmt: skip
    assert declared["07_embedding_maps"] >= {"run", "without", "corpora", "data_root", "split", "prompts"}
