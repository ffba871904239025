"""Speech backbones behind one interface: waveforms in, the frames of every layer out, and a mask of the valid ones.

A clip's frames do not depend on what it is batched with. What comes after (layer mix, pooling, projection) is in
`retriever`, so that a frozen backbone's frames can be kept (`embedding`). A model's own library is imported when such a
model is loaded, not before.
"""

from __future__ import annotations

from pathlib import Path

from esr_utils import weights
from esr_utils.speech.interface import MIN_SAMPLES, SpeechBackbone, active_frames, length_mask
from esr_utils.speech.logmel import LogMel, LogMelBackbone

__all__ = [
    "MIN_SAMPLES",
    "LogMel",
    "LogMelBackbone",
    "SpeechBackbone",
    "active_frames",
    "length_mask",
    "load_speech_backbone",
]


def load_speech_backbone(name: str) -> SpeechBackbone:
    """A speech backbone in eval mode, on the CPU, all parameters frozen.

    Args:
        name: `whisper-tiny` (the default; English-only weights), `whisper-base`, `logmel`, another short name of
            `weights.HUB`, or the hub id or folder of a WavLM, HuBERT, wav2vec 2.0, Whisper, emotion2vec or CLAP model.

    Raises:
        weights.WeightsError: not found, damaged, or a kind that is not supported.
    """
    if name == "logmel":
        return LogMelBackbone().eval()
    backbone = _load(weights.find(name))
    backbone.set_trainable(False)
    return backbone.eval()


def _load(folder: Path) -> SpeechBackbone:
    if (folder / "config.yaml").is_file() and not (folder / "config.json").is_file():
        from esr_utils.speech.emotion2vec import load_emotion2vec

        return load_emotion2vec(folder)
    kind = "whisper" if (folder / "model.bin").is_file() else weights.model_type(folder)
    if kind == "whisper":
        from esr_utils.speech.whisper import load_whisper

        return load_whisper(folder)
    if kind in ("wavlm", "hubert", "wav2vec2"):
        from esr_utils.speech.wavlm import load_wav2vec2

        return load_wav2vec2(folder, kind)
    if kind == "clap":
        from esr_utils.speech.clap import load_clap

        return load_clap(folder)
    known = "wavlm, hubert, wav2vec2, whisper, emotion2vec, clap, logmel"
    raise weights.WeightsError(f"{folder} holds a {kind!r} model; speech backbones here are: {known}")
