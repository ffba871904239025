"""Recordings into an index: found, cut into moments, embedded, written.

    found = recordings.find(["path/to/recordings", "one more.mp3"])
    index = recordings.index_for("recordings.index", found)     # by models/esr-tiny; or run="acted"
    report = recordings.refresh(index, found)                   # only what is new or changed is embedded

A file that takes long is written also on the way. If that is interrupted, the file is heard from its start again, so
that its moments are the same, but what is there of them is not embedded again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from esr_utils import runs
from esr_utils.audio_folder import absolute, absolute_key, find_audio
from esr_utils.config import Level
from esr_utils.index import Index
from esr_utils.index_rows import Changes, Embedded, File, IndexUnusable, Report
from esr_utils.index_table import matrix
from esr_utils.recording_labels import Labels

# What hears is imported where it is needed: where nothing is new, that would be most of the time.
if TYPE_CHECKING:
    from esr_utils.listening import Made, Place
    from esr_utils.moments import Channels
    from esr_utils.retriever import Retriever

DEFAULT_RUN = runs.RELEASED  # whose retriever makes an index where no run is named

Progress = Callable[[int, int, float], None]


def load_retriever(run: str | Path | None = None, device: str = "auto") -> tuple[Retriever, Level, str]:
    """The best retriever of a run of any kind, the level that its clips had, and where the run is.

    Args:
        run: name or path of a run folder; None is DEFAULT_RUN.

    Raises:
        weights.WeightsError: no such run, or its files are damaged.
    """
    from esr_utils import retriever
    from esr_utils.weights import WeightsError

    try:
        folder = runs.run_folder(DEFAULT_RUN if run is None else run)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    model = retriever.load(folder / "best", runs.pick_device(device))
    try:
        return model, runs.read_json(folder / "config.json")["training"]["level"], str(folder)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{folder} is no run that can be used: its config.json lacks training, level: {error}"
        ) from None


def retriever_of(uri: str | Path, run: str | Path | None = None) -> tuple[Retriever, Level, str]:
    """As `load_retriever`: of the run that is named, else of that which made the index, else of DEFAULT_RUN.

    Raises:
        weights.WeightsError: as `load_retriever`.
    """
    from esr_utils.weights import WeightsError

    try:
        made_by = Index.open(uri).about["run"]
    except IndexUnusable:
        made_by = ""
    try:
        return load_retriever(run or made_by or None)
    except WeightsError as error:
        if run or not made_by:
            raise
        raise WeightsError(f"{error}. {uri} was made by that run: --run says where it is now") from None


def model_of(index: Index) -> Retriever:
    """The retriever of an index: that which it was opened with, else that of the run which it names, whose text side
    is loaded when it is needed.

    Raises:
        IndexUnusable: the run's retriever is another by now.
        weights.WeightsError: as `retriever_of`.
    """
    if index.model is None:
        index.model = Index.open(index.uri, retriever_of(index.uri)[0]).model
        index.model.text.release()
    return index.model


def open_index(
    uri: str | Path, places: str | Path | Iterable[str | Path] = (), run: str | Path | None = None
) -> tuple[Index, Report]:
    """An index and the retriever that made it; with places, it is made if it is not there, and brought up to date.

    Args:
        places: folders of recordings, or recordings; none: the index is taken as it is.
        run: as `retriever_of`.

    Raises:
        index_rows.IndexUnusable: it is not there and no places are named, or another retriever made it.
        Further as `retriever_of`, `find` and `refresh`.
    """
    if not places:
        Index.open(uri)  # that there is none is said before a model is loaded
        return Index.open(uri, retriever_of(uri, run)[0]), Report()
    found = find(places)
    index = index_for(uri, found, run)
    with tqdm(unit="file", desc="index", leave=False) as bar:

        def heard(done: int, total: int, _: float) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = refresh(index, found, progress=heard)
    model_of(index)
    return index, report


def index_for(
    uri: str | Path,
    found: Found,
    run: str | Path | None = None,
    channels: Channels | None = None,
    adapt: str | None = None,
) -> Index:
    """The index of recordings that is there, or a new one.

    As it was made, it is opened without its retriever, which `refresh` loads if it needs it.

    Args:
        run: as `retriever_of`.
        channels, adapt: as `Index.create`. A new index adapts by speaker where most files have one in the labels
            and the retriever can: on corpora left out of the training that gains, or costs nothing told
            (`benchmarks/adaptation.py`).

    Raises:
        IndexUnusable, AdaptationError: as `Index.create`.
        weights.WeightsError: as `retriever_of`.
    """
    try:
        there = Index.open(uri)
    except IndexUnusable:
        there = None
    if there and not (run or channels or adapt):
        return there
    from esr_utils import adaptation

    model, level, folder = retriever_of(uri, run)
    if not there and not adapt and found.labels.name_most("speaker", found.files) and adaptation.is_possible(model):
        adapt = "speaker"
    made_by = "" if folder == str(runs.run_folder(DEFAULT_RUN)) else folder  # the default is where the project is
    index = Index.create(uri, model, level=level, run=made_by, channels=channels, adapt=adapt)
    model.text.release()  # while recordings are heard no sentence is read, and it takes 90 MB and more
    return index


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
        root = absolute(place)
        files, left_out = find_audio(root, gone)
        found.within.append(key := absolute_key(root))
        found.files.update((absolute_key(path), path) for _, path in files)
        found.left_out.update((f"{key}/{name}", reason) for name, reason in left_out)
        folders[root if root.is_dir() else root.parent] = None
    for folder in folders:
        found.labels.read(folder)
    return found


def refresh(index: Index, found: Found, progress: Progress | None = None) -> Report:
    """Embeds what is new or changed, and drops what is gone from the places. Interrupted, run it again.

    Args:
        index: its `about` says how recordings of several channels are heard. If it was opened without a model, that
            is loaded when there is something to embed, or vectors are to be adapted.
        progress: is called with the files done, those to do in all, and the seconds of audio heard.

    Raises:
        IndexUnusable, IndexWriteError: as `Index.add`; what was committed stays.
        recording_labels.LabelsError: labels do not fit the index.
        weights.WeightsError: silero-vad is not installed; or as `model_of`.
    """

    def embed(changes: Changes, report: Report) -> Iterator[Embedded]:
        if not changes.changed and not changes.new:
            return iter(())
        from esr_utils.listening import Embedder

        n_files = len(changes.changed) + len(changes.new)
        heard = (lambda done, seconds: progress(done, n_files, seconds)) if progress else None
        return Embedder(model_of(index), index.about, report, heard, _known(index))(changes.to_embed())

    return refresh_by(embed, index, found)


def refresh_by(embed: Callable[[Changes, Report], Iterable[Embedded]], index: Index, found: Found) -> Report:
    """As `refresh`, by what embeds files elsewhere.

    Args:
        embed: from the changes, of which it embeds those new and changed, to what was made of each. It notes in the
            report what it embeds, and what it cannot use.
    """
    labels = found.labels.for_index(index)
    changes = index.changes(found.within, found.files.items())
    changes.gone = [key for key in changes.gone if not _in(key, found.left_out)]  # perhaps they cannot be seen now
    report = Report(unchanged=changes.unchanged + len(changes.touched), removed=len(changes.gone))
    new = {key for key, _ in changes.new} | {file.key for file in changes.changed}
    same = {key: path for key, path in found.files.items() if key not in new}

    def embedded(_: Iterator[File]) -> Iterator[Embedded]:
        for one in labels.relabelled(index, same):
            report.relabelled += 1
            yield one
        for one in embed(changes, report):
            yield replace(one, moments=pd.concat([one.moments, labels.of(one.file.key, one.moments)], axis=1))

    index.apply(changes, embedded)
    if index.about["adapt"] != "off":
        from esr_utils import index_adaptation

        due = index_adaptation.is_due(index)
        adapted = index_adaptation.adapt(index, model_of(index)) if due else index_adaptation.Adapted()
        report.adapted, report.few_styles = adapted.files, dict(adapted.few_styles)
    report.left_out |= found.left_out | dict(changes.unreadable)
    return report


def _in(key: str, places: Mapping[str, str]) -> bool:
    """Whether one of the places is that key, or a folder above it."""
    return any(key[:end] in places for end in [len(key), *(found.start() for found in re.finditer("/", key))])


def _known(index: Index) -> Callable[[File], dict[Place, Made]]:
    """What is there of a file that was interrupted, if it is still the same."""
    from esr_utils import adaptation

    unfinished, about = index.unfinished(), index.about

    def known(file: File) -> dict[Place, Made]:
        sha256, version = unfinished.get(file.key, ("", 0))
        if sha256 != file.sha256:
            return {}
        kept = ["pooled"] if about["pooled"] else []
        there = index.of_version(version, ["start_s", "end_s", "channel", "vector", *kept])
        places = zip(*(there[name].to_pylist() for name in ("start_s", "end_s", "channel")), strict=True)
        vectors = matrix(there["vector"], about["dim"])
        pooled = np.zeros((len(vectors), 0), np.float16)
        if kept:  # the vectors may be by the index's own statistics
            pooled = matrix(there["pooled"], about["pooled"])
            training = adaptation.of_training(index.model)
            vectors = adaptation.vectors(index.model, pooled.reshape(-1, *training.mean.shape), training)
        return dict(zip(places, zip(vectors, pooled, strict=True), strict=True))

    return known
