"""Recordings, or a manifest's clips, into an index by many processes and machines: a Ray Data job.

    found = recordings.find("path/to/recordings")
    model, level, run = recordings.load_retriever()   # models/esr-tiny, or a run's
    index = Index.create("recordings.index", model, level=level, run=run)
    report = scale.refresh(index, found, run, Workers(8, threads=4))            # on this machine
    report = scale.refresh(index, found, run, Workers(16, gpus=1, address="auto"))   # on a cluster

The driver, who calls, compares the files with the index (as `recordings.refresh` on one machine), and gives those to
embed to Ray in batches, the longest first. A worker has a retriever of its own, loaded from the run folder, and runs
the code of the single process: the numbers are the same. What it makes goes back to the driver, who alone writes the
index: 2 kB a moment of 512 dimensions, where a second of 16 kHz audio is 32, in one commit for some thousand moments.
So no commit meets another, and workers need no access to the index. On a cluster each node has this project with
requirements-scale.txt, and sees recordings and run folder at the same paths.

A worker that dies costs its batch, which another one does again, and again. Files of a batch that fails every time are
tried one by one; who then still fails is left out, and named in the report. Whatever was committed stays: interrupted
or killed, run it again.

Nothing here reads or writes a pickle, but Ray hands functions, tables and results from process to process as pickles
of its own: whoever reaches a cluster's ports can run code on it. Keep them within a network that you trust.
"""

from __future__ import annotations

import logging
import os
import random
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm.auto import tqdm

from esr_utils import index as index_module
from esr_utils import recordings, runs
from esr_utils.audio_folder import absolute_path
from esr_utils.index import Index, clip_keys
from esr_utils.index_rows import Changes, Embedded, Report, first_line
from esr_utils.index_snapshot import Snapshot
from esr_utils.recordings import Found, refresh_by
from esr_utils.scale_workers import Clips, Done, Listener, Worker

if TYPE_CHECKING:
    from esr_utils.retriever import Retriever

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
    workers: Workers = Workers(),  # noqa: B008
) -> Report:
    """As `recordings.refresh`, by several workers. Interrupted, run it again.

    Args:
        index: without a model too; the workers have theirs.
        run: name or path of the run folder whose retriever made the index, as all nodes see it.

    Raises:
        ScaleError: Ray is not installed, its cluster not reached or too small, or no worker could work: such as when
            the run's retriever is another than the index's.
        IndexUnusable, IndexWriteError, recording_labels.LabelsError: as `recordings.refresh`.
    """

    with ExitStack() as ends:

        def embed(changes: Changes, report: Report) -> Iterator[Embedded]:
            files = {file.key: file.path for file in changes.changed} | dict(changes.new)
            seconds = pd.Series({key: _seconds(path) for key, path in files.items()}, dtype=float)
            table = pd.DataFrame({"key": list(files)})
            results = _told(_spread(Listener, table, seconds, index, run, workers), report, len(files))
            return ends.enter_context(closing(results))  # else an error's traceback would keep the workers going

        return refresh_by(embed, index, found)


def build(
    index: Index,
    manifest: pd.DataFrame,
    run: str | Path,
    workers: Workers = Workers(),  # noqa: B008
) -> Report:
    """As `index.build`, by several workers, into an index that may hold part of it already. Interrupted, run it again.

    Files of which the index knows size and time are left as they are, so to take over other columns of a manifest begin
    at a new place; those that the manifest does not name are dropped. A file whose audio cannot be read, or does not
    fit its rows, is a problem in the report, where `index.build` ends.

    Args:
        manifest: rows of `manifests.load_corpora`.

    Raises:
        ScaleError, IndexUnusable, IndexWriteError: as `refresh`.
    """
    clips = manifest.assign(key=clip_keys(manifest))
    changes = index.changes("/", ((key, absolute_path(key)) for key in clips["key"].unique()))
    report = Report(unchanged=changes.unchanged, removed=len(changes.gone))

    files = [file.key for file in changes.changed] + [key for key, _ in changes.new]
    seconds = clips.groupby("key")["duration_s"].sum()[files]
    with closing(_told(_spread(Clips, clips, seconds, index, run, workers), report, len(files))) as results:
        index.apply(changes, lambda _: results)
    report.left_out |= dict(changes.unreadable)
    return report


def fill(
    index: Index,
    source: Found | pd.DataFrame,
    run: str | Path,
    workers: Workers = Workers(),  # noqa: B008
) -> Report:
    """`refresh` by recordings, `build` by a manifest."""
    return (refresh if isinstance(source, Found) else build)(index, source, run, workers)


