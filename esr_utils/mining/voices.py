"""A vector for whose voice it is: resemblyzer's encoder (in its package), or funasr's CAM++ as in the FS-CLAP paper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import librosa
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from esr_utils import weights
from esr_utils.mining.funasr_models import FunasrModel
from esr_utils.mining.separation import MODEL_RATE

CAMPLUS = ("CAMPPlus",)
_RESEMBLYZER_SHA256 = "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e"
_WINDOW, _STEP, _MIN_COVERAGE = 160, 77, 0.75  # frames of 10 ms, as resemblyzer cuts an utterance
_LEVEL_DB = -30  # dBFS that quiet speech is raised to
_CAM_WINDOW_S, _CAM_STEP_S = 1.5, 0.75  # seconds, as funasr cuts speech


class VoiceEncoder(Protocol):
    """(S,) mono samples at 16 kHz -> (D,) of unit length."""

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]: ...


# resemblyzer ------------------------------------------------------------------------------------------------


class Resemblyzer(nn.Module):
    """The speaker encoder of Wan et al. 2018 (GE2E) as resemblyzer trained it: 40 mel bands, 3 LSTM layers, 256 wide.

    Its package imports webrtcvad, which needs a compiler, so only its weights are taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        """(N, 160, 40) -> (N, 256) of unit length, none below 0."""
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(self.linear(hidden[-1]).relu(), dim=1)

    @torch.inference_mode()
    def encode(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """(S,) at 16 kHz -> (256,): the mean over windows of 1.6 s, of unit length."""
        level = np.sqrt(np.mean(waveform**2, dtype=np.float64))
        if level == 0:
            raise ValueError("is silent: there is no voice in it")
        waveform = waveform * max(1.0, 10 ** (_LEVEL_DB / 20) / level)
        starts = window_starts(len(waveform))
        end = (starts[-1] + _WINDOW) * 160
        waveform = np.pad(waveform, (0, max(0, end - len(waveform))))
        mel = librosa.feature.melspectrogram(y=waveform, sr=MODEL_RATE, n_fft=400, hop_length=160, n_mels=40)
        mel = torch.from_numpy(np.ascontiguousarray(mel.T, dtype=np.float32))
        parts = self(torch.stack([mel[at : at + _WINDOW] for at in starts]).to(self.linear.weight.device))
        return nn.functional.normalize(parts.mean(dim=0), dim=0).cpu().numpy()


def window_starts(n_samples: int) -> list[int]:
    """First frames of the windows of an utterance; the last one is left out if less than 3/4 of it is speech."""
    n_frames = -(-(n_samples + 1) // 160)
    starts = list(range(0, max(1, n_frames - _WINDOW + _STEP + 1), _STEP))
    covered = (n_samples - starts[-1] * 160) / (_WINDOW * 160)
    return starts[:-1] if covered < _MIN_COVERAGE and len(starts) > 1 else starts


def resemblyzer_file() -> Path:
    """The weights in resemblyzer's package (Apache-2.0).

    Raises:
        weights.WeightsError: the package is not installed, or its weights are not those of 0.1.4.
    """
    spec = find_spec("resemblyzer")
    if spec is None:
        raise weights.WeightsError(
            "needs resemblyzer, which is not installed: pip install --no-deps resemblyzer==0.1.4 (its own "
            "requirements include webrtcvad, which needs a compiler and is not used here)"
        )
    file = Path(spec.submodule_search_locations[0]) / "pretrained.pt"
    weights.check_sha256(file, _RESEMBLYZER_SHA256)
    return file


@contextmanager
def resemblyzer(device: torch.device) -> Iterator[VoiceEncoder]:
    """The encoder with the weights of `resemblyzer_file`, within the context."""
    encoder, file = Resemblyzer(), resemblyzer_file()
    weights.load_state(encoder, weights.read_state(file), file)
    yield encoder.eval().to(device).encode


# CAM++ ------------------------------------------------------------------------------------------------------


@dataclass
class CamPlus:
    """CAM++ (Wang et al. 2023): the mean over windows of 1.5 s, each of unit length, then of unit length again."""

    model: FunasrModel

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        size, step = round(_CAM_WINDOW_S * MODEL_RATE), round(_CAM_STEP_S * MODEL_RATE)
        if not waveform.any():
            raise ValueError("is silent: there is no voice in it")
        ends = [min(start + size, len(waveform)) for start in range(0, max(len(waveform) - size + step, 1), step)]
        windows = [waveform[max(0, end - size) : end] for end in ends]
        parts = [self.model(np.pad(part, (0, size - len(part))))["spk_embedding"][0] for part in windows]
        parts = nn.functional.normalize(torch.stack(parts), dim=1)
        return nn.functional.normalize(parts.mean(dim=0), dim=0).cpu().numpy()
