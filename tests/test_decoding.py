"""Sound of any file in blocks: what is decoded, and what is said of files that cannot be."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from esr_utils import audio_lengths, decoding
from esr_utils.audio_files import AudioError
from esr_utils.decoding import NoFfmpegError, Resampler, decode

RATE = 16_000
LEVELS = (0.1, 0.2)  # of the two channels


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    """(S, 2): a low tone, after a second of silence."""
    time = np.arange(round(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * 300 * time) * (time >= 1)
    return (wave[:, None] * LEVELS).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


def convert(source: Path, target: Path, *options: str) -> Path:
    """By the package's ffmpeg, which can write all that is tested; a system's may lack an encoder, such as AMR's."""
    package = pytest.importorskip("imageio_ffmpeg", reason="needs the package imageio-ffmpeg")
    command = [package.get_ffmpeg_exe(), "-v", "error", "-i", source, *options, target]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


def whole(path: Path) -> tuple[np.ndarray, int]:
    blocks = list(decode(path))
    return np.concatenate([samples for samples, _ in blocks]), blocks[0][1]


def starts_s(samples: np.ndarray, rate: int) -> float:
    """When the tone begins."""
    return float(np.flatnonzero(np.abs(samples[:, 0]) > 0.05)[0] / rate)


@pytest.fixture
def wav(tmp_path) -> Path:
    return write(tmp_path / "tone.wav", tone(3))


@pytest.fixture
def no_ffmpeg(monkeypatch) -> None:
    def missing() -> str:
        raise NoFfmpegError("needs ffmpeg")

    monkeypatch.setattr(decoding, "find_ffmpeg", missing)


# Files that are sound ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "opus", "mp3"])
def test_plain_files_are_read_without_ffmpeg(tmp_path, no_ffmpeg, kind):
    options = {"format": "OGG", "subtype": "OPUS"} if kind == "opus" else {}
    rate = 24_000 if kind == "opus" else 22_050
    samples, found_rate = whole(write(tmp_path / f"a.{kind}", tone(3, rate), rate, **options))
    assert found_rate == rate and samples.shape[1] == 2 and samples.dtype == np.float32
    assert len(samples) / rate == pytest.approx(3, abs=0.06) and starts_s(samples, rate) == pytest.approx(1, abs=0.06)


def test_a_notebook_does_not_show_what_libmpg123_says(tmp_path, monkeypatch, capfd):
    path = write(tmp_path / "a.mp3", tone(5))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = np.random.default_rng(0).bytes(400)
    path.write_bytes(data)
    for stderr, heard in ((io.StringIO(), False), (sys.__stderr__, True)):  # a notebook's is no file; a script's is
        monkeypatch.setattr(sys, "stderr", stderr)
        assert len(decoding.read_spans(path, [(0.5, 4.5)])[0][0])
        os.write(2, b"and what others say")
        said = capfd.readouterr().err
        assert said.endswith("and what others say") and ("MPEG" in said) == heard == (len(said) > 19), said


@pytest.mark.parametrize("kind", ["m4a", "mp4", "mka", "aac", "wma", "webm", "amr"])
def test_other_files_are_read_by_ffmpeg(tmp_path, wav, kind):
    options = ["-ar", "8000", "-ac", "1"] if kind == "amr" else []
    samples, rate = whole(convert(wav, tmp_path / f"a.{kind}", *options))
    assert samples.shape[1] == (1 if kind == "amr" else 2)
    assert len(samples) / rate == pytest.approx(3, abs=0.1) and starts_s(samples, rate) == pytest.approx(1, abs=0.1)


def test_what_ffmpeg_gives_is_what_went_in(tmp_path, wav):
    samples, rate = whole(convert(wav, tmp_path / "a.mka", "-c:a", "pcm_f32le"))
    assert rate == RATE
    np.testing.assert_array_equal(samples, soundfile.read(wav, dtype="float32")[0])


@pytest.mark.parametrize("renamed", ["a.wav", "a.mp3", "a.raw", "a", "a.m4a"])
def test_the_name_does_not_matter(tmp_path, wav, renamed):
    flac = write(tmp_path / "tone.flac", tone(3))
    assert len(whole(flac.rename(tmp_path / renamed))[0]) == 3 * RATE


