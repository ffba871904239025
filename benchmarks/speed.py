"""What the README says of time and memory, beside a rival each, in one run: python benchmarks/speed.py

    embedding   Whisper tiny encoder, cut to each clip, batched by length | padded to 30 s, as transformers does
    trials      scores once, then gathered                                | full cosine for every trial, as published
    training    RAVDESS + EmoDB from kept frames, with peak memory        | from no kept frames

Clips: RAVDESS under $ESR_DATA if it is there, else the demo corpus; training needs RAVDESS and EmoDB.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import WhisperFeatureExtractor

from esr_utils import batches, manifests, runs, training, trials
from esr_utils.speech import load_speech_backbone

ROUNDS = 3


def in_turns(ours, theirs) -> tuple[float, float]:
    """Best of ROUNDS for each, one after the other, so that both meet the same machine."""
    times = ([], [])
    for _ in range(ROUNDS):
        for kept, call in zip(times, (ours, theirs), strict=True):
            started = time.perf_counter()
            call()
            kept.append(time.perf_counter() - started)
    return min(times[0]), min(times[1])


@torch.no_grad()
def embedding_speed(clips) -> None:
    chosen = clips.sample(96, random_state=0)
    cuts, seconds = manifests.to_cuts(chosen), chosen["duration_s"].sum()
    backbone, extractor = load_speech_backbone("whisper-tiny"), WhisperFeatureExtractor()
    waveforms = [batch for batch in batches.ordered_batches(cuts, 16, "normalised")]

    def ours() -> None:
        for batch in batches.ordered_batches(cuts, 16, "normalised"):  # decoding included
            backbone.layers(batch["waveform"], batch["n_samples"])

    def theirs() -> None:
        for batch in waveforms:  # decoding not included
            clips = [w[:n].numpy() for w, n in zip(batch["waveform"], batch["n_samples"], strict=True)]
            mel = extractor(clips, sampling_rate=16_000, return_tensors="pt").input_features
            backbone.encoder(mel)

    fast, slow = in_turns(ours, theirs)
    print(f"embedding, decode included: {fast / seconds:.4f} of real time; padded to 30 s, without decode: "
          f"{slow / seconds:.4f}; ratio {slow / fast:.1f}", flush=True)  # fmt: skip


def trial_speed() -> None:
    clips = manifests.load_corpora("demo")
    rng = np.random.default_rng(0)
    n = int((clips["split"] == "test").sum())
    speech = rng.normal(size=(n, 512)).astype(np.float32)
    speech /= np.linalg.norm(speech, axis=1, keepdims=True)
    prompts = {style: rng.normal(size=(66, 512)).astype(np.float32) for style in sorted(set(clips["style"]))}
    prompts = {style: p / np.linalg.norm(p, axis=1, keepdims=True) for style, p in prompts.items()}

    def ours() -> None:
        drawn = trials.build_trials(clips, "demo", "test")
        trials.evaluate_trials(drawn, {style: speech @ p.mean(axis=0) for style, p in prompts.items()})

    drawn, sample = trials.build_trials(clips, "demo", "test"), 20
    vectors = torch.from_numpy(speech)

    def theirs() -> None:
        for style, rows in drawn.table.items():
            queries = normalize(torch.from_numpy(prompts[style]), dim=-1)
            for row in rows[:sample]:
                candidates = normalize(vectors[torch.from_numpy(row).long()], dim=-1)
                (queries @ candidates.T).mean(dim=0).argsort(descending=True)

    fast, slow = in_turns(ours, theirs)
    slow *= 1000 / sample
    print(f"trials, 22 styles x 1000, drawn and scored: {fast:.2f} s; full cosine a trial, {sample} of 1000 timed: "
          f"{slow:.1f} s; ratio {slow / fast:.0f}", flush=True)  # fmt: skip


def train_once(name: str, folder: Path) -> None:
    """In a process of its own, so that its peak memory is its own."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    started = time.perf_counter()
    training.fit(manifests.load_corpora("ravdess+emodb"), folder / "run", cache=folder / "cache")
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20  # Linux
    print(f"training, RAVDESS + EmoDB, {name}: {time.perf_counter() - started:.1f} s, peak memory {peak:.2f} GiB "
          "(loading of manifests and kept frames included)", flush=True)  # fmt: skip


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    real = os.environ.get("ESR_DATA")
    embedding_speed(manifests.load_corpora("ravdess" if real else "demo"))
    trial_speed()
    if real:
        folder = runs.RUNS / "speed"
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("frames made", "frames kept"):
            process = multiprocessing.get_context("spawn").Process(target=train_once, args=(name, folder))
            process.start()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)
