"""Run folders: where a run keeps its settings, log, checkpoints, results and figures, all readable without this
package.

runs/<name>/config.json      settings, seed, corpora, versions
            metrics.jsonl    one line per epoch
            best/            the retriever with the lowest validation loss
            results.json     flat keys, fractions
            figures/
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import platform
import random
import re
import tempfile
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

PROJECT = Path(__file__).resolve().parents[1]
RUNS = PROJECT / "runs"
RELEASED = PROJECT / "models" / "esr-tiny"  # a run folder too: config.json and best/, and a card
DEFAULT_RUN = "train"  # what 03_train writes and the notebooks after it read, unless told otherwise


def run_folder(run: str | Path) -> Path:
    """A bare name is a folder under `runs/`; anything with a slash is a path as it stands. Not created here."""
    path = Path(run).expanduser()
    if str(run) in ("", ".", ".."):
        raise ValueError(f"run is {str(run)!r}; it must be the name or path of a folder of its own")
    return path.resolve() if path.is_absolute() or "/" in str(run) or len(path.parts) > 1 else RUNS / path


def slug(name: str) -> str:
    """A name of anything as a folder's: "w/o pre-training" is "without-pre-training"."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower().replace("w/o", "without"))


@contextmanager
def atomic_path(path: str | Path):
    """Yields a temporary path in the same folder; it becomes `path` only if the block ends well.

    A reader therefore sees the old file or the whole new one, also after a crash or a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)  # mkstemp makes files that only their owner reads
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Writes indented UTF-8 JSON atomically. NaN is refused: it is not JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Reads JSON.

    Raises:
        ValueError: the file is not JSON; the message names it.
        FileNotFoundError: it is not there.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_metrics(run: str | Path) -> list[dict]:
    """The epochs of a run's metrics.jsonl, in order."""
    path = run_folder(run) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seed_everything(seed: int, *more: int) -> np.random.Generator:
    """Seeds Python, NumPy and torch (all devices) from the whole tuple, and returns a NumPy generator of the same.

    Given (seed, epoch), all that is random in an epoch depends on nothing before it, which makes resuming exact.
    """
    import torch  # when asked for: a corpus is made into a manifest without it, in 400 MB less

    state = np.random.SeedSequence((seed, *more))
    word = int(state.generate_state(1, np.uint64)[0])
    random.seed(word)
    np.random.seed(word % 2**32)
    torch.manual_seed(word % 2**63)
    return np.random.default_rng(state)


def text_sha256(text: str) -> str:
    """Hex sha256 of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """What the run was made with: Python, the platform and the packages that decide its numbers."""
    packages = ("torch", "torchaudio", "transformers", "numpy", "lhotse", "accelerate", "scikit-learn")
    return {"python": platform.python_version(), "machine": platform.machine()} | {
        name: metadata.version(name) for name in packages
    }


def pick_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU; anything else is a torch device string.

    Raises:
        ValueError: this machine has no such device.
    """
    import torch

    if device == "auto":
        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((name for name, there in backends.items() if there), "cpu"))
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}, which is not to be had here: {str(error).splitlines()[0]}") from None


def check_parameters(namespace: dict[str, Any]) -> None:
    """Stops a notebook that was given a parameter it does not declare, or a value of the wrong type.

    papermill puts what it was given into a cell of its own, below the one tagged `parameters`, and only warns about
    names that the latter lacks. A notebook therefore calls this with its `globals()` in the cell after: declared are
    the annotated names; given are those assigned in papermill's cell, which opens with the comment `# Parameters`.

    Raises:
        TypeError: with the list of known parameters.
    """
    injected = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")]
    declared = {name: kind for name, kind in namespace.get("__annotations__", {}).items() if not name.startswith("_")}
    for name in _assigned(injected[-1]) if injected else []:
        if name not in declared:
            raise TypeError(f"unknown parameter {name!r}; known are: {', '.join(declared)}")
        kind, value = declared[name], namespace[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            continue
        if isinstance(kind, type) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise TypeError(f"parameter {name!r} is {value!r}; it must be of type {kind.__name__}")


def _assigned(source: str) -> list[str]:
    targets = (target for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets)
    return [target.id for target in targets if isinstance(target, ast.Name)]
