"""PromptSpeech: English, 26,588 clips out of LibriTTS and of synthetic voices, with descriptions of their style, 38 h.

Guo et al. 2023, "PromptTTS: Controllable Text-to-Speech with Text Descriptions" (ICASSP).
Where: the page of PromptTTS, speechresearch.github.io/prompttts; the real clips are of LibriTTS, openslr.org/60.
Licence: not stated for the descriptions; LibriTTS is CC BY 4.0.
Layout: one or more CSV files and the audio, in any folders. No sample was at hand, so which column of the CSV holds
what is a parameter, `columns`; a `columns.json` in the corpus folder, {"caption": "the CSV's name for it"}, goes before
the default, also where `load_corpora` reads the corpus.

Splits as for TextrolSpeech; a column `split` goes before both.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from esr_utils.corpora import CorpusError
from esr_utils.corpora.captioned import Corpus, from_csv
from esr_utils.runs import read_json

ABOUT = "PromptSpeech: English speech with descriptions of its style."
SOURCE = "speechresearch.github.io/prompttts"
LICENCE = "not stated for the descriptions; LibriTTS is CC BY 4.0"
LAYOUT = "CSV files and audio in any folders; columns.json may say which column holds what"

COLUMNS = {
    "name": "item_name",
    "path": "wav_fp",
    "caption": "style_prompt",
    "text": "content_prompt",
    "speaker": "speaker",
    "split": "split",
    "emotion": "emotion",
    "gender": "gender",
    "pitch": "pitch",
    "tempo": "speed",
    "energy": "volume",
}


def prepare(root: Path, columns: dict[str, str] | None = None) -> pd.DataFrame:
    """The manifest of the clips that the CSV files name. See `build_manifest` for what is left out.

    Args:
        columns: column of the manifest (or `name`, `emotion`) → column of the CSV, over those of COLUMNS.
    Raises:
        CorpusError: no CSV with the columns of the caption and of the path or name; a map that is none.
    """
    if columns is None and (root / "columns.json").is_file():
        columns = read_json(root / "columns.json")
    columns = columns or {}
    if not isinstance(columns, dict) or not all(isinstance(column, str) for column in columns.values()):
        raise CorpusError(f"columns are {columns!r}; they must be {{column of the manifest: column of the CSV}}")
    if unknown := set(columns) - set(COLUMNS):
        raise CorpusError(f"columns has {', '.join(sorted(unknown))}; known are {', '.join(COLUMNS)}")
    return from_csv(root, Corpus("promptspeech", "en", LICENCE, SOURCE), COLUMNS | columns)
