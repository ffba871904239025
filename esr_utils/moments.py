"""Long recordings to moments: utterances of 1 to 10 s, in one pass, in the memory of about a minute of audio.

What silero-vad finds between pauses of 0.2 s (`vad.SpeechSegments`) is a moment, but
- shorter than 1 s: it is joined with the one before it, else with the one after, if that is at most 0.5 s away and both
  together last at most 10 s; else it is dropped;
- longer than 10 s: it is cut where speech is least probable, over 0.1 s, from 4 to 10 s after its start; at least 1 s
  is left for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from esr_utils.audio_files import AudioError
from esr_utils.config import SAMPLE_RATE
from esr_utils.decoding import Resampler, decode
from esr_utils.vad import WINDOW, SpeechProbability, SpeechSegments

Channels = Literal["mix", "split"]
MIN_S, MAX_S = 1.0, 10.0  # seconds that a moment lasts
NEAR_S = 0.5  # seconds of silence over which a short one is joined
CUT_FROM_S = 4.0  # seconds after the start of a long one from which it may be cut
_MIN, _MAX, _NEAR, _CUT_FROM = (round(seconds * SAMPLE_RATE) for seconds in (MIN_S, MAX_S, NEAR_S, CUT_FROM_S))


@dataclass(frozen=True)
class Moment:
    """An utterance within a recording.

    Attributes:
        file: the recording.
        start_s, end_s: seconds from its start.
        channel: from 0; None of all channels together.
        waveform: (S,) float32 at 16 kHz.
    """

    file: Path
    start_s: float
    end_s: float
    channel: int | None
    waveform: NDArray[np.float32]


def moments(path: str | Path, channels: Channels = "mix") -> Iterator[Moment]:
    """The moments of a recording of any length, as they are found; those of one channel in order, without overlap.

    Args:
        channels: `mix` listens to the mean of the channels; `split` to each by itself, as for calls with one party a
            channel. A file of one channel is the same either way.
    Raises:
        AudioError: it is no file that `decoding.decode` reads, or is so up to some point only. What came before that
            point is given first.
        weights.WeightsError: silero-vad is not installed.
        ValueError: unknown `channels`.
    """
    if channels not in ("mix", "split"):
        raise ValueError(f"channels is {channels!r}; known are mix and split")
    path, tracks, broken = Path(path), [], None
    try:
        for block, rate in decode(path):
            if not tracks:
                split = channels == "split" and block.shape[1] > 1
                tracks = [_Track(path, rate, number) for number in (range(block.shape[1]) if split else [None])]
            for track in tracks:
                yield from track.feed(block.mean(axis=1) if track.channel is None else block[:, track.channel])
    except AudioError as error:
        broken = error
    for track in tracks:
        yield from track.finish()
    if broken:
        raise broken


class _Track:
    """One channel, or the mean of all: from its samples to its moments, with what is still needed of the former."""

    def __init__(self, file: Path, rate: int, channel: int | None) -> None:
        self.file, self.channel = file, channel
        self._resample = Resampler(rate, SAMPLE_RATE)
        self._probability, self._utterances = SpeechProbability(), _Utterances()
        self._held, self._from = np.zeros(0, np.float32), 0  # samples at 16 kHz, and the place of the first

    def feed(self, samples: NDArray[np.float32]) -> Iterator[Moment]:
        """Args: samples: (S,) at the file's rate."""
        yield from self._listen(self._resample(samples))

    def finish(self) -> Iterator[Moment]:
        yield from self._listen(self._resample(np.zeros(0, np.float32), last=True))
        spans = self._utterances.feed(self._probability.finish())
        yield from self._moments(spans + self._utterances.finish(self._from + len(self._held)))

    def _listen(self, samples: NDArray[np.float32]) -> Iterator[Moment]:
        self._held = np.concatenate([self._held, samples])
        yield from self._moments(self._utterances.feed(self._probability.feed(samples)))
        used = min(self._utterances.needed, self._from + len(self._held)) - self._from
        self._held, self._from = self._held[used:].copy(), self._from + used

    def _moments(self, spans: list[tuple[int, int]]) -> Iterator[Moment]:
        for start, end in spans:
            waveform = self._held[start - self._from : end - self._from].copy()
            yield Moment(self.file, start / SAMPLE_RATE, end / SAMPLE_RATE, self.channel, waveform)


class _Utterances:
    """Of 1 to 10 s, from the probability of speech in window after window; start and end are samples at 16 kHz."""

    def __init__(self) -> None:
        self._segments = SpeechSegments()
        self._probabilities: list[float] = []  # of windows, from that in which the speech that goes on begins
        self._first = 0  # the number of the first of them
        self._waiting: tuple[int, int] | None = None  # for a short one to be joined with
        self._found: list[tuple[int, int]] = []

    @property
    def needed(self) -> int:
        """The first sample that may still be part of one."""
        return min(self._first * WINDOW, self._waiting[0] if self._waiting else self._segments.now)

    def feed(self, probabilities: NDArray[np.float32]) -> list[tuple[int, int]]:
        for probability in probabilities.tolist():
            self._step(probability)
        found, self._found = self._found, []
        return found

    def finish(self, n_samples: int) -> list[tuple[int, int]]:
        self._add(self._segments.finish(n_samples))
        self._release()
        return self._found

    def _step(self, probability: float) -> None:
        segments = self._segments
        self._probabilities.append(probability)
        over = segments.step(probability)
        if over:
            self._add(over)
        elif segments.start is not None and segments.now - segments.start > _MAX + _MIN:
            segments.start = self._cut(segments.start, segments.now)
        if segments.start is not None:
            self._forget(segments.start // WINDOW)
            return
        self._forget(segments.now // WINDOW - 2)  # speech that begins now is padded with less than two windows
        if self._waiting and segments.now - 2 * WINDOW - self._waiting[1] > _NEAR:
            self._release()

    def _forget(self, first: int) -> None:
        """Probabilities of windows before `first`."""
        if first > self._first:
            del self._probabilities[: first - self._first]
            self._first = first

    def _cut(self, start: int, end: int) -> int:
        """Takes a piece off the front of a segment of 10 to 11 s; where the rest begins."""
        low, high = max(start + _CUT_FROM, end - _MAX), min(start + _MAX, end - _MIN)
        low, high = -(-low // WINDOW), high // WINDOW - 1  # the windows whose middles are in between
        around = np.array(self._probabilities[low - 1 - self._first : high + 2 - self._first])
        at = (low + int(np.convolve(around, np.ones(3), "valid").argmin())) * WINDOW + WINDOW // 2
        self._join(start, at)
        return at

    def _add(self, segment: tuple[int, int] | None) -> None:
        if segment:
            start, end = segment
            self._join(self._cut(start, end) if end - start > _MAX else start, end)

    def _join(self, start: int, end: int) -> None:
        if end <= start:  # a cut within the silence that ends the speech
            return
        if self._waiting:
            first, last = self._waiting
            short = min(last - first, end - start) < _MIN
            if short and start - last <= _NEAR and end - first <= _MAX:
                self._waiting = (first, end)
                return
            self._release()
        self._waiting = (start, end)

    def _release(self) -> None:
        if self._waiting and self._waiting[1] - self._waiting[0] >= _MIN:
            self._found.append(self._waiting)
        self._waiting = None
