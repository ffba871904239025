"""TextrolSpeech: English, 236,220 descriptions of speech out of LibriTTS, VCTK and emotional corpora, 330 h.

Ji et al. 2024, "TextrolSpeech: A Text Style Control Speech Corpus" (ICASSP).
Where: jishengpeng/TextrolSpeech on GitHub names the downloads (emotional speech and text; LibriTTS from openslr.org/60,
VCTK from datashare.ed.ac.uk/handle/10283/3443).
Licence: not stated for the descriptions; the audio has each corpus's own.
Layout: CSV files with columns num, wav_fp, item_name, gender, pitch, tempo, energy, emotion, style_prompt,
content_prompt, and the audio where wav_fp says, or where the end of wav_fp says, in the corpus folder.

A CSV with train, val or test in its name gives its rows that split; else 5 % each go to val and test, by a hash of the
folder of the audio. Its authors' test set is 200 clips drawn at random. The speakers are not named.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from esr_utils.corpora.captioned import Corpus, from_csv

ABOUT = "TextrolSpeech: English speech of many corpora, with descriptions of its style."
SOURCE = "jishengpeng/TextrolSpeech on GitHub"
LICENCE = "not stated for the descriptions; the audio has each corpus's own"
LAYOUT = "CSV files with columns wav_fp, item_name, style_prompt, and the audio under wav_fp"

COLUMNS = {
    "name": "item_name",
    "path": "wav_fp",
    "caption": "style_prompt",
    "text": "content_prompt",
    "emotion": "emotion",
    "gender": "gender",
    "pitch": "pitch",
    "tempo": "tempo",
    "energy": "energy",
}


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the clips that the CSV files name. See `build_manifest` for what is left out.

    Raises:
        CorpusError: no CSV with the columns wav_fp or item_name and style_prompt.
    """
    return from_csv(root, Corpus("textrolspeech", "en", LICENCE, SOURCE), COLUMNS)
