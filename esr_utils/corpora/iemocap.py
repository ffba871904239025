"""IEMOCAP: ten actors in five sessions, one woman and one man each, in scripted and improvised dialogues, 16 kHz.

Busso et al. 2008, "IEMOCAP: interactive emotional dyadic motion capture database". About 12 h, 10,039 utterances.
Where: sail.usc.edu/iemocap, by request to USC SAIL. Licence: IEMOCAP's own, for research that is not commercial.
Layout: `Session1/dialog/EmoEvaluation/Ses01F_impro01.txt` has the labels, a line for each utterance followed by what
its raters said; `Session1/dialog/transcriptions/Ses01F_impro01.txt` what is spoken;
`Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav` the audio.

The first F or M of an utterance's name is that of the actor who wore the markers; who speaks is the last.

All is training data (ESR, section IV-A). Utterances of another emotion (oth) or on which the raters do not agree (xxx,
a quarter of all) are left out. The paper's Table I has 12.4 h, nearly all of the corpus: its published code takes the
labels of a re-upload, which names an emotion for the latter too.
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

ABOUT = "IEMOCAP: acted dialogues of ten North American actors, nine emotions."
SOURCE = "sail.usc.edu/iemocap, by request to USC SAIL"
LICENCE = "IEMOCAP licence (USC SAIL): research, not commercial"
LAYOUT = "Session1/dialog/EmoEvaluation/Ses01F_impro01.txt, Session1/dialog/transcriptions, Session1/sentences/wav"

NO_STYLE = {"oth": "an emotion that is none of the nine (oth)", "xxx": "the raters do not agree (xxx)"}
GENDERS = {"F": "female", "M": "male"}

_LABEL = re.compile(r"\s*\[[\d. ]+-[\d. ]+\]\s+(?P<name>\S+)\s+(?P<code>\w+)\s+\[[^\]]+\]\s*")
_NO_LABEL = re.compile(r"\s*([AC]-.*|%.*)?")
_NAME = re.compile(r"(?P<dialog>(?P<session>Ses\d\d)[FM]_\w+)_(?P<gender>[FM])\w*")
_SPOKEN = re.compile(r"(?P<name>Ses\S+)\s*\[[^\]]*\]:\s*(?P<text>.*)")


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the utterances that the EmoEvaluation files label, wherever under `root` the sessions are.

    Left out, by path or by file and line: labels without a style, without audio, named twice or malformed, and audio
    that no file labels. A missing transcript leaves the text empty.
    """
    rows: dict[str, dict] = {}
    left_out: dict[str, str] = {}
    names, paths = set(), set()  # that have been met
    texts = _transcripts(root)
    for session, line, label, parts in _labels(root):
        if not parts:
            left_out[line] = "malformed line"
            continue
        name, code = label["name"], label["code"]
        path = f"{session}/sentences/wav/{parts['dialog']}/{name}.wav"
        if name in names:
            left_out[line] = "names an utterance for the second time"
        elif code not in CORPUS_STYLES["iemocap"]:
            left_out[path] = NO_STYLE.get(code, f"unknown emotion {code!r}")
        else:
            try:
                duration_s = read_header(root, path).duration_s
                rows[name] = _row(name, path, duration_s, code, texts.get(name, ""), parts)
            except AudioError as error:
                left_out[path] = str(error)
        names.add(name)
        paths.add(path)
    wavs = {file.relative_to(root).as_posix() for file in root.rglob("sentences/wav/*/Ses*.wav")}
    left_out |= dict.fromkeys(sorted(wavs - paths), "not in the annotation files")
    return build_manifest([rows[name] for name in sorted(rows)], left_out)


def _labels(root: Path) -> Iterator[tuple[str, str, re.Match | None, re.Match | None]]:
    """The lines of the EmoEvaluation files that label: session folder, file and line, the label, the name's parts.

    The others are what single raters said (`C-E1:`, `A-F1:`), the header (%) and blank ones.
    """
    for file in sorted(root.rglob("dialog/EmoEvaluation/Ses*.txt")):
        session = file.parents[2].relative_to(root).as_posix()
        for number, line in enumerate(read_lines(file), start=1):
            if not _NO_LABEL.fullmatch(line):
                label = _LABEL.fullmatch(line)
                place = f"{file.relative_to(root).as_posix()} line {number}"
                yield session, place, label, _NAME.fullmatch(label["name"]) if label else None


def _transcripts(root: Path) -> dict[str, str]:
    """What is spoken, by utterance."""
    files = sorted(root.rglob("dialog/transcriptions/Ses*.txt"))
    lines = (_SPOKEN.fullmatch(line) for file in files for line in read_lines(file))
    return {line["name"]: line["text"].strip() for line in lines if line}


def _row(name: str, path: str, duration_s: float, code: str, text: str, parts: re.Match) -> dict:
    return {
        "utterance_id": f"iemocap/{name}",
        "path": path,
        "corpus": "iemocap",
        "split": "train",
        "speaker": parts["session"] + parts["gender"],
        "gender": GENDERS[parts["gender"]],
        "language": "en",
        "style": CORPUS_STYLES["iemocap"][code],
        "style_raw": code,
        "text": text,
        "duration_s": round(duration_s, 4),
        "licence": LICENCE,
        "source": f"IEMOCAP: {path}",
    }