def alone(index: Index, model: Retriever, source: Found | pd.DataFrame, n: int, seed: int) -> Index:
    """What this process by itself makes of n of the recordings, or of a manifest's clips, that filled an index: another
    one, in memory, by the training's statistics."""
    good, about = index.files().query("problem == ''").index, index.about
    if isinstance(source, Found):
        made = Index.create("memory://", model, about["level"], replace=True, channels=about["channels"])
        usable = sorted(path for key, path in source.files.items() if key in good)
        recordings.refresh(made, recordings.find(random.Random(seed).sample(usable, min(n, len(usable)))))
        return made
    usable = source[[key in good for key in clip_keys(source)]]
    sample = usable.sample(min(n, len(usable)), random_state=seed)
    return index_module.build(model, sample, level=about["level"], cache=None)[0]


def agreement(index: Index, other: Index) -> pd.DataFrame:
    """Whether what `other` holds, such as a sample of the same files, is in `index` too, by the same numbers.

    Returns:
        One row: `moments` of other, `missing` of these in index, and `max |1 - cosine|` of the vectors of the rest.
    """
    ours, theirs = (_unit_vectors(one) for one in (index, other))
    missing = theirs.keys() - ours.keys()
    apart = [abs(1 - float(ours[one] @ theirs[one])) for one in theirs.keys() - missing]
    return pd.DataFrame(
        {"moments": [len(theirs)], "missing": [len(missing)], "max |1 - cosine|": [max(apart, default=np.nan)]}
    )


def _unit_vectors(index: Index) -> dict[str, NDArray[np.float64]]:
    """(d,) of each moment, by its id."""
    index.reload()
    found = {}
    for batch in index.batches(["id", "vector"], Snapshot(index).alive()):
        vectors = np.array(batch["vector"].to_pylist(), np.float64)  # kept as fp16, and so not quite of length 1
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found.update(zip(batch["id"].to_pylist(), vectors, strict=True))
    return found


# What the driver does ---------------------------------------------------------------------------------------


def _told(results: Iterable[Done], report: Report, n_files: int) -> Iterator[Embedded]:
    """Passes on what the workers have made, and tells of it."""
    seconds, started = 0.0, time.monotonic()
    with tqdm(total=n_files, desc="embed", unit="file", leave=False) as bar:
        for done in results:
            yield from done.embedded
            for name in ("embedded", "moments", "speech_s", "problems", "left_out"):
                ours, theirs = getattr(report, name), getattr(done.report, name)
                setattr(report, name, ours | theirs if isinstance(ours, dict) else ours + theirs)
            seconds += done.seconds
            speed = seconds / (time.monotonic() - started)
            bar.set_postfix_str(f"{seconds / 3600:.2f} h heard, {speed:.0f} x real time", refresh=False)
            bar.update(len(done.keys))


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
                    missing.pop(key, None)
                yield done
    reason = f"its worker failed or died, {_RETRIES + 1} times: Ray's logs (session_latest/logs in its folder) say why"
    if len(missing) == len(seconds):
        raise ScaleError(f"no worker could do anything: {reason}")
    for key in missing:
        yield Done([key], report=Report(left_out={key: reason}))


def _job(worker: type[Worker], arguments: tuple, parts: list[pd.DataFrame], workers: Workers) -> Iterator[Done]:
    """What workers make of batches, as it is done, without those that failed for good."""
    ray = load_ray()
    if not parts:
        return
    settings = ray.data.DataContext.get_current().copy()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    settings.max_errored_blocks = -1  # who failed is seen by what is missing
    settings.target_max_block_size = _BLOCK
    with ray.data.DataContext.current(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Ray 2.60 has no other way to say how often it tries
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


def load_ray() -> Any:
    """Ray, which keeps what it tells to its log files, and sends no statistics.

    Raises:
        ScaleError: it is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)  # read by its import, and by the processes that it starts
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
    ray = load_ray()
    if ours := not ray.is_initialized():
        _start(ray, workers)
    try:
        there = ray.cluster_resources()
        for name, needed in (("CPU", workers.threads), ("GPU", workers.gpus)):
            if needed > there.get(name, 0):
                raise ScaleError(f"a worker takes {needed:g} {name}, and Ray has {there.get(name, 0):g} of them")
        yield
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any, workers: Workers, tries: int = 3) -> None:
    settings = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not workers.address:
        settings |= {"num_cpus": workers.n * workers.threads, "include_dashboard": False, "object_store_memory": _STORE}
    for left in reversed(range(tries)):
        try:
            with warnings.catch_warnings():  # of LanceDB, that it does not like forks: Ray's become other programs
                warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
                ray.init(workers.address or "local", **settings)
            return
        except Exception as error:  # Ray raises Exception itself where a busy machine takes over 30 s to start it
            ray.shutdown()
            if workers.address or not left:
                where = workers.address or "this machine"
                raise ScaleError(f"no Ray could be had at {where}: {first_line(error)}") from error
