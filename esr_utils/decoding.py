"""Audio of any file, a block at a time: libsndfile reads wav, flac, ogg, opus and mp3; ffmpeg, where there is one, the
rest, and those of which libsndfile would read a part only, since their headers do not tell how long they are.

Hours need no more memory than a block of 10 s.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import ParamSpec, TypeVar

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from esr_utils.audio_files import LENGTH_TOLERANCE_S, AudioError
from esr_utils.audio_lengths import bytes_untold, is_told

BLOCK_S = 10  # seconds read at a time
_UNKNOWN_BYTES = (1 << 31) - (1 << 16)  # a size from here on, in the header of a stream, says that it is not known
_PROTECTED = r"\((drms|enca|aavd) /"  # sample entries of iTunes, of MPEG-4 common encryption, of Audible
_QUIET = Lock()  # file descriptor 2 is the whole process's
_AU = struct.Struct(">4s5I")  # magic, bytes before the samples, bytes of samples, encoding, Hz, channels
_MOST = 1 << 24  # samples read at a time, of all channels: a header may tell of any rate
# What does not decode, or begins after the picture, becomes silence, so that times stay those of the file. Not so of
# files that may be joined: what follows would be taken to begin late.
_TIMED = ("-af", "aresample=async=1:first_pts=0")

P, T = ParamSpec("P"), TypeVar("T")


class NotNowError(AudioError):
    """A file that could not be read for a reason that is not the file's."""


class NoFfmpegError(NotNowError):
    """A file that only ffmpeg reads, where there is none; the message says how to get it."""


class ForFfmpegError(Exception):
    """A file that libsndfile does not read, or not to its end; the message begins a sentence that asks for ffmpeg.

    Attributes:
        filters: options of ffmpeg's.
    """

    def __init__(self, why: str, filters: Sequence[str]) -> None:
        super().__init__(why)
        self.filters = filters


def find_ffmpeg() -> str:
    """ffmpeg of the system, else that of the package imageio-ffmpeg.

    Raises:
        NoFfmpegError: there is none.
    """
    if found := shutil.which("ffmpeg"):
        return found
    if importlib.util.find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    raise NoFfmpegError(
        "needs ffmpeg, which is not there: install it (apt install ffmpeg, brew install ffmpeg, or pip install "
        "imageio-ffmpeg); wav, flac, ogg, opus and mp3 files that tell how long they are are read without it"
    )


def sndfile_name(path: Path) -> str | bytes:
    """As soundfile takes it: a name that is no Unicode only as bytes."""
    return os.fsencode(path) if os.name == "posix" else str(path)


