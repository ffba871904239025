"""Clips to batches: files handled or refused by name, levels, windows of long clips, crops, epochs."""

from __future__ import annotations

import math
import os
import tracemalloc
import wave
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording

from esr_utils import batches
from esr_utils.batches import BadAudio, WaveformClips, load_waveform, ordered_batches, pieces
from esr_utils.manifest_schema import COLUMNS
from esr_utils.manifests import to_cuts, validate

RATE = 16_000


def tone(hz: float, seconds: float, rate: int = RATE, amplitude: float = 0.2) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype("float32")


def cuts_of(*files: Path, **cells: object) -> CutSet:
    """Cuts of whole files, by the manifest's own way; the utterance's id is mine/<name of the file>."""
    rows = [
        dict.fromkeys(COLUMNS, "")
        | {"utterance_id": f"mine/{file.stem}", "path": file.name, "corpus": "mine", "split": "train"}
        | {"duration_s": soundfile.info(file).duration}
        | cells
        for file in files
    ]
    return to_cuts(validate(pd.DataFrame(rows, dtype=object), files[0].parent), files[0].parent)


@pytest.fixture
def clip(tmp_path):
    """Writes samples to a file, and gives the one cut of it."""

    def write(samples: np.ndarray, rate: int = RATE, name: str = "clip.wav", subtype: str = "FLOAT", **cells):
        kind = {} if name.endswith(".flac") else {"subtype": subtype}
        soundfile.write(tmp_path / name, samples, rate, **kind)
        return cuts_of(tmp_path / name, **cells)[0]

    return write


def strongest_hz(waveform: torch.Tensor) -> float:
    spectrum = np.abs(np.fft.rfft(waveform.numpy() * np.hanning(len(waveform))))
    return float(spectrum.argmax() * RATE / len(waveform))


def dbfs(waveform: torch.Tensor) -> float:
    return 10 * math.log10(float(waveform.double().square().mean()))


# One clip ---------------------------------------------------------------------------------------------------


def test_16_khz_mono_is_given_as_it_lies(clip):
    samples = tone(440, 1.0)
    found = load_waveform(clip(samples), "recorded")
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), samples)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100])
def test_other_rates_become_16_khz(clip, rate):
    found = load_waveform(clip(tone(440, 2.0, rate), rate), "recorded")
    assert len(found) == 32_000
    assert strongest_hz(found) == pytest.approx(440, abs=1)
    assert dbfs(found[1000:-1000]) == pytest.approx(20 * math.log10(0.2 / math.sqrt(2)), abs=0.1)


def test_48_khz_stereo_becomes_the_mean_of_both_channels(clip):
    both = np.stack([tone(500, 1.0, 48_000), tone(1500, 1.0, 48_000)], axis=1)
    found = load_waveform(clip(both, 48_000), "recorded")
    expected = (tone(500, 1.0) + tone(1500, 1.0)) / 2
    assert found.shape == (RATE,)
    np.testing.assert_allclose(found.numpy()[500:-500], expected[500:-500], atol=2e-3)


def test_one_channel_of_two_by_its_number(clip):
    both = np.stack([tone(500, 1.0), tone(1500, 1.0)], axis=1)
    assert strongest_hz(load_waveform(clip(both, channel=1))) == pytest.approx(1500, abs=2)


def test_a_range_of_a_file(clip):
    samples = np.concatenate([tone(300, 1.0), tone(900, 1.0), tone(300, 1.0)])
    found = load_waveform(clip(samples, start_s=1.0, end_s=2.0, duration_s=1.0), "recorded")
    np.testing.assert_array_equal(found.numpy(), samples[RATE : 2 * RATE])


def test_a_clip_of_30_ms_is_taken(clip):
    assert len(load_waveform(clip(tone(440, 0.03)))) == 480
    assert len(load_waveform(clip(tone(440, 0.03, 8_000), 8_000))) == 480


def test_level_is_normalised_to_26_below_full_scale(clip):
    for gain in (0.9, 0.01):
        found = load_waveform(clip(tone(440, 1.0, amplitude=gain)), "normalised")
        assert dbfs(found) == pytest.approx(-26.0, abs=1e-3)


def test_level_as_recorded_is_left_alone(clip):
    samples = tone(440, 1.0, amplitude=0.01)
    assert dbfs(load_waveform(clip(samples), "recorded")) == pytest.approx(
        10 * math.log10(np.square(samples, dtype=np.float64).mean()), abs=1e-6
    )


