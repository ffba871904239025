"""Expresso: four North American speakers, read in 8 styles and in improvised dialogues of 26, 48 kHz, about 40 h.

Nguyen et al. 2023, "EXPRESSO: A Benchmark and Analysis of Discrete Expressive Speech Resynthesis".
Where: speechbot.github.io/expresso. Licence: CC BY-NC 4.0.
Layout: `audio_48khz/read/ex03/default/base/ex03_default_emphasis_00010.wav`, mono;
`audio_48khz/read/ex01/default/longform/ex01_default_longform_00001.wav`, minutes long;
`audio_48khz/conversational/ex04-ex01/sad-sympathetic/ex04-ex01_sad-sympathetic_002.wav`, stereo: the left channel
(channel1) is the first speaker in the first style, the right one the second speaker, in the second style if there are
two; `splits/{train,dev,test}.txt`, a recording a line, perhaps with the only part of it that belongs to the split:
`(60.0s,)`, `(,60.0s)`, `(50.27s,100.54s)`; `VAD_segments.txt`, the stretches of speech of each channel of the long
recordings: `ex01-ex02_default_001/channel1`, a tab, `(23.88, 28.14) (55.12, 61.83)`; `read_transcriptions.txt`.
Lines that begin with # are comments.

ESR (section IV-A) uses 19 of the 26 styles. Read clips are taken whole. Long recordings are cut: each stretch of
speech, as far as it lies in the part that belongs to the split, is an utterance if it lasts 1 s or more; one that is
longer than `max_segment_s` becomes equal windows, as few as will do, so that no scrap is left over.

The published code drops the parts and looks for each recording in train first. Every long recording is in train too,
so all of them land there: its test set is read clips alone, in 7 styles. `paper_compat=True` (the corpus
"expresso-paper") does likewise. Its val and test are those of the published code, clip for clip; its train has the
same recordings, but is cut as here, where that code looks for speech by energy and keeps pauses of up to 2 s. Never
train on it and test on the other: the long recordings that are test here are train there. The other way about is sound,
for its test set is a part of the one here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import pandas as pd

from esr_utils.audio_files import AudioError, Header, read_header
from esr_utils.corpora import CorpusError, read_lines
from esr_utils.manifests import build_manifest
from esr_utils.styles import CORPUS_STYLES

ABOUT = "Expresso: read and improvised speech of four North American speakers, 26 styles, 19 of them used."
SOURCE = "speechbot.github.io/expresso"
LICENCE = "CC BY-NC 4.0"
LAYOUT = "audio_48khz/read, audio_48khz/conversational, splits/train.txt, VAD_segments.txt, read_transcriptions.txt"

SPLITS = {"train": "train", "dev": "val", "test": "test"}
LEFT_OUT = ("animal", "animaldir", "child", "childdir", "narration", "nonverbal", "singing")
VAD_FILE = "VAD_segments.txt"
TEXT_FILE = "read_transcriptions.txt"
MIN_SEGMENT_S = 1.0

Part = tuple[int, int]  # from, to: hundredths of a second, as exact as the files are
Speech = dict[str, list[Part]]  # recording, or recording/channel1 → its stretches of speech

_NAME = re.compile(r"(?P<speakers>ex\d\d(-ex\d\d)?)_(?P<styles>[a-z]+(-[a-z]+)?)(_(?P<kind>[a-z]+))?_\d+")
_SECONDS = r"(\d+(?:\.\d+)?)"
_ENTRY = re.compile(rf"(\S+)(?:\s+\(\s*(?:{_SECONDS}s)?\s*,\s*(?:{_SECONDS}s)?\s*\))?")
_STRETCH = re.compile(rf"\({_SECONDS},\s*{_SECONDS}\)")


class _LeftOut(ValueError):
    """Why an entry gives nothing."""


@dataclass(frozen=True)
class Entry:
    """A line of a split file: a recording, or the part of it that belongs to the split."""

    place: str  # file and line
    split: str  # train, dev or test
    name: str
    start: int = 0  # hundredths of a second
    end: int | None = None  # None: the recording's end

    def __str__(self) -> str:
        return f"{self.place}: {self.name}"


@dataclass(frozen=True)
class Recording:
    """What a recording's name says of it."""

    path: str
    speakers: tuple[str, ...]  # of a conversation by channel, left to right; else the one
    styles: tuple[str, ...]  # of each speaker
    long: bool  # to be cut where there is speech

    @classmethod
    def named(cls, name: str) -> Recording | None:
        """None: no recording of Expresso is called so."""
        parts = _NAME.fullmatch(name)
        if not parts:
            return None
        speakers, styles = parts["speakers"].split("-"), parts["styles"].split("-")
        if len(styles) > len(speakers):
            return None
        if len(speakers) == 2:
            path, long = f"conversational/{parts['speakers']}/{parts['styles']}", True
        else:
            long = parts["kind"] == "longform"
            path = f"read/{speakers[0]}/{styles[0]}/{'longform' if long else 'base'}"
        styles = styles * len(speakers) if len(styles) == 1 else styles
        return cls(f"audio_48khz/{path}/{name}.wav", tuple(speakers), tuple(styles), long)


