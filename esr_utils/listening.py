"""Recordings heard: cut into moments, embedded, and given file by file.

Embedding is fast where clips of like length are side by side, while files are short, long or without speech. So the
moments of many files wait together, up to five minutes of speech, and are embedded by length; each file is given when
all of its own are through, and one that takes long also on the way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from esr_utils.audio_files import AudioError
from esr_utils.batches import BadAudio, prepared
from esr_utils.config import SAMPLE_RATE
from esr_utils.decoding import NotNowError
from esr_utils.index_rows import UNFINISHED, Embedded, File, Report
from esr_utils.memory import give_back
from esr_utils.moments import MIN_S, Moment, moments
from esr_utils.retriever import Retriever

POOL_S = 300.0  # seconds of speech that wait to be embedded: 19 MB
WAIT_S = 20.0  # seconds after which what waits is embedded, however little it is
PART_S = 120.0  # seconds after which what there is so far of a file is given, and so is lost by a kill at most
BATCH_S = 16.0  # seconds a forward pass, with what is padded: more is no faster on a CPU, and takes more memory
_ROWS = 64  # moments of a file that there is room for from the start

Place = tuple[float, float, int | None]  # start_s, end_s, channel
Made = tuple[NDArray[np.floating], NDArray[np.floating]]  # of a moment: vector (d,), pooled features (p,)


class _Rows:
    """Rows (n, width) that come one by one, in any order. They are there once, however many: what is read is a view."""

    def __init__(self, width: int, dtype: type) -> None:
        self.rows = np.empty((_ROWS, width), dtype)

    def __setitem__(self, place: int, row: NDArray[np.floating]) -> None:
        if place >= len(self.rows):
            before, self.rows = self.rows, np.empty((2 * place, self.rows.shape[1]), self.rows.dtype)
            self.rows[: len(before)] = before
        self.rows[place] = row


class _Recording:
    """A file that is being heard: its moments, and what was made of them as far as it is there."""

    def __init__(self, file: File, known: Mapping[Place, Made], about: Mapping[str, Any]) -> None:
        """
        Args:
            known: what is there of its moments since it was interrupted, by their places.
            about: of the index.
        """
        self.file, self.known, self.problem, self.given = file, known, "", time.monotonic()
        self.places: list[Place] = []
        self.vectors, self.pooled = _Rows(about["dim"], np.float32), _Rows(about["pooled"], np.float16)

    def put(self, place: int, made: Made) -> None:
        self.vectors[place], self.pooled[place] = made

    def embedded(self, problem: str) -> Embedded:
        table = pd.DataFrame(self.places, columns=["start_s", "end_s", "channel"])
        table = table.astype({"start_s": float, "end_s": float, "channel": "Int64"})
        vectors, pooled = (one.rows[: len(table)] for one in (self.vectors, self.pooled))
        return Embedded(self.file, table, vectors, pooled if pooled.shape[1] else None, problem)


class Embedder:
    """From files to what was made of each, with the columns start_s, end_s and channel; call it once.

    Attributes:
        heard_s: seconds of the files that were heard to their end.
    """

    def __init__(
        self,
        model: Retriever,
        about: Mapping[str, Any],
        report: Report,
        heard: Callable[[int, float], None] | None = None,
        known: Callable[[File], Mapping[Place, Made]] | None = None,
    ) -> None:
        """
        Args:
            about: of the index that they are for: dim, pooled, level, channels.
            report: is told what was embedded, and what could not be.
            heard: is called with the files done, and the seconds of audio heard.
            known: what is there of a file that was interrupted. Without it files are given whole only.
        """
        self.model, self.about, self.report, self.heard, self.known = model.eval(), about, report, heard, known
        self.waiting: list[tuple[_Recording, int, torch.Tensor]] = []  # whose, which of its moments, (S,) samples
        self.done: list[_Recording] = []  # heard to the end; those of their moments that are not embedded yet wait
        self.waiting_s, self.since, self.heard_s, self.files = 0.0, time.monotonic(), 0.0, 0

    def __call__(self, files: Iterable[File]) -> Iterator[Embedded]:
        for file in files:
            one = _Recording(file, self.known(file) if self.known else {}, self.about)
            for _ in self._hear(one):
                yield from self._release()
                if self.known and time.monotonic() - one.given >= PART_S and len(one.places) > len(one.known):
                    yield one.embedded(UNFINISHED)
                    one.given = time.monotonic()
            self.files += 1
            self._tell(0.0)
            if self._is_time():
                yield from self._release()
        yield from self._release()

    def _hear(self, one: _Recording) -> Iterator[None]:
        """Takes up the moments of a recording; stops where those that wait are to be embedded."""
        end_s = 0.0
        try:
            for moment in moments(one.file.path, self.about["channels"]):
                self._take(one, moment)
                end_s = max(end_s, moment.end_s)
                self._tell(end_s)
                if self._is_time():
                    yield
        except NotNowError as error:
            self.report.left_out[one.file.key] = str(error)
            return
        except AudioError as error:
            one.problem = str(error)
        self.heard_s += end_s
        if not one.places and not one.problem:
            one.problem = f"no speech of {MIN_S:g} s or more was found"
        if one.problem:
            self.report.problems[one.file.key] = one.problem
        self.done.append(one)

    def _take(self, one: _Recording, moment: Moment) -> None:
        place = (moment.start_s, moment.end_s, moment.channel)
        if place in one.known:
            one.put(len(one.places), one.known[place])
        else:
            try:
                waveform = prepared(torch.from_numpy(moment.waveform), self.about["level"])
            except BadAudio:  # quieter than what counts as silence
                return
            self.waiting.append((one, len(one.places), waveform))
            self.waiting_s += len(waveform) / SAMPLE_RATE
        one.places.append(place)

    def _is_time(self) -> bool:
        return self.waiting_s >= POOL_S or time.monotonic() - self.since >= WAIT_S

    def _tell(self, end_s: float) -> None:
        if self.heard:
            self.heard(self.files, self.heard_s + end_s)

    @torch.inference_mode()
    def _embed(self) -> None:
        for batch in by_length(self.waiting):
            waveforms = [waveform for _, _, waveform in batch]
            lengths = torch.tensor([len(waveform) for waveform in waveforms])
            padded = {"waveform": pad_sequence(waveforms, batch_first=True), "n_samples": lengths}
            for (one, place, _), *made in zip(batch, *self._made(padded), strict=True):
                one.put(place, made)
            give_back()
        self.waiting, self.waiting_s, self.since = [], 0.0, time.monotonic()

    def _made(self, batch: dict) -> Made:
        """Unit vectors (B, d), and pooled features (B, p), in an index that keeps none (B, 0)."""
        if not self.about["pooled"]:
            vectors = self.model.encode_speech(batch).float().cpu().numpy()
            return vectors, np.zeros((len(vectors), 0), np.float16)
        pooled = self.model.pooled(batch)
        vectors = F.normalize(self.model.speech_vectors({"pooled": pooled}), dim=-1)
        return vectors.float().cpu().numpy(), pooled.flatten(1).half().cpu().numpy()

    def _release(self) -> Iterator[Embedded]:
        """Embeds all that waits, and gives the files that are done."""
        self._embed()
        done, self.done = self.done, []
        for one in done:
            self.report.embedded += bool(one.places)
            self.report.moments += len(one.places)
            self.report.speech_s += sum(end - start for start, end, _ in one.places)
            yield one.embedded(one.problem)


def by_length(waiting: list[tuple[_Recording, int, torch.Tensor]]) -> Iterator[list]:
    """Batches of like lengths, of BATCH_S seconds with what is padded."""
    batch: list = []
    for one in sorted(waiting, key=lambda one: len(one[2])):
        if batch and (len(batch) + 1) * len(one[2]) > BATCH_S * SAMPLE_RATE:  # the longest is the newest
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch
