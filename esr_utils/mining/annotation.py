"""How it is said, in words: funasr's SenseVoice (An et al. 2024) names an emotion, which a sentence then describes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from esr_utils.mining.funasr_models import FunasrModel
from esr_utils.prompts import PromptBank

SENSEVOICE = ("SenseVoiceSmall",)
# SenseVoice's tags → style; <|EMO_UNKNOWN|> has none
STYLE_OF = {
    "HAPPY": "happy",
    "SAD": "sad",
    "ANGRY": "angry",
    "NEUTRAL": "neutral",
    "FEARFUL": "fearful",
    "DISGUSTED": "disgusted",
    "SURPRISED": "surprised",
}
_LANGUAGES = ("zh", "en", "yue", "ja", "ko")
_ISO = {"yue": "zh"}  # Cantonese has no two letters of its own
_EVENTS = ("Speech", "BGM", "Applause", "Laughter", "Cry", "Sneeze", "Breath", "Cough")


@dataclass(frozen=True)
class Annotation:
    """What SenseVoice hears in a clip.

    Attributes:
        language: two letters; "" unknown.
        emotion: its own tag, such as HAPPY; "" unknown.
        event: its own tag for what else is heard, such as Laughter or BGM; "" for speech alone.
        text: what is said, with punctuation.
    """

    language: str = ""
    emotion: str = ""
    event: str = ""
    text: str = ""

    @property
    def style(self) -> str:
        return STYLE_OF.get(self.emotion, "")

    def to_dict(self) -> dict:
        return asdict(self)


def parse(said: str) -> Annotation:
    """From "<|zh|><|HAPPY|><|Speech|><|withitn|>text": tags in any number and order; unknown ones are dropped."""
    tags, text = re.findall(r"<\|([^|]*)\|>", said), re.sub(r"<\|[^|]*\|>", "", said).strip()
    language = next((tag for tag in tags if tag in _LANGUAGES), "")
    return Annotation(
        language=_ISO.get(language, language),
        emotion=next((tag for tag in tags if tag in STYLE_OF), ""),
        event=next((tag for tag in tags if tag in _EVENTS and tag != "Speech"), ""),
        text=text,
    )


def annotate(sensevoice: FunasrModel, waveform: NDArray[np.float32]) -> Annotation:
    """SenseVoice on (S,) mono samples at 16 kHz."""
    return parse(sensevoice(waveform, language="auto", use_itn=True).get("text", ""))


def describe(style: str, utterance_id: str, bank: PromptBank) -> str:
    """A sentence of the prompt bank for a style, always the same for one clip; "" for no style."""
    if not style:
        return ""
    seed = int.from_bytes(hashlib.sha256(utterance_id.encode()).digest()[:8], "big")
    return bank.sample(style, np.random.default_rng(seed))
