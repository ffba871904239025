"""Where weights are looked for, what is said when there are none, and that files are read as tensors alone."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import huggingface_hub
import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from torch import nn

from esr_utils import weights
from esr_utils.speech import load_speech_backbone
from esr_utils.text import load_text_backbone

# Names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("wavlm", "microsoft/wavlm-base-plus"),
        ("emotion2vec", "emotion2vec/emotion2vec_base"),
        ("bert", "google-bert/bert-base-uncased"),
        ("roberta", "FacebookAI/roberta-base"),
        ("t5", "google-t5/t5-base"),
        ("flan-t5", "google/flan-t5-base"),
        ("whisper-base", "openai/whisper-base"),
    ],
)
def test_a_short_name_is_a_hub_id_below_esr_models(name, hub_id, tmp_path, monkeypatch):
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    (tmp_path / hub_id).mkdir(parents=True)
    assert weights.find(name) == weights.find(hub_id) == (tmp_path / hub_id).resolve()


@pytest.mark.parametrize("name", sorted(weights.HUB))
def test_a_missing_model_says_which_files_to_put_where(name, monkeypatch):
    monkeypatch.delenv("ESR_MODELS", raising=False)
    load = load_text_backbone if "tokenizer" in weights.HUB[name][1] else load_speech_backbone
    with pytest.raises(weights.WeightsError) as caught:
        load(name)
    hub_id, files = weights.HUB[name]
    message = str(caught.value)
    assert f"https://huggingface.co/{hub_id}" in message and f"$ESR_MODELS/{hub_id}" in message
    assert files in message and "config" in files


# The hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that stands for one repository of the hub; `fetched` below it is what was downloaded of it."""
    repository, fetched = tmp_path / "repository", tmp_path / "fetched"
    repository.mkdir(), fetched.mkdir()

    def snapshot_download(hub_id: str, allow_patterns: list[str]) -> str:
        for file in repository.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                (fetched / file.name).write_bytes(file.read_bytes())
        return str(fetched)

    monkeypatch.delenv("ESR_MODELS", raising=False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository


OTHER_FORMATS = ("tf_model.h5", "flax_model.msgpack", "pytorch_model.bin", "rust_model.ot", "notes.pt", "README.md")


@pytest.mark.parametrize(
    ("published", "expected"),
    [
        (("config.json", "model.safetensors", "spiece.model", *OTHER_FORMATS), ("model.safetensors", "spiece.model")),
        (("config.json", "pytorch_model.bin", "tf_model.h5", "example.wav"), ("pytorch_model.bin",)),
        (
            ("config.yaml", "configuration.json", "emotion2vec_base.pt", "logo.png"),
            ("emotion2vec_base.pt", "config.yaml"),
        ),
    ],
)
def test_of_a_repository_only_the_needed_files_are_fetched(published, expected, hub):
    for name in published:
        (hub / name).write_text(name)
    found = {file.name for file in weights.find("someone/model").iterdir()}
    assert found == {name for name in published if name.endswith(".json")} | set(expected)


def test_a_model_of_the_hub_loads(hub):
    tiny_models.write_wav2vec2(hub, "wavlm", **tiny_models.BASE)
    assert load_speech_backbone("wavlm").dim == 32


# Files ------------------------------------------------------------------------------------------------------


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["ESR_TEST_TRACE"],)


@pytest.mark.parametrize(
    "content", [Malicious(), {"weight": Malicious()}, {"model": {"a": torch.ones(1), "b": Malicious()}}]
)
def test_a_file_that_holds_a_program_is_refused_and_not_run(content, tmp_path, monkeypatch):
    monkeypatch.setenv("ESR_TEST_TRACE", str(tmp_path / "trace"))
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(weights.WeightsError, match="model.pt.*more than tensors"):
        weights.read_state(tmp_path / "model.pt")
    assert not (tmp_path / "trace").exists()


STATE = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2, dtype=torch.float64)}


@pytest.mark.parametrize("wrapped", [STATE, {"model": STATE, "args": None}, {"state_dict": STATE, "step": 3}])
def test_the_state_is_found_in_what_a_training_script_saves(wrapped, tmp_path):
    torch.save(wrapped, tmp_path / "model.pt")
    found = weights.read_state(tmp_path / "model.pt")
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, torch.ones(2)])
def test_a_file_without_named_tensors_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(weights.WeightsError, match="model.pt"):
        weights.read_state(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_file_that_is_cut_short_is_refused(suffix, share, tmp_path):
    file = tmp_path / f"model.{suffix}"
    torch.save(STATE, file) if suffix == "pt" else save_file(STATE, file)
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(weights.WeightsError, match="damaged"):
        weights.read_state(file)


def test_safetensors_come_first(tmp_path):
    with pytest.raises(weights.WeightsError, match="holds no weights"):
        weights.weights_file(tmp_path)
    for name in ("model.pt", "pytorch_model.bin", "model.safetensors"):  # each before the ones above
        (tmp_path / name).touch()
        assert weights.weights_file(tmp_path).name == name


def test_a_module_is_set_from_a_state_that_fits(tmp_path):
    module = nn.Linear(3, 2)
    weights.load_state(module, STATE | {"other": torch.ones(1)}, tmp_path)
    assert torch.equal(module.weight, STATE["weight"]) and module.bias.dtype == torch.float32
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(weights.WeightsError, match="lacks 1 weights: bias"):
        weights.load_state(module, {"weight": STATE["weight"]}, tmp_path)
    with pytest.raises(weights.WeightsError, match=r"bias \(3,\) for \(2,\)"):
        weights.load_state(module, STATE | {"bias": torch.ones(3)}, tmp_path)