def test_the_level_is_of_the_clip_alone(clip):
    """Scaling changes nothing but the gain."""
    samples = tone(440, 1.0) * np.linspace(0.1, 1.0, RATE, dtype="float32")
    recorded, normalised = (load_waveform(clip(samples), level) for level in ("recorded", "normalised"))
    ratio = normalised[100:] / recorded[100:]
    ratio = ratio[recorded[100:].abs() > 1e-3]
    assert float(ratio.max() - ratio.min()) < 1e-4


# Clips that cannot be used ----------------------------------------------------------------------------------


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def overwritten(file: Path) -> None:
    file.write_bytes(np.random.default_rng(0).bytes(file.stat().st_size))


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {"empty": emptied, "corrupt": overwritten, "truncated": cut_short, "gone": Path.unlink}


@pytest.mark.parametrize("name", ["clip.wav", "clip.flac", "clip.ogg"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_damaged_after_the_manifest_was_read_is_refused(clip, tmp_path, name, damage):
    samples = 0.1 * np.random.default_rng(0).standard_normal(3 * RATE).astype("float32")
    cut = clip(samples, name=name, subtype="VORBIS" if name.endswith("ogg") else "FLOAT")
    load_waveform(cut)
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(BadAudio, match="cannot be decoded: .+"):
        load_waveform(cut)


def spoilt(value: float) -> np.ndarray:
    samples = tone(440, 1.0)
    samples[1234] = value
    return samples


BAD = {
    "nan": (spoilt(float("nan")), "NaN or infinite"),
    "infinite": (spoilt(float("inf")), "NaN or infinite"),
    "silent": (np.zeros(RATE, "float32"), "silent.*-70 dBFS"),
    "hardly_audible": (tone(440, 1.0, amplitude=1e-4), "silent.*-70 dBFS"),
    "short": (tone(440, 0.02), r"0\.020 s long.*0\.025"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("level", ["normalised", "recorded"])
def test_a_clip_that_cannot_be_used_is_refused_with_the_reason(clip, name, level):
    samples, reason = BAD[name]
    with pytest.raises(BadAudio, match=reason):
        load_waveform(clip(samples), level)


def test_a_quiet_clip_is_not_silent(clip):
    """-64 dBFS: a whisper recorded far off."""
    assert dbfs(load_waveform(clip(tone(440, 1.0, amplitude=9e-4)))) == pytest.approx(-26, abs=1e-2)


@pytest.mark.parametrize("message", ["", "\n", "first line\nsecond line"])
def test_a_decoder_that_fails_without_a_word_is_refused_too(clip, monkeypatch, message):
    def fail(self, *args, **kwargs):
        raise EOFError(message)

    cut = clip(tone(440, 1.0))
    monkeypatch.setattr(MonoCut, "load_audio", fail)
    with pytest.raises(BadAudio, match="first line$" if "first" in message else "EOFError|cannot be decoded"):
        load_waveform(cut)


def test_the_rest_of_a_batch_goes_on_and_each_refused_clip_is_named(tmp_path):
    names = ["good1", "nan", "good2", "silent", "gone", "short", "good3"]
    for i, name in enumerate(names):
        samples = BAD[name][0] if name in BAD else tone(200 + 100 * i, 1 + i / 10)
        soundfile.write(tmp_path / f"{name}.wav", samples, RATE, subtype="FLOAT")
    cuts = cuts_of(*(tmp_path / f"{name}.wav" for name in names), style="happy")
    (tmp_path / "gone.wav").unlink()
    (batch,) = ordered_batches(cuts, batch_size=16, level="recorded")
    assert batch["utterance_id"] == ["mine/good1", "mine/good2", "mine/good3"]
    assert batch["cut_id"] == batch["utterance_id"]
    assert batch["n_samples"].tolist() == [RATE, round(1.2 * RATE), round(1.6 * RATE)]
    assert batch["waveform"].shape == (3, round(1.6 * RATE)) and len(set(batch["style"].tolist())) == 1
    for row, (i, seconds) in enumerate([(0, 1.0), (2, 1.2), (6, 1.6)]):
        samples = tone(200 + 100 * i, seconds)
        np.testing.assert_array_equal(batch["waveform"][row, : len(samples)].numpy(), samples)
        assert not bool(batch["waveform"][row, len(samples) :].any())
    reasons = dict(batch["skipped"])
    assert len(batch["skipped"]) == 4
    assert "NaN" in reasons["mine/nan"] and "silent" in reasons["mine/silent"]
    assert "decoded" in reasons["mine/gone"] and "0.020 s" in reasons["mine/short"]


def test_a_batch_without_any_usable_clip_is_empty_not_an_error(clip):
    (batch,) = ordered_batches(CutSet.from_cuts([clip(BAD["silent"][0])]), 4, "normalised")
    assert batch["waveform"].shape[0] == 0 and batch["style"].tolist() == [] and len(batch["skipped"]) == 1


def test_ordered_batches_take_every_cut_once_shortest_first(tmp_path):
    seconds = [1.3, 0.2, 0.9, 0.4, 2.0]
    for i, s in enumerate(seconds):
        soundfile.write(tmp_path / f"{i}.wav", tone(300, s), RATE)
    cuts = cuts_of(*(tmp_path / f"{i}.wav" for i in range(5)))
    found = list(ordered_batches(cuts, 2, "normalised"))
    assert [batch["utterance_id"] for batch in found] == [
        ["mine/1", "mine/3"],
        ["mine/2", "mine/0"],
        ["mine/4"],
    ]
    assert [batch["waveform"].shape[1] for batch in found] == [6400, 20_800, 32_000]


# Long clips -------------------------------------------------------------------------------------------------


def long_cut(seconds: float, rate: int = RATE) -> MonoCut:
    """A cut of a file that is not there: only its numbers count."""
    n = round(seconds * rate)
    cut = MonoCut("long", 0.0, n / rate, 0, recording=Recording("long", [], rate, n, n / rate))
    cut.custom = {"utterance_id": "mine/long", "style": ""}
    return cut


@pytest.mark.parametrize("seconds", [30.001, 31.0, 32.0, 47.3, 100.123, 7203.7])
@pytest.mark.parametrize("rate", [RATE, 44_100])
def test_a_long_clip_is_tiled_by_windows_of_one_size_of_at_most_8_s(seconds, rate):
    windows = list(pieces(CutSet.from_cuts([long_cut(seconds, rate)])))
    assert len(windows) == math.ceil(round(seconds * rate) / rate / 8)
    sizes = [window.duration for window in windows]
    assert max(sizes) <= 8 and max(sizes) - min(sizes) < 1e-3
    assert windows[0].start == 0 and windows[-1].end == pytest.approx(seconds, abs=1 / rate)
    for window, following in zip(windows, windows[1:], strict=False):
        assert abs(window.end - following.start) < 1.5 / rate  # at most one sample is lost or read twice
    assert len({window.id for window in windows}) == len(windows)
    assert {batches.utterance_id(window) for window in windows} == {"mine/long"}


def test_a_clip_of_up_to_30_s_stays_whole():
    cuts = CutSet.from_cuts([long_cut(30.0)])
    assert [cut.duration for cut in pieces(cuts)] == [30.0]
    assert len(list(pieces(cuts, whole_s=8.0, window_s=8.0))) == 4


def test_a_file_of_two_hours_is_read_a_window_at_a_time(tmp_path):
    """8 kHz, 8 bits: 58 MB on disk, 230 MB as floats. All bytes are 0 (-1.0) but in window 899 (+1)."""
    file, rate, hours = tmp_path / "long.wav", 8_000, 2
    with wave.open(str(file), "wb") as header:
        header.setnchannels(1), header.setsampwidth(1), header.setframerate(rate)
        header.writeframes(b"\0")
    head = bytearray(file.read_bytes()[:44])
    size = hours * 3600 * rate
    head[4:8], head[40:44] = (36 + size).to_bytes(4, "little"), size.to_bytes(4, "little")
    with file.open("wb") as out:
        out.write(head), out.truncate(44 + size)
        out.seek(44 + 899 * 8 * rate), out.write(b"\xff" * 8 * rate)
    windows = list(pieces(cuts_of(file)))
    assert len(windows) == 900 and {window.duration for window in windows} == {8.0}
    tracemalloc.start()
    try:
        middle, last = (load_waveform(windows[i], "recorded") for i in (450, 899))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(middle) == len(last) == 8 * RATE
    assert float(middle.mean()) == pytest.approx(-1, abs=0.02) and float(last.mean()) == pytest.approx(1, abs=0.02)
    assert peak < 20e6


# Epochs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> CutSet:
    """24 clips of 0.3 s to 1.5 s, 3 of them longer than a crop of 1 s by a sample or more, 2 just as long."""
    folder = tmp_path_factory.mktemp("many")
    sizes = [RATE + 1, RATE, RATE, round(1.5 * RATE), RATE + 800, *range(4_800, 14_300, 500)]
    for i, size in enumerate(sizes[:24]):
        soundfile.write(folder / f"{i:02d}.wav", tone(200 + 10 * i, size / RATE), RATE)
    return cuts_of(*(folder / f"{i:02d}.wav" for i in range(24)), style="calm")


def epoch(cuts: CutSet, seed: int, batch_size: int = 2, crop_s: float = 1.0) -> list[dict]:
    clips = WaveformClips(cuts, batch_size, crop_s, "recorded")
    return list(clips.load(clips.plan(np.random.default_rng(seed))))


def order(found: list[dict]) -> list[list[str]]:
    return [batch["utterance_id"] for batch in found]


@pytest.mark.parametrize("batch_size", [2, 16], ids=["bucketed", "simple"])
def test_an_epoch_covers_every_clip_once(many, batch_size):
    for seed in range(3):
        found = epoch(many, seed, batch_size)
        ids = sum(order(found), [])
        assert sorted(ids) == sorted(cut.id for cut in many)
        assert max(len(batch["utterance_id"]) for batch in found) <= batch_size
        assert all(batch["skipped"] == [] for batch in found)


@pytest.mark.parametrize("batch_size", [2, 16], ids=["bucketed", "simple"])
def test_the_order_follows_from_the_generator_alone(many, batch_size):
    torch.manual_seed(0), np.random.seed(0)
    first = order(epoch(many, 5, batch_size))
    torch.manual_seed(1), np.random.seed(1)
    assert order(epoch(many, 5, batch_size)) == first != order(epoch(many, 6, batch_size))


def test_crops_follow_from_the_generator_alone(many):
    torch.manual_seed(0)
    first = epoch(many, 5)
    torch.manual_seed(1)
    for batch, again in zip(first, epoch(many, 5), strict=True):
        assert torch.equal(batch["waveform"], again["waveform"])


def test_batches_hold_clips_of_like_length(many):
    """Bucketed, the padding is less than that of batches at random."""
    spread = [int(b["n_samples"].max() - b["n_samples"].min()) for seed in range(4) for b in epoch(many, seed)]
    sizes = np.random.default_rng(0).permutation([min(cut.num_samples, RATE) for cut in many])
    at_random = np.abs(sizes[::2] - sizes[1::2])
    assert np.mean(spread) < 0.7 * at_random.mean()


def test_no_crop_is_longer_than_asked_for(many):
    """A clip of one sample more than the crop is cropped; one just as long is not touched."""
    for seed in range(5):
        torch.manual_seed(seed)
        for batch in epoch(many, seed):
            for utterance, n in zip(batch["utterance_id"], batch["n_samples"].tolist(), strict=True):
                whole = next(cut.num_samples for cut in many if cut.id == utterance)
                assert n == min(whole, RATE)


def test_crops_are_parts_of_the_clip_and_vary(many):
    (cut,) = [cut for cut in many if cut.num_samples == round(1.5 * RATE)]
    whole, starts = load_waveform(cut, "recorded"), set()
    for seed in range(6):
        torch.manual_seed(seed)
        (batch,) = epoch(CutSet.from_cuts([cut]), seed)
        crop = batch["waveform"][0]
        start = int((whole.unfold(0, 100, 1) - crop[:100]).abs().amax(1).argmin())  # where it begins alike
        torch.testing.assert_close(crop, whole[start : start + RATE], atol=1e-6, rtol=0)
        starts.add(start)
    assert len(starts) > 3


def test_an_epoch_of_nothing_has_no_batch():
    assert epoch(CutSet.from_cuts([]), 0) == []


def test_styles_are_numbers_and_minus_one_without(clip):
    labelled, not_labelled = clip(tone(300, 0.5), style="sad"), clip(tone(300, 0.5), style="")
    assert batches.STYLES[batches.style_label(labelled)] == "sad"
    assert batches.style_label(not_labelled) == -1
