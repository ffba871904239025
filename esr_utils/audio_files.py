"""Audio files as they lie in a corpus folder: headers, and whether they decode. libsndfile reads them all."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath

import numpy as np
import soundfile

LENGTH_TOLERANCE_S = 0.05  # seconds: lossy codecs and label files round the length of a file
MAX_FRAMES = 1 << 48  # libsndfile gives 2**63 - 1 for a stream of unknown length
BLOCK = 1 << 20  # samples decoded at a time when the audio itself is checked


class AudioError(ValueError):
    """An audio file that cannot be used; the message is the reason, without the file's name."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says, without its audio being read."""

    path: str  # absolute
    frames: int  # samples per channel
    sample_rate: int  # Hz
    channels: int

    @property
    def duration_s(self) -> float:
        return self.frames / self.sample_rate


class Folder:
    """A corpus folder, for the headers of many files: where a subfolder leads is found out once."""

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        self._inside: dict[str, str] = {}  # subfolder as written → where it is; "" if that is not inside

    def header(self, path: str) -> Header:
        """The header of the audio file `path`, which is relative to the folder.

        Raises:
            AudioError: the path is absolute or leaves the folder (also through a symlink); the file is missing,
                unreadable or empty.
        """
        full, status = self._plain(path) or self._resolved(path)
        return _header(full, status.st_size, status.st_mtime_ns)

    def _plain(self, path: str) -> tuple[str, os.stat_result] | None:
        """A file that is no link, of a subfolder inside, which most are: a tenth of what resolving its path costs."""
        parent, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.isabs(path) or "\\" in path or ":" in path:
            return None
        try:
            if parent not in self._inside:
                place = os.path.realpath(os.path.join(self.root, parent))
                self._inside[parent] = place if os.path.commonpath([self.root, place]) == self.root else ""
            full = os.path.join(self._inside[parent], name)
            status = os.lstat(full)
        except (ValueError, OSError):
            return None
        return (full, status) if self._inside[parent] and stat.S_ISREG(status.st_mode) else None

    def _resolved(self, path: str) -> tuple[str, os.stat_result]:
        if Path(path).is_absolute() or PureWindowsPath(path).is_absolute():
            raise AudioError("is absolute; it must be relative to the corpus folder")
        try:
            full = os.path.realpath(os.path.join(self.root, path))
        except (ValueError, OSError) as error:  # a NUL in the name, a loop of links
            raise AudioError(f"is not a path: {error}") from None
        if os.path.commonpath([self.root, full]) != self.root:
            raise AudioError("leaves the corpus folder")
        if not os.path.isfile(full):
            raise AudioError("is not there")
        return full, os.stat(full)


def read_header(root: str | Path, path: str) -> Header:
    """`Folder.header` of one file."""
    return Folder(root).header(path)


@lru_cache(maxsize=1 << 16)  # a manifest is checked and then made into cuts: one read for both
def _header(full: str, size: int, mtime_ns: int) -> Header:
    if not size:
        raise AudioError("is empty (0 bytes)")
    try:
        info = soundfile.info(full)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise AudioError(f"is not readable as audio: {getattr(error, 'error_string', error)}") from None
    if not 0 < info.frames < MAX_FRAMES:
        raise AudioError("holds no audio, or does not say how much")
    return Header(full, info.frames, info.samplerate, info.channels)


class ContentNames:
    """Names for what is kept of cuts: by the content of the audio file, the range, the channel and the speed.

    A file that changed is another name, whatever it is called; one that moved is the same.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple, str] = {}

    def name(self, cut) -> str:
        """32 hex digits for a lhotse cut.

        Raises:
            OSError: the audio file is gone.
        """
        parts = [cut.start, cut.duration, str(getattr(cut, "channel", 0))]
        parts += [self._digest(source.source) for source in cut.recording.sources]
        parts += [repr(cut.recording.transforms)] if cut.recording.transforms else []
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def _digest(self, path: str) -> str:
        status = os.stat(path)
        key = (path, status.st_size, status.st_mtime_ns)  # a file cut into many segments is read once
        if key not in self._digests:
            with open(path, "rb") as file:
                self._digests[key] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        return self._digests[key]


def check_audio(header: Header, start_s: float = 0.0, end_s: float | None = None, channel: int | None = None) -> None:
    """Decodes a range (seconds; None is the end) block by block, so that hours fit in little memory.

    Raises:
        AudioError: it does not decode, or not to its full length; it holds NaN; every sample is zero.
    """
    first = round(start_s * header.sample_rate)
    last = header.frames if end_s is None else min(round(end_s * header.sample_rate), header.frames)
    left, silent = last - first, True
    try:
        with soundfile.SoundFile(header.path) as file:
            file.seek(first)
            while left > 0 and len(block := file.read(min(BLOCK, left), dtype="float32", always_2d=True)):
                left -= len(block)
                block = block if channel is None else block[:, channel]
                if not np.isfinite(block).all():
                    raise AudioError("holds samples that are not numbers (NaN or infinite)")
                silent = silent and not block.any()
    except soundfile.LibsndfileError as error:
        raise AudioError(f"does not decode: {error.error_string}") from None
    if left > LENGTH_TOLERANCE_S * header.sample_rate:
        raise AudioError(f"is cut short: {left / header.sample_rate:.2f} s less audio than its header says")
    if silent:
        raise AudioError("is silent: every sample is 0")
