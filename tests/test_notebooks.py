"""Notebooks 00, 02 and 03, headless, in small; and what all notebooks have in common."""

import re

import nbformat
import pytest
from notebook_runs import execute

from esr_utils import runs

NOTEBOOKS = sorted((runs.PROJECT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def mini(data_root):
    """The notebooks' parameters for "mini", by the default backbones."""
    return {"corpora": "mini", "data_root": str(data_root)}


@pytest.fixture(scope="module")
def trained(folder, mini):
    """A run folder as 03 writes it, from the notebooks' own folder as working directory."""
    run = folder / "train"
    execute("03_train", folder, cwd=runs.PROJECT / "notebooks", run=str(run), max_steps=30, epochs=40, **mini)
    return run


def test_quickstart_trains_evaluates_plots_searches_and_can_be_heard(folder, mini):
    run = folder / "quick"
    shown = execute("00_quickstart", folder, run=str(run), max_steps=40, **mini)
    results = runs.read_json(run / "results.json")
    assert results["mini/n_candidates"] == 1 + 12  # the clips of the other two styles
    assert 0 <= results["mini/seen/r@1"] <= results["mini/seen/r@10"] <= 1
    assert (run / "best" / "model.safetensors").is_file()
    figures = {path.name for path in (run / "figures").iterdir()}
    assert figures == {f"{name}.{kind}" for name in ("training", "recall", "joint_space") for kind in ("png", "svg")}
    assert shown.count("<audio controls") == 3 * 7  # five sentences, an example, own recordings: three players each


def test_prompt_notebook_finds_no_clash_and_writes_the_map(folder):
    shown = execute("02_prompt_generation", folder, run=str(folder / "prompts"))
    assert "'0 clashes'" in shown
    assert (folder / "prompts" / "prompt_space.png").stat().st_size > 10_000


def test_training_notebook_writes_a_run_that_others_read(trained):
    config = runs.read_json(trained / "config.json")
    assert config["corpora"] == ["mini"] and config["training"]["max_steps"] == 30
    assert [line["stage"] for line in runs.read_metrics(trained)][0] == "classify"


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
    assert declared["11_search"] >= {"query", "index", "k", "run"}
    assert declared["07_embedding_maps"] >= {"run", "without", "corpora", "data_root", "split", "prompts"}
