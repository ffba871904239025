"""funasr's models as they lie in a folder: its classes and config, the weights read by us, nothing fetched or printed.

funasr's own AutoModel unpickles, downloads, prints, sets torch's thread count, and holds four models at a time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from esr_utils import weights
from esr_utils.speech.funasr_classes import funasr_modules, quiet

# What each class is built of: modules of funasr, and those among them that only enter its tables.
_PARAFORMER = (
    "models.paraformer.decoder", "models.paraformer.cif_predictor", "models.bicif_paraformer.cif_predictor",
    "models.sanm.encoder", "frontends.wav_frontend", "tokenizer.char_tokenizer",
)  # fmt: skip
_MODULES = {
    "FsmnVADStreaming": (
        "models.fsmn_vad_streaming.model", "models.fsmn_vad_streaming.encoder", "frontends.wav_frontend",
    ),
    "BiCifParaformer": ("models.bicif_paraformer.model", *_PARAFORMER),
    "SeacoParaformer": ("models.seaco_paraformer.model", *_PARAFORMER),
    "CTTransformer": ("models.ct_transformer.model", "models.sanm.encoder", "tokenizer.char_tokenizer"),
    "CAMPPlus": ("models.campplus.model",),
    "SenseVoiceSmall": (
        "models.sense_voice.model", "frontends.wav_frontend", "tokenizer.sentencepiece_tokenizer",
    ),
}  # fmt: skip


@dataclass
class FunasrModel:
    """A model with its tokenizer and frontend, ready to run."""

    model: nn.Module
    tokenizer: object
    frontend: object
    device: torch.device

    @torch.inference_mode()
    def __call__(self, item: np.ndarray | str, **options) -> dict:
        """What funasr's `inference` says of one waveform, (S,) at 16 kHz, or of one text; {} where it says nothing."""
        item = torch.from_numpy(np.ascontiguousarray(item)) if isinstance(item, np.ndarray) else item
        options |= {"tokenizer": self.tokenizer, "frontend": self.frontend, "device": self.device.type}
        with quiet():
            found = self.model.inference([item], key=["clip"], **options)
        return found[0][0] if found and found[0] else {}


@contextmanager
def funasr_model(name: str, kinds: tuple[str, ...], device: torch.device) -> Iterator[FunasrModel]:
    """A model by its short name, hub id or folder (`weights.find`), within the context.

    Args:
        kinds: the classes that can do what is wanted here, by funasr's names.

    Raises:
        weights.WeightsError: it is not there, or damaged, or of another class, or funasr is not installed.
    """
    folder = find_funasr(name, kinds)
    config = _read_config(folder / "config.yaml")
    kind = config["model"]
    gc.collect()  # a model before this one that refers to itself is still in memory until then
    try:
        with funasr_modules("register", *_MODULES[kind]) as (register, *modules):
            yield _build(register, modules, config, folder, device)
    except ImportError as error:
        raise weights.WeightsError(f"{kind} needs funasr, which cannot be imported here: {error}") from error


def find_funasr(name: str, kinds: tuple[str, ...]) -> Path:
    """The folder of a model of one of these classes; its weights are not read.

    Raises:
        weights.WeightsError: it is not there, or of another class.
    """
    folder = weights.find(name)
    kind = _read_config(folder / "config.yaml").get("model")
    if kind not in kinds:
        raise weights.WeightsError(f"{folder} holds a {kind!r}; needed is {' or '.join(kinds)}")
    return folder


def _read_config(file: Path) -> dict:
    try:
        config = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    except Exception as error:  # the parser raises many kinds
        raise weights.WeightsError(f"{file} is no config of funasr: {type(error).__name__}: {error}") from None
    return config if isinstance(config, dict) else {}


def _build(register: ModuleType, modules: list[ModuleType], config: dict, folder: Path, device) -> FunasrModel:
    tables, kind = register.tables, config["model"]
    tokenizer = frontend = None
    conf = {key: value for key, value in config.items() if key not in ("model_conf", "specaug", "specaug_conf")}
    conf |= config.get("model_conf") or {}
    try:
        with quiet():
            if name := config.get("tokenizer"):
                settings = (config.get("tokenizer_conf") or {}) | _tokenizer_files(folder)
                tokenizer = tables.tokenizer_classes[name](**settings)
                conf["vocab_size"] = _vocab_size(tokenizer)
            if name := config.get("frontend"):
                settings = (config.get("frontend_conf") or {}) | {"cmvn_file": _optional(folder / "am.mvn")}
                # dither is noise that would make each run another
                frontend = tables.frontend_classes[name](**settings | {"dither": 0.0})
                conf["input_size"] = frontend.output_size()
            if kind == "CTTransformer":
                conf["jieba_usr_dict"] = _optional(folder / "jieba_usr_dict")
            model = getattr(modules[0], kind)(**conf)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise weights.WeightsError(f"{folder} makes no {kind}: {reason}") from error
    file = weights.weights_file(folder)
    weights.load_state(model, weights.read_state(file), file)
    return FunasrModel(model.eval().to(device), tokenizer, frontend, device)


def _tokenizer_files(folder: Path) -> dict:
    pieces = sorted(folder.glob("*.bpe.model"))
    files = {"token_list": folder / "tokens.json", "seg_dict": folder / "seg_dict"}
    files |= {"bpemodel": pieces[0]} if pieces else {}
    return {name: str(file) for name, file in files.items() if file.is_file()}


def _vocab_size(tokenizer) -> int:
    listed = getattr(tokenizer, "token_list", None)
    return len(listed) if listed is not None else tokenizer.get_vocab_size()


def _optional(file: Path) -> str | None:
    return str(file) if file.is_file() else None
