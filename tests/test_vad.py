"""Voice activity in blocks is silero-vad's own on the whole recording."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import silero_vad
import soundfile
import torch
from silero_vad.utils_vad import get_speech_timestamps_from_probs

from esr_utils import vad, weights
from esr_utils.manifests import load_corpora, to_cuts

RATE = 16_000
RULE = {"threshold": 0.3, "min_silence_duration_ms": 200, "min_speech_duration_ms": 250, "speech_pad_ms": 50}


def recording(pauses: list[float]) -> np.ndarray:
    """Clips of the demo corpus with silences in between, in seconds."""
    clips = load_corpora("demo").sample(len(pauses), random_state=0)
    root = [soundfile.read(path, dtype="float32") for path in audio_paths(clips)]
    assert {rate for _, rate in root} == {RATE}
    noise = np.random.default_rng(0).normal(0, 1e-4, (len(pauses), 3 * RATE)).astype(np.float32)
    parts = [np.concatenate([n[: round(p * RATE)], w]) for (w, _), p, n in zip(root, pauses, noise, strict=True)]
    return np.concatenate(parts)


def audio_paths(clips) -> list[str]:
    return [source.source for cut in to_cuts(clips) for source in cut.recording.sources]


@pytest.fixture(scope="module")
def speech() -> np.ndarray:
    return recording([0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 0.3, 0.05, 0.0, 1.5])


def package_probabilities(samples: np.ndarray) -> np.ndarray:
    model = silero_vad.load_silero_vad()
    padded = np.pad(samples, (0, -len(samples) % 512))
    with torch.inference_mode():
        return np.array([model(torch.from_numpy(w), RATE).item() for w in padded.reshape(-1, 512)])


@pytest.mark.parametrize("size", [1, 511, 512, 513, 5000, 300_000, 10**9])
def test_probabilities_in_blocks_are_the_packages_own(speech, size):
    """Window after window, through its own model."""
    samples = speech[: 3000 if size == 1 else None]
    stream = vad.SpeechProbability()
    found = [stream.feed(samples[at : at + size]) for at in range(0, len(samples), size)] + [stream.finish()]
    np.testing.assert_allclose(np.concatenate(found), package_probabilities(samples), atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 512, 1024])
def test_the_last_window_is_filled_up(length):
    stream = vad.SpeechProbability()
    assert len(stream.feed(np.zeros(length, np.float32))) + len(stream.finish()) == -(-length // 512)
    assert len(stream.finish()) == 0


def segments(probabilities: np.ndarray, n_samples: int) -> list[tuple[int, int]]:
    rule = vad.SpeechSegments()
    found = [rule.step(p) for p in probabilities.tolist()] + [rule.finish(n_samples)]
    return [segment for segment in found if segment]


def test_segments_of_real_speech_are_the_packages_own(speech):
    expected = silero_vad.get_speech_timestamps(torch.from_numpy(speech), silero_vad.load_silero_vad(), **RULE)
    stream = vad.SpeechProbability()
    blocks = [stream.feed(block) for block in np.array_split(speech, 7)] + [stream.finish()]
    found = segments(np.concatenate(blocks), len(speech))
    assert found == [(part["start"], part["end"]) for part in expected] and len(found) >= 5


@pytest.mark.parametrize("seed", range(40))
def test_segments_of_any_probabilities_are_the_packages_own(seed):
    """Walks that stay near the thresholds, of 0 to 400 windows; the last window is not always full."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 400))
    walk = np.clip(np.cumsum(rng.normal(0, rng.uniform(0.03, 0.3), n)) % 2 - 1, -1, 1)
    probabilities = np.abs(walk)
    n_samples = max(0, n * 512 - int(rng.integers(512)))
    expected = get_speech_timestamps_from_probs(probabilities.tolist(), audio_length_samples=n_samples, **RULE)
    assert segments(probabilities, n_samples) == [(part["start"], part["end"]) for part in expected]


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_whispers_are_kept(gain):
    """The demo corpus's, which are synthetic. The package's threshold loses a sixth of them."""
    clips, lost = load_corpora("demo").query("style == 'whispered'"), 0
    for path in audio_paths(clips):
        samples = soundfile.read(path, dtype="float32")[0] * np.float32(gain)
        stream = vad.SpeechProbability()
        lost += not segments(np.concatenate([stream.feed(samples), stream.finish()]), len(samples))
    assert len(clips) == 40 and lost <= (2 if gain == 1 else 9)


def test_the_thread_count_is_left_alone(monkeypatch):
    """The first import of silero-vad sets it to 1."""
    for name in [name for name in sys.modules if name.split(".")[0] == "silero_vad"]:
        monkeypatch.delitem(sys.modules, name)
    vad.load_silero.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        vad.load_silero()
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    def missing(name: str) -> str:
        raise vad.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vad.metadata, "version", missing)
    vad.load_silero.cache_clear()
    with pytest.raises(weights.WeightsError, match="needs silero-vad.*pip install"):
        vad.load_silero()
