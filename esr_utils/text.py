"""Text backbones behind one interface, and the cache of a frozen one's prompt vectors.

The backbone stays frozen and in eval mode (no dropout), as in the paper, so a prompt has one vector: it is computed
once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer

from esr_utils import weights

_CLS = ("bert", "roberta", "xlm-roberta")  # model types whose first token stands for the text (ESR section III-B)
_ENCODER_DECODER = ("t5", "mt5", "umt5")  # of which the encoder alone is used
_BATCH = 256


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
        unused = 2 if "roberta" in model.config.model_type else 0
        positions = getattr(model.config, "max_position_embeddings", 512) - unused
        self.max_tokens = min(tokenizer.model_max_length, positions)
        self._known: dict[str, Tensor] = {}

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
        if self.model is None:
            self.model = self._load().eval().requires_grad_(False).to(self._place)
        with torch.autocast(self._place.type, enabled=False):
            hidden = self.model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        return hidden.last_hidden_state, encoded["attention_mask"].bool()

    def embed(self, texts: list[str]) -> Tensor:
        """(B, D) float32, not normalised; each distinct text is run once in the life of this object."""
        new = {text for text in texts if text not in self._known}
        new = sorted(new, key=lambda text: (len(text), text))  # like lengths side by side, and in every process alike
        for start in range(0, len(new), _BATCH):
            part = new[start : start + _BATCH]
            tokens, mask = self.tokens(part)
            self._known.update(zip(part, pool_tokens(tokens.float(), mask, self.pooling), strict=True))
        return torch.stack([self._known[text] for text in texts]).to(self._place)


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


def load_text_backbone(name: str) -> TextBackbone:
    """A frozen text backbone on the CPU.

    Args:
        name: `minilm` (the default), `bert`, `roberta`, `t5` or `flan-t5` (whose encoder is used), or the hub id or
            folder of such a model, or of another encoder that transformers' AutoModel loads.

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
    return TextBackbone(load, tokenizer, _pooling_of(folder, model_type))
