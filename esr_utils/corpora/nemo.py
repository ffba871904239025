"""nEMO: nine Polish actors, 90 sentences, six emotions, 4481 clips, 24 kHz.

Christop 2024, "nEMO: Dataset of Emotional Speech in Polish".
Where: amu-cai/nEMO on GitHub. (amu-cai/nEMO on the Hugging Face hub holds the same clips inside Parquet
files: export them to this layout first.) Licence: CC BY-NC-SA 4.0.
Layout: `data.tsv` and `samples/WR0_surprised_64.wav`. Tab-separated columns: file_id, emotion, raw_text,
normalized_text, speaker_id (with blanks before it), gender, age. The text taken is raw_text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from esr_utils.audio_files import AudioError, read_header
from esr_utils.corpora import CorpusError
from esr_utils.manifests import build_manifest
from esr_utils.styles import CORPUS_STYLES

ABOUT = "nEMO: acted emotional speech of nine Polish actors."
SOURCE = "amu-cai/nEMO on GitHub"
LICENCE = "CC BY-NC-SA 4.0"
LAYOUT = "data.tsv and samples/WR0_surprised_64.wav"

LABELS = "data.tsv"
FIELDS = ("file_id", "emotion", "raw_text", "speaker_id", "gender")  # those that are needed
VAL_SPEAKERS = ("KD0", "MP0")
TEST_SPEAKERS = ("IC0", "KS0")


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the clips that data.tsv names. See `build_manifest` for what is left out.

    Raises:
        CorpusError: no data.tsv, or one without the columns above.
    """
    rows: dict[str, dict] = {}
    left_out: dict[str, str] = {}
    named = set()
    for label in _labels(root / LABELS):
        path = f"samples/{label['file_id']}"
        name = path.removeprefix("samples/").removesuffix(".wav")
        if name in rows:
            left_out[f"{LABELS}: {label['file_id']}"] = "named twice in data.tsv"
        elif label["emotion"] not in CORPUS_STYLES["nemo"]:
            left_out[path] = f"unknown emotion {label['emotion']!r}"
        else:
            try:
                rows[name] = _row(name, path, read_header(root, path).duration_s, label)
            except AudioError as error:
                left_out[path] = str(error)
        named.add(path)
    samples = {file.relative_to(root).as_posix() for file in (root / "samples").glob("*.wav")}
    left_out |= dict.fromkeys(sorted(samples - named), "not in data.tsv")
    return build_manifest([rows[name] for name in sorted(rows)], left_out)


def _labels(file: Path) -> Iterator[dict[str, str]]:
    if not file.is_file():
        raise CorpusError(f"there is no {file}. {ABOUT} Get it from {SOURCE}. Licence: {LICENCE}. Layout: {LAYOUT}.")
    with file.open(newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        if missing := set(FIELDS) - set(table.fieldnames or ()):
            raise CorpusError(f"{file} has no column {', '.join(sorted(missing))}")
        for row in table:
            yield {name: (row[name] or "").strip() for name in FIELDS}


def _row(name: str, path: str, duration_s: float, label: dict[str, str]) -> dict:
    speaker = label["speaker_id"]
    return {
        "utterance_id": f"nemo/{name}",
        "path": path,
        "corpus": "nemo",
        "split": "test" if speaker in TEST_SPEAKERS else "val" if speaker in VAL_SPEAKERS else "train",
        "speaker": speaker,
        "gender": label["gender"],
        "language": "pl",
        "style": CORPUS_STYLES["nemo"][label["emotion"]],
        "style_raw": label["emotion"],
        "text": label["raw_text"],
        "duration_s": round(duration_s, 4),
        "licence": LICENCE,
        "source": f"{SOURCE}: {path}",
    }
