"""Recordings cut into utterances: by hand-made probabilities, by any, and through files of every kind."""

from __future__ import annotations

import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st
from silero_vad.utils_vad import get_speech_timestamps_from_probs

from esr_utils import decoding, moments
from esr_utils.audio_files import AudioError
from esr_utils.manifests import load_corpora, to_cuts
from esr_utils.moments import Moment
from esr_utils.vad import MIN_SILENCE_S, MIN_SPEECH_S, PAD_S, SPEECH, WINDOW, SpeechProbability

RATE = 16_000
RULE = {
    "threshold": SPEECH,
    "min_silence_duration_ms": round(1000 * MIN_SILENCE_S),
    "min_speech_duration_ms": round(1000 * MIN_SPEECH_S),
    "speech_pad_ms": round(1000 * PAD_S),
}
PAD = 800  # samples kept on both sides of speech
NEAR = RATE // 2


def spans(probabilities: np.ndarray, size: int = 10**6, n_samples: int | None = None) -> list[tuple[int, int]]:
    """Utterances, in samples, of probabilities that come `size` windows at a time."""
    utterances, found = moments._Utterances(), []
    for at in range(0, len(probabilities), size):
        found += utterances.feed(probabilities[at : at + size])
    return found + utterances.finish(len(probabilities) * WINDOW if n_samples is None else n_samples)


def speech(*where: tuple[int, int], n: int) -> np.ndarray:
    """Probabilities of n windows: 0.9 from one window to another, else 0.1."""
    found = np.full(n, 0.1, np.float32)
    for first, last in where:
        found[first:last] = 0.9
    return found


def around(first: int, last: int) -> tuple[int, int]:
    """Speech from one window to another, with what is kept on both sides."""
    return first * WINDOW - PAD, last * WINDOW + PAD


# The rule, by hand. A window is 32 ms: 31.25 of them are 1 s, 312.5 are 10 s. --------------------------------


def test_utterances_between_pauses():
    assert spans(speech((10, 60), (100, 200), n=300)) == [around(10, 60), around(100, 200)]


def test_speech_to_the_last_sample():
    assert spans(speech((0, 100), n=100), n_samples=51_000) == [(0, 51_000)]


def test_nothing_of_nothing_and_of_silence():
    assert spans(np.zeros(0)) == spans(np.zeros(1000)) == []


@pytest.mark.parametrize("first", [True, False])
def test_a_short_one_is_joined_with_its_neighbour(first):
    where = [(10, 25), (35, 135)] if first else [(10, 110), (120, 135)]
    assert spans(speech(*where, n=200)) == [around(10, 135)]


def test_short_ones_are_joined_with_each_other():
    assert spans(speech((10, 25), (35, 50), (60, 75), n=200)) == [around(10, 75)]


def test_a_short_one_by_itself_is_dropped():
    """0.5 s away is near, more is not: 18 windows of silence less what is kept on both sides are 0.476 s."""
    assert spans(speech((10, 25), (100, 200), n=300)) == [around(100, 200)]
    assert spans(speech((10, 25), (43, 143), n=300)) == [around(10, 143)]
    assert spans(speech((10, 25), (44, 144), n=300)) == [around(44, 144)]


def test_none_is_joined_past_10_s():
    assert spans(speech((10, 300), (310, 325), n=400)) == [around(10, 300)]


