"""What is measured is what is there: tones of known pitch, level and rhythm."""

import numpy as np
import pandas as pd
import pytest

from esr_utils import acoustics
from esr_utils.acoustics import LOUDNESS, PROSODY, SPEECH, measure, measure_waveform
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
    assert list(found.columns) == [*LOUDNESS, *PROSODY, *SPEECH] and not found.attrs["skipped"]
    assert np.isfinite(found.to_numpy()).all()
    pitch = found["pitch_st"].groupby(clips["gender"].to_numpy()).median()
    assert pitch["female"] > pitch["male"] + 2


def test_noise_and_a_30_ms_clip_have_numbers_too():
    noise = np.random.default_rng(0).normal(size=480).astype(np.float32)
    assert np.isfinite(list(measure_waveform(noise).values())).all()


def test_only_what_is_periodic_is_voice():
    rng = np.random.default_rng(1)
    noise = 0.1 * rng.normal(size=2 * RATE).astype(np.float32)
    assert measure_waveform(noise)["f0_hz"] == 0 and measure_waveform(noise)["periodic_share"] == 0
    half = np.concatenate([voice(180.0, 1.0), noise[:RATE]])
    found = measure_waveform(half)
    assert found["f0_hz"] == pytest.approx(180, rel=0.02) and 0.4 < found["periodic_share"] < 0.6


def test_the_rate_leaves_the_silence_around_out():
    t = np.arange(2 * RATE) / RATE
    beats = voice(150, 2.0) * (0.02 + (np.sin(2 * np.pi * 4 * t) > 0)).astype(np.float32)
    padded = np.concatenate([np.zeros(RATE, np.float32), beats, np.zeros(RATE, np.float32)])
    assert measure_waveform(padded)["rate_hz"] == pytest.approx(measure_waveform(beats)["rate_hz"], rel=0.1)
    assert measure_waveform(padded)["tempo_hz"] < 0.65 * measure_waveform(beats)["tempo_hz"]


def test_measures_are_kept_by_content(tmp_path, monkeypatch):
    clips = load_corpora("demo").head(3)
    first = measure(to_cuts(clips), tmp_path)
    files = sorted(tmp_path.rglob("*.json"))
    assert len(files) == 3
    files[0].write_text('{"f0_hz": 1')  # cut short: measured anew
    calls = []
    monkeypatch.setattr(acoustics, "measure_waveform", lambda wave: calls.append(1) or measure_waveform(wave))
    again = measure(to_cuts(clips), tmp_path)
    pd.testing.assert_frame_equal(first, again)
    assert len(calls) == 1
    assert measure(to_cuts(clips), tmp_path).equals(first) and len(calls) == 1
