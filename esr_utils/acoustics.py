"""Loudness, pitch, energy and tempo of clips, measured: the cues that a retriever must do better than."""

from __future__ import annotations

import librosa
import numpy as np
import pandas as pd
from lhotse import CutSet
from numpy.typing import NDArray
from tqdm.auto import tqdm

from esr_utils.batches import BadAudio, load_waveform, utterance_id
from esr_utils.config import SAMPLE_RATE

LOUDNESS = ("rms_dbfs", "peak_dbfs")
PROSODY = ("pitch_st", "pitch_spread_st", "pitch_range_st", "energy_db", "energy_spread_db", "tempo_hz", "voiced_share")

_HOP, _FRAME = 320, 1024  # samples: 20 ms, 64 ms
_PITCH_HZ = (65.0, 600.0)
_LONGEST_S = 30.0  # only the start of a longer clip is measured


def measure(cuts: CutSet) -> pd.DataFrame:
    """One row per usable clip, indexed by utterance_id, columns LOUDNESS and PROSODY, of the audio as recorded."""
    rows = {}
    for cut in tqdm(cuts, desc="acoustics", unit="clip", leave=False):
        cut = cut.truncate(duration=min(cut.duration, _LONGEST_S))
        try:
            rows[utterance_id(cut)] = measure_waveform(load_waveform(cut, "recorded").numpy())
        except BadAudio:
            continue  # named where the clips are embedded
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*LOUDNESS, *PROSODY])


def measure_waveform(waveform: NDArray[np.float32]) -> dict[str, float]:
    """Measures (S,) samples at 16 kHz.

    Returns `rms_dbfs`, `peak_dbfs`; pitch in semitones re 55 Hz (YIN, voiced frames): median, standard deviation,
    5–95 % range; energy of the frames in dB: mean, standard deviation; `tempo_hz`, energy peaks (about syllables) a
    second; `voiced_share` of the frames.
    """
    waveform = np.pad(waveform, (0, max(0, 2 * _FRAME - len(waveform))))
    energy = 20 * np.log10(librosa.feature.rms(y=waveform, frame_length=_FRAME, hop_length=_HOP)[0] + 1e-7)
    pitch = librosa.yin(
        waveform, fmin=_PITCH_HZ[0], fmax=_PITCH_HZ[1], sr=SAMPLE_RATE, frame_length=_FRAME, hop_length=_HOP
    )
    frames = min(len(energy), len(pitch))
    energy, pitch = energy[:frames], 12 * np.log2(pitch[:frames] / 55.0)
    steady = np.abs(np.diff(pitch, prepend=pitch[0])) < 1.5  # YIN always answers; only a voiced pitch moves slowly
    voiced = steady & (energy > energy.max() - 30)
    pitch = pitch[voiced] if voiced.any() else np.zeros(1)
    smooth = np.convolve(energy, np.hanning(7) / np.hanning(7).sum(), mode="same")
    peaks = (smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:]) & (smooth[1:-1] > smooth.max() - 25)
    loud = energy[energy > energy.max() - 40]
    return {
        "rms_dbfs": float(10 * np.log10(np.mean(np.square(waveform)) + 1e-12)),
        "peak_dbfs": float(20 * np.log10(np.abs(waveform).max() + 1e-7)),
        "pitch_st": float(np.median(pitch)),
        "pitch_spread_st": float(pitch.std()),
        "pitch_range_st": float(np.subtract(*np.percentile(pitch, [95, 5]))),
        "energy_db": float(loud.mean()),
        "energy_spread_db": float(loud.std()),
        "tempo_hz": float(peaks.sum() / (frames * _HOP / SAMPLE_RATE)),
        "voiced_share": float(voiced.mean()),
    }