def _quietly(read: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """What a call returns, without what it writes to stderr in a notebook, which would show it among the results.

    libmpg123 speaks of errors in sound MP3s of LAME too, above all of variable bit rate, and decodes them all the same.
    The sys.stderr of a notebook is not file descriptor 2, so nothing of Python's is lost; elsewhere nothing is changed.
    """
    if sys.stderr is sys.__stderr__:
        return read(*arguments, **options)
    with _QUIET, open(os.devnull, "wb") as nowhere:
        before = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            return read(*arguments, **options)
        finally:
            os.dup2(before, 2)
            os.close(before)


def read_blocks(path: Path, first: int = 0, last: int | None = None) -> Iterator[NDArray[np.float32]]:
    """(S, C) samples of a file that libsndfile reads, or of its range, 10 s at a time.

    Raises:
        AudioError: it does not decode, or holds NaN.
    """
    try:
        with _quietly(soundfile.SoundFile, sndfile_name(path)) as file:
            _quietly(file.seek, first)
            left = (file.frames if last is None else min(last, file.frames)) - first
            most = min(BLOCK_S * file.samplerate, _MOST // file.channels)
            while left > 0 and len(block := _quietly(file.read, min(left, most), "float32", always_2d=True)):
                left -= len(block)
                yield _finite(block)
    except soundfile.LibsndfileError as error:
        raise AudioError(f"does not decode: {error.error_string}") from None


def _finite(block: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(block).all():
        raise AudioError("holds samples that are not numbers (NaN or infinite)")
    return block


def read_range(path: Path, start_s: float, end_s: float) -> NDArray[np.float32]:
    """(S,) samples of a mono file from one second to another."""
    rate = soundfile.info(path).samplerate
    blocks = list(read_blocks(path, round(start_s * rate), round(end_s * rate)))
    return np.concatenate(blocks)[:, 0] if blocks else np.zeros(0, np.float32)


def decode(path: Path) -> Iterator[tuple[NDArray[np.float32], int]]:
    """(S, C) samples of the first sound track of any file, and their rate in Hz, about 10 s at a time.

    Raises:
        AudioError: it cannot be opened, is no audio, needs an ffmpeg that is not there, or holds no sound; or, after
            the blocks that came before, breaks off: less audio than the header promises, data that do not decode, or
            more of them than a WAV's header can tell of.
            Of an Ogg file that is cut short nothing tells so.
    """
    _check_file(path)
    try:
        blocks = _by_sndfile(path, sndfile_info(path))
    except ForFfmpegError as error:
        blocks = _by_ffmpeg(path, str(error), error.filters)  # the error would keep this frame alive, and so ffmpeg
    frames = 0
    for block, rate in blocks:
        frames += len(block)
        yield block, rate
    if not frames:
        raise AudioError("holds no sound")
    if (untold := bytes_untold(path)) > rate * block.shape[1]:  # about a second
        raise AudioError(
            f"is a WAV of which {untold / 1e6:.1f} MB are behind the sound that its header can tell of, "
            f"{frames / rate:.0f} s: make a FLAC of it (ffmpeg -ignore_length 1 -i FILE FILE.flac)"
        )


def read_spans(path: Path, spans: Sequence[tuple[float, float | None]]) -> tuple[list[NDArray[np.float32]], int]:
    """Ranges of any file, as recorded.

    Args:
        spans: start and end in seconds, by the times of `decode`; None is the end of the file.

    Returns:
        (S, C) samples of each, fewer where the file ends before, and their rate in Hz.
    Raises:
        AudioError: as `decode`, up to where the last of them ends.
    """
    _check_file(path)
    try:
        info = sndfile_info(path)
    except ForFfmpegError:
        return _pass_over(path, spans)
    rate, pieces = info.samplerate, []
    for start, end in spans:
        first = min(round(start * rate), info.frames)
        before = min(first, rate) if info.format == "MP3" else 0  # a frame needs bits of some that came before it
        blocks = read_blocks(path, first - before, None if end is None else round(end * rate))
        pieces.append(np.concatenate([*blocks] or [np.zeros((0, info.channels), np.float32)])[before:])
    return pieces, rate


def _pass_over(path: Path, spans: Sequence[tuple[float, float | None]]) -> tuple[list[NDArray[np.float32]], int]:
    """As `read_spans`, of a file in which no place can be gone to: in one pass, however many there are."""
    pieces: list[list[NDArray[np.float32]]] = [[] for _ in spans]
    at, rate = 0, 0
    for block, rate in decode(path):
        ends = [math.inf if end is None else round(end * rate) for _, end in spans]
        for piece, (start, _), end in zip(pieces, spans, ends, strict=True):
            piece.append(block[max(0, round(start * rate) - at) : int(max(0, min(end - at, len(block))))].copy())
        at += len(block)
        if at >= max(ends, default=0):
            break
    return [np.concatenate(piece) for piece in pieces], rate


def _check_file(path: Path) -> None:
    try:
        if not path.is_file():  # to open a pipe may take for ever
            raise AudioError("is no file" if path.exists() else "is not there")
        with path.open("rb") as file:
            if not file.read(1):
                raise AudioError("is empty (0 bytes)")
    except OSError as error:
        raise AudioError(f"cannot be opened: {error.strerror}") from None


def sndfile_info(path: Path):
    """What libsndfile says of a file that it reads whole.

    Raises:
        ForFfmpegError: it does not.
    """
    try:
        info = _quietly(soundfile.info, sndfile_name(path), verbose=True)
    except (soundfile.LibsndfileError, TypeError) as error:  # the latter of a name that ends in .raw
        complaint = getattr(error, "error_string", "of no kind that it knows").rstrip(".")
        raise ForFfmpegError(f"is not readable as audio ({complaint}), or", _TIMED) from None
    if not is_told(path, info):
        raise ForFfmpegError("does not tell how long it is, and", ())
    return info


def _by_sndfile(path: Path, info) -> Iterator[tuple[NDArray[np.float32], int]]:
    frames, promised = 0, info.frames
    for block in read_blocks(path):
        frames += len(block)
        yield block, info.samplerate
    # libsndfile takes the length of a WAV or AIFF that is cut short from the file, and notes what its header said.
    if found := re.search(r"(?:data|SSND|Data size) *: (\d+) \(should be (\d+)\)", info.extra_info):
        claimed, there = int(found[1]), int(found[2])
        if there < claimed < _UNKNOWN_BYTES:
            promised = max(promised, round(frames * claimed / max(there, 1)))
    if (missing := (promised - frames) / info.samplerate) > LENGTH_TOLERANCE_S:
        raise AudioError(f"is cut short: {missing:.2f} s less audio than its header says")


def _by_ffmpeg(path: Path, why: str, filters: Sequence[str]) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Args: why, filters: of a `ForFfmpegError`; the former says more where there is no ffmpeg to try."""
    try:
        program = find_ffmpeg()
    except NoFfmpegError as error:
        raise NoFfmpegError(f"{why} {error}") from None
    source = ["-nostdin", "-hide_banner", "-i", b"file:" + os.fsencode(path)]
    _check_track([program, *source])
    # AU is the plainest format that says its rate and channels before its samples, however many there will be.
    sound = ["-map", "0:a:0", *filters, "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    command = [program, "-v", "error", *source, *sound]
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints)
        try:
            with process.stdout as stream:
                yield from _au_blocks(stream)
            failed = process.wait()
        finally:
            process.kill()
            process.wait()
        complaints.seek(0)
        said = complaints.read(1 << 16).decode("utf-8", "replace")
    if failed < 0:
        raise NotNowError(f"was not read to its end: ffmpeg was ended (signal {-failed}), perhaps for want of memory")
    if re.search(r"partial file|ended prematurely", said):
        raise AudioError("is cut short, ffmpeg says")
    if found := re.search(r"(.*)\n.*Error during demuxing", said):
        raise AudioError(f"could not be read to its end: {_without_place(found[1])}")
    if failed:
        reason = _without_place(said.partition("\n")[0]) or f"exit code {failed}"
        raise AudioError(f"is no audio that ffmpeg can decode (damaged, protected or of another kind): {reason}")


def _without_place(line: str) -> str:
    """What ffmpeg says, without which part of it did."""
    return re.sub(r"^(\[[^]]*\] ?)*", "", line)


def _check_track(command: list) -> None:
    """Refuses what has no sound, and what is protected, which would decode to noise.

    Args: command: of ffmpeg with nothing but a source, of which it then tells what it holds.
    """
    about = subprocess.run(command, capture_output=True).stderr.decode("utf-8", "replace")
    tracks = re.findall(r"^ *Stream #\d.*?: Audio: (.*)$", about, re.MULTILINE)
    if "Stream #" in about and not tracks:
        raise AudioError("holds no sound")
    if tracks and re.search(_PROTECTED, tracks[0]) or "DRM protected stream" in about:
        raise AudioError("is protected (DRM): it can be played by its seller's program alone")


def _au_blocks(sound) -> Iterator[tuple[NDArray[np.float32], int]]:
    """Args: sound: the bytes of an AU stream of 32-bit floats; nothing at all gives no block."""
    header = sound.read(_AU.size)
    if len(header) < _AU.size:
        return
    _, before, _, _, rate, channels = _AU.unpack(header)
    sound.read(before - _AU.size)
    size = 4 * channels
    while data := sound.read(size * min(BLOCK_S * rate, _MOST // channels)):
        samples = np.frombuffer(data[: len(data) - len(data) % size], ">f4").astype(np.float32)
        if len(samples):
            yield _finite(samples.reshape(-1, channels)), rate


class Resampler:
    """Of one channel, in blocks, without seams: together they are what resampling the whole would give (soxr, HQ)."""

    def __init__(self, rate: int, to: int) -> None:
        """Args: rate, to: Hz."""
        self._stream = None if rate == to else soxr.ResampleStream(rate, to, 1, dtype="float32")

    def __call__(self, samples: NDArray[np.float32], last: bool = False) -> NDArray[np.float32]:
        """(S,) to (S',); `last` gives what was held back."""
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        return samples if self._stream is None else self._stream.resample_chunk(samples, last=last)
