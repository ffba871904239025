"""RAVDESS, its speech: 24 North American actors, 2 sentences, 8 emotions, 2 intensities, 1440 clips, 48 kHz.

Livingstone & Russo 2018, "The Ryerson Audio-Visual Database of Emotional Speech and Song".
Where: Zenodo record 1188976, Audio_Speech_Actors_01-24.zip. Licence: CC BY-NC-SA 4.0.
Layout: `Actor_01/03-01-05-01-01-01-01.wav`; the name is modality-channel-emotion-intensity-statement-
repetition-actor. Odd actors are men, even ones women. Songs (channel 02) and other modalities than audio (03)
are left out.

Two traps: 03-01-03-01-02-01-07 and 03-01-03-01-02-02-07 are the same recording, so the second is left out;
and some re-uploads hold every file twice, in two folders.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from esr_utils.audio_files import AudioError, read_header
from esr_utils.manifests import build_manifest
from esr_utils.styles import CORPUS_STYLES

ABOUT = "RAVDESS: acted emotional speech of 24 North American actors."
SOURCE = "Zenodo record 1188976, Audio_Speech_Actors_01-24.zip"
LICENCE = "CC BY-NC-SA 4.0"
LAYOUT = "Actor_01/03-01-05-01-01-01-01.wav"

EMOTIONS = dict(
    zip(
        ("01", "02", "03", "04", "05", "06", "07", "08"),
        ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"),
        strict=True,
    )
)
INTENSITIES = {"01": "normal", "02": "strong"}
STATEMENTS = {"01": "Kids are talking by the door", "02": "Dogs are sitting by the door"}
VAL_ACTORS = range(15, 17)
TEST_ACTORS = range(17, 25)
SAME_RECORDING = {"03-01-03-01-02-02-07": "03-01-03-01-02-01-07"}  # left out: the one it repeats


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the .wav files anywhere under `root`. See `build_manifest` for what is left out."""
    rows: dict[str, dict] = {}
    left_out: dict[str, str] = {}
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() == ".wav")
    names = {file.stem for file in files}
    for file in files:
        path = file.relative_to(root).as_posix()
        try:
            reason = _unwanted(file.stem, names) or ("same name as another file" if file.stem in rows else "")
            if not reason:
                rows[file.stem] = _row(file.stem, path, read_header(root, path).duration_s)
        except AudioError as error:
            reason = str(error)
        if reason:
            left_out[path] = reason
    return build_manifest([rows[name] for name in sorted(rows)], left_out)


def _unwanted(name: str, names: set[str]) -> str:
    if not re.fullmatch(r"\d\d(-\d\d){6}", name):
        return "name is not of RAVDESS"
    modality, channel, emotion, intensity, statement, _, actor = name.split("-")
    if channel == "02":
        return "song"
    if modality != "03":
        return "not the audio-only modality"
    if SAME_RECORDING.get(name) in names:
        return "same recording as another file"
    known = emotion in EMOTIONS and intensity in INTENSITIES and statement in STATEMENTS and 1 <= int(actor) <= 24
    return "" if channel == "01" and known else "name is not of RAVDESS"


def _row(name: str, path: str, duration_s: float) -> dict:
    _, _, emotion, intensity, statement, _, actor = name.split("-")
    raw, number = EMOTIONS[emotion], int(actor)
    return {
        "utterance_id": f"ravdess/{name}",
        "path": path,
        "corpus": "ravdess",
        "split": "test" if number in TEST_ACTORS else "val" if number in VAL_ACTORS else "train",
        "speaker": f"actor_{actor}",
        "gender": "male" if number % 2 else "female",
        "language": "en",
        "style": CORPUS_STYLES["ravdess"][raw],
        "style_raw": raw,
        "intensity": INTENSITIES[intensity],
        "text": STATEMENTS[statement],
        "duration_s": round(duration_s, 4),
        "licence": LICENCE,
        "source": f"Zenodo record 1188976: {path}",
    }
