"""`esr index` at its real sizes, start to exit: python benchmarks/index_command.py MODE [N [BY]]

    hours     one recording of N hours (6), 44.1 kHz stereo FLAC, into a new index: times real time, peak memory, what
              is on disk; BY: as in `--adapt BY`, such as all
    beside    the same of 0.2 hours, one command and two at once, by how long threads wait awake: as OpenMP has it by
              itself, and as this project sets it; seconds, the median of 3 in turns
    refresh   N unchanged recordings (10000) of ten moments each, the walk of their folder included: seconds; also of
              `recordings.find` and `refresh` alone, in a process that has its model already

The retriever is the released one. The recording is real speech where $ESR_DATA says where it is (RAVDESS, EmoDB,
nEMO), else the demo corpus: ten minutes of clips with pauses of 0.3 to 3 s and a little noise, over and over. Memory is
of all processes that the command starts, together. Needs Linux; six hours take 2 GB of disk.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pandas as pd
import soundfile
import soxr

from esr_utils import manifests, recordings
from esr_utils.audio_folder import absolute_key
from esr_utils.index import Index
from esr_utils.index_rows import Embedded, File

RATE, PART_S, MOMENTS = 44_100, 600, 10
OPENMP_SPIN = "300000"  # libgomp's own
LIMITS = {"speed": 25.0, "memory": 1.5, "refresh": 5.0}  # times real time, GB, s


def part() -> np.ndarray:
    """(S, 2) of speech with pauses."""
    rng, parts, n = np.random.default_rng(0), [], 0
    clips = manifests.load_corpora("ravdess+emodb+nemo" if os.environ.get("ESR_DATA") else "demo")
    for cut in manifests.to_cuts(clips.sample(frac=1, random_state=0)):
        clip, rate = soundfile.read(cut.recording.sources[0].source, dtype="float32")
        parts.append(np.pad(soxr.resample(clip, rate, RATE), (0, int(rng.uniform(0.3, 3) * RATE))))
        if (n := n + len(parts[-1])) >= PART_S * RATE:
            break
    samples = np.concatenate(parts)[:, None] * np.float32([1, 0.6])
    return (samples + rng.normal(0, 1e-3, samples.shape)).astype(np.float32)


def memory(pid: int) -> int:
    """kB of a process and of all that it has started."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [
            int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()
        ]
    except OSError:  # it is over
        return 0
    found = re.search(r"VmRSS:\s*(\d+) kB", status)
    return (int(found[1]) if found else 0) + sum(map(memory, children))


def esr(*arguments: object) -> tuple[float, float]:
    """Runs the command; its seconds, and the peak of its memory in GB."""
    started, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "esr_utils.cli", "index", *map(str, arguments)])
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.2)
    if process.returncode:
        sys.exit(f"esr index ended with {process.returncode}")
    return time.monotonic() - started, peak * 1024 / 1e9


def said(met: bool) -> str:
    return "met" if met else "NOT MET"


def record(path: Path, n_hours: float) -> None:
    samples = part()
    with soundfile.SoundFile(path, "w", RATE, 2, compression_level=0.0) as file:
        while (left := round(n_hours * 3600 * RATE) - file.frames) > 0:
            file.write(samples[:left])


def beside(folder: Path, n: float) -> bool:
    record(folder / "long.flac", n)
    times: dict[tuple[str, int], list[float]] = {}
    for turn in range(3):
        for spin in (OPENMP_SPIN, os.environ["GOMP_SPINCOUNT"]):
            for at_once in (1, 2):
                commands = [
                    [sys.executable, "-m", "esr_utils.cli", "index", folder / "long.flac",
                     "--index", folder / f"{turn}-{spin}-{at_once}-{i}", "--adapt", "off"] for i in range(at_once)
                ]  # fmt: skip
                started, environment = time.monotonic(), os.environ | {"GOMP_SPINCOUNT": spin}
                running = [subprocess.Popen(one, env=environment, stdout=subprocess.DEVNULL) for one in commands]
                if any(process.wait() for process in running):
                    sys.exit("esr index failed")
                times.setdefault((spin, at_once), []).append(time.monotonic() - started)
    for (spin, at_once), seconds in times.items():
        print(f"{n:g} h, GOMP_SPINCOUNT {spin}, {at_once} at once: {sorted(seconds)[1]:.0f} s "
              f"({min(seconds):.0f} to {max(seconds):.0f})", flush=True)  # fmt: skip
    return True


def hours(folder: Path, n: float, adapt: str) -> bool:
    record(folder / "long.flac", n)
    seconds, peak = esr(folder / "long.flac", "--index", folder / "index", "--adapt", adapt)
    speed = n * 3600 / seconds
    met = speed >= LIMITS["speed"] and peak <= LIMITS["memory"]
    on_disk = sum(path.stat().st_size for path in (folder / "index").rglob("*") if path.is_file())
    stats = Index.open(folder / "index").stats()
    print(f"{n:g} h in one file, --adapt {adapt}: {seconds:.0f} s, {speed:.0f} x real time, peak {peak:.2f} GB "
          f"(limits {LIMITS['speed']:g} x and {LIMITS['memory']} GB, {said(met)}); {stats['moments']} moments, "
          f"{stats['bytes'] / 1e6:.0f} MB, with what was replaced {on_disk / 1e6:.0f} MB", flush=True)  # fmt: skip
    return met


def refresh(folder: Path, n: int) -> bool:
    model, level, _ = recordings.load_retriever()
    index, dim = Index.create(folder / "index", model, level=level), model.config.dim
    rng, start = np.random.default_rng(0), np.arange(MOMENTS) * 4.0
    rows, made = pd.DataFrame({"start_s": start, "end_s": start + 4}), []
    for i in range(n):
        path = folder / "recordings" / f"{i // 100:03d}" / f"{i:05d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(i.to_bytes(8, "big"))  # nobody listens to it again
        vectors = rng.standard_normal((MOMENTS, dim))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        made.append(Embedded(File.read(absolute_key(path), path), rows, vectors))
    index.add(made)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        found = recordings.find(folder / "recordings")
        walked = time.perf_counter() - started
        report = recordings.refresh(index, found)
        times.append((time.perf_counter() - started, walked))
        assert (report.unchanged, report.embedded, report.removed) == (n, 0, 0)
    (inside, walked), (whole, _) = sorted(times)[1], esr(folder / "recordings", "--index", folder / "index")
    met = inside <= LIMITS["refresh"]
    print(f"{n} unchanged files of {MOMENTS} moments: {inside:.2f} s, of which the walk {walked:.2f} s "
          f"(limit {LIMITS['refresh']:g} s, {said(met)}); esr index, from start to exit: {whole:.1f} s",
          flush=True)  # fmt: skip
    return met


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else "hours"
    default = {"hours": "6", "beside": "0.2", "refresh": "10000"}[mode]
    n, adapt = [*sys.argv[2:], *(default, "off")[len(sys.argv[2:]) :]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if mode == "refresh":
            met = refresh(folder, int(n))
        else:
            met = hours(folder, float(n), adapt) if mode == "hours" else beside(folder, float(n))
    sys.exit(int(not met))
