"""From a file of any name and kind to its sound, and from the sound to voices."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
import subprocess

import numpy as np
import pytest
import soundfile
import tiny_mining
import torch

from esr_utils import decoding, weights
from esr_utils.audio_files import AudioError
from esr_utils.mining import MiningError, download, find_sources, media, separation

RATE = media.SOUND_RATE


def tone(seconds: float, rate: int, hz: float = 440.0, channels: int = 1) -> np.ndarray:
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave.astype(np.float32)[:, None], (1, channels))


@pytest.fixture
def no_ffmpeg(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else found(name))


# Which files ------------------------------------------------------------------------------------------------


def test_names_of_any_kind_become_plain_ids(tmp_path):
    names = ["a b.wav", "a-b.WAV", "new\nline.mp3", "-rf $(x);'\".flac", "第一集.mp4", "..wav.wav", "x" * 200 + ".ogg"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a b.wav").touch()
    (tmp_path / ".hidden.wav").touch()
    (tmp_path / "notes.txt").touch()
    found = find_sources(tmp_path)
    assert len(found) == len(names)  # "..wav.wav" begins with a dot, and sub's file is one more
    ids = [source.id for source in found]
    assert len(set(ids)) == len(ids) and all(set(i) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for i in ids)
    assert max(map(len, ids)) <= 49 and not any("\n" in source.name for source in found)
    assert [source.id for source in find_sources(tmp_path)] == ids


def test_a_name_that_is_no_unicode(tmp_path):
    try:
        path = os.fsencode(tmp_path) + b"/caf\xe9.wav"
        soundfile.write(path, tone(0.1, 8000), 8000)
    except OSError:
        pytest.skip("this file system takes no such names")
    (source,) = find_sources(tmp_path)
    assert source.name.encode()  # it can be written down
    media.extract_sound(source.path, tmp_path / "out" / f"{source.id}.flac")
    assert soundfile.info(tmp_path / "out" / f"{source.id}.flac").duration == pytest.approx(0.1, abs=0.01)


def test_a_single_file_is_enough(tmp_path):
    (tmp_path / "one.wav").touch()
    assert [source.name for source in find_sources(tmp_path / "one.wav")] == ["one.wav"]


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_nothing_to_mine_is_said(tmp_path, where):
    with pytest.raises(MiningError, match=r"no file and no folder|no video and no audio"):
        find_sources(tmp_path / where)


# Sound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rate", "channels", "kept"),
    [
        ("a.wav", 8000, 1, 1),
        ("a.flac", 48_000, 2, 2),
        ("a.ogg", 44_100, 1, 1),
        ("a.mp3", 22_050, 2, 2),
        ("b.wav", 44_101, 6, 1),
    ],
)
def test_sound_without_ffmpeg(tmp_path, no_ffmpeg, name, rate, channels, kept):
    soundfile.write(tmp_path / name, tone(1.5, rate, channels=channels), rate)
    media.extract_sound(tmp_path / name, tmp_path / "out.flac")
    found, at = soundfile.read(tmp_path / "out.flac", always_2d=True)
    assert at == RATE and found.shape[1] == kept
    assert abs(len(found) / RATE - soundfile.info(tmp_path / name).duration) < 0.001
    middle = found[RATE // 2 : RATE, 0]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.03)
    loudest = np.fft.rfftfreq(len(middle), 1 / RATE)[np.abs(np.fft.rfft(middle)).argmax()]
    assert loudest == pytest.approx(440, abs=3)


def test_blocks_make_no_seams(tmp_path, monkeypatch):
    """25 seconds, read in three blocks, are as when read in one."""
    soundfile.write(tmp_path / "long.wav", tone(25, 8000), 8000)
    media.extract_sound(tmp_path / "long.wav", tmp_path / "blocks.flac")
    monkeypatch.setattr(decoding, "BLOCK_S", 1000)
    media.extract_sound(tmp_path / "long.wav", tmp_path / "whole.flac")
    one, other = (soundfile.read(tmp_path / f"{name}.flac")[0] for name in ("blocks", "whole"))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_without_ffmpeg_a_video_says_what_to_do(tmp_path, no_ffmpeg):
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x20ftypisom" + bytes(100))
    with pytest.raises(MiningError, match=r"needs ffmpeg.*install.*wav, flac, ogg, opus and mp3"):
        media.extract_sound(tmp_path / "film.mp4", tmp_path / "out.flac")
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]


def test_a_broken_plain_file_is_not_blamed_on_ffmpeg(tmp_path, no_ffmpeg):
    (tmp_path / "broken.wav").write_bytes(b"RIFF and nothing else")
    with pytest.raises(AudioError, match="not readable as audio"):
        media.extract_sound(tmp_path / "broken.wav", tmp_path / "out.flac")


def test_samples_that_are_no_numbers_are_refused(tmp_path):
    samples = tone(0.5, 16_000)
    samples[100] = np.nan
    soundfile.write(tmp_path / "nan.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN"):
        media.extract_sound(tmp_path / "nan.wav", tmp_path / "out.flac")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.wav"]  # half of it is not left behind


def real_ffmpeg() -> str:
    try:
        return decoding.find_ffmpeg()
    except decoding.NoFfmpegError:
        pytest.skip("needs ffmpeg, or the package imageio-ffmpeg")


@pytest.mark.parametrize("name", ["-film: 第一集.mp4", "talk.m4a", "episode.mkv"])
def test_video_by_ffmpeg(tmp_path, name):
    soundfile.write(tmp_path / "a.wav", tone(1.5, 32_000, channels=2), 32_000)
    command = [real_ffmpeg(), "-v", "error", "-i", tmp_path / "a.wav"]
    if not name.endswith("m4a"):
        command += ["-f", "lavfi", "-t", "1.5", "-i", "color=c=black:s=64x64:r=5"]
    subprocess.run([*command, "-c:a", "aac", f"file:{tmp_path / name}"], check=True)
    media.extract_sound(tmp_path / name, tmp_path / "out.flac")
    found, at = soundfile.read(tmp_path / "out.flac", always_2d=True)
    assert at == RATE and found.shape[1] == 2 and abs(len(found) / RATE - 1.5) < 0.1
    assert np.sqrt(np.mean(found[RATE // 2 : RATE] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.05)


def test_a_video_without_sound_is_said_to_be_one(tmp_path):
    silent = ["-f", "lavfi", "-t", "1", "-i", "color=c=black:s=64x64:r=5", tmp_path / "mute.mp4"]
    subprocess.run([real_ffmpeg(), "-v", "error", *silent], check=True)
    with pytest.raises(AudioError, match="ffmpeg finds no sound"):
        media.extract_sound(tmp_path / "mute.mp4", tmp_path / "out.flac")
    assert not (tmp_path / "out.flac").exists()


# Downloads --------------------------------------------------------------------------------------------------


def test_downloads_need_yt_dlp(tmp_path, no_ffmpeg):
    with pytest.raises(MiningError, match="pip install yt-dlp"):
        download(tmp_path / "list.txt", tmp_path / "videos")


def test_each_address_of_the_list_is_downloaded_once(tmp_path, monkeypatch):
    """yt-dlp itself needs a network: here is a program of that name, which notes its last two arguments."""
    program = tmp_path / "bin" / "yt-dlp"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/sh\nfor last; do before=$seen; seen=$last; done\necho "$before $last" >> "$NOTES"\n'
        'case $last in *bad*) echo "ERROR: no such video" >&2; exit 1;; esac\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    (tmp_path / "list.txt").write_text("# mine\nhttps://a/1\n\n--exec=rm\nhttps://a/bad\nhttps://a/1\n")
    failed = download(tmp_path / "list.txt", tmp_path / "videos")
    assert failed == {"https://a/bad": "ERROR: no such video"}
    # after "--" nothing is an option
    assert (tmp_path / "notes").read_text().splitlines() == ["-- https://a/1", "-- --exec=rm", "-- https://a/bad"]


# Separation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 9, 10, 11, 30, 31, 33, 57])
@pytest.mark.parametrize("blocks", [1, 7, 100])
def test_what_is_cut_and_faded_is_put_together_again(length, blocks):
    """With nothing done in between; chunks of 10 that share 3."""
    sound = np.random.default_rng(0).normal(size=length).astype(np.float32)
    pieces = (sound[at : at + blocks] for at in range(0, length, blocks))
    chunks = list(separation._chunks(pieces, 10, 3))
    assert all(len(chunk) == 10 for chunk in chunks[:-1]) and len(chunks[-1]) <= 10
    found = np.concatenate(list(separation._crossfaded(iter(chunks), 3, np.copy)))
    np.testing.assert_allclose(found, sound, rtol=1e-6)


@pytest.fixture(scope="module")
def demucs(tmp_path_factory) -> str:
    return tiny_mining.write_separator(tmp_path_factory.mktemp("models") / "demucs")


def test_a_file_of_one_chunk_is_what_the_model_says_of_it(demucs, tmp_path):
    """HDemucs on the whole mix at mean 0 and deviation 1, in one call."""
    rng = np.random.default_rng(1)
    soundfile.write(tmp_path / "a.flac", rng.normal(0.02, 0.1, (3 * RATE, 2)), RATE)
    separator = separation.load_separator(demucs, torch.device("cpu"), chunk_s=10)
    found = np.concatenate(list(separator.vocals(tmp_path / "a.flac")))[:, 0]
    mix = torch.from_numpy(soundfile.read(tmp_path / "a.flac", dtype="float32")[0].T)
    ref = mix.mean(0)
    with torch.inference_mode():
        voices = separator.model(((mix - ref.mean()) / ref.std(correction=0))[None])[0, 0]
    np.testing.assert_allclose(found, (voices.mean(0) * ref.std(correction=0) + ref.mean()).numpy(), atol=1e-4)


@pytest.mark.parametrize(("seconds", "channels"), [(0.05, 1), (1.0, 2), (5.3, 1)])
def test_voices_are_as_long_as_the_sound(demucs, tmp_path, seconds, channels):
    """At 24 kHz, and a copy at 16 kHz; 5.3 s are three chunks of 2 s."""
    soundfile.write(tmp_path / "a.flac", tone(seconds, RATE, channels=channels), RATE)
    separator = separation.load_separator(demucs, torch.device("cpu"), chunk_s=2)
    targets = [(tmp_path / "24.flac", 24_000), (tmp_path / "16.flac", 16_000)]
    separation.write_voices(tmp_path / "a.flac", separator, targets)
    for path, rate in targets:
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (rate, 1) and abs(info.frames - seconds * rate) <= 2


def test_digital_silence_stays_silent(demucs, tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(RATE), RATE)
    separator = separation.load_separator(demucs, torch.device("cpu"))
    assert not np.concatenate(list(separator.vocals(tmp_path / "a.flac"))).any()


def test_a_missing_separator_says_what_to_download_and_where_to_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(
        weights.WeightsError, match=r"download https://download.pytorch.org/\S+hdemucs_high_trained.pt.*ESR_MODELS"
    ):
        separation.find_separator("hdemucs")


def test_a_separator_is_found_in_the_models_folder(monkeypatch, tmp_path, demucs):
    home = tmp_path / "torchaudio" / "hdemucs"
    shutil.copytree(demucs, home)
    state = weights.read_state(home / "model.safetensors")
    torch.save(state, home / "hdemucs_high_trained.pt")  # as torchaudio publishes it
    (home / "model.safetensors").unlink()
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    found = separation.load_separator("hdemucs", torch.device("cpu"))
    assert weights.fingerprint(found.model) == weights.fingerprint(
        separation.load_separator(demucs, torch.device("cpu")).model
    )


def test_a_separator_without_vocals_is_refused(tmp_path, demucs):
    shutil.copytree(demucs, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(
        '{"sources": ["drums", "bass"], "nfft": 1024, "depth": 5, "channels": 4}'
    )
    with pytest.raises(weights.WeightsError, match="vocals are needed"):
        separation.load_separator(str(tmp_path / "m"), torch.device("cpu"))
