"""Where somebody speaks, and where sentences begin and end.

Two ways: silero-vad alone, whose segments end where somebody pauses; or, as in the FS-CLAP paper, funasr's FSMN-VAD,
then Paraformer-large for the words and their times, then CT-Transformer for the punctuation that ends sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from esr_utils.decoding import read_blocks, read_range
from esr_utils.mining.funasr_models import FunasrModel
from esr_utils.mining.separation import MODEL_RATE
from esr_utils.vad import MIN_SILENCE_S, MIN_SPEECH_S, PAD_S, SpeechProbability, load_silero

VAD, ASR, PUNCTUATION = ("FsmnVADStreaming",), ("BiCifParaformer", "SeacoParaformer"), ("CTTransformer",)
SENTENCE_ENDS = frozenset("。？！.?!")
MARKS = SENTENCE_ENDS | frozenset("，、；：,;:")
PAUSE_S = 1.0  # a silence as long ends a sentence, whatever the punctuation


@dataclass(frozen=True)
class Segment:
    """A piece of a recording, in seconds from its start.

    Attributes:
        text: what is said, where that is known.
        whole: a sentence by its punctuation, which is not to be joined with its neighbours.
    """

    start_s: float
    end_s: float
    text: str = ""
    whole: bool = False

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    def to_dict(self) -> dict:
        return asdict(self)


# silero -----------------------------------------------------------------------------------------------------


def silero_segments(path: Path, max_s: float) -> list[Segment]:
    """Speech in a mono file at 16 kHz: apart where there is a pause of 0.2 s, none longer than `max_s` seconds.

    Raises:
        weights.WeightsError: silero-vad is not installed.
    """
    load_silero()
    from silero_vad.utils_vad import get_speech_timestamps_from_probs

    probability, samples, found = SpeechProbability(), 0, []
    for block in read_blocks(path):
        found.append(probability.feed(block[:, 0]))
        samples += len(block)
    found.append(probability.finish())
    parts = get_speech_timestamps_from_probs(
        np.concatenate(found).tolist(),
        audio_length_samples=samples,
        max_speech_duration_s=max_s,
        min_silence_duration_ms=round(1000 * MIN_SILENCE_S),
        min_speech_duration_ms=round(1000 * MIN_SPEECH_S),
        speech_pad_ms=round(1000 * PAD_S),
    )
    return [Segment(part["start"] / MODEL_RATE, min(part["end"], samples) / MODEL_RATE) for part in parts]


# funasr -----------------------------------------------------------------------------------------------------


def fsmn_segments(vad: FunasrModel, path: Path) -> list[Segment]:
    """Speech in a mono file at 16 kHz, by FSMN-VAD."""
    waveform = np.concatenate([block[:, 0] for block in read_blocks(path)] or [np.zeros(0, np.float32)])
    if not waveform.any():
        return []
    length_s = len(waveform) / MODEL_RATE
    found = vad(waveform, cache={}).get("value", [])
    spans = [(start / 1000, min(end / 1000, length_s)) for start, end in found]
    return [Segment(start, end) for start, end in spans if start < end]


def transcribe(asr: FunasrModel, path: Path, speech: Sequence[Segment]) -> list[dict]:
    """The words of each stretch of speech by Paraformer: {"word", "start_s", "end_s"}, in order."""
    words = []
    for part in speech:
        found = asr(read_range(path, part.start_s, part.end_s))
        tokens, times = found.get("text", "").split(), found.get("timestamp", [])
        if len(tokens) != len(times):
            raise ValueError(f"{len(tokens)} words at {len(times)} times, {part.start_s:.2f} s into it")
        for token, (start, end) in zip(tokens, times, strict=True):
            start_s, end_s = part.start_s + start / 1000, min(part.start_s + end / 1000, part.end_s)
            words.append({"word": token, "start_s": start_s, "end_s": max(start_s, end_s)})
    return words


def punctuate(punctuation: FunasrModel, words: Sequence[dict]) -> list[Segment]:
    """Sentences of the words, by CT-Transformer's punctuation."""
    tokens = [word["word"] for word in words]
    if not tokens:
        return []
    text = punctuation(" ".join(tokens)).get("text", "")
    times = [(word["start_s"], word["end_s"]) for word in words]
    return sentences(tokens, times, marks_after(tokens, text))


def marks_after(words: Sequence[str], text: str) -> list[str]:
    """The punctuation that follows each word in a text that is these words, however spaced and capitalised.

    Raises:
        ValueError: the text has other words.
    """
    marks, at = [], 0
    for word in words:
        for letter in word:
            while at < len(text) and not _same(text[at], letter) and _is_mark(text[at]):
                at += 1
            if at == len(text) or not _same(text[at], letter):
                raise ValueError(f"the punctuated text lacks {word!r} near {text[max(at - 20, 0) : at + 5]!r}")
            at += 1
        end = at
        while at < len(text) and _is_mark(text[at]):
            at += 1
        marks.append(text[end:at].strip())
    return marks


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _is_mark(letter: str) -> bool:
    return letter in MARKS or letter == " "


def sentences(words: Sequence[str], times: Sequence[tuple[float, float]], marks: Sequence[str]) -> list[Segment]:
    """Words put together, up to a mark that ends a sentence or a pause of 1 s.

    Args:
        times: start and end of each word, in seconds.
        marks: the punctuation after each word, "" for none.
    """
    found, first = [], 0
    for i, mark in enumerate(marks):
        last = i + 1 == len(words)
        if last or SENTENCE_ENDS & set(mark) or times[i + 1][0] - times[i][1] >= PAUSE_S:
            text = _written(words[first : i + 1], marks[first : i + 1])
            if times[i][1] > times[first][0]:
                found.append(Segment(times[first][0], times[i][1], text, whole=True))
            first = i + 1
    return found


def _written(words: Sequence[str], marks: Sequence[str]) -> str:
    """Latin words are spaced, Chinese characters are not."""
    text = ""
    for word, mark in zip(words, marks, strict=True):
        space = text and (text[-1].isascii() and word[0].isascii())
        text += (" " if space else "") + word + mark
    return text
