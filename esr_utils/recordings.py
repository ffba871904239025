"""Recordings into an index: found, cut into moments, embedded, written.

    found = recordings.find(["path/to/recordings", "one more.mp3"])
    model, level, run = recordings.load_retriever("acted")
    index = Index.create("recordings.index", model, level=level, run=run)
    report = recordings.refresh(index, found)                   # only what is new or changed is embedded

Embedding is fast where clips of like length are side by side, while files are short, long or without speech. So the
moments of many files wait together, up to five minutes of speech, and are embedded by length; each file is written when
all of its own are through, and one that takes long also on the way. If that is interrupted, the file is heard from its
start again, so that its moments are the same, but what is there of them is not embedded again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from esr_utils import retriever, runs
from esr_utils.audio_files import AudioError
from esr_utils.audio_folder import absolute_key, find_audio
from esr_utils.batches import BadAudio, prepared
from esr_utils.config import SAMPLE_RATE, Level
from esr_utils.decoding import NoFfmpegError
from esr_utils.index import Index
from esr_utils.index_rows import UNFINISHED, Embedded, File
from esr_utils.index_table import matrix
from esr_utils.moments import MIN_S, Moment, moments
from esr_utils.recording_labels import Columns, Labels
from esr_utils.retriever import Retriever
from esr_utils.weights import WeightsError

DEFAULT_RUN = runs.DEFAULT_RUN  # whose retriever makes an index where no run is named
POOL_S = 300.0  # seconds of speech that wait to be embedded: 19 MB
WAIT_S = 20.0  # seconds after which what waits is embedded, however little it is
PART_S = 120.0  # seconds after which what there is so far of a file is written, and so is lost by a kill at most
_AT_ONCE = 100  # hits of one file that are in memory together when they are cut
BATCH_S = 16.0  # seconds a forward pass, with what is padded: more is no faster on a CPU, and takes more memory

Progress = Callable[[int, int, float], None]
Place = tuple[float, float, int | None]  # start_s, end_s, channel


def load_retriever(run: str | Path | None = None, device: str = "auto") -> tuple[Retriever, Level, str]:
    """The best retriever of a run of any kind, the level that its clips had, and where the run is.

    Args:
        run: name or path of a run folder; None is DEFAULT_RUN, which is trained where it is not there yet.

    Raises:
        weights.WeightsError: no such run, or its files are damaged.
    """
    if run is None:
        from esr_utils import training  # here: a search starts faster without it

        model, settings = training.load_run(DEFAULT_RUN, device)
        return model, settings["training"]["level"], str(runs.run_folder(DEFAULT_RUN))
    try:
        folder = runs.run_folder(run)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    model = retriever.load(folder / "best", runs.pick_device(device))
    try:
        return model, runs.read_json(folder / "config.json")["training"]["level"], str(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder} is no run that can be used: its config.json lacks training, level: {error}"
        ) from None


@dataclass(frozen=True)
class Found:
    """Recordings at one or several places.

    Attributes:
        within: keys of the places.
        files: key and path of each recording.
        left_out: key and reason of what cannot be used.
        labels: columns of their moments, where a folder has a labels.csv (see `recording_labels`).
    """

    within: list[str]
    files: dict[str, Path]
    left_out: dict[str, str]
    labels: Labels


def find(places: str | Path | Iterable[str | Path], gone: bool = False) -> Found:
    """What recordings there are in folders (see `audio_folder.find_audio`), or files, by `audio_folder.absolute_key`.

    Args:
        gone: whether a place that is not there, or holds none, is one whose recordings were removed for good.

    Raises:
        audio_folder.NoAudio: one of the places is not there, or holds none, and `gone` is false: a disk that is not
            mounted looks the same.
        recording_labels.LabelsError: a labels.csv cannot be used.
    """
    found, folders = Found([], {}, {}, Labels()), {}
    for place in [places] if isinstance(places, str | Path) else places:
        root = Path(place).expanduser().resolve()
        files, left_out = find_audio(root, gone)
        found.within.append(key := absolute_key(root))
        found.files.update((absolute_key(path), path) for _, path in files)
        found.left_out.update((f"{key}/{name}", reason) for name, reason in left_out)
        folders[root if root.is_dir() else root.parent] = None
    for folder in folders:
        found.labels.read(folder)
    return found


@dataclass
class Report:
    """What became of recordings.

    Attributes:
        embedded, unchanged, removed: files.
        relabelled: those of the unchanged of which a labels.csv says something else than before.
        moments: of those embedded.
        speech_s: seconds that these moments last together.
        problems: key and reason of files that could not be used, or not whole; of those embedded or looked at now.
        left_out: the same of what was left as it is in the index, and is tried again the next time: it cannot be
            opened, leads elsewhere, or needs ffmpeg.
    """

    embedded: int = 0
    unchanged: int = 0
    removed: int = 0
    relabelled: int = 0
    moments: int = 0
    speech_s: float = 0.0
    problems: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def refresh(index: Index, found: Found, progress: Progress | None = None) -> Report:
    """Embeds what is new or changed, and drops what is gone from the places. Interrupted, run it again.

    Args:
        index: with a model; its `about` says how recordings of several channels are heard.
        progress: is called with the files done, those to do in all, and the seconds of audio heard.

    Raises:
        IndexUnusable, IndexWriteError: as `Index.add`; what was committed stays.
        recording_labels.LabelsError: labels do not fit the index.
        weights.WeightsError: silero-vad is not installed.
    """
    labels = found.labels.for_index(index)
    changes = index.changes(found.within, found.files.items())
    changes.gone = [key for key in changes.gone if not _in(key, found.left_out)]  # perhaps they cannot be seen now
    report = Report(unchanged=changes.unchanged + len(changes.touched), removed=len(changes.gone))
    n_files = len(changes.changed) + len(changes.new)
    heard = (lambda done, seconds: progress(done, n_files, seconds)) if progress else None
    embedder = _Embedder(index, labels, report, heard)
    new = {key for key, _ in changes.new} | {file.key for file in changes.changed}
    same = {key: path for key, path in found.files.items() if key not in new}

    def embedded(files: Iterator[File]) -> Iterator[Embedded]:
        for one in labels.relabelled(index, same):
            report.relabelled += 1
            yield one
        yield from embedder(files)

    index.apply(changes, embedded)
    report.left_out |= found.left_out | dict(changes.unreadable)
    return report


def _in(key: str, places: Mapping[str, str]) -> bool:
    """Whether one of the places is that key, or a folder above it."""
    return any(key[:end] in places for end in [len(key), *(found.start() for found in re.finditer("/", key))])


class _Recording:
    """A file that is being heard: its moments, and their vectors as far as they are there."""

    def __init__(self, file: File, known: Mapping[Place, NDArray[np.float16]]) -> None:
        """Args: known: vectors of its moments that are there since it was interrupted, by their places."""
        self.file, self.known, self.problem, self.written = file, known, "", time.monotonic()
        self.places: list[Place] = []
        self.vectors: list[NDArray[np.floating] | None] = []

    def embedded(self, dim: int, labels: Columns, problem: str) -> Embedded:
        table = pd.DataFrame(self.places, columns=["start_s", "end_s", "channel"])
        table = table.astype({"start_s": float, "end_s": float, "channel": "Int64"})
        table = pd.concat([table, labels.of(self.file.key, table)], axis=1)
        vectors = np.stack(self.vectors) if self.vectors else np.zeros((0, dim), np.float32)
        return Embedded(self.file, table, vectors, problem=problem)


class _Embedder:
    """From files to what was made of each, for `Index.apply`."""

    def __init__(
        self,
        index: Index,
        labels: Columns,
        report: Report,
        heard: Callable[[int, float], None] | None,
    ) -> None:
        self.index, self.model, self.dim = index, index.model.eval(), index.about["dim"]
        self.labels, self.report, self.heard = labels, report, heard
        self.unfinished = index.unfinished()
        self.waiting: list[tuple[_Recording, int, torch.Tensor]] = []  # whose, which of its moments, (S,) samples
        self.done: list[_Recording] = []  # heard to the end; those of their moments that are not embedded yet wait
        self.waiting_s, self.since, self.heard_s, self.files = 0.0, time.monotonic(), 0.0, 0

    def __call__(self, files: Iterable[File]) -> Iterator[Embedded]:
        for file in files:
            one = _Recording(file, self._known(file))
            for _ in self._hear(one):
                yield from self._release()
                if time.monotonic() - one.written >= PART_S and len(one.places) > len(one.known):
                    yield one.embedded(self.dim, self.labels, UNFINISHED)
                    one.written = time.monotonic()
            self.files += 1
            self._tell(0.0)
            if self._is_time():
                yield from self._release()
        yield from self._release()

    def _known(self, file: File) -> dict[Place, NDArray[np.float16]]:
        """What is there of a file that was interrupted, if it is still the same."""
        sha256, version = self.unfinished.get(file.key, ("", 0))
        if sha256 != file.sha256:
            return {}
        there = self.index.of_version(version, ["start_s", "end_s", "channel", "vector"])
        places = zip(*(there[name].to_pylist() for name in ("start_s", "end_s", "channel")), strict=True)
        return dict(zip(places, matrix(there["vector"], self.dim), strict=True))

    def _hear(self, one: _Recording) -> Iterator[None]:
        """Takes up the moments of a recording; stops where those that wait are to be embedded."""
        end_s = 0.0
        try:
            for moment in moments(one.file.path, self.index.about["channels"]):
                self._take(one, moment)
                end_s = max(end_s, moment.end_s)
                self._tell(end_s)
                if self._is_time():
                    yield
        except NoFfmpegError as error:
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
        if place not in one.known:
            try:
                waveform = prepared(torch.from_numpy(moment.waveform), self.index.about["level"])
            except BadAudio:  # quieter than what counts as silence
                return
            self.waiting.append((one, len(one.places), waveform))
            self.waiting_s += len(waveform) / SAMPLE_RATE
        one.places.append(place)
        one.vectors.append(one.known.get(place))

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
            vectors = self.model.encode_speech(padded).float().cpu().numpy()
            for (one, place, _), vector in zip(batch, vectors, strict=True):
                one.vectors[place] = vector
        self.waiting, self.waiting_s, self.since = [], 0.0, time.monotonic()

    def _release(self) -> Iterator[Embedded]:
        """Embeds all that waits, and gives the files that are done."""
        self._embed()
        done, self.done = self.done, []
        for one in done:
            self.report.embedded += 1
            self.report.moments += len(one.places)
            self.report.speech_s += sum(end - start for start, end, _ in one.places)
            yield one.embedded(self.dim, self.labels, one.problem)


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
