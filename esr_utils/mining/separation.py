"""Voices apart from music and noise: torchaudio's HDemucs (Défossez 2021), a few seconds at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchaudio.models import HDemucs

from esr_utils import weights
from esr_utils.decoding import read_blocks
from esr_utils.mining.media import SOUND_RATE, write_sound

VOICE_RATE, MODEL_RATE = 24_000, 16_000  # Hz: of the clips; of the copies that the models hear
OVERLAP_S = 1.0  # seconds that two chunks share, faded from the one to the other
# HDEMUCS_HIGH_MUSDB_PLUS; a folder whose config.json says otherwise is otherwise.
_HIGH = {"sources": ["drums", "bass", "other", "vocals"], "nfft": 4096, "depth": 6, "channels": 48}
_FILE = "hdemucs_high_trained.pt"
_URL = f"https://download.pytorch.org/torchaudio/models/{_FILE}"


@dataclass
class Separator:
    """HDemucs, which takes stereo at 44.1 kHz.

    Attributes:
        chunk_s: seconds that are separated at a time. Longer is a little better and takes more memory.
    """

    model: HDemucs
    device: torch.device
    chunk_s: float = 10.0

    def vocals(self, path: Path) -> Iterator[NDArray[np.float32]]:
        """(S, 1) blocks of the voices in a file at 44.1 kHz, as long together as the file.

        The model hears the whole file at mean 0 and deviation 1, as it was trained; so the file is read twice.
        """
        mean, std = _level(path)
        if std == 0:  # digital silence
            yield from (np.zeros((len(block), 1), np.float32) for block in read_blocks(path))
            return
        chunk, overlap = round(self.chunk_s * SOUND_RATE), round(OVERLAP_S * SOUND_RATE)
        chunks = _chunks(read_blocks(path), chunk, overlap)
        for block in _crossfaded(chunks, overlap, lambda mix: self._separate(mix, mean, std)):
            yield block[:, None]

    @torch.inference_mode()
    def _separate(self, mix: NDArray[np.float32], mean: float, std: float) -> NDArray[np.float32]:
        """(S, C) -> (S,)"""
        mix = torch.from_numpy(np.ascontiguousarray(mix.T)).to(self.device)
        mix = (mix.expand(2, -1) - mean) / std  # mono is the same on both sides
        size = max(mix.shape[-1], SOUND_RATE)  # the model takes no less than its window
        padded = torch.nn.functional.pad(mix, (0, size - mix.shape[-1]))
        voices = self.model(padded[None])[0, self.model.sources.index("vocals"), :, : mix.shape[-1]]
        return (voices.mean(dim=0) * std + mean).cpu().numpy()


def _level(path: Path) -> tuple[float, float]:
    """Mean and deviation of a file's samples, all channels averaged."""
    count, total, squares = 0, 0.0, 0.0
    for block in read_blocks(path):
        mono = block.mean(axis=1, dtype=np.float64)
        count, total, squares = count + len(mono), total + mono.sum(), squares + (mono**2).sum()
    mean = total / max(count, 1)
    return mean, float(np.sqrt(max(squares / max(count, 1) - mean**2, 0.0)))


def _chunks(blocks: Iterator[NDArray], size: int, overlap: int) -> Iterator[NDArray]:
    """Blocks of any length cut into chunks of `size`, each of which begins `overlap` before the last one's end."""
    held = next(blocks, None)
    if held is None:
        return
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > size:
            yield held[:size]
            held = held[size - overlap :]
    while len(held) > size:
        yield held[:size]
        held = held[size - overlap :]
    yield held


def _crossfaded(chunks: Iterator[NDArray], overlap: int, process) -> Iterator[NDArray]:
    """`process` of each chunk, put together again; where two overlap, the one fades into the other."""
    rise = np.linspace(0, 1, overlap, dtype=np.float32)
    tail = None
    for chunk in chunks:
        done = process(chunk)
        if tail is not None:
            done[:overlap] = tail * (1 - rise) + done[:overlap] * rise
        yield done[:-overlap] if len(done) > overlap else done[:0]
        tail = done[-overlap:]
    if tail is not None:
        yield tail


def load_separator(name: str, device: torch.device, chunk_s: float = 10.0) -> Separator:
    """HDemucs by `find_separator`.

    Raises:
        weights.WeightsError: it is not there, or damaged, or has no "vocals".
    """
    folder = find_separator(name)
    file, config = separator_file(folder), dict(_HIGH)
    if (folder / "config.json").is_file():
        config |= json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "vocals" not in config["sources"]:
        raise weights.WeightsError(f"{folder} separates {', '.join(config['sources'])}; vocals are needed")
    try:
        model = HDemucs(**config)
    except (TypeError, ValueError) as error:
        raise weights.WeightsError(f"{folder / 'config.json'} makes no HDemucs: {error}") from None
    weights.load_state(model, weights.read_state(file), file)
    return Separator(model.eval().to(device), device, chunk_s)


def find_separator(name: str) -> Path:
    """The folder of "hdemucs" ($ESR_MODELS/torchaudio/hdemucs, else torchaudio's own cache), or a folder as it stands.

    Raises:
        weights.WeightsError: it is not there; the message says what to download and where to put it.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    places = [Path(torch.hub.get_dir()) / "torchaudio" / "models"]
    if models := os.environ.get("ESR_MODELS"):
        places.insert(0, Path(models) / "torchaudio" / "hdemucs")
    for place in places if name == "hdemucs" else []:
        if (place / _FILE).is_file():
            return place
    raise weights.WeightsError(
        f"no separator {name!r} on this machine: download {_URL} into a folder and give that, or put it at "
        f"$ESR_MODELS/torchaudio/hdemucs/{_FILE} and give hdemucs"
    )


def separator_file(folder: Path) -> Path:
    """The file with the weights: torchaudio's own by its name, for its cache holds other models too."""
    return folder / _FILE if (folder / _FILE).is_file() else weights.weights_file(folder)


def write_voices(sound: Path, separator: Separator | None, targets: list[tuple[Path, int]]) -> None:
    """Writes the voices of a file at 44.1 kHz, mono, at each target's rate; without a separator, all there is."""
    if separator is None:
        blocks = (block.mean(axis=1, keepdims=True) for block in read_blocks(sound))
    else:
        blocks = separator.vocals(sound)
    write_sound(blocks, SOUND_RATE, targets, channels=1)
