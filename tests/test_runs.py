"""Run folders: parameters checked by name and type, files replaced whole or not, one seed for all."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from esr_utils import runs
from esr_utils.runs import atomic_path, check_parameters, read_json, run_folder, seed_everything, write_json

# Parameters -------------------------------------------------------------------------------------------------

DECLARED = 'backbone: str = "minilm"\nepochs: int = 3\nlearning_rate: float = 1e-3\nresume: bool = True'


def notebook(injected: str | None) -> dict:
    """The globals of a notebook's kernel after the parameters' cell and, if given, papermill's."""
    cells = ["", DECLARED]
    namespace: dict = {"__annotations__": {}}
    exec(compile(DECLARED, "cell", "exec", dont_inherit=True), namespace)  # a kernel's annotations are objects
    if injected is not None:
        cells.append("# Parameters\n" + injected)
        exec(injected, namespace)
    return namespace | {"In": cells}


@pytest.mark.parametrize(
    "injected",
    [None, "", 'backbone = "bert"', "epochs = 5\nresume = False", "learning_rate = 1", "learning_rate = 0.1"],
)
def test_declared_parameters_of_the_right_type_pass(injected):
    assert check_parameters(notebook(injected)) is None  # it does not raise


def test_an_unknown_parameter_is_refused_with_the_list_of_known_ones():
    with pytest.raises(TypeError, match="'epoch'.*backbone, epochs, learning_rate, resume"):
        check_parameters(notebook("epoch = 5"))


@pytest.mark.parametrize(
    ("injected", "name", "kind"),
    [
        ("backbone = 3", "backbone", "str"),
        ("epochs = 2.5", "epochs", "int"),
        ('epochs = "5"', "epochs", "int"),
        ("epochs = True", "epochs", "int"),
        ("learning_rate = True", "learning_rate", "float"),
        ('learning_rate = "1e-3"', "learning_rate", "float"),
        ("resume = 1", "resume", "bool"),
        ("backbone = None", "backbone", "str"),
        ('epochs = 4\nbackbone = ["bert"]', "backbone", "str"),
    ],
)
def test_a_parameter_of_the_wrong_type_is_refused(injected, name, kind):
    with pytest.raises(TypeError, match=f"'{name}'.*{kind}"):
        check_parameters(notebook(injected))


def test_only_papermills_cell_is_looked_at():
    """What the notebook itself assigns later is no parameter."""
    namespace = notebook("epochs = 2")
    namespace["In"].append("rows = 3")
    namespace["rows"] = 3
    assert check_parameters(namespace) is None  # it does not raise


def test_the_last_of_papermills_cells_counts():
    namespace = notebook("epochs = 2")
    namespace["In"].append("# Parameters\nepoch = 2")
    with pytest.raises(TypeError, match="'epoch'"):
        check_parameters(namespace)


# Files ------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    for text in ("first", "second"):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "first"  # until the block ends
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_an_exception_before_there_is_a_file_leaves_none(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file.txt"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_json_is_read_back_as_written(tmp_path):
    value = {"r@1": 0.1 + 0.2, "names": ["Łódź", "x"], "none": None, "ci": [0.0, 1e-17]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "Łódź" in (tmp_path / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}, {1, 2}])
def test_what_is_not_json_is_not_written(tmp_path, value):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == 1 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("data", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00"])
def test_a_json_file_that_is_not_whole_is_refused_by_name(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match="a.json is not JSON"):
        read_json(tmp_path / "a.json")


def test_metrics_are_read_line_by_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2, "tau": 0.07}\n')
    assert runs.read_metrics(tmp_path) == [{"epoch": 1}, {"epoch": 2, "tau": 0.07}]


def test_versions_can_be_written(tmp_path):
    assert json.dumps(runs.versions()) and runs.versions()["torch"] == torch.__version__.split("+")[0]


# Run folders ------------------------------------------------------------------------------------------------


def test_a_bare_name_is_a_folder_under_runs():
    assert run_folder("quickstart") == runs.RUNS / "quickstart"
    assert runs.RUNS.name == "runs" and (runs.RUNS.parent / "pyproject.toml").is_file()


def test_a_path_is_taken_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    here = Path(os.getcwd())
    assert run_folder(tmp_path / "mine") == tmp_path / "mine"
    assert run_folder("some/mine") == here / "some" / "mine"
    assert run_folder("~/mine") == tmp_path / "home" / "mine"
    assert not (tmp_path / "mine").exists()  # naming it does not make it


# Seeds ------------------------------------------------------------------------------------------------------


def draws(*seed: int) -> list[float]:
    rng = seed_everything(*seed)
    return [random.random(), float(np.random.rand()), float(torch.rand(())), float(rng.random())]


def test_one_seed_decides_everything_that_is_random():
    assert draws(3) == draws(3) and draws(3, 1) == draws(3, 1)
    for other in (draws(4), draws(3, 1), draws(3, 2), draws(1, 3)):
        assert all(a != b for a, b in zip(draws(3), other, strict=True))


def test_what_was_drawn_before_does_not_matter():
    first = draws(5, 2)
    draws(17), torch.rand(10), np.random.rand(10), random.random()
    assert draws(5, 2) == first


def test_a_large_number_is_a_seed_too():
    assert draws(0, 2**31) == draws(0, 2**31) != draws(0, 0)


def test_devices_by_name():
    assert runs.pick_device("cpu") == torch.device("cpu")
    assert runs.pick_device("auto").type in ("cpu", "cuda", "mps")
