"""Video and audio files: which there are, and their sound as FLAC at 44.1 kHz.

libsndfile reads wav, flac, ogg, opus and mp3 (see `decoding`); everything else goes through ffmpeg. Sound is read,
resampled and written in blocks, so that an hour needs no more memory than a minute.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from esr_utils.audio_files import AudioError
from esr_utils.audio_folder import AUDIO, PLAIN, VIDEO, printable
from esr_utils.decoding import ForFfmpegError, NoFfmpegError, decode, find_ffmpeg, sndfile_info
from esr_utils.runs import atomic_path

SOUND_RATE = 44_100  # Hz; what the separator is trained on


class MiningError(RuntimeError):
    """Something that mining cannot go on without; the message says what to do."""


@dataclass(frozen=True)
class Source:
    """A file to be mined.

    Attributes:
        id: the name of its files in every stage: letters, digits and - alone, another for each path.
        path: absolute.
        name: its path relative to the folder that was given, for people; what cannot be printed is replaced.
    """

    id: str
    path: Path
    name: str

    @property
    def identity(self) -> list:
        """What changes when the file is replaced: its id, size in bytes and time of change."""
        stat = self.path.stat()
        return [self.id, stat.st_size, stat.st_mtime_ns]


def find_sources(root: str | Path) -> list[Source]:
    """A file, or all video and audio below a folder in the order of their names; hidden ones are left out.

    Raises:
        MiningError: there is nothing to mine.
    """
    root = Path(root).expanduser().resolve()
    if root.is_file():
        return [_source(root, root.parent)]
    if not root.is_dir():
        raise MiningError(f"{root} is no file and no folder: give a video or audio file, or a folder of them")
    suffixes = {*AUDIO, *VIDEO}
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
    sources = [_source(path, root) for path in files if not _hidden(path.relative_to(root))]
    if not sources:
        raise MiningError(f"{root} holds no video and no audio; known are {', '.join(sorted(suffixes))}")
    return sources


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _source(path: Path, root: Path) -> Source:
    """A name may hold anything but "/" and NUL, so the id is what is plain in it, and a hash of the whole."""
    inside = os.fsencode(path.relative_to(root))
    plain = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:40].strip("-")
    name = printable(path.relative_to(root))
    return Source(f"{plain or 'file'}-{hashlib.sha256(inside).hexdigest()[:8]}", path, name)


def extract_sound(source: Path, target: Path) -> None:
    """Writes the first sound track of a video or audio file as FLAC, 44.1 kHz, mono or stereo; whole or not at all.

    Raises:
        AudioError: it cannot be read, or holds no sound.
        MiningError: it needs ffmpeg, which is not there.
    """
    try:
        info = sndfile_info(source)
    except ForFfmpegError as error:
        _by_ffmpeg(source, target, str(error))
    else:
        mono = info.channels != 2  # of more than two, which is which is not known
        blocks = (block.mean(axis=1, keepdims=True) if mono else block for block, _ in decode(source))
        write_sound(blocks, info.samplerate, [(target, SOUND_RATE)], 1 if mono else 2)
    if soundfile.info(target).frames == 0:
        target.unlink()
        raise AudioError("holds no sound")


def _by_ffmpeg(source: Path, target: Path, why: str) -> None:
    """Args: why: libsndfile's, for a file of a kind that it should read where there is no ffmpeg to try."""
    try:
        program = find_ffmpeg()
    except NoFfmpegError as error:
        if source.suffix.lower() in PLAIN:
            raise AudioError(f"{why} {error}") from None
        raise MiningError(str(error)) from None
    command = [program, "-nostdin", "-v", "error", "-y", "-i", f"file:{source}"]
    with atomic_path(target) as temporary:
        command += ["-map", "0:a:0", "-vn", "-ac", "2", "-ar", str(SOUND_RATE), "-sample_fmt", "s16"]
        if said := _complaint([*command, "-f", "flac", f"file:{temporary}"]):
            raise AudioError(f"ffmpeg finds no sound in it: {said}")


def _complaint(command: list[str]) -> str:
    """Runs a program; the last line that it complains with if it fails, "" if it does not."""
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    said = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return (said[-1] if said else f"exit code {done.returncode}") if done.returncode else ""


def write_sound(
    blocks: Iterator[NDArray[np.float32]], rate: int, targets: Sequence[tuple[Path, int]], channels: int
) -> None:
    """Writes blocks of (S, channels) as FLAC of 16 bit, resampled to each target's rate; all whole, or none at all."""
    with ExitStack() as stack:
        outputs = []
        for target, to in targets:
            temporary = stack.enter_context(atomic_path(target))
            resampler = None if to == rate else soxr.ResampleStream(rate, to, channels, dtype="float32")
            file = soundfile.SoundFile(temporary, "w", to, channels, "PCM_16", format="FLAC")
            outputs.append((stack.enter_context(file), resampler))
        for block in blocks:
            for file, resampler in outputs:
                block = np.ascontiguousarray(block, dtype=np.float32)
                file.write(block if resampler is None else resampler.resample_chunk(block))
        for file, resampler in outputs:
            if resampler is not None:
                file.write(resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True))


def download(addresses: str | Path, folder: str | Path) -> dict[str, str]:
    """Downloads what a list names, one address a line, by yt-dlp; lines that begin with # are left out.

    yt-dlp is not installed with this project. Whose videos may be downloaded, and what may be done with them, is for
    you to know.

    Returns:
        The addresses that failed, with yt-dlp's reason. What is there already is not downloaded again.
    Raises:
        MiningError: there is no yt-dlp.
    """
    if not (program := shutil.which("yt-dlp")):
        raise MiningError("needs yt-dlp, which is not there: pip install yt-dlp, or put the files there yourself")
    folder, failed = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in Path(addresses).read_text(encoding="utf-8").splitlines()]
    for address in dict.fromkeys(line for line in lines if line and not line.startswith("#")):
        command = [program, "--no-progress", "--restrict-filenames", "--format", "bestaudio/best"]
        command += ["--paths", str(folder.resolve()), "--output", "%(title).80s-%(id)s.%(ext)s", "--", address]
        if said := _complaint(command):
            failed[address] = said
    return failed
