"""ESD, the Emotional Speech Dataset, its English part: ten speakers, 350 sentences in each of five emotions, 16 kHz.

Zhou et al. 2022, "Emotional voice conversion: Theory, databases and ESD".
Where: HLTSingapore/Emotional-Speech-Data on GitHub, by a form. Licence: for research only.
Layout: `0011/Angry/train/0011_000401.wav` (or evaluation, or test), or without these three folders
`0011/Angry/0011_000401.wav`; and `0011/0011.txt`, a line for each clip: name, text, emotion, with tabs between.
Speakers 0001 to 0010 speak Mandarin and are left out.

Clips are numbered from 1, emotion by emotion, 350 each. Of each 350 the first 20 are the evaluation set, the next 30
the test set; the three folders say the same, and have the last word where they are there. Every speaker is therefore in
all splits.

The text files are in UTF-8, UTF-16 or Latin-1; some have blanks for tabs, or lines that lack a field. They give the
text alone: the folder is the label, so a line that cannot be read leaves the text empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from esr_utils.audio_files import AudioError, read_header
from esr_utils.corpora import read_lines
from esr_utils.manifests import build_manifest
from esr_utils.styles import CORPUS_STYLES

ABOUT = "ESD: acted emotional speech of ten English speakers, five emotions."
SOURCE = "HLTSingapore/Emotional-Speech-Data on GitHub, by a form"
LICENCE = "ESD: research only"
LAYOUT = "0011/0011.txt and 0011/Angry/train/0011_000401.wav, or 0011/Angry/0011_000401.wav"

MEN = ("0011", "0012", "0013", "0014", "0020")  # as the corpus's own ReadMe has it
WOMEN = ("0015", "0016", "0017", "0018", "0019")
SPLITS = {"evaluation": "val", "test": "test", "train": "train"}
PER_EMOTION = 350
EVALUATION = 20  # of each 350 the first
TEST = 30  # the next

_EMOTIONS = "|".join(CORPUS_STYLES["esd"])
_NAME = re.compile(r"(?P<speaker>\d{4})_(?P<number>\d{6})")
_LINE = re.compile(r"\s*(?P<name>\d{4}_\d{6})(?:\t+|\s+)(?P<text>\S.*)")


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the English clips, wherever under `root` the speakers' folders are.

    Left out, by path or by file and line: clips of other speakers, emotions and names, of a name met already, or
    unreadable; lines of the text files that are malformed, repeated, or name no clip.
    """
    texts, left_out = _transcripts(root)
    rows: dict[str, dict] = {}
    for file in sorted(file for file in root.rglob("*") if file.suffix.lower() == ".wav"):
        path = file.relative_to(root).as_posix()
        parts = _NAME.fullmatch(file.stem)
        folder = file.parent if file.parent.name in SPLITS else None
        emotion = (folder.parent if folder else file.parent).name
        reason = _unwanted(parts, emotion) or ("same name as another file" if file.stem in rows else "")
        try:
            if not reason:
                split = SPLITS[folder.name] if folder else split_of(int(parts["number"]))
                text = texts.get(file.stem, ("", ""))[1]
                rows[file.stem] = _row(file.stem, path, read_header(root, path).duration_s, split, emotion, text)
        except AudioError as error:
            reason = str(error)
        if reason:
            left_out[path] = reason
    gone = {place: "names a clip that is not kept or not there" for n, (place, _) in texts.items() if n not in rows}
    return build_manifest([rows[name] for name in sorted(rows)], left_out | gone)


def split_of(number: int) -> str:
    """The split of clip `number` of a speaker, from 1: where it stands among the 350 of its emotion."""
    place = (number - 1) % PER_EMOTION
    return "val" if place < EVALUATION else "test" if place < EVALUATION + TEST else "train"


def _unwanted(parts: re.Match | None, emotion: str) -> str:
    if not parts or not 1 <= int(parts["number"]) <= PER_EMOTION * len(CORPUS_STYLES["esd"]):
        return "name is not of ESD"
    if parts["speaker"] not in MEN + WOMEN:
        return "not an English speaker"
    return "" if emotion in CORPUS_STYLES["esd"] else f"unknown emotion {emotion!r}"


def _transcripts(root: Path) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Of the English speakers' text files: {clip: (file and line, text)}, and the lines that are left out."""
    texts: dict[str, tuple[str, str]] = {}
    left_out: dict[str, str] = {}
    for place, line in _lines(root):
        parts = _LINE.fullmatch(line)
        if not parts or parts["name"][:4] not in MEN + WOMEN:
            left_out[place] = "malformed line"
        elif parts["name"] in texts:
            left_out[place] = "names a clip for the second time"
        else:
            texts[parts["name"]] = (place, _spoken(parts["text"]))
    return texts, left_out


def _lines(root: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(file for file in root.rglob("*.txt") if file.stem in MEN + WOMEN):
        for number, line in enumerate(read_lines(file), start=1):
            if line.strip():
                yield f"{file.relative_to(root).as_posix()} line {number}", line


def _spoken(rest: str) -> str:
    """The text of a line without the name: up to the tab, or else up to the emotion that ends the line."""
    text, tab, _ = rest.partition("\t")
    return text.strip() if tab else re.sub(rf"(?:^|\s+)(?:{_EMOTIONS})\s*$", "", rest).strip()


def _row(name: str, path: str, duration_s: float, split: str, emotion: str, text: str) -> dict:
    speaker = name[:4]
    return {
        "utterance_id": f"esd/{name}",
        "path": path,
        "corpus": "esd",
        "split": split,
        "speaker": speaker,
        "gender": "male" if speaker in MEN else "female",
        "language": "en",
        "style": CORPUS_STYLES["esd"][emotion],
        "style_raw": emotion,
        "text": text,
        "duration_s": round(duration_s, 4),
        "licence": LICENCE,
        "source": f"HLTSingapore/Emotional-Speech-Data: {path}",
    }