def test_long_speech_is_cut_where_speech_is_least_probable():
    """20 s: pauses too short to end speech, at 3 s (too early), 6.4 s and 15.36 s, and weaker ones."""
    probabilities = speech((10, 635), n=700)
    for window, value in {100: 0.36, 210: 0.4, 280: 0.45, 490: 0.4, 560: 0.45}.items():
        probabilities[window - 1 : window + 2] = value
    cuts = [210 * WINDOW + WINDOW // 2, 490 * WINDOW + WINDOW // 2]
    start, end = around(10, 635)
    assert spans(probabilities) == [(start, cuts[0]), (cuts[0], cuts[1]), (cuts[1], end)]


@pytest.mark.parametrize("n", [310, 313, 320, 343, 346, 350, 630])
def test_speech_without_any_pause(n):
    found = spans(speech((10, 10 + n), n=n + 100))
    start, end = around(10, 10 + n)
    assert found[0][0] == start and found[-1][1] == end
    assert all(one[1] == other[0] for one, other in pairwise(found))
    assert all(RATE <= last - first <= 10 * RATE for first, last in found)


# The rule, of anything --------------------------------------------------------------------------------------


def walk(seed: int, n: int, step: float, up: float) -> np.ndarray:
    """Probabilities that wander; `up` moves them to speech or silence."""
    steps = np.random.default_rng(seed).normal(0, step, n)
    return np.clip(np.abs(np.cumsum(steps) % 2 - 1) + up, 0, 1).astype(np.float32)


walks = st.builds(
    walk, st.integers(0, 10**6), st.integers(0, 4000), st.floats(0.02, 0.4), st.sampled_from([-0.2, 0, 0.2, 0.45, 1])
)


@settings(max_examples=60, deadline=None)
@given(walks)
def test_utterances_of_any_probabilities(probabilities):
    """1 to 10 s, in order, apart; what the package's rule finds is within them unless it is short, and no more is."""
    found = spans(probabilities)
    assert all(RATE <= last - first <= 10 * RATE for first, last in found)
    assert all(one[1] <= other[0] for one, other in pairwise(found))
    n_samples = len(probabilities) * WINDOW
    parts = get_speech_timestamps_from_probs(probabilities.tolist(), audio_length_samples=n_samples, **RULE)
    kept = np.zeros(n_samples, bool)
    for first, last in found:
        kept[first:last] = True
    for part in parts:
        length, missing = part["end"] - part["start"], np.count_nonzero(~kept[part["start"] : part["end"]])
        if length >= RATE:
            assert missing == 0 if length <= 10 * RATE else missing < RATE
        kept[part["start"] : part["end"]] = False
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(int)))
    assert all(last - first <= NEAR for first, last in edges.reshape(-1, 2))  # silence within joined ones


@settings(max_examples=30, deadline=None)
@given(walks, st.integers(1, 400))
def test_it_does_not_matter_how_probabilities_come(probabilities, size):
    assert spans(probabilities, size) == spans(probabilities)


@settings(max_examples=30, deadline=None)
@given(walks)
def test_what_is_needed_is_kept_and_no_more_than_22_s(probabilities):
    """`needed` says which samples may be let go: never one of an utterance that is found later."""
    utterances, needed = moments._Utterances(), 0
    for i, probability in enumerate(probabilities, 1):
        assert all(first >= needed for first, _ in utterances.feed(np.array([probability])))
        assert needed <= utterances.needed <= i * WINDOW <= utterances.needed + 22 * RATE
        needed = utterances.needed
    assert all(first >= needed for first, _ in utterances.finish(len(probabilities) * WINDOW))


# Through files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recording() -> np.ndarray:
    """(S,) at 16 kHz: a minute of clips of the demo corpus, with pauses of 0 to 1.5 s."""
    rng = np.random.default_rng(0)
    parts = []
    for cut in to_cuts(load_corpora("demo").sample(22, random_state=0)):
        pause = np.zeros(int(rng.choice([0, 0.1, 0.3, 0.6, 1.5]) * RATE))
        parts += [soundfile.read(cut.recording.sources[0].source, dtype="float32")[0], pause]
    return np.concatenate(parts).astype(np.float32)


def slowly(samples: np.ndarray) -> list[tuple[float, float]]:
    """All at once: (S,) at 16 kHz to starts and ends in seconds."""
    probability = SpeechProbability()
    found = np.concatenate([probability.feed(samples), probability.finish()])
    return [(first / RATE, last / RATE) for first, last in spans(found, n_samples=len(samples))]


def times(found: list[Moment]) -> list[tuple[float, float]]:
    return [(moment.start_s, moment.end_s) for moment in found]


def test_a_recording_in_blocks_is_the_recording_at_once(tmp_path, recording, monkeypatch):
    path = tmp_path / "a.wav"
    soundfile.write(path, recording, RATE, subtype="FLOAT")
    found = list(moments.moments(path))
    assert times(found) == slowly(recording) and len(found) > 12
    for moment in found:
        assert (moment.file, moment.channel) == (path, None) and moment.waveform.dtype == np.float32
        first, last = round(moment.start_s * RATE), round(moment.end_s * RATE)
        np.testing.assert_array_equal(moment.waveform, recording[first:last])
        assert moment.waveform.base is None  # else it would hold on to the recording
    monkeypatch.setattr(decoding, "BLOCK_S", 1)
    assert times(list(moments.moments(path))) == times(found)


def test_other_rates_and_the_mean_of_the_channels(tmp_path, recording):
    wide = soxr.resample(recording, RATE, 44_100)
    soundfile.write(tmp_path / "a.wav", np.stack([wide * 1.5, wide * 0.5], 1), 44_100, subtype="FLOAT")
    found = list(moments.moments(tmp_path / "a.wav"))
    samples = soxr.resample(wide, 44_100, RATE)
    np.testing.assert_allclose(times(found), slowly(samples), atol=0.04)
    first = round(found[0].start_s * RATE)
    np.testing.assert_allclose(found[0].waveform, samples[first:][: len(found[0].waveform)], atol=1e-4)