def prepare(root: Path, paper_compat: bool = False, max_segment_s: float = 10.0) -> pd.DataFrame:
    """The manifest of the recordings that the split files name; as the published code splits them if `paper_compat`.

    Args:
        max_segment_s: the longest utterance cut from a long recording, seconds; 2 or more.
    Returns:
        `.attrs["left_out_files"]` has every line of the split files of which nothing is kept; of those kept, the voices
        and stretches of speech that are lost; malformed lines; and audio that no split names.
    Raises:
        CorpusError: no split files, or no VAD_segments.txt.
        ValueError: a `max_segment_s` below 2 s.
    """
    entries, left_out = read_splits(root / "splits")
    speech, malformed = read_speech(root / VAD_FILE)
    named = {recording.path for entry in entries if (recording := Recording.named(entry.name))}
    repeated: dict[str, str] = {}
    if paper_compat:
        entries, repeated = published_splits(entries)
    corpus = "expresso-paper" if paper_compat else "expresso"
    rows, lost = utterances(
        entries, speech, lambda path: read_header(root, path), max_segment_s, corpus, _texts(root / TEXT_FILE)
    )
    wavs = {file.relative_to(root).as_posix() for file in (root / "audio_48khz").rglob("*.wav")}
    stray = dict.fromkeys(sorted(wavs - named), "not in the split files")
    return build_manifest(rows, left_out | malformed | repeated | lost | stray)


def read_splits(folder: Path) -> tuple[list[Entry], dict[str, str]]:
    """The entries of train.txt, dev.txt and test.txt, in this order, and the malformed lines.

    Raises:
        CorpusError: a file is missing.
    """
    entries, left_out = [], {}
    for split in SPLITS:
        for place, line in _lines(folder / f"{split}.txt"):
            parts = _ENTRY.fullmatch(line)
            start, end = (_hundredths(parts[2] or "0"), parts[3] and _hundredths(parts[3])) if parts else (0, 0)
            if end is None or start < end:
                entries.append(Entry(place, split, parts[1], start, end))
            else:
                left_out[place] = "malformed line"
    return entries, left_out


def read_speech(file: Path) -> tuple[Speech, dict[str, str]]:
    """The stretches of speech in the long recordings, and the lines that are malformed or repeated.

    Malformed is also a line in which a stretch ends before it begins, or begins before the last one ended.

    Raises:
        CorpusError: no such file.
    """
    speech, left_out = {}, {}
    for place, line in _lines(file):
        name, _, rest = line.partition("\t")
        stretches = [(_hundredths(start), _hundredths(end)) for start, end in _STRETCH.findall(rest)]
        bounds = [bound for stretch in stretches for bound in stretch]
        if re.search(r"[\s(]", name) or _STRETCH.sub("", rest).strip() or bounds != sorted(bounds):
            left_out[place] = "malformed line"
        elif name in speech:
            left_out[place] = "names a voice for the second time"
        else:
            speech[name] = stretches
    return speech, left_out


