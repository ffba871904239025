"""EmoDB, the Berlin Database of Emotional Speech: 10 actors, 10 German sentences, 7 emotions, 535 clips.

Burkhardt et al. 2005, "A Database of German Emotional Speech". 16 kHz.
Where: emodb.bilderbar.info. Licence: CC0-1.0.
Layout: `wav/03a01Fa.wav`; the name is speaker (2 digits), sentence (a or b and 2 digits), emotion (the first
letter of the German word), take (a letter).
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from esr_utils.audio_files import AudioError, read_header
from esr_utils.manifests import build_manifest
from esr_utils.styles import CORPUS_STYLES

ABOUT = "EmoDB: acted emotional speech of 10 German actors."
SOURCE = "emodb.bilderbar.info"
LICENCE = "CC0-1.0"
LAYOUT = "wav/03a01Fa.wav"

EMOTIONS = {  # Wut, Langeweile, Ekel, Angst, Freude, Trauer, neutral
    "W": "anger",
    "L": "boredom",
    "E": "disgust",
    "A": "anxiety/fear",
    "F": "happiness",
    "T": "sadness",
    "N": "neutral",
}
SENTENCES = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}
MEN = ("03", "10", "11", "12", "15")
WOMEN = ("08", "09", "13", "14", "16")
VAL_SPEAKERS = ("13",)
TEST_SPEAKERS = ("14", "15", "16")

_NAME = re.compile(r"(?P<speaker>\d\d)(?P<sentence>[ab]\d\d)(?P<emotion>[WLEAFTN])[a-z]")


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the .wav files anywhere under `root`. See `build_manifest` for what is left out."""
    rows: dict[str, dict] = {}
    left_out: dict[str, str] = {}
    for file in sorted(file for file in root.rglob("*") if file.suffix.lower() == ".wav"):
        path = file.relative_to(root).as_posix()
        parts = _NAME.fullmatch(file.stem)
        if not parts or parts["speaker"] not in MEN + WOMEN or parts["sentence"] not in SENTENCES:
            left_out[path] = "name is not of EmoDB"
        elif file.stem in rows:
            left_out[path] = "same name as another file"
        else:
            try:
                rows[file.stem] = _row(file.stem, path, read_header(root, path).duration_s, **parts.groupdict())
            except AudioError as error:
                left_out[path] = str(error)
    return build_manifest([rows[name] for name in sorted(rows)], left_out)


def _row(name: str, path: str, duration_s: float, speaker: str, sentence: str, emotion: str) -> dict:
    raw = EMOTIONS[emotion]
    return {
        "utterance_id": f"emodb/{name}",
        "path": path,
        "corpus": "emodb",
        "split": "test" if speaker in TEST_SPEAKERS else "val" if speaker in VAL_SPEAKERS else "train",
        "speaker": f"spk_{speaker}",
        "gender": "male" if speaker in MEN else "female",
        "language": "de",
        "style": CORPUS_STYLES["emodb"][raw],
        "style_raw": raw,
        "text": SENTENCES[sentence],
        "duration_s": round(duration_s, 4),
        "licence": LICENCE,
        "source": f"{SOURCE}: {path}",
    }
