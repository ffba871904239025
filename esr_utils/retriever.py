"""Retrievers: a speech encoder and a text encoder into one space, where the cosine says how well a sentence fits.

`Retriever` is what all of them share: unit vectors, the temperature, a folder. `load` reads whichever kind a folder
holds. StyleRetriever is ESR's; FS-CLAP's is `fusion.FusionRetriever`.

StyleRetriever. speech: backbone frames (B, L, T, D) -> pooled over time per layer (B, L, P) -> standardised -> mixed
over layers, or these side by side -> hidden layer -> linear projection (B, d). text: backbone vector -> linear
projection (B, d). In ESR section III-A, B the mean of the last layer is projected at once; `ModelConfig.paper()` is
just that. A style classifier reads the speech vectors: it helps training, and alone it is the paper's baseline
(section IV-D).
"""

from __future__ import annotations

import math
import pkgutil
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from esr_utils import losses, runs, weights
from esr_utils.config import FusionConfig, ModelConfig
from esr_utils.speech import SpeechBackbone, active_frames, load_speech_backbone
from esr_utils.styles import STYLES
from esr_utils.text import TextBackbone, load_text_backbone

MAX_LOGIT_SCALE = math.log(100.0)  # as CLIP and CLAP clamp it

# `kind` in a folder's config.json -> its class, by name: the modules of the others import this one.
KINDS = {"style": "esr_utils.retriever:StyleRetriever", "fusion": "esr_utils.fusion:FusionRetriever"}