def test_a_renamed_m4a(tmp_path, wav):
    samples, rate = whole(convert(wav, tmp_path / "a.m4a").rename(tmp_path / "a.wav"))
    assert starts_s(samples, rate) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["wav", "m4a"])
@pytest.mark.parametrize("name", [b'it\'s "so"', b"two\nlines", b"caf\xe9", b"-i", b"%d", b"pipe:0", b"a;b|c $(d)"])
def test_names_of_any_bytes(tmp_path, wav, kind, name):
    source = wav if kind == "wav" else convert(wav, tmp_path / "a.m4a")
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name + b"." + kind.encode()))
    try:
        source.rename(path)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert len(whole(path)[0]) == pytest.approx(3 * RATE, abs=1600)


def test_blocks_are_short_and_make_no_seams(tmp_path):
    path = write(tmp_path / "a.wav", tone(25), subtype="FLOAT")
    samples = np.concatenate([block for block, _ in decode(path)])
    assert [len(block) / RATE for block, _ in decode(path)] == [10, 10, 5]
    np.testing.assert_array_equal(samples, tone(25))


def piped(source: Path, target: Path, kind: str) -> Path:
    """As a program writes what it cannot go back in."""
    program = pytest.importorskip("imageio_ffmpeg", reason="needs the package imageio-ffmpeg").get_ffmpeg_exe()
    command = [program, "-v", "error", "-i", source, *(["-q:a", "4"] if kind == "mp3" else []), "-f", kind, "pipe:1"]
    target.write_bytes(subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE).stdout)
    return target


def joined(folder: Path, kind: str, seconds: float, *options: str) -> Path:
    """17 s of quiet and as many of noise, and then so many of noise, of other parameters where options say so."""
    noise = np.random.default_rng(0).normal(0, 0.1, (34 * RATE, 1)).astype(np.float32)
    noise[: 17 * RATE] /= 100
    source, more = write(folder / "source.wav", noise), write(folder / "more.wav", noise[-round(seconds * RATE) :])
    encoder = {"ogg": "libvorbis", "opus": "libopus", "mp3": "libmp3lame"}[kind]
    codec = ["-c:a", encoder, "-metadata", f"title={'x' * 9000}"]
    other = [] if kind == "mp3" else ["-serial_offset", "7"]
    parts = convert(source, folder / f"1.{kind}", *codec), convert(more, folder / f"2.{kind}", *codec, *other, *options)
    path = folder / f"a.{kind}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def of_unknown_length(kind: str, folder: Path) -> tuple[Path, float]:
    """A file, and how many seconds it lasts, of which libsndfile would read less or complain of its end."""
    name, _, how = kind.partition(" ")
    if how.startswith("joined"):
        return joined(folder, name, float(how.split()[1])), 34 + float(how.split()[1])
    noise = np.random.default_rng(0).normal(0, 0.1, (34 * RATE, 1))
    noise[: 17 * RATE] /= 100
    source, path = write(folder / "source.wav", noise), folder / f"a.{name}"
    match how:
        case "piped":
            return piped(source, path, name), 34
        case "without header":
            return convert(source, path, "-write_xing", "0", "-b:a", "64k"), 34
        case "with a header of no frames":
            content = bytearray(convert(source, path, "-q:a", "4").read_bytes())
            at = re.search(b"Xing|Info", content).start()
            content[at + 8 : at + 12] = bytes(4)
            path.write_bytes(content)
            return path, 34
        case "of mp3":
            return convert(source, path, "-c:a", "libmp3lame", "-b:a", "64k"), 34
        case _:  # of a writer that was ended before it could tell
            content = bytearray(source.read_bytes())
            content[4:8] = content[40:44] = bytes(4)
            path.write_bytes(content)
            return path, 34


UNKNOWN = [
    "mp3 piped", "mp3 without header", "mp3 with a header of no frames", "mp3 joined 34", "mp3 joined 1",
    "ogg joined 34", "ogg joined 1", "opus joined 34", "opus joined 1", "flac piped", "wav of mp3", "wav ended",
]  # fmt: skip