def published_splits(entries: Iterable[Entry]) -> tuple[list[Entry], dict[str, str]]:
    """The entries as the published code takes them: whole, each recording once, train before dev before test."""
    first: dict[str, Entry] = {}
    left_out = {}
    for entry in entries:
        kept = first.setdefault(entry.name, replace(entry, start=0, end=None))
        if kept.place != entry.place:
            left_out[str(entry)] = f"the published code has it in {kept.split}"
    return list(first.values()), left_out


def utterances(
    entries: Iterable[Entry],
    speech: Speech,
    header_of: Callable[[str], Header],
    max_segment_s: float = 10.0,
    corpus: str = "expresso",
    texts: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[dict], dict[str, str]]:
    """The rows that the entries come to, and what is left out with the reason. Looks at no file itself.

    Args:
        header_of: the header of the audio at a path of the corpus; raises AudioError if there is none.
        texts: recording → what is read; it goes to clips taken whole.
    Raises:
        ValueError: a `max_segment_s` below 2 s, which could not be had without scraps of less than 1 s.
    """
    if max_segment_s < 2 * MIN_SEGMENT_S:
        raise ValueError(f"max_segment_s is {max_segment_s:g}; it must be {2 * MIN_SEGMENT_S:g} s or more")
    rows: list[dict] = []
    left_out: dict[str, str] = {}
    taken: dict[str, list[Entry]] = {}
    for entry in entries:
        try:
            recording = _admitted(entry, taken)
            header = header_of(recording.path)
            cut = _cut(entry, recording, header, speech, round(100 * max_segment_s)) if recording.long else None
        except (_LeftOut, AudioError) as error:
            left_out[str(entry)] = str(error)
            continue
        taken.setdefault(entry.name, []).append(entry)
        if cut is None:
            rows.append(_clip(corpus, entry, recording, header, texts.get(entry.name, "")))
        else:
            rows += [_segment(corpus, entry, recording, voice, part) for voice, part in cut[0]]
            left_out |= cut[1]
    return rows, left_out


def _admitted(entry: Entry, taken: Mapping[str, list[Entry]]) -> Recording:
    """What an entry names, if its name and its styles are of use and no other entry has that part of it already."""
    recording = Recording.named(entry.name)
    if not recording:
        raise _LeftOut("name is not of Expresso")
    if not any(style in CORPUS_STYLES["expresso"] for style in recording.styles):
        raise _LeftOut(_without_style(*recording.styles))
    if not recording.long and (entry.start, entry.end) != (0, None):
        raise _LeftOut("a part of a read clip, which is taken whole or not at all")
    for other in taken.get(entry.name, ()):
        if entry.start < (other.end or math.inf) and other.start < (entry.end or math.inf):
            raise _LeftOut(f"overlaps what {other.split} has of it")
    return recording


def _without_style(*styles: str) -> str:
    kind = "style not among the 19" if set(styles) <= set(LEFT_OUT) else "unknown style"
    return f"{kind}: {', '.join(sorted(set(styles)))}"


