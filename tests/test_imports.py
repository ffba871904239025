"""The architecture, read from the source: imports go one way, few modules know a library, none prints."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import esr_utils

ROOT = Path(esr_utils.__file__).parent

LAYERS = {
    "leaves": (
        "config", "runs", "weights", "styles", "wording", "prompts", "grammar", "metrics", "intervals", "losses",
        "audio_files", "manifest_schema", "text_tables", "modality", "tables", "paper", "processes", "matching",
        "codebook", "audio_folder", "audio_lengths", "decoding", "nearest", "index_rows", "index_table",
        "index_writing", "index_snapshot", "clips", "cli_options", "cli_progress", "memory",
    ),
    "data": (
        "manifests", "corpora", "provenance", "batches", "acoustics", "attributes", "captions", "trials", "scoring",
        "captioned", "controls", "embeddings_file",
    ),
    "models": (
        "speech", "text", "chat", "retriever", "fusion", "frame_cache", "embedding", "vad", "moments", "adaptation",
    ),
    "top": (
        "objective", "checkpoints", "fitting", "training", "evaluation", "comparison", "ablations", "spaces", "index",
        "generation", "mining", "plots", "fusion_objective", "fusion_training", "fusion_systems", "protocols",
        "fusion_evaluation", "fusion_tables", "fusion_limits", "leakage",
        "fusion_folds", "recordings", "recording_labels", "query_vectors", "listening", "index_adaptation",
        "scale", "scale_workers", "cards", "panel",
    ),
    "command": ("cli",),
}  # fmt: skip
LAYER = {module: i for i, modules in enumerate(LAYERS.values()) for module in modules}

FILES = sorted(ROOT.rglob("*.py"))
TREES = {file.relative_to(ROOT).with_suffix("").as_posix(): ast.parse(file.read_text("utf-8")) for file in FILES}


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements run at import: not those within functions, but those within classes and conditions."""
    found, waiting = [], list(tree.body)
    while waiting:
        node = waiting.pop()
        found.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return found


def imported(nodes) -> set[str]:
    """Full dotted names of what is imported: `from a import b` gives a.b."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(name: str) -> set[str]:
    """Modules of the package that a module imports, functions included; corpora.demo counts as corpora."""
    full = [n.split(".") for n in imported(ast.walk(TREES[name]))]
    return {parts[1] for parts in full if parts[0] == "esr_utils" and len(parts) > 1}


def module_of(name: str) -> str:
    return name.split("/")[0]


MODULES = sorted(name for name in TREES if name != "__init__")


def test_every_module_has_its_place():
    assert {module_of(name) for name in MODULES} == set(LAYER)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    here = LAYER[module_of(name)]
    above = {other for other in own_modules(name) if LAYER[other] > here}
    assert not above, f"{name} imports {', '.join(sorted(above))}, which stand above it"


def test_the_reader_of_the_source_sees_imports():
    """Else the tests here would pass on anything."""
    assert {"config", "styles", "losses"} <= own_modules("batches")
    assert {"speech", "text", "weights"} <= own_modules("retriever")
    assert "transformers.AutoModel" in imported(ast.walk(TREES["text"]))


def test_the_command_answers_before_a_library_is_imported():
    light = ("cli_options", "audio_folder")
    for name in ("cli", *light):
        found = imported(TREES[name].body)
        assert not {"torch", "pandas", "numpy"} & {n.split(".")[0] for n in found}
        assert all(n.split(".")[1] in light for n in found if n.startswith("esr_utils"))


def test_training_and_evaluation_never_import_each_other():
    assert "evaluation" not in own_modules("training") and "training" not in own_modules("evaluation")


def test_there_is_no_circle():
    graph = {name: own_modules(name) - {module_of(name)} for name in MODULES if "/" not in name}
    graph["corpora"] = own_modules("corpora/__init__") - {"corpora"}
    graph["speech"] = {m for name in MODULES if module_of(name) == "speech" for m in own_modules(name)} - {"speech"}
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert done == set(graph), f"a circle among {sorted(set(graph) - done)}"


@pytest.mark.parametrize(
    ("libraries", "allowed"),
    [
        ({"transformers", "tokenizers", "funasr"}, {"speech", "text", "chat", "weights", "mining"}),
        ({"matplotlib", "seaborn"}, {"plots"}),
        ({"accelerate"}, {"fitting", "objective"}),
        ({"ray"}, {"scale"}),
        (
            {"lancedb", "pyarrow"},
            {"index", "index_rows", "index_table", "index_writing", "index_snapshot", "index_adaptation"},
        ),
    ],
)
def test_few_modules_know_a_library(libraries, allowed):
    found = {module_of(n) for n in MODULES if libraries & {i.split(".")[0] for i in imported(ast.walk(TREES[n]))}}
    assert found <= allowed and found


def test_speech_alone_needs_no_models_library():
    """A backbone's own library is imported when such a backbone is loaded."""
    for name in ("speech/__init__", "speech/interface", "speech/logmel"):
        assert not {"transformers", "funasr", "omegaconf"} & {i.split(".")[0] for i in imported(top_level(TREES[name]))}


