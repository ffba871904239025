"""What is measured is what is there: tones of known pitch, level and rhythm."""

import numpy as np
import pytest

from esr_utils.acoustics import LOUDNESS, PROSODY, VOICED, measure, measure_waveform
from esr_utils.manifests import load_corpora, to_cuts

RATE = 16_000


def voice(pitch_hz, seconds=2.0, amplitude=0.1):
    """Ten harmonics, falling by 6 dB an octave."""
    t = np.arange(int(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * pitch_hz * k * t) / k for k in range(1, 11))
    return (amplitude * wave / np.abs(wave).max()).astype(np.float32)


@pytest.mark.parametrize("pitch_hz", [110.0, 220.0, 330.0])
def test_pitch_of_a_steady_voice(pitch_hz):
    found = measure_waveform(voice(pitch_hz))
    assert found["pitch_st"] == pytest.approx(12 * np.log2(pitch_hz / 55), abs=0.2)
    assert found["pitch_range_st"] < 0.5 and found["voiced_share"] > 0.9


def test_twice_the_amplitude_is_6_db_more_and_the_same_pitch():
    quiet, loud = measure_waveform(voice(200)), measure_waveform(2 * voice(200))
    for name in (*LOUDNESS, "energy_db"):
        assert loud[name] - quiet[name] == pytest.approx(6.02, abs=0.05)
    assert loud["pitch_st"] == pytest.approx(quiet["pitch_st"], abs=0.05)


@pytest.mark.parametrize("rate_hz", [2.0, 4.0])
def test_tempo_counts_the_beats(rate_hz):
    t = np.arange(4 * RATE) / RATE
    beats = (0.02 + (np.sin(2 * np.pi * rate_hz * t) > 0)).astype(np.float32)
    assert measure_waveform(voice(150, 4.0) * beats)["tempo_hz"] == pytest.approx(rate_hz, abs=0.6)


def test_every_usable_clip_has_every_measure_and_women_speak_higher():
    clips = load_corpora("demo")
    clips = clips[clips["style"] == "neutral"]
    found = measure(to_cuts(clips))
    assert list(found.index) == list(clips["utterance_id"])
    assert list(found.columns) == [*LOUDNESS, *PROSODY, *VOICED] and not found.attrs["skipped"]
    assert np.isfinite(found.to_numpy()).all()
    pitch = found["pitch_st"].groupby(clips["gender"].to_numpy()).median()
    assert pitch["female"] > pitch["male"] + 2


def test_noise_and_a_30_ms_clip_have_numbers_too():
    noise = np.random.default_rng(0).normal(size=480).astype(np.float32)
    assert np.isfinite(list(measure_waveform(noise).values())).all()
