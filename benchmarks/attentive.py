"""A head that pools by attention, for `recipes`: is it worth more than the mean and the deviation of all active frames?

Attentive statistics pooling (Okabe, Koshinaka & Shinoda 2018): each layer weighs its frames by a small network of its
own and takes the weighted mean and deviation. It starts at equal weights, so at the released recipe, and is trained
with the rest, from every fourth active frame. Features are standardised, in training and after, by the statistics that
pooling with equal weights has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import adaptation as benchmark
import numpy as np
import torch
from lhotse.cut import Cut
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from esr_utils import adaptation, checkpoints, embedding, manifests, provenance, training
from esr_utils.adaptation import Statistics
from esr_utils.config import Level, ModelConfig, TrainConfig
from esr_utils.frame_cache import CACHE, FrameCache
from esr_utils.retriever import StyleRetriever

HIDDEN = 64  # units of a layer's network
EVERY = 4  # every fourth active frame is read: all, at three speeds, take more memory than there is


class Attention(nn.Module):
    """Frames of clips end to end (L, N, D), and whose each is (N,) -> weighted means and deviations (B, L, 2 D)."""

    def __init__(self, head: nn.Module) -> None:
        """Args: head: the retriever's, which knows the scale of each layer's frames."""
        super().__init__()
        n_layers, width = head.mean.shape
        self.register_buffer("centre", head.mean[:, None, : width // 2].clone())
        self.register_buffer("scale", head.mean[:, None, width // 2 :].clone())
        self.first = nn.Parameter(torch.randn(n_layers, width // 2, HIDDEN) / (width // 2) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(n_layers, 1, HIDDEN))
        self.second = nn.Parameter(torch.zeros(n_layers, HIDDEN, 1))

    def forward(self, frames: Tensor, clip: Tensor) -> Tensor:
        frames = (frames.float() - self.centre) / self.scale
        logits = (torch.tanh(frames @ self.first + self.bias) @ self.second).transpose(1, 2)  # (L, 1, N)
        others = torch.arange(int(clip[-1]) + 1)[:, None] != clip
        weight = logits.masked_fill(others, -torch.inf).softmax(-1)  # (L, B, N)
        mean = weight @ frames
        deviation = (weight @ frames.square() - mean.square()).clamp(min=1e-6).sqrt()
        return torch.cat([mean * self.scale + self.centre, deviation * self.scale], -1).transpose(0, 1)


@dataclass(frozen=True)
class Attended(embedding.Features):
    """Features that are pooled when a batch is asked for. `frames`: N times (L, T, D) fp16."""

    frames: list[Tensor]
    attention: Attention

    def batch(self, rows: list[int]) -> dict:
        frames = [self.frames[row] for row in rows]
        clip = torch.arange(len(rows)).repeat_interleave(torch.tensor([one.shape[1] for one in frames]))
        return {"pooled": self.attention(torch.cat(frames, 1), clip)}


class Trainer(training._Trainer):
    """The recipe's own, of a head with `attention`."""

    def _clips(self, retriever: StyleRetriever, manifest, split: str, cache: Path) -> embedding.FrozenClips:
        clips = super()._clips(retriever, manifest, split, cache)  # which also fits the statistics
        if split == "train":
            retriever.attention = Attention(retriever.speech_head)
            frames = _frames(retriever, clips.cuts, self.config.level, cache)
            clips.features = Attended(**vars(clips.features), frames=frames, attention=retriever.attention)
        return clips


_read: dict[tuple[str, ...], list[Tensor]] = {}  # of the split last trained on: the next seed's is the same


def _frames(model: StyleRetriever, cuts: list[Cut], level: Level, cache: Path = CACHE) -> list[Tensor]:
    """(L, T, D) fp16 of each cut, of which `frozen_features` has kept all frames."""
    if (ids := tuple(cut.id for cut in cuts)) not in _read:
        _read.clear()
        kept = FrameCache(model.speech, level, cache)
        _read[ids] = [_some(*kept.read(cut)) for cut in tqdm(cuts, desc="frames", leave=False)]
    return _read[ids]


def _some(frames: Tensor, active: Tensor) -> Tensor:
    return frames[:, active][:, ::EVERY].contiguous()


@dataclass
class Heard(benchmark.LeftOut):
    """`pooled` is by attention, `plain` with equal weights: (N, L, P) fp16."""

    plain: np.ndarray

    def own(self, rows: np.ndarray) -> Statistics:
        return adaptation.gather([(["all"] * len(rows), self.plain[rows])])["all"]


def left_out(corpus: str, seed: int, folder: Path, model_config: ModelConfig, config: TrainConfig) -> Heard:
    """As the benchmark `adaptation`'s."""
    others = benchmark.without(corpus)
    folder, config = folder / f"without-{corpus}-{seed}", config.but(seed=seed)
    provenance.begin(others, folder, model_config, config)
    if not checkpoints.finished(folder):
        Trainer(others, folder, model_config, config, "cpu", CACHE).run()
    model = StyleRetriever.build(model_config)
    model.attention = Attention(model.speech_head)
    model.load_state_dict(load_file(folder / "best" / "model.safetensors"), strict=False)
    clips, plain = benchmark.heard(corpus, model_config.speech_backbone, config.level)
    rows = benchmark.trained_on(clips, others)
    kept, pooled = FrameCache(model.speech, config.level), []
    clips = clips.iloc[rows].reset_index(drop=True)
    with torch.no_grad():
        for cut in manifests.to_cuts(clips):
            frames = _some(*kept.read(cut))
            pooled.append(model.attention(frames, torch.zeros(frames.shape[1], dtype=torch.int64))[0].half())
    return Heard(model.eval(), clips, torch.stack(pooled).numpy(), plain[rows])
