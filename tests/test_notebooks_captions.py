"""Notebooks 01 and 08 to 10, headless, in small: corpora and their captions."""

import shutil

import pandas as pd
import pytest
from notebook_runs import execute, exported

from esr_utils import attributes, manifests, runs, text_tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def fsclap(folder, data_root, tiny_text, tiny_whisper):
    """A grid as 08 writes it, on "mini" with tiny backbones."""
    run = folder / "fsclap"
    shown = execute(
        "08_fsclap_train", folder, corpora="mini", data_root=str(data_root), run=str(run), backbone=tiny_text,
        speech_backbone=tiny_whisper, epochs=2, batch_size=8, systems="CLAP+MGA-CLAP+FS-CLAP", seeds=2,
    )  # fmt: skip
    return run, shown


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