@pytest.mark.parametrize("kind", UNKNOWN)
def test_files_that_do_not_tell_how_long_they_are_are_heard_to_their_end(tmp_path, kind):
    path, seconds = of_unknown_length(kind, tmp_path)
    samples, rate = whole(path)
    assert len(samples) / rate == pytest.approx(seconds, abs=0.2)
    assert np.flatnonzero(np.abs(samples) > 0.05)[0] / rate == pytest.approx(17, abs=0.1)
    (piece, rest), found_rate = decoding.read_spans(path, [(16.5, 18), (seconds - 2, None)])
    np.testing.assert_array_equal(piece, samples[round(16.5 * rate) : 18 * rate])
    assert found_rate == rate and len(rest) / rate == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_files_that_do_not_tell_how_long_they_are_are_not_read_in_part(tmp_path, no_ffmpeg, kind):
    path, _ = of_unknown_length(kind, tmp_path)
    for read in (lambda: list(decode(path)), lambda: decoding.read_spans(path, [(1, 2)])):
        with pytest.raises(NoFfmpegError, match="does not tell how long it is, and needs ffmpeg"):
            read()


@pytest.mark.parametrize("kind", ["ogg", "mp3"])
@pytest.mark.parametrize("options", [["-ac", "2"], ["-ar", "22050"]], ids=["stereo", "another rate"])
def test_joined_files_that_differ_are_heard_to_their_end_or_said_not_to_be(tmp_path, kind, options):
    """What follows comes at its time, and without ffmpeg's silence for what it takes to begin late."""
    blocks = decode(joined(tmp_path, kind, 5, *options))
    found = []
    try:
        found.extend(block for block, _ in blocks)
    except AudioError as error:  # of ffmpeg 6 and later
        assert "could not be read to its end" in str(error)
        assert sum(map(len, found)) / RATE == pytest.approx(34, abs=0.2)
    else:
        assert sum(map(len, found)) / RATE == pytest.approx(39, abs=0.3)


