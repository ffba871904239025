"""GigaSpeech-M with SpeechCraft's descriptions: English podcasts, audiobooks and YouTube, 670,070 clips, 740 h.

Chen et al. 2021, "GigaSpeech"; Jin et al. 2024, "SpeechCraft". M is its part of
1,000 h, of which SpeechCraft describes 740.
Where: audio from speechcolab/gigaspeech on the Hugging Face hub (by a form), cut into its segments; labels and
descriptions (English) from thuhcsi/SpeechCraft on GitHub. Licence: GigaSpeech's own terms (research, not commercial);
SpeechCraft states none for its annotations.
Layout: any folders of `YOU0000000315_S0000660.wav`, and SpeechCraft's files (`esr_utils/corpora/speechcraft.py`).

The split is by recording (the name before `_S`), whose clips share speakers: 5 % each for val and test, by a hash.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from esr_utils.corpora import speechcraft
from esr_utils.corpora.captioned import Corpus

ABOUT = "GigaSpeech-M with SpeechCraft's descriptions: English, 670,070 clips."
SOURCE = "speechcolab/gigaspeech on the Hugging Face hub (audio), thuhcsi/SpeechCraft on GitHub (labels, descriptions)"
LICENCE = "GigaSpeech's own terms: research, not commercial"
LAYOUT = "audio segments in any folders, labels.json and description files in any"


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the labelled or described clips. See `speechcraft` for what is left out.

    Raises:
        CorpusError: no label and no description file.
    """
    corpus = Corpus("gigaspeech-m", "en", LICENCE, SOURCE)
    return speechcraft.prepare(root, corpus, lambda name, path: name.rpartition("_S")[0] or name)
