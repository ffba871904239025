"""Recordings, or a manifest's clips, into an index by many processes and machines: a Ray Data job.

    found = recordings.find("path/to/recordings")
    model, level, run = recordings.load_retriever("acted")
    index = Index.create("recordings.index", model, level=level, run=run)
    report = scale.refresh(index, found, run, Workers(8, threads=4))            # on this machine
    report = scale.refresh(index, found, run, Workers(16, gpus=1, address="auto"))   # on a cluster

The driver, who calls, compares the files with the index (as `recordings.refresh` on one machine), and gives those to
embed to Ray in batches, the longest first. A worker has a retriever of its own, loaded from the run folder, and runs
the code of the single process: the numbers are the same. What it makes goes back to the driver, who alone writes the
index: 1 kB a moment, a thirtieth of the bytes that were read as 16 kHz audio at the least, in one commit for some
thousand moments. So no commit meets another, and workers need no access to the index. On a cluster each node has this
project with requirements-scale.txt, and sees recordings and run folder at the same paths.

A worker that dies costs its batch, which another one does again, and again. Files of a batch that fails every time are
tried one by one; who then still fails is left out, and named in the report. Whatever was committed stays: interrupted
or killed, run it again.

Nothing here reads or writes a pickle, but Ray hands functions, tables and results from process to process as pickles
of its own: whoever reaches a cluster's ports can run code on it. Keep them within a network that you trust.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from esr_utils import runs
from esr_utils.audio_folder import absolute_path
from esr_utils.config import Level
from esr_utils.index import Index, clip_keys, model_id, of_clips, stated
from esr_utils.index_rows import Changes, Embedded, IndexUnusable, first_line
from esr_utils.manifest_schema import ManifestError
from esr_utils.moments import Channels
from esr_utils.recordings import Embedder, Found, Progress, Report, load_retriever, refresh_by

_BATCH_S, _BATCH_FILES = 1800.0, 500  # of audio in a batch, at most, if no single file is longer: what a death costs
_ROUNDS = 4  # batches that a worker gets, at least, so that all end at about the same time
_RETRIES = 3  # of a batch whose worker has died
_STORE = 128 * 2**20  # bytes of shared memory of a Ray of our own: results wait there for the driver
_BLOCK = 2**20  # bytes that Ray Data expects of a result before it has seen one
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Bytes a second of audio, to tell long files from short ones without opening them.
_BYTES = {".wav": 64e3, ".aiff": 64e3, ".aif": 64e3, ".caf": 64e3, ".w64": 64e3, ".flac": 32e3}
_BYTES_OF_OTHERS = 12e3


class ScaleError(RuntimeError):
    """There is no Ray, or its workers cannot work; the message says what to do."""


@dataclass(frozen=True)
class Workers:
    """Who shares the work.

    Attributes:
        n: workers, each a process with a model of its own.
        threads: CPU cores that each one takes.
        gpus: that each one takes; 0.5 puts two on one GPU, 0 keeps to the CPU.
        address: of a Ray cluster, `auto` for the one of this machine; empty: a Ray of our own on this machine, for as
            long as the job runs, or the one that this process is connected to.
    """

    n: int = 2
    threads: int = 1
    gpus: float = 0.0
    address: str = ""


def refresh(
    index: Index,
    found: Found,
    run: str | Path,
    workers: Workers = Workers(),  # noqa: B008: it is frozen
    channels: Channels = "mix",
    progress: Progress | None = None,
) -> Report:
    """As `recordings.refresh`, by several workers. Interrupted, run it again.

    Args:
        index: without a model too; the workers have theirs.
        run: name or path of the run folder whose retriever made the index, as all nodes see it.
        progress: is called with the files done, those to do in all, and the seconds of audio heard, batch by batch.

    Raises:
        ScaleError: Ray is not installed, its cluster not reached or too small, or no worker could work: such as when
            the run's retriever is another than the index's.
        IndexUnusable, IndexWriteError, recording_labels.LabelsError: as `recordings.refresh`.
    """

    def embed(changes: Changes, report: Report) -> Iterator[Embedded]:
        files = {file.key: file.path for file in changes.changed} | dict(changes.new)
        seconds = pd.Series({key: _seconds(path) for key, path in files.items()}, dtype=float)
        table = pd.DataFrame({"key": list(files)})
        yield from _told(_spread(Listener, table, seconds, index, run, workers, channels), report, len(files), progress)

    return refresh_by(embed, index, found)


def build(
    index: Index,
    manifest: pd.DataFrame,
    run: str | Path,
    workers: Workers = Workers(),  # noqa: B008
    progress: Progress | None = None,
) -> Report:
    """As `index.build`, by several workers, into an index that may hold part of it already. Interrupted, run it again.

    Files of which the index knows size and time are left as they are, so to take over other columns of a manifest begin
    at a new place; those that the manifest does not name are dropped. A file whose audio cannot be read, or does not
    fit its rows, is a problem in the report, where `index.build` ends.

    Args:
        manifest: rows of `manifests.load_corpora`.
        progress: as `refresh`; the seconds are those of the clips.

    Raises:
        ScaleError, IndexUnusable, IndexWriteError: as `refresh`.
    """
    clips = manifest.assign(key=clip_keys(manifest))
    changes = index.changes("/", ((key, absolute_path(key)) for key in clips["key"].unique()))
    report = Report(unchanged=changes.unchanged, removed=len(changes.gone))

    def embed(_: Iterator[Any]) -> Iterator[Embedded]:
        keys = [file.key for file in changes.changed] + [key for key, _ in changes.new]
        seconds = clips.groupby("key")["duration_s"].sum()[keys]
        yield from _told(_spread(Clips, clips, seconds, index, run, workers), report, len(keys), progress)

    index.apply(changes, embed)
    report.left_out |= dict(changes.unreadable)
    return report


# What a worker does -----------------------------------------------------------------------------------------


@dataclass
class Done:
    """What was made of a batch.

    Attributes:
        keys: of its files.
        report: of these.
        seconds: of audio.
    """

    keys: list[str]
    embedded: list[Embedded] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    seconds: float = 0.0


class Worker:
    """A process with a retriever of its own. Of a batch that fails, the files are tried by themselves."""

    def __init__(self, run: str, about: dict[str, Any], threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.model, _, _ = load_retriever(run, device)
        self.model.eval()
        self.level: Level = about["level"]
        if (found := model_id(self.model)) != about["model"]:
            raise IndexUnusable(f"the index was made by model {about['model']!r}, and {run} holds {found!r}")

    def __call__(self, batch: pd.DataFrame) -> pd.DataFrame:
        """Args: batch: rows with a column `key`. Returns one row with a column `done`."""
        done = Done(batch["key"].unique().tolist())
        try:
            self.embed(batch, done)
        except Exception as error:
            if len(done.keys) > 1:
                raise
            done = Done(done.keys)
            done.report.left_out[done.keys[0]] = f"failed: {type(error).__name__}: {first_line(error)}"
        return pd.DataFrame({"done": [done]})

    def embed(self, batch: pd.DataFrame, done: Done) -> None:
        raise NotImplementedError


class Listener(Worker):
    """Recordings to moments."""

    def __init__(self, run: str, about: dict[str, Any], threads: int, device: str, channels: Channels) -> None:
        super().__init__(run, about, threads, device)
        self.channels = channels

    def embed(self, batch: pd.DataFrame, done: Done) -> None:
        files = Changes(new=[(key, absolute_path(key)) for key in done.keys])
        embedder = Embedder(self.model, self.level, self.channels, done.report)
        done.embedded.extend(embedder(files.to_embed()))
        done.report.left_out |= dict(files.unreadable)
        done.seconds = embedder.heard_s


class Clips(Worker):
    """A manifest's clips; all those of a file are in one batch."""

    def embed(self, batch: pd.DataFrame, done: Done) -> None:
        from esr_utils.embedding import embed

        cuts, problems = self._cuts(batch)
        found = embed(self.model, cuts, self.level, cache=None)
        clips = batch.drop(columns="key").reset_index(drop=True)
        key_of = dict(zip(batch["utterance_id"], batch["key"], strict=True))
        for utterance_id, reason in found.skipped.itertuples(index=False):
            problems.setdefault(key_of[utterance_id], []).append(f"{utterance_id}: {reason}")
        made = {one.file.key: one for one in of_clips(clips, found)}
        for key in done.keys:
            none = Embedded(stated(key), clips[:0], np.zeros((0, self.model.config.dim), np.float32))
            done.embedded.append(replace(made.get(key, none), problem="; ".join(problems.get(key, []))))
        done.report.problems |= {one.file.key: one.problem for one in done.embedded if one.problem}
        done.seconds = float(clips["duration_s"].sum())
        done.report.embedded = len(done.keys)
        done.report.moments = len(found.utterance_ids)
        done.report.speech_s = float(clips.set_index("utterance_id")["duration_s"][found.utterance_ids].sum())

    @staticmethod
    def _cuts(batch: pd.DataFrame) -> tuple[Any, dict[str, list[str]]]:
        """Cuts of the clips whose audio is there, and what is wrong with that of the others, by file."""
        from lhotse import CutSet

        from esr_utils.manifests import to_cuts

        cuts, problems = [], {}
        for key, clips in batch.drop(columns="key").groupby(batch["key"], sort=False):
            try:
                cuts.extend(to_cuts(clips))
            except ManifestError as error:
                problems[key] = [str(problem) for problem in error.problems]
        return CutSet.from_cuts(cuts), problems


