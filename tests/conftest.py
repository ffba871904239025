"""What the tests share: a corpus of a few real clips, and real models small enough to run in milliseconds."""

from __future__ import annotations

import os

# Read when these libraries are imported: no progress bars, no network, no warning about forks.
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import copy
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import tiny_models
import torch
from transformers import BertConfig, BertModel, BertTokenizer, WhisperConfig, WhisperModel

from esr_utils import retriever, runs, weights
from esr_utils.config import ModelConfig
from esr_utils.corpora import DEMO_FOLDER
from esr_utils.manifests import load_corpora, with_root
from esr_utils.prompts import PromptBank
from esr_utils.retriever import StyleRetriever
from esr_utils.speech import SpeechBackbone, load_speech_backbone

SENTENCES = {"train": (0, 1), "val": (0,), "test": (0, 1)}
VOICES = {"train": ("f_alpha", "m_kumo"), "val": ("m_deep",), "test": ("f_gongi", "f_mix", "m_mid")}
MINI_STYLES = ("angry", "calm", "whispered")


LONG = ("test_notebooks", "test_training", "test_panel_browser", "test_fusion", "test_mining", "test_recordings")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: else one of two workers would be left alone with the last of them."""
    items.sort(key=lambda item: not item.path.name.startswith(LONG))


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one corpus, "mini": 33 clips of the demo corpus, 3 styles, each sentence in every style.

    Do not change it; `own_corpus` is a copy that may be damaged.
    """
    root = tmp_path_factory.mktemp("data")
    demo = pd.read_csv(DEMO_FOLDER / "manifest.csv", dtype=str, keep_default_na=False).set_index("utterance_id")
    ids = [
        f"demo/{voice}_{style}_{sentence}"
        for split, voices in VOICES.items()
        for voice in voices
        for style in MINI_STYLES
        for sentence in SENTENCES[split]
    ]
    rows = demo.loc[ids].reset_index()
    for path in rows["path"]:
        (root / "mini" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DEMO_FOLDER / path, root / "mini" / path)
    rows["utterance_id"] = "mini/" + rows["utterance_id"].str.removeprefix("demo/")
    rows.assign(corpus="mini").to_csv(root / "mini" / "manifest.csv", index=False)
    return root


@pytest.fixture(scope="session")
def manifest(data_root: Path) -> pd.DataFrame:
    """The rows of "mini", as training and evaluation take them."""
    return load_corpora("mini", data_root)


@pytest.fixture
def own_corpus(data_root: Path, manifest: pd.DataFrame, tmp_path: Path) -> pd.DataFrame:
    """The rows of a copy of "mini" that belongs to one test."""
    shutil.copytree(data_root / "mini", tmp_path / "mini")
    return with_root(manifest, tmp_path / "mini")


@pytest.fixture(scope="module")
def read_once():
    """Backbones are read from disk once and copied from there on: that is most of the time of a small run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_speech_backbone", "load_text_backbone"):
            load = cache(getattr(retriever, name))
            patch.setattr(retriever, name, lambda folder, load=load: copy.deepcopy(load(folder)))
        yield


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random BERT of width 16 that knows the prompt bank's words. Its dropout is high."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    bank = PromptBank.load()
    prompts = " ".join(prompt for style in bank.labels for prompt in bank.all_prompts(style)).lower()
    words = sorted({"".join(filter(str.isalpha, word)) for word in prompts.split()} - {""})
    letters = list("abcdefghijklmnopqrstuvwxyz.,'-")
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{c}" for c in letters], *words]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(vocab))}
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5,
        initializer_range=0.5,
    )  # fmt: skip
    with weights.quiet_transformers():
        BertModel(config).save_pretrained(folder)
        BertTokenizer(vocab=vocab, model_max_length=512).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random Whisper: 2 encoder layers of width 16, 30 s."""
    folder = tmp_path_factory.mktemp("models") / "tiny-whisper"
    torch.manual_seed(2)
    config = WhisperConfig(
        vocab_size=8, d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_target_positions=4,
        init_std=0.3,         pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    with weights.quiet_transformers():
        WhisperModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_speech(tmp_path_factory: pytest.TempPathFactory, tiny_whisper: str) -> Callable[[str], str]:
    """From a kind of speech backbone to a folder with a random one: a few layers, 50 frames a second (clap: 12.8).

    Kinds: wavlm, hubert, wav2vec2 (as the base models: group norm), their names with "-large" (layer norm, norm first,
    waveform normalised), emotion2vec, whisper, clap.
    """
    root = tmp_path_factory.mktemp("speech")

    @cache
    def folder(kind: str) -> str:
        if kind == "whisper":
            return tiny_whisper
        if kind == "emotion2vec":
            config = tiny_models.emotion2vec_config(**tiny_models.TINY_EMOTION2VEC)
            return tiny_models.write_emotion2vec(root / kind, config, tiny_models.emotion2vec_model(config))
        if kind == "clap":
            return tiny_models.write_clap(root / kind, ["An angry voice.", "Speech that is calm."])
        family, _, large = kind.partition("-")
        return tiny_models.write_wav2vec2(root / kind, family, **(tiny_models.LARGE if large else tiny_models.BASE))

    return folder


@pytest.fixture(scope="session")
def tiny_config(tiny_text: str, tiny_whisper: str) -> ModelConfig:
    """Every setting named, so that no test rests on a default."""
    return ModelConfig(
        speech_backbone=tiny_whisper,
        text_backbone=tiny_text,
        pooling="stats",
        mix_layers=True,
        dropout=0.0,
        hidden=12,
        dim=8,
        temperature=0.07,
    )


@pytest.fixture(scope="session")
def _tiny_model(tiny_config: ModelConfig) -> StyleRetriever:
    torch.manual_seed(3)
    return StyleRetriever.build(tiny_config).eval()


@pytest.fixture
def tiny_model(_tiny_model: StyleRetriever) -> StyleRetriever:
    """An untrained retriever of its own for each test, always with the same weights."""
    return copy.deepcopy(_tiny_model)


@pytest.fixture(scope="session")
def whisper_tiny() -> SpeechBackbone:
    """The pretrained default, from its package. Do not change it."""
    return load_speech_backbone("whisper-tiny")


@pytest.fixture(scope="session")
def speech(manifest: pd.DataFrame) -> np.ndarray:
    """(S,) float32 at 16 kHz: twelve clips of "mini" with half a second of silence after each. Do not change it."""
    parts = [
        soundfile.read(Path(root) / path, dtype="float32")[0] for root, path in manifest[["root", "path"]].to_numpy()
    ]
    return np.concatenate([part for clip in parts[:12] for part in (clip, np.zeros(8000, np.float32))])


@pytest.fixture(scope="session")
def tiny_run(_tiny_model: StyleRetriever, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with this retriever, its level as recorded. Do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    _tiny_model.save(folder / "best")
    runs.write_json(folder / "config.json", {"kind": "style", "training": {"level": "recorded"}})
    return folder