@pytest.mark.parametrize("kind", ["flac", "ogg", "mp3", "m4a", "mp4"])
def test_every_kind_of_file_gives_the_same_moments(tmp_path, recording, kind):
    soundfile.write(tmp_path / "a.wav", recording, RATE)
    path = tmp_path / f"a.{kind}"
    if kind in ("m4a", "mp4"):
        convert(tmp_path / "a.wav", path)
    else:
        soundfile.write(path, recording, RATE)
    found, expected = times(list(moments.moments(path))), slowly(recording)
    near = [min(abs(start - s) + abs(end - e) for s, e in expected) < 0.15 for start, end in found]
    assert sum(near) >= 0.9 * len(expected) and len(found) <= len(expected) + 1  # lossy codecs move a few


def convert(source: Path, target: Path) -> None:
    try:
        program = decoding.find_ffmpeg()
    except decoding.NoFfmpegError:
        pytest.skip("needs ffmpeg, or the package imageio-ffmpeg")
    subprocess.run([program, "-v", "error", "-i", source, target], check=True, stdin=subprocess.DEVNULL)


def test_a_call_split_by_channel(tmp_path, recording):
    """One speaks while the other listens; each channel is as if it were a file of its own."""
    half = len(recording) // 2
    parties = np.zeros((len(recording), 2), np.float32)
    parties[:half, 0], parties[half:, 1] = recording[:half], recording[half:]
    soundfile.write(tmp_path / "call.wav", parties, RATE, subtype="FLOAT")
    found = list(moments.moments(tmp_path / "call.wav", "split"))
    for channel in (0, 1):
        own = [moment for moment in found if moment.channel == channel]
        assert times(own) == slowly(parties[:, channel]) and own
        for moment in own:
            first, last = round(moment.start_s * RATE), round(moment.end_s * RATE)
            np.testing.assert_array_equal(moment.waveform, parties[first:last, channel])
    assert {moment.channel for moment in moments.moments(tmp_path / "call.wav")} == {None}


def test_a_file_of_one_channel_has_nothing_to_split(tmp_path, recording):
    soundfile.write(tmp_path / "a.wav", recording[: 10 * RATE], RATE)
    assert {moment.channel for moment in moments.moments(tmp_path / "a.wav", "split")} == {None}


def test_they_come_before_the_file_has_been_read(tmp_path, recording, monkeypatch):
    """A minute is 6 blocks; the first moment needs the first alone."""
    soundfile.write(tmp_path / "a.wav", recording, RATE)
    read, decode = [], moments.decode
    monkeypatch.setattr(moments, "decode", lambda path: (read.append(block) or block for block in decode(path)))
    next(moments.moments(tmp_path / "a.wav"))
    assert len(read) == 1


@pytest.mark.parametrize("seconds", [60, 300])
@pytest.mark.parametrize("loud", [True, False])
def test_what_is_held_does_not_grow_with_the_recording(seconds, loud, monkeypatch):
    """Of speech without any pause, and of silence."""
    monkeypatch.setattr(
        SpeechProbability, "feed", lambda self, samples: np.full(len(samples) // WINDOW, float(loud), np.float32)
    )
    track, held = moments._Track(Path("a.wav"), RATE, None), []
    for _ in range(seconds):
        list(track.feed(np.zeros(RATE // WINDOW * WINDOW, np.float32)))
        held.append(len(track._held) / RATE)
    assert max(held) < 22 and len(track._utterances._probabilities) < 22 * RATE / WINDOW


def test_silence_has_no_moments(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(5 * RATE), RATE)
    assert list(moments.moments(tmp_path / "a.wav")) == []


@pytest.mark.parametrize("samples", [1, 100, RATE // 2])
def test_files_shorter_than_a_moment(tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", np.full(samples, 0.1), 8000)
    assert list(moments.moments(tmp_path / "a.wav")) == []


def test_a_file_that_breaks_gives_what_came_before_and_then_the_reason(tmp_path, recording):
    path = tmp_path / "a.wav"
    soundfile.write(path, recording, RATE, subtype="FLOAT")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    found = []
    with pytest.raises(AudioError, match="is cut short"):
        found.extend(moments.moments(path))
    there = (len(content) // 2 - content.find(b"data") - 8) // 4
    assert times(found) == slowly(recording[:there]) and len(found) > 5


def test_a_file_that_cannot_be_used_at_all(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(AudioError, match="is empty"):
        list(moments.moments(tmp_path / "a.wav"))


def test_unknown_channels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="known are mix and split"):
        list(moments.moments(tmp_path / "a.wav", "left"))