# What the driver does ---------------------------------------------------------------------------------------


def _told(results: Iterable[Done], report: Report, n_files: int, progress: Progress | None) -> Iterator[Embedded]:
    """Passes on what the workers have made, and tells of it."""
    n, seconds = 0, 0.0
    for done in results:
        yield from done.embedded
        for name in ("embedded", "moments", "speech_s", "problems", "left_out"):
            ours, theirs = getattr(report, name), getattr(done.report, name)
            setattr(report, name, ours | theirs if isinstance(ours, dict) else ours + theirs)
        n, seconds = n + len(done.keys), seconds + done.seconds
        if progress:
            progress(n, n_files, seconds)


def _seconds(path: Path) -> float:
    """About how long a recording lasts, by its size."""
    try:
        return os.stat(path).st_size / _BYTES.get(path.suffix.lower(), _BYTES_OF_OTHERS)
    except OSError:  # the worker will say so
        return 0.0


def batches(seconds: pd.Series, n_workers: int) -> list[list[str]]:
    """Files as batches: the longest first, so that no worker begins one when the others end.

    A batch lasts at most half an hour, or a fourth of a worker's share, or is one file.

    Args:
        seconds: that each file lasts, by its key.
    """
    limit = min(_BATCH_S, seconds.sum() / (_ROUNDS * n_workers))
    found: list[list[str]] = []
    filled = 0.0
    for key, lasts in seconds.sort_values(ascending=False, kind="stable").items():
        if not found or filled + lasts > limit or len(found[-1]) == _BATCH_FILES:
            found.append([])
            filled = 0.0
        found[-1].append(key)
        filled += lasts
    return found


