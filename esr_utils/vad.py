"""Where somebody speaks, by silero-vad (MIT), whose package ships its weights: in blocks, with its state carried along.

The package runs its network on one window of 32 ms at a time. Here all but its recurrent part, which is small, runs on
512 windows at once, and that part on all of them in one call: the same probabilities, about ten times as fast.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import metadata

import numpy as np
import torch
from numpy.typing import NDArray

from esr_utils import weights
from esr_utils.config import SAMPLE_RATE

WINDOW = 512  # samples at 16 kHz
# Probabilities: speech begins at the one, and ends below the other. The package's own 0.5 loses more whispers and quiet
# voices (`benchmarks/voice_activity.py`): what is no speech fits no sentence, what is lost cannot be found.
SPEECH, SILENCE = 0.3, 0.15
MIN_SILENCE_S, MIN_SPEECH_S, PAD_S = 0.2, 0.25, 0.05  # seconds: of a pause, of speech, kept on both sides
_CONTEXT = 64  # samples of the window before, which the network also hears
_AT_ONCE = 512  # windows
_PAD, _MIN_SILENCE, _MIN_SPEECH = (round(seconds * SAMPLE_RATE) for seconds in (PAD_S, MIN_SILENCE_S, MIN_SPEECH_S))


def silero_version() -> str:
    """Of the package silero-vad.

    Raises:
        weights.WeightsError: it is not installed.
    """
    try:
        return metadata.version("silero-vad")
    except metadata.PackageNotFoundError:
        advice = "pip install -r requirements.txt"
        raise weights.WeightsError(f"needs silero-vad, which is not installed: {advice}") from None


@lru_cache(maxsize=1)
def load_silero() -> torch.jit.ScriptModule:
    """The package's own model, read once.

    Raises:
        weights.WeightsError: the package is not installed.
    """
    silero_version()
    threads = torch.get_num_threads()
    try:
        import silero_vad  # sets torch's thread count to 1, for the whole process
    finally:
        torch.set_num_threads(threads)
    return silero_vad.load_silero_vad()


@lru_cache(maxsize=1)
def _recurrent() -> torch.nn.LSTM:
    """The model's LSTM cell as a layer, which takes a sequence in one call."""
    cell = load_silero()._model.decoder.rnn
    layer = torch.nn.LSTM(128, 128)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    return layer


class SpeechProbability:
    """The probability of speech in each window of 512 samples of one recording at 16 kHz, which comes in blocks."""

    def __init__(self) -> None:
        self._held = np.zeros(_CONTEXT, np.float32)  # the context, and samples that do not fill a window
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.inference_mode()
    def feed(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """(S,) samples to (N,) probabilities of the windows that they complete."""
        held = np.concatenate([self._held, samples])
        used = (len(held) - _CONTEXT) // WINDOW * WINDOW
        self._held = held[used:].copy()
        if not used:
            return np.zeros(0, np.float32)
        windows = torch.from_numpy(held[: used + _CONTEXT]).unfold(0, WINDOW + _CONTEXT, WINDOW)
        return torch.cat([self._windows(part) for part in windows.split(_AT_ONCE)]).numpy()

    def finish(self) -> NDArray[np.float32]:
        """(1,) of the last window, filled up with zeros; (0,) if there is no rest."""
        rest = (len(self._held) - _CONTEXT) % WINDOW
        return self.feed(np.zeros(WINDOW - rest if rest else 0, np.float32))

    def _windows(self, windows: torch.Tensor) -> torch.Tensor:
        """(N, 64 + 512) samples to (N,)."""
        model = load_silero()._model
        encoded = model.encoder(model.run_extractors(windows))  # (N, 128, 1)
        hidden, self._state = _recurrent()(encoded.transpose(1, 2), self._state)  # N steps of a batch of one
        return model.decoder.decoder(hidden.transpose(1, 2))[:, 0, 0]


class SpeechSegments:
    """Speech from probabilities, a window at a time, by the rule of the package's `get_speech_timestamps`.

    Speech begins at a window of 0.3, and ends where it falls below 0.15 for 0.2 s without being at 0.3 again; what is
    shorter than 0.25 s is none; 0.05 s are kept on both sides.

    Attributes:
        now: samples heard, in whole windows.
        start: sample at which the speech that goes on begins, None in silence. May be moved, to cut it.
    """

    def __init__(self) -> None:
        self.now = 0
        self.start: int | None = None
        self._first = 0  # sample of the first window of speech
        self._quiet: int | None = None  # sample from which it is quiet

    def step(self, probability: float) -> tuple[int, int] | None:
        """Start and end, in samples, of speech that is over with this window."""
        at, self.now = self.now, self.now + WINDOW
        if probability >= SPEECH:
            self._quiet = None
            if self.start is None:
                self.start, self._first = max(0, at - _PAD), at
        elif probability < SILENCE and self.start is not None:
            self._quiet = at if self._quiet is None else self._quiet
            if at - self._quiet >= _MIN_SILENCE:
                return self._end(self._quiet, self._quiet + _PAD)
        return None

    def finish(self, n_samples: int) -> tuple[int, int] | None:
        """The speech in which the recording, of `n_samples`, ends."""
        return None if self.start is None else self._end(n_samples, n_samples)

    def _end(self, last: int, end: int) -> tuple[int, int] | None:
        start, self.start, self._quiet = self.start, None, None
        return (start, end) if last - self._first > _MIN_SPEECH else None
