"""Speed of many workers against one process: python benchmarks/scale_out.py [minutes] [rounds]

    one process, 1 thread     recordings.refresh
    one process, n threads    the same, on all cores
    1 worker                  scale.refresh by Ray Data, one worker of 1 thread
    n workers                 as many as there are cores, 1 thread each

Recordings of 20 s to 8 min, made of clips of RAVDESS, EmoDB and nEMO in $ESR_DATA (where that is not set, of the demo
corpus) with half a second of silence between them. Whisper tiny and MiniLM with heads that are not trained, which costs
the same. In turns, in one run. Ray is there when the clock starts, and how long its start takes is said; that of the
workers, with the loading of their models, counts, while the single process has its model. The bytes that a worker's
results take are of the vectors and places, pickled as Ray does.
"""

from __future__ import annotations

import os
import pickle
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import soundfile
import torch

from esr_utils import batches, manifests, recordings, runs, scale
from esr_utils.config import ModelConfig
from esr_utils.index import Index
from esr_utils.retriever import StyleRetriever
from esr_utils.scale import Workers

MINUTES, ROUNDS = 60.0, 3
RATE = 16_000
CORES = len(os.sched_getaffinity(0))


def write(folder: Path, seconds: float) -> tuple[int, float]:
    """Files of about so many seconds in all: how many, and how long exactly."""
    corpora = "ravdess+emodb+nemo" if os.environ.get("ESR_DATA") else "demo"
    clips = iter(manifests.to_cuts(manifests.load_corpora(corpora).sample(frac=1, random_state=0)))
    rng, total, n = np.random.default_rng(0), 0.0, 0
    while total < seconds:
        length, parts = np.exp(rng.uniform(np.log(20), np.log(480))), []
        while sum(map(len, parts)) < length * RATE and (cut := next(clips, None)) is not None:
            parts += [batches.load_waveform(cut).numpy(), np.zeros(RATE // 2, np.float32)]
        if not parts:
            break
        samples = np.concatenate(parts)
        soundfile.write(folder / f"{n:04d}.flac", samples / max(1, abs(samples).max()), RATE)
        total, n = total + len(samples) / RATE, n + 1
    return n, total


def alone(threads: int):
    def refresh(index: Index, found: recordings.Found, run: Path) -> recordings.Report:
        torch.set_num_threads(threads)
        return recordings.refresh(index, found)

    return refresh


def shared(n: int):
    return lambda index, found, run: scale.refresh(index, found, run, Workers(n))


def result_bytes(index: Index) -> float:
    """A moment's, on its way from a worker."""
    vectors = np.zeros((1000, index.about["dim"]), np.float32)
    places = np.zeros((1000, 3))
    return len(pickle.dumps((vectors, places), protocol=5)) / 1000


def main(minutes: float, rounds: int) -> None:
    systems = {
        "one process, 1 thread": alone(1), f"one process, {CORES} threads": alone(CORES), "1 worker": shared(1),
        f"{CORES} workers": shared(CORES),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "recordings").mkdir()
        n, seconds = write(root / "recordings", minutes * 60)
        torch.manual_seed(0)
        StyleRetriever.build(ModelConfig()).save(root / "run" / "best")
        runs.write_json(root / "run" / "config.json", {"training": {"level": "normalised"}})
        model, level, run = recordings.load_retriever(root / "run", "cpu")
        found = recordings.find(root / "recordings")
        speeds: dict[str, list[float]] = {name: [] for name in systems}
        started = time.perf_counter()
        with scale.connected(Workers(CORES)):
            print(f"{seconds / 60:.0f} min in {n} files, {rounds} rounds; Ray started in "
                  f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
            for turn in range(rounds):
                for i, (name, system) in enumerate(systems.items()):
                    index = Index.create(root / f"index{turn}{i}", model, level=level)
                    started = time.perf_counter()
                    report = system(index, found, root / "run")
                    speeds[name].append(seconds / (time.perf_counter() - started))
        first = next(iter(systems))
        for name, found_speeds in speeds.items():
            speed, ratio = (
                statistics.median(found_speeds),
                statistics.median(found_speeds) / statistics.median(speeds[first]),
            )
            print(f"  {name}: {speed:.0f} hours of audio an hour ({min(found_speeds):.0f}-{max(found_speeds):.0f}), "
                  f"{ratio:.2f} of {first}", flush=True)  # fmt: skip
        last, before = (Index.open(root / f"index{rounds - 1}{i}") for i in (len(systems) - 1, 0))
        print(f"  {report.moments} moments, {result_bytes(index):.0f} bytes each from worker to driver")
        print(scale.agreement(last, before).to_string(index=False))


if __name__ == "__main__":
    minutes, rounds = [*sys.argv[1:], *map(str, (MINUTES, ROUNDS)[len(sys.argv) - 1 :])]
    main(float(minutes), int(rounds))