@pytest.mark.parametrize("options", [["-ar", "16000", "-q:a", "9"], ["-ar", "8000", "-b:a", "8k"], ["-ar", "44100"]])
def test_a_span_of_an_mp3_is_that_of_the_whole(tmp_path, options):
    """Its frames take bits of those before."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 20 * RATE) * np.repeat(rng.uniform(0, 0.1, 100), RATE // 5)
    path = convert(write(tmp_path / "a.wav", noise), tmp_path / "a.mp3", *options)
    samples, rate = whole(path)
    for start in (0.3, 4.0, 11.1, 19.0):
        ((piece,), _) = decoding.read_spans(path, [(start, start + 0.7)])
        np.testing.assert_allclose(piece, samples[round(start * rate) : round((start + 0.7) * rate)], atol=1e-5)


def test_a_header_of_a_hostile_rate_takes_no_memory(tmp_path):
    path = write(tmp_path / "a.wav", tone(3))
    content = bytearray(path.read_bytes())
    content[24:28], content[40:44] = (0x7FFFFFFF).to_bytes(4, "little"), bytes(4)
    path.write_bytes(content)
    with suppress(AudioError):
        assert len(whole(path)[0]) == 3 * RATE


@pytest.mark.parametrize("options", [["-q:a", "4"], ["-b:a", "64k"]], ids=["variable", "constant"])
def test_an_mp3_that_tells_how_long_it_is_needs_no_ffmpeg(tmp_path, no_ffmpeg, wav, options):
    path = convert(wav, tmp_path / "a.mp3", *options, "-metadata", f"comment={'x' * 100_000}", "-write_id3v1", "1")
    samples, rate = whole(path)
    assert len(samples) == 3 * rate and starts_s(samples, rate) == pytest.approx(1, abs=0.06)


def test_times_are_those_of_the_file_where_sound_begins_late(tmp_path, wav):
    """Sound that starts 0.7 s after the picture: its tone is at 1.7 s of what a player shows."""
    picture = ["-f", "lavfi", "-i", "color=duration=3:size=16x16:rate=5", "-map", "1:v", "-map", "0:a"]
    path = convert(wav, tmp_path / "a.mkv", *picture, "-af", "asetpts=PTS+0.7/TB")
    assert starts_s(*whole(path)) == pytest.approx(1.7, abs=0.06)


def test_times_are_those_of_the_file_after_what_does_not_decode(tmp_path):
    """The tone is after the damage."""
    noise = np.random.default_rng(0).normal(0, 0.01, (6 * RATE, 1))
    noise[5 * RATE :] += tone(6)[5 * RATE :, :1] * 5
    path = convert(write(tmp_path / "a.wav", noise), tmp_path / "a.m4a")
    damaged = bytearray(path.read_bytes())
    begins = damaged.find(b"mdat") + 8
    damaged[begins + 10_000 : begins + 20_000] = bytes(10_000)
    path.write_bytes(damaged)
    samples, rate = whole(path)
    assert np.flatnonzero(np.abs(samples) > 0.3)[0] / rate == pytest.approx(5, abs=0.06)


@pytest.mark.parametrize(("rate", "size"), [(44_100, 441), (44_100, 100_000), (8_000, 1), (16_000, 777)])
def test_resampling_in_blocks_is_resampling_at_once(rate, size):
    samples = np.random.default_rng(0).normal(0, 0.1, 3000 if size == 1 else 150_000).astype(np.float32)
    resample = Resampler(rate, RATE)
    found = [resample(samples[at : at + size]) for at in range(0, len(samples), size)]
    found = np.concatenate([*found, resample(np.zeros(0, np.float32), last=True)])
    np.testing.assert_allclose(found, soxr.resample(samples, rate, RATE), atol=1e-5)


# Files that are not -----------------------------------------------------------------------------------------


def test_missing_empty_and_no_file(tmp_path):
    (tmp_path / "empty.wav").touch()
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    for name, reason in {
        "nowhere.wav": "is not there",
        "empty.wav": "is empty",
        "pipe.wav": "is no file",
        "loop.wav": "is not there|cannot be opened",
    }.items():
        with pytest.raises(AudioError, match=reason):
            next(decode(tmp_path / name))
    with pytest.raises(AudioError, match="is no file"):
        next(decode(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read(wav):
    wav.chmod(0)
    with pytest.raises(AudioError, match="cannot be opened: Permission denied"):
        next(decode(wav))


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "m4a", "aac", "mp4"])
@pytest.mark.parametrize("content", [b"Dear all,\n" * 900, b"\x89PNG\r\n\x1a\n" + bytes(5000), bytes(5000)])
@pytest.mark.parametrize("ffmpeg", [True, False])
def test_what_is_no_audio(tmp_path, request, kind, content, ffmpeg):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    if not ffmpeg:
        request.getfixturevalue("no_ffmpeg")
    with pytest.raises(AudioError, match="no audio|no sound|not readable as audio|needs ffmpeg"):
        list(decode(path))


def test_without_ffmpeg_it_says_how_to_get_it(tmp_path, monkeypatch, wav):
    path = convert(wav, tmp_path / "a.m4a")
    monkeypatch.setattr(decoding.shutil, "which", lambda _: None)
    monkeypatch.setattr(decoding.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(NoFfmpegError, match=r"is not readable as audio \(.*\), or needs ffmpeg.*apt install ffmpeg"):
        next(decode(path))


def test_no_samples(tmp_path):
    with pytest.raises(AudioError, match="holds no sound"):
        next(decode(write(tmp_path / "a.wav", tone(0))))


def test_a_film_without_sound(tmp_path, wav):
    path = convert(wav, tmp_path / "a.mp4", "-f", "lavfi", "-i", "color=duration=1:size=16x16", "-map", "1:v")
    with pytest.raises(AudioError, match="holds no sound"):
        next(decode(path))


@pytest.mark.parametrize("entry", [b"drms", b"enca", b"aavd"])
def test_protected_files_are_said_to_be(tmp_path, wav, entry):
    """As shops sell them: the sample entry says that the data are encrypted."""
    path = convert(wav, tmp_path / "a.m4a")
    path.write_bytes(path.read_bytes().replace(b"mp4a", entry))
    with pytest.raises(AudioError, match="is protected"):
        next(decode(path))


def test_encrypted_data_that_nothing_says_are_so(tmp_path, wav):
    path = convert(wav, tmp_path / "a.m4a")
    content = path.read_bytes()
    begins, ends = content.find(b"mdat") + 4, content.find(b"moov") - 4
    path.write_bytes(content[:begins] + np.random.default_rng(0).bytes(ends - begins) + content[ends:])
    with pytest.raises(AudioError, match="is no audio that ffmpeg can decode"):
        list(decode(path))


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "aiff", "m4a"])
def test_a_file_cut_short_gives_what_is_there_and_then_says_so(tmp_path, kind):
    whole_file = write(tmp_path / "whole.wav", np.random.default_rng(0).normal(0, 0.1, 30 * RATE))
    if kind == "m4a":
        path = convert(whole_file, tmp_path / "a.m4a", "-movflags", "+faststart")
    else:
        path = write(tmp_path / f"a.{kind}", soundfile.read(whole_file)[0])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    found = []
    with pytest.raises(AudioError, match="is cut short|does not decode"):
        found.extend(block for block, _ in decode(path))
    assert 9.9 < sum(map(len, found)) / RATE < 16


@pytest.mark.parametrize("how", ["over 4 GB", "over 4 GB of unknown length", "joined", "recorded on"])
def test_a_wav_with_sound_that_its_header_does_not_tell_of(tmp_path, wav, how):
    """Sizes of 32 bits: ffmpeg writes them modulo 2**32, others as all ones; of 5 GB, the file here has a hole."""
    size, content = wav.stat().st_size, wav.read_bytes()
    if how == "over 4 GB":
        os.truncate(wav, size + (1 << 32))
    elif how == "over 4 GB of unknown length":
        wav.write_bytes(content[:40] + b"\xff" * 4 + content[44:])
        os.truncate(wav, 5_000_000_000)
    else:
        wav.write_bytes(content * 2 if how == "joined" else content + content[44:])
    assert audio_lengths.bytes_untold(wav) > 2 * 2 * RATE
    if "unknown" not in how:  # that would be hours
        found = []
        with pytest.raises(AudioError, match=r"MB are behind the sound that its header can tell of, 3 s: make a FLAC"):
            found.extend(block for block, _ in decode(wav))
        assert sum(map(len, found)) == 3 * RATE


def test_what_follows_the_sound_of_a_wav_may_be_no_sound(tmp_path, wav):
    wav.write_bytes(wav.read_bytes() + b"LIST" + (300_001).to_bytes(4, "little") + b"x" * 300_002 + b"id3 \0\0\0\0")
    assert audio_lengths.bytes_untold(wav) == 0 and len(whole(wav)[0]) == 3 * RATE


def test_damage_in_the_middle(tmp_path):
    path = write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 30 * RATE))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 9000] = bytes(9000)
    path.write_bytes(content)
    found = []
    with pytest.raises(AudioError, match="does not decode"):
        found.extend(block for block, _ in decode(path))
    assert sum(map(len, found)) == 10 * RATE


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["wav", "mka"])
def test_samples_that_are_no_numbers(tmp_path, value, kind):
    samples = tone(15)
    samples[12 * RATE] = value
    path = write(tmp_path / "a.wav", samples, subtype="FLOAT")
    path = path if kind == "wav" else convert(path, tmp_path / "a.mka", "-c:a", "pcm_f32le")
    blocks = decode(path)
    next(blocks)
    with pytest.raises(AudioError, match="not numbers"):
        list(blocks)


def test_a_stream_of_unknown_length_is_not_cut_short(tmp_path, wav):
    """As programs write a WAV that they do not know the end of."""
    content = bytearray(wav.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    wav.write_bytes(content)
    assert len(whole(wav)[0]) == 3 * RATE


def test_no_ffmpeg_is_left_running_when_no_more_is_wanted(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    path = convert(write(tmp_path / "a.wav", tone(60)), tmp_path / "a.mka", "-c:a", "pcm_s16le")
    started.clear()
    blocks = decode(path)
    next(blocks)
    blocks.close()
    assert len(started) == 2 and all(process.returncode is not None for process in started)