class Retriever(nn.Module):
    """What is common to all kinds. A subclass names its `kind` and settings, and makes the vectors.

    Attributes:
        kind: of KINDS; written to config.json.
        config: how it was built; `save` and `load` keep it in a folder.
        speech, text: the backbones.
        log_scale: log(1 / tau), learned; see `logit_scale`.
        classifier: (B, d) speech vectors to (B, 22) logits of styles, or None where the kind has none.
    """

    kind: str
    config_type: type[ModelConfig | FusionConfig]

    def __init__(self, config: ModelConfig | FusionConfig, speech: SpeechBackbone, text: TextBackbone) -> None:
        super().__init__()
        self.config = config
        self.speech, self.text = speech, text
        self.classifier = None
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    @classmethod
    def build(cls, config: ModelConfig | FusionConfig, text: TextBackbone | None = None) -> Self:
        """A retriever with pretrained backbones and all else drawn from torch's current seed.

        Args:
            text: the text backbone, where it is loaded already.
        """
        text = text or load_text_backbone(config.text_backbone)
        return cls(config, load_speech_backbone(config.speech_backbone), text)

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    @property
    def logit_scale(self) -> Tensor:
        """1 / tau, at most 100."""
        beyond = (self.log_scale - MAX_LOGIT_SCALE).clamp(min=0.0)
        return (self.log_scale - beyond.detach()).exp()  # at the limit it still has a gradient, to come back by

    @property
    def last_only(self) -> bool:
        """Whether the last layer of the speech backbone is all that is read."""
        return False

    @property
    def speech_is_tuned(self) -> bool:
        """Whether the speech backbone is this run's own, and no longer the one that its name stands for."""
        return any(parameter.requires_grad for parameter in self.speech.parameters())

    def speech_vectors(self, batch: dict) -> Tensor:
        """e_s, (B, d), not normalised, of a batch with `waveform` (B, S) at 16 kHz and `n_samples` (B,)."""
        raise TypeError(f"{type(self).__name__} does not define speech_vectors")

    def text_vectors(self, texts: list[str]) -> Tensor:
        """e_t, (B, d), not normalised."""
        raise TypeError(f"{type(self).__name__} does not define text_vectors")

    def encode_speech(self, batch: dict) -> Tensor:
        """(B, d), L2-normalised; see `speech_vectors`."""
        return F.normalize(self.speech_vectors(batch), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        """(B, d), L2-normalised."""
        return F.normalize(self.text_vectors(texts), dim=-1)

    def frames(self, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
        """The speech backbone's frames (B, L, T, D), which are valid (B, T), and which carry speech (B, T).

        L is 1, the last layer, where layers are not mixed.
        """
        waveform, n_samples = batch["waveform"].to(self.device), batch["n_samples"].to(self.device)
        layers, mask = self.speech.layers(waveform, n_samples, last_only=self.last_only)
        return layers, mask, active_frames(waveform, n_samples, self.speech.hop, mask.shape[1])

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`: what was trained, and of an untouched backbone name and hash.

        Each file is replaced at once; the settings name the weights' hash, so a mixture of two saves is refused at
        load.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tuned = self.speech_is_tuned
        left_out = ("text.",) if tuned else ("text.", "speech.")
        state = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items() if not k.startswith(left_out)}
        with runs.atomic_path(folder / "model.safetensors") as temporary:
            save_file(state, temporary)
            digest = weights.file_sha256(temporary)
        about = {
            "kind": self.kind,
            "model": self.config.to_dict(),
            "speech_backbone_tuned": tuned,
            "speech_backbone_sha256": None if tuned else weights.fingerprint(self.speech),
            "text_backbone_sha256": self.text.sha256,
            "weights_sha256": digest,
        }
        runs.write_json(folder / "config.json", about)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """Reads what `save` wrote, in eval mode. `load` of this module takes any kind.

        Raises:
            weights.WeightsError: a file is missing or damaged, it is a retriever of another kind, or a backbone is not
                the one it was trained on.
        """
        folder = Path(folder)
        about = _about(folder)
        if about["kind"] != cls.kind:
            raise weights.WeightsError(
                f"{folder} holds a retriever of kind {about['kind']!r}, not {cls.kind!r}: retriever.load takes either"
            )
        weights.check_sha256(folder / "model.safetensors", about["weights_sha256"])
        model = cls.build(cls.config_type.from_dict(about["model"]))
        untouched = {"text": model.text.sha256}
        if not about["speech_backbone_tuned"]:
            untouched["speech"] = weights.fingerprint(model.speech)
        for part, found in untouched.items():
            if found != (expected := about[f"{part}_backbone_sha256"]):
                name = about["model"][f"{part}_backbone"]
                raise weights.WeightsError(
                    f"{folder} was trained on a {name!r} of sha256 {expected[:12]}…; this machine's has {found[:12]}…"
                )
        try:
            state = load_file(folder / "model.safetensors")
        except SafetensorError as error:
            raise weights.WeightsError(f"{folder / 'model.safetensors'}: {error}") from None
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # a tensor of another shape
            raise weights.WeightsError(f"{folder} does not fit its settings: {error}") from None
        absent = [k for k in missing if not k.startswith(("text.", "speech."))]
        if absent or unexpected or (about["speech_backbone_tuned"] and any(k.startswith("speech.") for k in missing)):
            raise weights.WeightsError(f"{folder} does not fit its settings: lacks {absent}, has {unexpected}")
        model.speech.set_trainable(about["speech_backbone_tuned"])  # saved again, it is saved whole again
        return model.eval().to(device)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Retriever:
    """The retriever that a folder holds, of whichever kind, in eval mode.

    Raises:
        weights.WeightsError: as `Retriever.load`, or the kind is not known here.
    """
    kind = _about(Path(folder))["kind"]
    if kind not in KINDS:
        raise weights.WeightsError(f"{folder} holds a retriever of kind {kind!r}; known here: {', '.join(KINDS)}")
    return pkgutil.resolve_name(KINDS[kind]).load(folder, device)


def _about(folder: Path) -> dict:
    """A retriever's config.json; where no kind is stated, from before there were several, it is `style`."""
    if not (folder / "config.json").is_file():
        raise weights.WeightsError(f"{folder} holds no retriever: train one with notebook 03_train first")
    about = runs.read_json(folder / "config.json")
    wanted = {"model", "speech_backbone_tuned", "speech_backbone_sha256", "text_backbone_sha256", "weights_sha256"}
    if lacking := wanted - set(about if isinstance(about, dict) else ()):
        raise weights.WeightsError(f"{folder / 'config.json'} is not a retriever's: it lacks {sorted(lacking)}")
    return {"kind": "style"} | about


def pool(layers: Tensor, mask: Tensor, active: Tensor, pooling: str) -> Tensor:
    """Frames to one vector per layer.

    Args:
        layers: (B, L, T, D).
        mask: (B, T), the valid frames.
        active: (B, T), those that carry speech (`speech.active_frames`).
        pooling: `mean` over the valid frames, P = D; `stats`, mean and standard deviation over the active, P = 2 D.

    Returns:
        (B, L, P) float32.
    """
    used = (mask if pooling == "mean" else mask & active)[:, None, :, None]
    layers, count = layers.float(), used.sum(2)
    mean = (layers * used).sum(2) / count
    if pooling == "mean":
        return mean
    variance = ((layers - mean[:, :, None]).square() * used).sum(2) / count
    return torch.cat([mean, (variance + 1e-8).sqrt()], dim=-1)


class SpeechHead(nn.Module):
    """(B, L, P) pooled layers -> (B, d).

    The features are standardised by buffers that start as the identity; with a frozen backbone they are fitted on the
    training split once (`fit`). The mix is a softmax over layers of `mix` times a gain: it must get far within
    a schedule of a thousand steps, at the learning rate of all else.
    """

    GAIN = 30.0

    def __init__(self, n_layers: int, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_layers, width))
        self.register_buffer("std", torch.ones(n_layers, width))
        mixed = config.mix_layers and not config.concat_layers
        self.mix = nn.Parameter(torch.zeros(n_layers)) if mixed else None
        width = width if mixed else n_layers * width
        hidden = [nn.Linear(width, config.hidden), nn.GELU(), nn.Dropout(config.dropout)] if config.hidden else []
        projection = nn.Linear(config.hidden or width, config.dim)
        self.projection = nn.Sequential(nn.Dropout(config.dropout), *hidden, projection)

    @property
    def layer_weights(self) -> Tensor:
        """(L,), summing to 1."""
        return (self.GAIN * self.mix).softmax(0)

    def fit(self, pooled: Tensor) -> None:
        """Sets the standardisation to the statistics of (N, L, P) features."""
        self.mean.copy_(pooled.mean(0))
        self.std.copy_(pooled.std(0, correction=0).clamp(min=1e-4))

    @property
    def is_fitted(self) -> bool:
        """Whether features are standardised at all."""
        return not (bool((self.mean == 0).all()) and bool((self.std == 1).all()))

    def forward(self, pooled: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, L, P) -> (B, d), standardised by mean and deviation, its own unless others are given: (L, P) or a clip's
        each (B, L, P)."""
        mean, std = (one.to(pooled.device) for one in statistics or (self.mean, self.std))
        pooled = (pooled - mean) / std
        mixed = pooled.flatten(1) if self.mix is None else torch.einsum("blp,l->bp", pooled, self.layer_weights)
        return self.projection(mixed)


class StyleRetriever(Retriever):
    """See the module's docstring."""

    kind, config_type = "style", ModelConfig

    def __init__(self, config: ModelConfig, speech: SpeechBackbone, text: TextBackbone) -> None:
        super().__init__(config, speech, text)
        width = speech.dim * (2 if config.pooling == "stats" else 1)
        self.speech_head = SpeechHead(speech.n_layers if config.mix_layers else 1, width, config)
        self.text_head = nn.Linear(text.dim, config.dim)
        self.bias = nn.Parameter(torch.tensor(-10.0))  # only the sigmoid objective reads it
        self.classifier = losses.two_layer(config.dim, config.classifier_hidden, len(STYLES))

    @property
    def last_only(self) -> bool:
        return not self.config.mix_layers

    def pooled(self, batch: dict) -> Tensor:
        """(B, L, P): those that came with the batch (a frozen backbone's, kept), else by running the backbone."""
        if "pooled" in batch:
            return batch["pooled"].to(self.device)
        return pool(*self.frames(batch), self.config.pooling)

    def speech_vectors(self, batch: dict) -> Tensor:
        """e_s, (B, d), not normalised, of a batch with `waveform` (B, S) at 16 kHz and `n_samples` (B,), or `pooled`.

        What the losses and the style classifier take. With `statistics`, a mean and a deviation, the features are
        standardised by those (see `adaptation`).
        """
        return self.speech_head(self.pooled(batch), batch.get("statistics"))

    def text_vectors(self, texts: list[str]) -> Tensor:
        """e_t, (B, d), not normalised: what the losses take."""
        return self.text_head(self.text.embed(list(texts)))
