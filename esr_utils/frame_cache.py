"""A frozen backbone's frames, kept on disk.

Kept are the frames of every layer as fp16, and these pooled over time, one safetensors file a clip, under a name made
from the audio file's content, the range and channel cut from it, the level, and the backbone's fingerprint: a changed
file, setting or backbone is another name. A file cut short or damaged is not read but made anew. Whisper base takes
0.36 MB per second of speech, Whisper tiny 0.19; what a StyleRetriever reads of it is 28 or 15 kB a clip.
"""

from __future__ import annotations

from pathlib import Path

import torch
from lhotse.cut import Cut
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from esr_utils import runs, weights
from esr_utils.audio_files import ContentNames
from esr_utils.config import SAMPLE_RATE, Level
from esr_utils.retriever import pool
from esr_utils.speech import SpeechBackbone

CACHE = runs.RUNS / "cache"
_FORMAT = 3  # part of every name: raise it when what is kept, or the way it is computed, changes
_POOLINGS = {"mean": 1, "stats": 2}  # kept of each clip: of `Pooling`, how many numbers of each of a frame


class FrameCache:
    """Frames of one backbone at one level, by content.

    Attributes:
        folder: where the files are; safe to delete at any time.
        shape: (L, D) of a clip's frames; L is 1 where only the last layer is kept.
    """

    def __init__(self, backbone: SpeechBackbone, level: Level, folder: Path = CACHE, last_only: bool = False) -> None:
        kind = f"{type(backbone).__name__}-{weights.fingerprint(backbone)[:12]}-{level}-{_FORMAT}"
        self.folder = folder / (kind + "-last" * last_only)
        self.backbone, self.shape = backbone, (1 if last_only else backbone.n_layers, backbone.dim)
        self._names = ContentNames()

    def path(self, cut: Cut) -> Path:
        """Where the frames of this cut are, or would be."""
        name = self._names.name(cut)
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, cut: Cut) -> tuple[Tensor, Tensor] | None:
        """Frames (L, T, D) fp16 and which carry speech (T,) bool, or None if they are not there whole."""
        return self._read(cut, "frames", "active")

    def pooled(self, cut: Cut, pooling: str) -> Tensor | None:
        """The frames as `retriever.pool` makes them one vector a layer (L, P), or None if they are not there whole."""
        found = self._read(cut, pooling)
        return found and found[0]

    def _read(self, cut: Cut, *names: str) -> tuple[Tensor, ...] | None:
        try:
            with safe_open(self.path(cut), framework="pt") as file:
                return tuple(file.get_tensor(name) for name in names) if self._whole(cut, file) else None
        except (OSError, SafetensorError):
            return None

    def _whole(self, cut: Cut, file: safe_open) -> bool:
        """Whether all is there, and as many frames as the cut has; one more or less comes of rounding to 16 kHz."""
        shape = {name: tuple(file.get_slice(name).get_shape()) for name in ("frames", "active", *_POOLINGS)}
        n_layers, n_frames, width = shape["frames"] if len(shape["frames"]) == 3 else (0, 0, 0)
        expected = self.backbone.n_frames(torch.tensor(round(cut.duration * SAMPLE_RATE)))
        return (
            file.get_slice("frames").get_dtype() == "F16"
            and (n_layers, width) == self.shape
            and shape["active"] == (n_frames,)
            and all(shape[name] == (n_layers, factor * width) for name, factor in _POOLINGS.items())
            and abs(n_frames - int(expected)) <= 1
        )

    def write(self, cut: Cut, frames: Tensor, active: Tensor) -> None:
        """Keeps frames (L, T, D) fp16 and which carry speech (T,) bool, atomically."""
        pooled = {pooling: pool_one(frames, active, pooling) for pooling in _POOLINGS}
        with runs.atomic_path(self.path(cut)) as temporary:
            save_file({"frames": frames.contiguous(), "active": active.contiguous(), **pooled}, temporary)


def pool_one(frames: Tensor, active: Tensor, pooling: str) -> Tensor:
    """One clip's kept frames to (L, P)."""
    return pool(frames[None], torch.ones(1, frames.shape[1], dtype=torch.bool), active[None], pooling)[0]
