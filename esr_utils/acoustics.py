"""Loudness, pitch, energy and tempo of clips, measured: the cues that a retriever must do better than."""

from __future__ import annotations

from pathlib import Path

import librosa
import numpy as np
import pandas as pd
from lhotse import CutSet
from lhotse.cut import Cut
from numpy.typing import NDArray
from tqdm.auto import tqdm

from esr_utils.audio_files import ContentNames
from esr_utils.batches import BadAudio, load_waveform, utterance_id
from esr_utils.config import SAMPLE_RATE
from esr_utils.runs import read_json, write_json

LOUDNESS = ("rms_dbfs", "peak_dbfs")
PROSODY = ("pitch_st", "pitch_spread_st", "pitch_range_st", "energy_db", "energy_spread_db", "tempo_hz", "voiced_share")
SPEECH = ("f0_hz", "periodic_share", "rate_hz")

_HOP, _FRAME = 320, 1024  # samples: 20 ms, 64 ms
_MEASURES = (*LOUDNESS, *PROSODY, *SPEECH)
_PITCH_HZ = (65.0, 600.0)
_FORMAT = 1  # part of the name of what is kept: raise it when a measure changes
_PERIODIC = 0.6  # correlation of a frame with itself a period later, from which it is voice: noise stays below 0.4
_LONGEST_S = 30.0  # only the start of a longer clip is measured


def measure(cuts: CutSet, cache: Path | None = None) -> pd.DataFrame:
    """One row per usable clip, indexed by utterance_id, columns LOUDNESS, PROSODY and SPEECH, of the audio as recorded.

    Args:
        cache: folder where a clip's measures are kept, one JSON file each, under a name made from the audio's content;
            interrupted, it goes on where it was. None keeps nothing.
    Returns:
        `.attrs["skipped"]` is {utterance_id: why its audio cannot be used}.
    """
    rows, skipped, names = {}, {}, ContentNames()
    for cut in tqdm(cuts, desc="acoustics", unit="clip", leave=False):
        cut = cut.truncate(duration=min(cut.duration, _LONGEST_S))
        try:
            rows[utterance_id(cut)] = _measure_one(cut, names, cache)
        except BadAudio as error:  # named where the clips are embedded, too
            skipped[utterance_id(cut)] = str(error)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(_MEASURES))
    table.attrs["skipped"] = skipped
    return table


def _measure_one(cut: Cut, names: ContentNames, cache: Path | None) -> dict[str, float]:
    if cache is None or not all(Path(source.source).is_file() for source in cut.recording.sources):
        return measure_waveform(load_waveform(cut, "recorded").numpy())
    name = names.name(cut)
    file = cache / f"acoustics-{_FORMAT}" / name[:2] / f"{name}.json"
    try:
        kept = read_json(file)
        if isinstance(kept, dict) and set(kept) == set(_MEASURES):
            return kept
    except (OSError, ValueError):
        pass  # not there, or not whole: measured anew
    measures = measure_waveform(load_waveform(cut, "recorded").numpy())
    write_json(file, measures)
    return measures


def measure_waveform(waveform: NDArray[np.float32]) -> dict[str, float]:
    """Measures (S,) samples at 16 kHz.

    Returns `rms_dbfs`, `peak_dbfs`; pitch in semitones re 55 Hz (YIN, voiced frames): median, standard deviation,
    5–95 % range; energy of the frames in dB: mean, standard deviation; `tempo_hz`, energy peaks (about syllables) a
    second; `voiced_share` of the frames, by their energy and how slowly YIN's answer moves, which noise has too. And of
    the frames among these that are periodic, as noise and whispers are not: the median pitch `f0_hz`, 0 if there are
    none, and `periodic_share` of all frames. `rate_hz`: energy peaks a second between the first and the last frame
    within 30 dB of the loudest: without the silence around the speech, unlike `tempo_hz`.
    """
    waveform = np.pad(waveform, (0, max(0, 2 * _FRAME - len(waveform))))
    energy = 20 * np.log10(librosa.feature.rms(y=waveform, frame_length=_FRAME, hop_length=_HOP)[0] + 1e-7)
    pitch = librosa.yin(
        waveform, fmin=_PITCH_HZ[0], fmax=_PITCH_HZ[1], sr=SAMPLE_RATE, frame_length=_FRAME, hop_length=_HOP
    )
    frames = min(len(energy), len(pitch))
    f0_hz, periodic = pitch[:frames], _periodicity(waveform, pitch)[:frames] >= _PERIODIC
    energy, pitch = energy[:frames], 12 * np.log2(pitch[:frames] / 55.0)
    steady = np.abs(np.diff(pitch, prepend=pitch[0])) < 1.5  # YIN always answers; only a voiced pitch moves slowly
    voiced = steady & (energy > energy.max() - 30)
    periodic &= voiced
    pitch = pitch[voiced] if voiced.any() else np.zeros(1)
    smooth = np.convolve(energy, np.hanning(7) / np.hanning(7).sum(), mode="same")
    peaks = (smooth[1:-1] > smooth[:-2]) & (smooth[1:-1] >= smooth[2:]) & (smooth[1:-1] > smooth.max() - 25)
    loud, active = energy[energy > energy.max() - 40], np.flatnonzero(energy > energy.max() - 30)
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
        "f0_hz": float(np.median(f0_hz[periodic])) if periodic.any() else 0.0,
        "periodic_share": float(periodic.mean()),
        "rate_hz": float(peaks.sum() / ((active[-1] - active[0] + 1) * _HOP / SAMPLE_RATE)),
    }


def _periodicity(waveform: NDArray[np.float32], pitch_hz: NDArray[np.floating]) -> NDArray[np.floating]:
    """(T,) correlation of each of YIN's frames with itself, a period of `pitch_hz` (T,) later."""
    windows = librosa.util.frame(np.pad(waveform, _FRAME // 2), frame_length=_FRAME, hop_length=_HOP, axis=0)
    windows, lag = windows[: len(pitch_hz)], np.round(SAMPLE_RATE / pitch_hz).astype(int)
    windows = windows - windows.mean(axis=1, keepdims=True)
    rows, lag = np.arange(len(windows)), lag[: len(windows)]
    spectrum = np.fft.rfft(windows, 2 * _FRAME)
    shared = np.fft.irfft(np.abs(spectrum) ** 2)[rows, lag]
    power = np.cumsum(np.square(windows), axis=1)
    first, second = power[rows, _FRAME - 1 - lag], power[:, -1] - power[rows, lag - 1]
    return shared / np.sqrt(np.maximum(first * second, 1e-20))