def test_lancedb_is_imported_when_an_index_is_opened():
    """It takes over a second, and `index` is imported by notebooks that may not search."""
    for name in ("index", "index_rows", "index_table", "index_writing", "index_snapshot"):
        outside = [node for node in TREES[name].body if not (isinstance(node, ast.If))]  # `if TYPE_CHECKING`
        assert "lancedb" not in {i.split(".")[0] for i in imported(outside)}


@pytest.mark.parametrize("name", [*(name for name in MODULES if name != "cli"), "__init__"])
def test_nothing_prints_but_the_command(name):
    for node in ast.walk(TREES[name]):
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), f"{name}, line {node.lineno}"


NETWORK = {"requests", "urllib", "http", "httpx", "aiohttp", "socket", "ftplib", "huggingface_hub"}
FETCHES = {
    "from_pretrained",
    "snapshot_download",
    "hf_hub_download",
    "urlopen",
    "urlretrieve",
    "load_dataset",
    "get",
}


@pytest.mark.parametrize("name", [*MODULES, "__init__"])
def test_nothing_is_fetched_at_import(name):
    nodes = top_level(TREES[name])
    assert not NETWORK & {full.split(".")[0] for full in imported(nodes)}
    for node in nodes:
        if isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            assert called not in FETCHES, f"{name}, line {node.lineno}: {called}"


def pickling(tree: ast.Module) -> list[ast.Attribute]:
    """Where a module names torch.load or torch.save."""
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    return [n for n in attributes if n.value.id == "torch" and n.attr in ("save", "load")]


@pytest.mark.parametrize("name", [*MODULES, "__init__"])
def test_no_pickle_is_read_or_written(name):
    """`torch.load` and `torch.save` are pickles too; foreign weights are read at one place, as tensors only."""
    assert not {"pickle", "joblib", "dill"} & {i.split(".")[0] for i in imported(ast.walk(TREES[name]))}
    if name != "weights":
        assert not pickling(TREES[name]), f"{name}, line {pickling(TREES[name])[0].lineno}"


def test_the_one_unpickler_reads_only_tensors():
    (place,) = pickling(TREES["weights"])
    (call,) = [n for n in ast.walk(TREES["weights"]) if isinstance(n, ast.Call) and n.func is place]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert place.attr == "load" and given["weights_only"] is True


def test_text_in_tables_is_held_by_python_also_where_pandas_finds_pyarrow():
    assert pd.Series(["text"]).dtype.storage == "python"


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux is PyTorch's OpenMP that of GNU")
@pytest.mark.parametrize(
    ("said", "expected"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
def test_threads_of_pytorch_wait_awake_for_a_moment_only(said, expected):
    """By its OpenMP's own account; what the user says goes first."""
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", "import esr_utils, torch"]
    environment = rest | said | {"OMP_DISPLAY_ENV": "verbose", "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr
