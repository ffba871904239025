"""What voice activity keeps of speech, and of what is none: python benchmarks/voice_activity.py [folder of sounds]

    lost     clips that make no moment, which lasts a second at least
    kept     share of the time from a clip's first frame of 32 ms that is at most 35 dB below its loudest, to its last
    room     s kept of an hour of what comes before that, or after, over 0.1 s away: room, and breath
    sounds   s kept of an hour of the folder's files, which should hold no speech: noise, music

by the threshold of silero-vad's package, and by ours, for each clip by itself. Clips are of RAVDESS, EmoDB and nEMO in
$ESR_DATA, as recorded and 20 dB quieter, and whispers of the demo corpus, which are synthetic. In brackets the 95 %
bootstrap interval over speakers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from esr_utils import decoding, intervals, manifests, moments, vad
from esr_utils.batches import load_waveform, utterance_id
from esr_utils.config import SAMPLE_RATE

THRESHOLDS = {"package": (0.5, 0.35), "here": (vad.SPEECH, vad.SILENCE)}
CORPORA = ("ravdess", "emodb", "nemo") if os.environ.get("ESR_DATA") else ()
BELOW_DB, MARGIN, SILENT = 35, 1600, 1e-12


def spans(probabilities: np.ndarray, n_samples: int, threshold: tuple[float, float]) -> tuple[list, list]:
    """Of speech, and of the moments made of it."""
    vad.SPEECH, vad.SILENCE = threshold
    rule, utterances = vad.SpeechSegments(), moments._Utterances()
    found = [rule.step(float(p)) for p in probabilities] + [rule.finish(n_samples)]
    return [span for span in found if span], utterances.feed(probabilities) + utterances.finish(n_samples)


def within(found: list[tuple[int, int]], start: int, end: int) -> int:
    return sum(max(0, min(last, end) - max(first, start)) for first, last in found)


def heard(samples: np.ndarray) -> dict[str, float]:
    """Of one clip (S,), by each threshold."""
    stream = vad.SpeechProbability()
    probabilities = np.concatenate([stream.feed(samples), stream.finish()])
    frames = samples[: len(samples) // vad.WINDOW * vad.WINDOW].reshape(-1, vad.WINDOW)
    level = 10 * np.log10((frames.astype(np.float64) ** 2).mean(1) + SILENT)
    loud = np.flatnonzero(level > level.max() - BELOW_DB)
    start, end = loud[0] * vad.WINDOW, (loud[-1] + 1) * vad.WINDOW
    quiet = [(0, max(0, start - MARGIN)), (min(len(samples), end + MARGIN), len(samples))]
    row: dict[str, float] = {"s": len(samples), "quiet_s": sum(last - first for first, last in quiet)}
    for name, threshold in THRESHOLDS.items():
        found, made = spans(probabilities, len(samples), threshold)
        row |= {f"lost {name}": not made, f"kept {name}": within(found, start, end) / (end - start)}
        row |= {f"room {name}": sum(within(found, *part) for part in quiet)}
        row |= {f"all {name}": within(found, 0, len(samples))}
    return row


def shown(rows: pd.DataFrame, column: str) -> str:
    """Mean and interval of a column of each clip; of "more" it is what ours keeps more than the package."""
    more = column == "more"
    values = (rows["kept here"] - rows["kept package"] if more else rows[column]).to_numpy(float)
    weights, _ = intervals.speaker_bootstrap_weights(rows["speaker"], 1000, np.random.default_rng(0))
    found = weights @ values / weights.sum(1)
    whole = intervals.interval(found, values.mean(), (-1, 1)) if more else None
    low, high = whole or intervals.interval_of_few(found, values.mean(), len(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def speech(corpus: str, styles: list[str] | None, gain_db: float) -> None:
    clips = manifests.load_corpora(corpus)
    clips = clips[clips["style"].isin(styles)] if styles else clips
    speakers = clips.set_index("utterance_id")["speaker"]
    rows = []
    for cut in tqdm(manifests.to_cuts(clips), desc=corpus, leave=False):
        samples = load_waveform(cut, "recorded").numpy() * np.float32(10 ** (gain_db / 20))
        rows.append(heard(samples) | {"speaker": speakers[utterance_id(cut)]})
    rows = pd.DataFrame(rows)
    quiet_h = rows["quiet_s"].sum() / SAMPLE_RATE / 3600
    print(f"{corpus}{' ' + ', '.join(styles) if styles else ''}{f', {gain_db:g} dB' if gain_db else ''}: "
          f"{len(rows)} clips, {rows['speaker'].nunique()} speakers, {quiet_h:.2f} h of room")  # fmt: skip
    for name, threshold in THRESHOLDS.items():
        room = f", room {rows[f'room {name}'].sum() / SAMPLE_RATE / quiet_h:.0f} s/h" if quiet_h > 0.1 else ""
        print(
            f"  {threshold[0]:g} ({name}): lost {shown(rows, f'lost {name}')}, kept {shown(rows, f'kept {name}')}{room}"
        )
    print(f"  kept more by ours: {shown(rows, 'more')}", flush=True)


def sounds(folder: Path) -> None:
    rows = []
    for path in tqdm(sorted(folder.rglob("*")), leave=False):
        if path.suffix in (".wav", ".ogg", ".oga", ".flac") and path.is_file():
            resample, blocks = None, []
            for block, rate in decoding.decode(path):
                resample = resample or decoding.Resampler(rate, SAMPLE_RATE)
                blocks.append(resample(block.mean(axis=1)))
            samples = np.concatenate([*blocks, resample(np.zeros(0, np.float32), last=True)])
            if len(samples) > vad.WINDOW:
                rows.append(heard(samples))
    rows = pd.DataFrame(rows)
    print(f"{folder.name}: {len(rows)} files, {rows['s'].sum() / SAMPLE_RATE:.0f} s: kept " + ", ".join(
        f"{3600 * rows[f'all {name}'].sum() / rows['s'].sum():.0f} s/h at {threshold[0]:g}"
        for name, threshold in THRESHOLDS.items()), flush=True)  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)  # the network is small
    for corpus, styles in (("demo", ["whispered"]), *((corpus, None) for corpus in CORPORA)):
        for gain_db in (0, -20):
            speech(corpus, styles, gain_db)
    for folder in sys.argv[1:]:
        sounds(Path(folder))