def _cut(
    entry: Entry, recording: Recording, header: Header, speech: Speech, longest: int
) -> tuple[list[tuple[int, Part]], dict[str, str]]:
    """Who speaks when in the part of a long recording: (voice, segment); and what of it is left out.

    Raises:
        _LeftOut: nothing is kept.
    """
    voices = len(recording.speakers)
    if header.channels != voices:
        raise _LeftOut(f"has {header.channels} channel(s) where {voices} would be the voices")
    length = header.frames * 100 // header.sample_rate
    segments, scraps, silent = [], {}, {}
    for voice, style in enumerate(recording.styles):
        name = f"{entry.name}/channel{voice + 1}" if voices == 2 else entry.name
        parts = list(_within(speech.get(name, ()), entry.start, min(entry.end or length, length)))
        kept = [(a, b) for a, b in parts if b - a >= 100 * MIN_SEGMENT_S]
        if style not in CORPUS_STYLES["expresso"]:
            silent[name] = _without_style(style)
        elif not kept:
            reason = f"no speech of {MIN_SEGMENT_S:g} s or more in its part"
            silent[name] = reason if name in speech else f"not in {VAD_FILE}"
        else:
            segments += [(voice, window) for part in kept for window in _windows(part, longest)]
            short = [f"{name} {a / 100:.2f}-{b / 100:.2f}" for a, b in parts if (a, b) not in kept]
            scraps |= dict.fromkeys(short, "speech of less than 1 s")
    if not segments:
        raise _LeftOut("; ".join(dict.fromkeys(silent.values())))
    return segments, scraps | {f"{entry.place}: {name}": reason for name, reason in silent.items()}


def _within(stretches: Iterable[Part], start: int, end: int) -> Iterator[Part]:
    """The stretches as far as they lie between `start` and `end`."""
    clipped = ((max(a, start), min(b, end)) for a, b in stretches)
    return ((a, b) for a, b in clipped if a < b)


def _windows(part: Part, longest: int) -> Iterator[Part]:
    """The part, or if it is longer than `longest`, as few equal windows as will do; to a hundredth of a second."""
    start, length = part[0], part[1] - part[0]
    count = -(-length // longest)
    return ((start + i * length // count, start + (i + 1) * length // count) for i in range(count))


def _clip(corpus: str, entry: Entry, recording: Recording, header: Header, text: str) -> dict:
    whole = {"utterance_id": f"{corpus}/{entry.name}", "text": text, "duration_s": round(header.duration_s, 4)}
    return _row(corpus, entry, recording, 0) | whole


def _segment(corpus: str, entry: Entry, recording: Recording, voice: int, part: Part) -> dict:
    start_s, end_s = part[0] / 100, part[1] / 100
    channel = f"channel{voice + 1}/" if len(recording.speakers) == 2 else ""
    return _row(corpus, entry, recording, voice) | {
        "utterance_id": f"{corpus}/{entry.name}/{channel}{start_s:.2f}-{end_s:.2f}",
        "start_s": start_s,
        "end_s": end_s,
        "channel": voice if channel else None,
        "duration_s": (part[1] - part[0]) / 100,
    }


def _row(corpus: str, entry: Entry, recording: Recording, voice: int) -> dict:
    """The cells that do not depend on when something is said. The corpus does not tell which speakers are women."""
    style = recording.styles[voice]
    return {
        "path": recording.path,
        "corpus": corpus,
        "split": SPLITS[entry.split],
        "speaker": recording.speakers[voice],
        "language": "en",
        "style": CORPUS_STYLES["expresso"][style],
        "style_raw": style,
        "licence": LICENCE,
        "source": f"{SOURCE}: {recording.path}",
    }


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Place (file and number) and text of the lines that are neither blank nor comments."""
    if not file.is_file():
        raise CorpusError(f"there is no {file}. {ABOUT} Get it from {SOURCE}. Licence: {LICENCE}. Layout: {LAYOUT}.")
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip() and not line.startswith("#"):
            yield f"{file.name} line {number}", line.strip()


def _texts(file: Path) -> dict[str, str]:
    """Recording → what is read in it; nothing where the file is not there."""
    lines = (line.partition("\t") for _, line in _lines(file)) if file.is_file() else ()
    return {name: text.strip() for name, _, text in lines}


def _hundredths(seconds: str) -> int:
    return round(100 * float(seconds))
