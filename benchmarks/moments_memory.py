"""Memory and speed of cutting hours into moments, beside silero-vad's own way: python benchmarks/moments_memory.py

    ours           a file of 6 h decoded, listened to and cut in one pass, its moments' sound included; the mean of two
                   channels of a 44.1 kHz FLAC, and each channel of an 8 kHz WAV by itself (a call)
    silero-vad     as its README has it: the whole file read and resampled, then `get_speech_timestamps`; the first half
                   hour alone, since 6 h take long and several GB

Clips of the demo corpus, over and over, with pauses of 0.3 to 3 s and a little noise. One thread; each in a process of
its own, in turns, with its imports in the peak. Needs 2.5 GB of disk for its temporary files.
"""

from __future__ import annotations

import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import silero_vad
import soundfile
import soxr
import torch

from esr_utils import manifests, moments

HOURS, RIVAL_S = 6, 1800
RATE = 16_000
FILES = {"mean of 2 channels": ("podcast.flac", 44_100, "mix"), "split by channel": ("call.wav", 8_000, "split")}
LIMITS = (1.5, 80)  # GB; times real time


def minutes(rate: int) -> np.ndarray:
    """(S, 2) of clips with pauses, one party a channel, each heard a little in the other's."""
    rng, parts = np.random.default_rng(0), []
    for i, cut in enumerate(manifests.to_cuts(manifests.load_corpora("demo").sample(150, random_state=0))):
        clip, found = soundfile.read(cut.recording.sources[0].source, dtype="float32")
        assert found == RATE
        clip = np.pad(soxr.resample(clip, RATE, rate), (0, int(rng.uniform(0.3, 3) * rate)))
        parts.append(clip[:, None] * ((1, 0.1) if i % 2 else (0.1, 1)))
    samples = np.concatenate(parts)
    return (samples + rng.normal(0, 1e-3, samples.shape)).astype(np.float32)


def write(path: Path, rate: int, seconds: float) -> None:
    part = minutes(rate)
    with soundfile.SoundFile(path, "w", rate, 2) as file:
        while (left := round(seconds * rate) - file.frames) > 0:
            file.write(part[:left])


def peak_memory() -> float:
    """GB of this process (Linux); getrusage would begin at the parent's."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def ours(path: Path, channels: str) -> int:
    return sum(len(moment.waveform) > 0 for moment in moments.moments(path, channels))


def silero(path: Path, channels: str) -> int:
    samples, rate = soundfile.read(path, frames=RIVAL_S * soundfile.info(path).samplerate, dtype="float32")
    tracks = [samples.mean(axis=1)] if channels == "mix" else samples.T
    waves = [torch.from_numpy(soxr.resample(np.ascontiguousarray(track), rate, RATE)) for track in tracks]
    model = silero_vad.load_silero_vad()
    return sum(len(silero_vad.get_speech_timestamps(wave, model, max_speech_duration_s=10)) for wave in waves)


def measure(system, path: Path, channels: str, seconds: float, speeds: dict[str, float]) -> None:
    """In a process of its own, so that its peak memory is its own."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    found = system(path, channels)
    speeds[system.__name__] = speed = seconds / (time.perf_counter() - started)
    peak = peak_memory()
    said = f"  {system.__name__}: {seconds / 3600:g} h, {found} found, {speed:.0f} x real time, peak {peak:.2f} GB"
    if system is ours:
        met = peak <= LIMITS[0] and speed >= LIMITS[1]
        said += f" (limits {LIMITS[1]} x, {LIMITS[0]} GB, {'met' if met else 'NOT MET'})"
    print(said, flush=True)


if __name__ == "__main__":
    hours = float(sys.argv[1]) if len(sys.argv) > 1 else HOURS
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.Manager() as manager:
        for name, (file, rate, channels) in FILES.items():
            path = Path(temporary) / file
            write(path, rate, hours * 3600)
            print(f"{name}: {file}, {rate} Hz, {path.stat().st_size / 1e9:.2f} GB", flush=True)
            speeds = manager.dict()
            for system, seconds in ((ours, hours * 3600), (silero, min(RIVAL_S, hours * 3600))):
                arguments = (system, path, channels, seconds, speeds)
                process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(f"{system.__name__}: the process ended with {process.exitcode}")
            print(f"  ratio {speeds['ours'] / speeds['silero']:.1f}", flush=True)
            path.unlink()
