"""The 22 speaking styles, and what each corpus calls them.

Kang & Roy, "Expressive Speech Retrieval using Natural Language Descriptions of Speaking Style" (ASRU 2025):
22 styles out of three corpora (section IV-A.1).
"""

from __future__ import annotations

import pandas as pd

STYLES: tuple[str, ...] = (
    "angry", "awe", "bored", "calm", "confused", "desire", "disgusted", "enunciated", "excited", "fast",
    "fearful", "frustrated", "happy", "laughing", "neutral", "projected", "sad", "sarcastic", "sleepy",
    "surprised", "sympathetic", "whispered",
)  # fmt: skip

# corpus → the corpus's own label → style. A label that is not here has no style.
CORPUS_STYLES: dict[str, dict[str, str]] = {
    "demo": {style: style for style in STYLES},
    "iemocap": {
        "ang": "angry",
        "hap": "happy",
        "exc": "excited",
        "sad": "sad",
        "neu": "neutral",
        "fru": "frustrated",
        "fea": "fearful",
        "sur": "surprised",
        "dis": "disgusted",
    },
    "esd": {
        "Angry": "angry",
        "Happy": "happy",
        "Neutral": "neutral",
        "Sad": "sad",
        "Surprise": "surprised",
    },
    "expresso": {
        "angry": "angry",
        "awe": "awe",
        "bored": "bored",
        "calm": "calm",
        "confused": "confused",
        "default": "neutral",
        "desire": "desire",
        "disgusted": "disgusted",
        "enunciated": "enunciated",
        "fast": "fast",
        "fearful": "fearful",
        "happy": "happy",
        "laughing": "laughing",
        "projected": "projected",
        "sad": "sad",
        "sarcastic": "sarcastic",
        "sleepy": "sleepy",
        "sympathetic": "sympathetic",
        "whisper": "whispered",
    },
    "ravdess": {
        "neutral": "neutral",
        "calm": "calm",
        "happy": "happy",
        "sad": "sad",
        "angry": "angry",
        "fearful": "fearful",
        "disgust": "disgusted",
        "surprised": "surprised",
    },
    "emodb": {
        "neutral": "neutral",
        "anger": "angry",
        "boredom": "bored",
        "disgust": "disgusted",
        "anxiety/fear": "fearful",
        "happiness": "happy",
        "sadness": "sad",
    },
    "nemo": {
        "neutral": "neutral",
        "anger": "angry",
        "fear": "fearful",
        "happiness": "happy",
        "sadness": "sad",
        "surprised": "surprised",
    },
}


# The emotions of the captioned corpora (textrolspeech, promptspeech, gigaspeech-m), in lower case. A label that is not
# here, such as contempt, has no style.
CAPTIONED_STYLES: dict[str, str] = {
    **{style: style for style in ("angry", "disgusted", "fearful", "happy", "neutral", "sad", "sleepy", "surprised")},
    "anger": "angry",
    "disgust": "disgusted",
    "fear": "fearful",
    "happiness": "happy",
    "sadness": "sad",
    "sleepiness": "sleepy",
    "surprise": "surprised",
}


def style_table() -> pd.DataFrame:
    """`CORPUS_STYLES` as rows of corpus, style_raw (the corpus's label) and style."""
    rows = [(corpus, raw, style) for corpus, labels in CORPUS_STYLES.items() for raw, style in labels.items()]
    return pd.DataFrame(rows, columns=["corpus", "style_raw", "style"])
