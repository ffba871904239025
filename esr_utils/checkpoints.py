"""Where a stopped run goes on: what changes in training as safetensors, the rest as JSON; no pickle.

`resume.json` is written last and names the tensors' file: what it does not name does not count.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from esr_utils import runs, weights


@dataclass
class Progress:
    """What a stopped run needs besides the tensors."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done
    best_loss: float | None = None  # validation loss of the checkpoint in best/
    best_epoch: int | None = None
    since_best: int = 0  # epochs since then
    finished: bool = False
    state: str = ""  # the tensors' file, beside resume.json


def write(folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the state at the end of an epoch, and deletes older ones."""
    progress.state = f"resume-{progress.epoch}.safetensors"
    tensors = {f"model.{name}": value for name, value in _trained(model).items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    with runs.atomic_path(folder / progress.state) as temporary:
        save_file({name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}, temporary)
    runs.write_json(folder / "resume.json", vars(progress))
    for older in set(folder.glob("resume-*.safetensors")) - {folder / progress.state}:
        older.unlink()


def finished(folder: Path) -> bool:
    """Whether the run in this folder is over."""
    return (folder / "resume.json").is_file() and runs.read_json(folder / "resume.json")["finished"]


def read(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts the state of the last whole epoch back; a fresh Progress where there is none.

    Raises:
        weights.WeightsError: the tensors' file is missing, damaged, or lacks what this model trains.
    """
    if not (folder / "resume.json").is_file():
        return Progress()
    progress = Progress(**runs.read_json(folder / "resume.json"))
    try:
        tensors = load_file(folder / progress.state)
    except (OSError, SafetensorError) as error:
        raise weights.WeightsError(f"{folder / progress.state}: {error}: delete the run and start anew") from None
    trained = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    if missing := sorted(set(_trained(model)) - set(trained)):
        raise weights.WeightsError(f"{folder / progress.state} lacks {missing}: delete the run and start anew")
    model.load_state_dict(trained, strict=False)
    moments: dict[int, dict] = defaultdict(dict)
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            moments[int(index)][key] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
    return progress


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of all that is not a frozen backbone."""
    frozen = tuple(
        f"retriever.{part}."
        for part in ("speech", "text")
        if not any(p.requires_grad for p in getattr(model.retriever, part).parameters())
    )
    return {name: value for name, value in model.state_dict().items() if not name.startswith(frozen)}
