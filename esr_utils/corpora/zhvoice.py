"""Zhvoice with SpeechCraft's descriptions: Mandarin, read and recorded by telephone, 1,020,427 clips, 800 h.

Jin et al. 2024, "SpeechCraft". Zhvoice gathers eight open Mandarin corpora. Captions are Mandarin, of which MiniLM
knows nothing: score with a multilingual text backbone from a folder.
Where: audio from fighting41love/zhvoice on GitHub; labels and descriptions (ZH) from thuhcsi/SpeechCraft on GitHub.
Licence: those of the eight corpora; SpeechCraft states none for its annotations.
Layout: any folders of audio, and SpeechCraft's files (`esr_utils/corpora/speechcraft.py`).

The split is by folder, which in Zhvoice is a speaker's: 5 % each for val and test, by a hash.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from esr_utils.corpora import speechcraft
from esr_utils.corpora.captioned import Corpus

ABOUT = "Zhvoice with SpeechCraft's descriptions: Mandarin, 1,020,427 clips."
SOURCE = "fighting41love/zhvoice on GitHub (audio), thuhcsi/SpeechCraft on GitHub (labels, descriptions)"
LICENCE = "those of the eight corpora it gathers"
LAYOUT = "audio in a folder per speaker, labels.json and description files in any"


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the labelled or described clips. See `speechcraft` for what is left out.

    Raises:
        CorpusError: no label and no description file.
    """
    corpus = Corpus("zhvoice", "zh", LICENCE, SOURCE)
    return speechcraft.prepare(root, corpus, lambda name, path: path.rpartition("/")[0] or name)
