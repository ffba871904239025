"""Text backbones behind one interface, and the cache of a frozen one's prompt vectors.

The backbone stays frozen and in eval mode (no dropout), as in the paper, so a prompt has one vector, and one sequence
of token vectors: they are computed once, and kept in memory up to a limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer, ClapModel

from esr_utils import weights

_CLS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "clap",
)  # model types whose first token stands for the text (ESR section III-B)
_ENCODER_DECODER = ("t5", "mt5", "umt5")  # of which the encoder alone is used
_BATCH = 256
_KEPT_BYTES = 2**28  # of vectors, and as much of sequences: 170,000 and 17,000 captions with MiniLM


class Tokens(NamedTuple):
    """Sequences side by side: values (B, T, D), zero where invalid, and mask (B, T), True where valid."""

    values: Tensor
    mask: Tensor


class _Kept:
    """Tensors by text, up to `_KEPT_BYTES` in all: the oldest go first."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.n_bytes = 0

    def fill(self, texts: list[str], make: Callable[[list[str]], list[Tensor]]) -> list[Tensor]:
        """One tensor a text; `make` is called on batches of the distinct ones that are not kept."""
        found = {text: self.tensors[text] for text in texts if text in self.tensors}
        new = {text for text in texts if text not in found}
        new = sorted(new, key=lambda text: (len(text), text))  # like lengths side by side, and in every process alike
        for start in range(0, len(new), _BATCH):
            part = new[start : start + _BATCH]
            found.update(zip(part, make(part), strict=True))
        for text in new:
            self.tensors[text] = found[text]
            self.n_bytes += found[text].nbytes
        while self.n_bytes > _KEPT_BYTES:
            self.n_bytes -= self.tensors.pop(next(iter(self.tensors))).nbytes
        return [found[text] for text in texts]


class TextBackbone(nn.Module):
    """A frozen text encoder: sentences in, one vector each.

    Attributes:
        dim: width of a vector.
        pooling: `cls` (first token) or `mean` (over the valid tokens only).
        model: transformers' encoder; None while the weights are let go (`release`).
    """

    def __init__(self, load: Callable[[], nn.Module], tokenizer, pooling: str) -> None:
        """
        Args:
            load: makes the encoder on the CPU, the same at every call.
        """
        super().__init__()
        self._load = load
        self.model = model = load().eval().requires_grad_(False)
        self._place = torch.device("cpu")  # where it is, also while it is let go
        self._sha256 = ""
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.dim = model.config.hidden_size
        # A tokenizer that states no limit has a huge one; RoBERTa's table of positions has two rows that no token uses.
        unused = 2 if any(kind in model.config.model_type for kind in ("roberta", "clap")) else 0
        positions = getattr(model.config, "max_position_embeddings", 512) - unused
        self.max_tokens = min(tokenizer.model_max_length, positions)
        self._vectors, self._sequences = _Kept(), _Kept()

    def train(self, mode: bool = True) -> TextBackbone:
        """Stays in eval mode whatever its owner does: dropout would make a prompt's vector random."""
        return super().train(False)

    def _apply(self, fn: Callable, recurse: bool = True) -> TextBackbone:
        """What `to` and its kin call: where the weights go is where they come back to."""
        self._place = fn(torch.empty(0, device=self._place)).device
        return super()._apply(fn, recurse)

    @property
    def sha256(self) -> str:
        """`weights.fingerprint` of the encoder's weights, also while they are let go."""
        if not self._sha256:
            self._sha256 = weights.fingerprint(self)
        return self._sha256

    def load(self) -> None:
        """Takes the weights up again, if they were let go."""
        if self.model is None:
            self.model = self._load().eval().requires_grad_(False).to(self._place)

    def release(self) -> None:
        """Lets the weights go (RoBERTa base: 0.5 GB) and keeps the vectors made; a new text loads them again."""
        _ = self.sha256
        self.model = None

    @torch.no_grad()
    def tokens(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token vectors (B, T, D) and their mask (B, T), True where valid. Texts past the model's limit are cut.

        In fp32 whatever autocast says: the vectors are kept, and T5's do not bear half precision.
        """
        options = {"padding": True, "truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
        encoded = self.tokenizer(texts, **options).to(self._place)
        self.load()
        with torch.autocast(self._place.type, enabled=False):
            hidden = self.model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        return hidden.last_hidden_state, encoded["attention_mask"].bool()

    def embed(self, texts: list[str]) -> Tensor:
        """(B, D) float32, not normalised; a text that is kept is not run again."""

        def make(part: list[str]) -> list[Tensor]:
            tokens, mask = self.tokens(part)
            return [vector.clone() for vector in pool_tokens(tokens.float(), mask, self.pooling)]

        return torch.stack(self._vectors.fill(list(texts), make)).to(self._place)

    def sequences(self, texts: list[str]) -> Tokens:
        """The last hidden states, special tokens included: values (B, T, D) float32; kept as fp16, as `embed` does."""

        def make(part: list[str]) -> list[Tensor]:
            tokens, mask = self.tokens(part)
            return [one[valid].half().cpu() for one, valid in zip(tokens, mask, strict=True)]

        sequences = self._sequences.fill(list(texts), make)
        lengths = torch.tensor([len(one) for one in sequences], device=self._place)
        values = pad_sequence(sequences, batch_first=True).to(self._place).float()
        return Tokens(values, torch.arange(values.shape[1], device=self._place) < lengths[:, None])


def pool_tokens(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """(B, T, D), (B, T) -> (B, D): the first token, or the mean over valid tokens (not over the padding)."""
    if pooling == "cls":
        return tokens[:, 0]
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _pooling_of(folder: Path, model_type: str) -> str:
    """Sentence-transformers folders say how they are pooled; else [CLS] for the BERT family and mean for the rest."""
    stated = folder / "1_Pooling" / "config.json"
    if stated.is_file():
        return "cls" if json.loads(stated.read_text()).get("pooling_mode_cls_token") else "mean"
    return "cls" if model_type in _CLS else "mean"


def _clap_text(folder: Path) -> nn.Module:
    """The text side of a CLAP: a RoBERTa. Its pooler is left out, as of the others."""
    model = weights.load_pretrained(ClapModel, folder).text_model
    model.pooler = None
    return model


def load_text_backbone(name: str) -> TextBackbone:
    """A frozen text backbone on the CPU.

    Args:
        name: `minilm` (the default), `bert`, `roberta`, `t5` or `flan-t5` (whose encoder is used), `clap` (whose text
            side is), or the hub id or folder of such a model, or of another encoder that transformers' AutoModel loads.

    Raises:
        weights.WeightsError: not found or damaged.
    """
    folder = weights.find(name)
    model_type = weights.model_type(folder)
    options = {"add_pooling_layer": False} if model_type in _CLS else {}
    kind = AutoModelForTextEncoding if model_type in _ENCODER_DECODER else AutoModel
    if not list(folder.glob("tokenizer.json")) + list(folder.glob("vocab*")) + list(folder.glob("*.model")):
        raise weights.WeightsError(
            f"{folder} holds no tokenizer: tokenizer.json, a vocabulary or a sentencepiece model"
        )
    with weights.quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    load = partial(weights.load_pretrained, kind, folder, **options)
    if model_type == "clap":
        load = partial(_clap_text, folder)
    return TextBackbone(load, tokenizer, _pooling_of(folder, model_type))
