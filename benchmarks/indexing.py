"""Speed from files to an index, in times real time: python benchmarks/indexing.py [minutes] [rounds]

    ours     recordings.refresh: decoded, listened to, cut, embedded by length in batches across files, written
    plain    what one would write down first: each file read whole and resampled (soundfile, soxr), silero-vad's own
             `get_speech_timestamps`, one clip after the other through the same retriever, the same index

By the released retriever. A podcast (44.1 kHz, stereo FLAC), a call (8 kHz WAV), an MP3 (24 kHz) and short notes
(16 kHz Ogg), made of clips of the demo corpus with pauses of 0.3 to 3 s and a little noise; a quarter of the minutes
each. In turns, each in a process of its own, after a warm-up that loads the models; as many threads as torch takes by
itself, or OMP_NUM_THREADS.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pandas as pd
import soundfile
import soxr
import torch

from esr_utils import manifests, recordings
from esr_utils.index import Index
from esr_utils.index_rows import Embedded, File

MINUTES, ROUNDS = 60.0, 3
RATE = 16_000
LIMIT = 25  # times real time
NOTE_S = 45.0  # seconds of a short note


def speech(seconds: float) -> np.ndarray:
    """(S,) at 16 kHz."""
    rng, parts, n = np.random.default_rng(0), [], 0
    clips = manifests.to_cuts(manifests.load_corpora("demo").sample(frac=1, random_state=0))
    while n < seconds * RATE:
        for cut in clips:
            clip = soundfile.read(cut.recording.sources[0].source, dtype="float32")[0]
            parts.append(np.pad(clip, (0, int(rng.uniform(0.3, 3) * RATE))))
            n += len(parts[-1])
            if n >= seconds * RATE:
                break
    samples = np.concatenate(parts)[: round(seconds * RATE)]
    return (samples + rng.normal(0, 1e-3, samples.shape)).astype(np.float32)


def write(folder: Path, seconds: float) -> float:
    """Files of about so many seconds in all, and exactly how many."""
    part = speech(seconds / 4)
    stereo = soxr.resample(part, RATE, 44_100)[:, None] * np.float32([1, 0.6])
    soundfile.write(folder / "podcast.flac", stereo, 44_100)
    soundfile.write(folder / "call.wav", soxr.resample(part, RATE, 8_000), 8_000)
    soundfile.write(folder / "talk.mp3", soxr.resample(part, RATE, 24_000), 24_000)
    step = round(NOTE_S * RATE)
    for at in range(0, len(part), step):
        soundfile.write(folder / f"note{at // step:04d}.ogg", part[at : at + step], RATE)
    return sum(soundfile.info(path).duration for path in folder.iterdir())


def ours(index: Index, folder: Path) -> int:
    return recordings.refresh(index, recordings.find(folder)).moments


@torch.no_grad()
def plain(index: Index, folder: Path) -> int:
    import silero_vad  # here: it sets torch's threads to 1

    vad, made = silero_vad.load_silero_vad(), []
    for key, path in recordings.find(folder).files.items():
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        wave = torch.from_numpy(soxr.resample(samples.mean(axis=1), rate, RATE))
        spans = silero_vad.get_speech_timestamps(wave, vad, max_speech_duration_s=10, min_speech_duration_ms=1000)
        vectors = []
        for span in spans:
            clip = wave[span["start"] : span["end"]]
            clip = clip * (10 ** (-26 / 20) / clip.square().mean().sqrt())
            vector = index.model.encode_speech({"waveform": clip[None], "n_samples": torch.tensor([len(clip)])})
            vectors.append(vector[0].numpy())
        rows = pd.DataFrame(
            [(span["start"] / RATE, span["end"] / RATE) for span in spans], columns=["start_s", "end_s"]
        )
        made.append(Embedded(File.read(key, path), rows, np.array(vectors).reshape(len(rows), -1)))
    index.add(made)
    return sum(len(one.moments) for one in made)


def measure(system, folder: Path, warm_up: Path, place: Path, seconds: float, answers) -> None:
    """In a process of its own, so that its peak memory is its own."""
    threads = torch.get_num_threads()
    model = recordings.load_retriever()[0]
    system(Index.create(place / "warm-up", model), warm_up)
    torch.set_num_threads(threads)  # as before silero-vad was imported
    index = Index.create(place / "index", model)
    started = time.perf_counter()
    n = system(index, folder)
    speed = seconds / (time.perf_counter() - started)
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    answers.append((speed, peak, n, threads))


def main(minutes: float, rounds: int) -> int:
    systems = {"ours": ours, "plain": plain}
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.Manager() as manager:
        folder, warm_up = Path(temporary) / "recordings", Path(temporary) / "warm-up"
        folder.mkdir(), warm_up.mkdir()
        seconds = write(folder, minutes * 60)
        soundfile.write(warm_up / "short.wav", speech(20), RATE)
        found = {name: manager.list() for name in systems}
        for turn in range(rounds):
            for name, system in systems.items():
                place = Path(temporary) / f"{name}{turn}"
                arguments = (system, folder, warm_up, place, seconds, found[name])
                process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(f"{name}: the process ended with {process.exitcode}")
        print(f"{seconds / 60:.0f} min in {len(list(folder.iterdir()))} files, {rounds} rounds", flush=True)
        medians = {}
        for name, answers in found.items():
            speeds, peaks, counts, threads = zip(*answers, strict=True)
            medians[name] = statistics.median(speeds)
            spread = f"({min(speeds):.0f}-{max(speeds):.0f})"
            print(f"  {name}: {medians[name]:.0f} x real time {spread}, {counts[0]} moments, "
                  f"peak {max(peaks):.2f} GB, {threads[0]} threads", flush=True)  # fmt: skip
        met = medians["ours"] >= LIMIT
        print(f"  ratio {medians['ours'] / medians['plain']:.1f}; limit {LIMIT} x, {'met' if met else 'NOT MET'}")
    return int(not met)


if __name__ == "__main__":
    minutes, rounds = [*sys.argv[1:], *map(str, (MINUTES, ROUNDS)[len(sys.argv) - 1 :])]
    sys.exit(main(float(minutes), int(rounds)))
