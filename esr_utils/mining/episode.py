"""An "episode" whose truth is known: clips of several speakers in turn, with music-like noise under them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from numpy.typing import NDArray

from esr_utils.batches import load_waveform
from esr_utils.config import SAMPLE_RATE
from esr_utils.manifests import load_corpora, to_cuts
from esr_utils.mining.annotation import STYLE_OF
from esr_utils.mining.speakers import purity
from esr_utils.runs import atomic_path

SPEECH_DB = -26.0  # dBFS: every clip is brought to this level
GAP_S = (0.4, 1.2)  # seconds of noise alone between two clips
_CHORDS = ((220.0, 277.2, 329.6), (196.0, 246.9, 293.7), (174.6, 220.0, 261.6), (164.8, 207.7, 246.9))  # Hz
_CHORD_S = 2.0


def music(samples: int, level_db: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """(samples,) at 16 kHz: chords of three tones with overtones that change every 2 s, over pink noise; dBFS."""
    time = np.arange(samples) / SAMPLE_RATE
    chord = (time // _CHORD_S).astype(int)
    order = rng.integers(len(_CHORDS), size=chord.max(initial=0) + 1)
    tones = np.zeros(samples)
    for voice in range(3):
        pitch = np.array([_CHORDS[i][voice] for i in order])[chord]
        phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
        tones += sum(np.sin(k * phase) / k for k in (1, 2, 3))
    tones *= np.exp(-(time % _CHORD_S))
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    pink = np.fft.irfft(spectrum / np.sqrt(np.arange(len(spectrum)) + 1), samples)
    return _at_level(_at_level(tones, 0.0) + 0.5 * _at_level(pink, 0.0), level_db)


def _at_level(sound: NDArray, level_db: float) -> NDArray[np.float32]:
    level = np.sqrt(np.mean(sound**2))
    return (sound * (10 ** (level_db / 20) / level if level else 0.0)).astype(np.float32)


def build_episode(clips: pd.DataFrame, path: Path, noise_db: float = -25.0, seed: int = 0) -> pd.DataFrame:
    """Writes the clips one after the other as one WAV at 16 kHz.

    Args:
        clips: rows of `manifests.load_corpora`, in the order in which they are heard.
        noise_db: level of the noise relative to the speech.

    Returns:
        The truth, a row a clip: start_s and end_s in the episode (of the clip, its own silence included), speaker,
        utterance_id.
    """
    rng, parts, rows, at = np.random.default_rng(seed), [], [], 0
    cuts = to_cuts(clips)
    for cut, speaker in zip(cuts, clips["speaker"], strict=True):
        gap = np.zeros(round(rng.uniform(*GAP_S) * SAMPLE_RATE), np.float32)
        clip = _at_level(load_waveform(cut).numpy(), SPEECH_DB)
        start, at = at + len(gap), at + len(gap) + len(clip)
        parts += [gap, clip]
        rows.append((start / SAMPLE_RATE, at / SAMPLE_RATE, speaker, cut.custom["utterance_id"]))
    speech = np.concatenate([*parts, np.zeros(SAMPLE_RATE // 2)])
    episode = np.clip(speech + music(len(speech), SPEECH_DB + noise_db, rng), -1, 1)
    with atomic_path(path) as temporary:
        soundfile.write(temporary, episode, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return pd.DataFrame(rows, columns=["start_s", "end_s", "speaker", "utterance_id"])


def truth_of(clips: pd.DataFrame, truth: pd.DataFrame) -> list[str]:
    """The true speaker of each found clip (start_s, end_s): who speaks in most of it; "" where nobody does."""
    names = []
    for clip in clips.itertuples():
        shared = truth["end_s"].clip(upper=clip.end_s) - truth["start_s"].clip(lower=clip.start_s)
        names.append(truth["speaker"][shared.idxmax()] if (shared > 0).any() else "")
    return names


def demo_episode(
    folder: Path, voices: list[str], noise_db: float = -25.0, seed: int = 0, clips_each: int = 7
) -> tuple[Path, pd.DataFrame]:
    """An episode of the demo corpus's voices, in the styles that SenseVoice knows; made once for each of its settings.

    Returns:
        The WAV, and the truth as of `build_episode`.

    Raises:
        ValueError: the demo corpus has no such voice.
    """
    corpus = load_corpora("demo")
    known = sorted(corpus["speaker"].unique())
    if unknown := sorted(set(voices) - set(known)):
        raise ValueError(f"the demo corpus has no voice {', '.join(unknown)}; it has {', '.join(known)}")
    rows = corpus[corpus["speaker"].isin(voices) & corpus["style"].isin(STYLE_OF.values())]
    rows = rows.groupby("speaker").sample(clips_each, random_state=seed).sample(frac=1, random_state=seed)
    path = folder / f"episode-{'-'.join(sorted(voices))}-{noise_db:g}dB-seed{seed}.wav"
    if path.is_file() and path.with_suffix(".csv").is_file():
        return path, pd.read_csv(path.with_suffix(".csv"))
    truth = build_episode(rows.reset_index(drop=True), path, noise_db, seed)
    with atomic_path(path.with_suffix(".csv")) as temporary:
        truth.to_csv(temporary, index=False)
    return path, truth


def score(clips: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """How well the clips of one episode are cut and named, all of them and those that are kept.

    Returns:
        `found`: the share of the true clips that some clip overlaps; `purity`: the share of clips that belong to the
        speaker whom most clips of the same name belong to; how many speakers were named, and how many there are.
    """
    rows = {}
    for name, part in (("all clips", clips), ("clips that are kept", clips[clips["left_out"] == ""])):
        names = truth_of(part, truth)
        hit = [((part["start_s"] < row.end_s) & (part["end_s"] > row.start_s)).any() for row in truth.itertuples()]
        rows[name] = {
            "clips": len(part),
            "found": float(np.mean(hit)),
            "purity": purity(part["speaker"], names),
            "speakers named": part["speaker"].nunique(),
            "true speakers": truth["speaker"].nunique(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")
