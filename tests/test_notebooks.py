"""Notebooks 00 to 03, headless, in small; and what all notebooks have in common."""

import re
import shutil

import nbformat
import pandas as pd
import pytest
from notebook_runs import execute
from papermill.exceptions import PapermillExecutionError

from esr_utils import attributes, runs, text_tables

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