def _spread(
    worker: type[Worker],
    table: pd.DataFrame,
    seconds: pd.Series,
    index: Index,
    run: str | Path,
    workers: Workers,
    *arguments: Any,
) -> Iterator[Done]:
    """What workers make of files, as it is done.

    Args:
        table: rows with a column `key`.
        seconds: that each file lasts, by its key.
        arguments: further ones of the worker.
    """
    if not len(seconds):
        return
    device = "cuda" if workers.gpus else "cpu"
    arguments = (str(runs.run_folder(run)), index.about, workers.threads, device, *arguments)
    rows, missing = table.groupby("key", sort=False).indices, dict.fromkeys(seconds.index)
    with connected(workers):
        for some in (batches(seconds, workers.n), None):
            some = [[key] for key in missing] if some is None else some
            parts = [table.iloc[np.concatenate([rows[key] for key in batch])] for batch in some]
            for done in _job(worker, arguments, parts, workers):
                for key in done.keys:
                    del missing[key]
                yield done
    reason = f"its worker failed or died, {_RETRIES + 1} times: the logs of Ray, in /tmp/ray of its node, say why"
    if len(missing) == len(seconds):
        raise ScaleError(f"no worker could do anything: {reason}")
    for key in missing:
        yield Done([key], report=Report(left_out={key: reason}))


def _job(worker: type[Worker], arguments: tuple, parts: list[pd.DataFrame], workers: Workers) -> Iterator[Done]:
    """What workers make of batches, as it is done, without those that failed for good."""
    ray = _ray()
    if not parts:
        return
    settings = ray.data.DataContext.get_current().copy()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    settings.max_errored_blocks = -1  # who failed is seen by what is missing
    settings.target_max_block_size = _BLOCK
    with ray.data.DataContext.current(settings):
        job = ray.data.from_pandas(parts).map_batches(
            worker,
            fn_constructor_args=arguments,
            batch_size=None,  # a batch is a block, and a block a task: it is what is tried again
            batch_format="pandas",
            compute=ray.data.ActorPoolStrategy(size=workers.n, max_tasks_in_flight_per_actor=1),
            num_cpus=workers.threads,
            num_gpus=workers.gpus or None,
            max_task_retries=_RETRIES,
        )
    try:
        for block in job.iter_batches(batch_size=None, batch_format="pandas", prefetch_batches=0):
            yield from block["done"]
    except ray.exceptions.RayError as error:
        raise ScaleError(f"the workers cannot work: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """The last line of what was raised in a worker, which says most; before it is where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise ScaleError("this needs Ray: pip install -r requirements-scale.txt") from None
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # that of the console; its log files stay
            handler.setLevel(logging.CRITICAL)
    return ray


@contextmanager
def connected(workers: Workers) -> Iterator[None]:
    """Within it there is a Ray: that to which this process is connected, else a cluster's, or one of our own.

    Raises:
        ScaleError: Ray is not installed, the cluster cannot be reached, or no worker fits into it.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)  # read by the import, and by the processes that it starts
    ray = _ray()
    if ours := not ray.is_initialized():
        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        own = {"num_cpus": workers.n * workers.threads, "include_dashboard": False, "object_store_memory": _STORE}
        try:
            ray.init(workers.address or "local", **quiet, **({} if workers.address else own))
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ScaleError(f"no Ray at {workers.address or 'this machine'}: {first_line(error)}") from None
    try:
        there = ray.cluster_resources()
        for name, needed in (("CPU", workers.threads), ("GPU", workers.gpus)):
            if needed > there.get(name, 0):
                raise ScaleError(f"a worker takes {needed:g} {name}, and Ray has {there.get(name, 0):g} of them")
        yield
    finally:
        if ours:
            ray.shutdown()
