"""Whether an audio file tells how long it is. libsndfile goes by its header, and where that is wrong, or of a part, it
reads a part without a word: of MP3s without a header or joined, of joined Ogg files, of WAVs that grew past it.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

from esr_utils.audio_files import MAX_FRAMES

# Of the first frame of an MP3, as Xing has it (and LAME and ffmpeg write it): frames and bytes of the whole stream.
_XING = re.compile(rb"(?:Xing|Info)...[\x03\x07\x0b\x0f](.{4})(.{4})", re.DOTALL)
_FRAME_BYTES = 1500  # no frame of an MP3 has more
_TAGS = 1024  # bytes of tags that may follow the last frame
_OGG_TAIL = 1 << 17  # bytes at the end of an Ogg file, in which its last page begins: it has at most half as many


def is_told(path: Path, info) -> bool:
    """Whether libsndfile, which says `info` of a file, knows how long it is."""
    if not 0 < info.frames < MAX_FRAMES:  # a WAV whose writer was ended; what was written to a pipe
        return False
    if info.subtype.startswith("MPEG"):
        return info.format == "MP3" and _mp3_is_told(path, info)
    return info.format != "OGG" or _is_one_stream(path)


def _mp3_is_told(path: Path, info) -> bool:
    """Without a header libsndfile takes all frames to be as large as the first; of files that were joined it knows what
    the first tells."""
    with path.open("rb") as file:
        at = 0
        while (tag := file.read(10))[:3] == b"ID3" and len(tag) == 10:
            footer = 10 if tag[5] & 0x10 else 0
            at += 10 + footer + sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=True))
            file.seek(at)
        file.seek(at)
        found = _XING.search(file.read(1 << 13))
        there = os.fstat(file.fileno()).st_size - at
    if found is None:
        return False
    frames, size = (int.from_bytes(number) for number in found.groups())
    samples = frames * (1152 if info.samplerate >= 32_000 else 576)
    told = abs(samples - info.frames) <= 8 * 1152  # of which the encoder's delay is left out
    return told and size <= (frames + 1) * _FRAME_BYTES and there - found.start() <= size + _TAGS


def _is_one_stream(path: Path) -> bool:
    """Whether the last page of an Ogg file is of the stream of the first: else another one was appended."""
    with path.open("rb") as file:
        first = file.read(18)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _OGG_TAIL))
        tail = file.read()
    last = tail.rfind(b"OggS")
    return last >= 0 and tail[last + 14 : last + 18] == first[14:18]


def bytes_untold(path: Path) -> int:
    """Bytes of a WAV behind what its header calls sound that are no chunks: of another file, or of what was recorded
    after the header was written, or of all above the 4 GB that it can tell of."""
    size = path.stat().st_size
    with path.open("rb") as file:
        at, sound = 12 if file.read(4) == b"RIFF" else size, False
        while at + 8 <= size:
            file.seek(at)
            name, length = struct.unpack("<4sI", file.read(8))
            if sound and (name == b"RIFF" or not re.fullmatch(rb"[ -~]{4}", name) or at + 8 + length > size):
                return size - at
            if name == b"data" and not length:  # its writer was ended: sound goes on to the end
                return 0
            sound = sound or name == b"data"
            at += 8 + length + length % 2
    return 0
