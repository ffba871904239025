"""From clips to vectors: what a frozen backbone makes of a manifest's clips, and the embeddings of them.

A backbone that is frozen is run once a clip, and its frames are kept (`frame_cache`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lhotse import CutSet
from lhotse.cut import Cut
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from esr_utils import adaptation, batches
from esr_utils.config import Level
from esr_utils.frame_cache import CACHE, FrameCache, pool_one
from esr_utils.fusion import FusionRetriever, pool_frames
from esr_utils.retriever import Retriever, StyleRetriever
from esr_utils.styles import STYLES

_BATCH = 16  # clips a forward pass


@dataclass(frozen=True)
class Features:
    """A frozen backbone's pooled layers: what the head reads.

    Attributes:
        cut_ids: N ids of the cuts that could be used, in the order given.
        pooled: (N, L, P) float32.
        skipped: columns utterance_id, reason.
    """

    cut_ids: list[str]
    pooled: Tensor
    skipped: pd.DataFrame

    def batch(self, rows: list[int]) -> dict:
        """What of a batch stands for the waveform: `pooled` (B, L, P)."""
        return {"pooled": self.pooled[rows]}


@dataclass(frozen=True)
class FrozenFrames:
    """A frozen backbone's frames, averaged n:1 over time: what FS-CLAP reads.

    Attributes:
        cut_ids: N ids of the cuts that could be used, in the order given.
        frames: N times (L, T, D) fp16, on the CPU.
        skipped: columns utterance_id, reason.
    """

    cut_ids: list[str]
    frames: list[Tensor]
    skipped: pd.DataFrame

    def batch(self, rows: list[int]) -> dict:
        """What of a batch stands for the waveform: `padded_frames`."""
        return padded_frames([self.frames[row] for row in rows])


def frozen_features(model: StyleRetriever, cuts: CutSet, level: Level, cache: Path = CACHE) -> Features:
    """Pooled layers of each cut, from kept frames where there are any, else by running the backbone and keeping them.

    Interrupted, it goes on where it was. Cuts that cannot be used are named in `skipped`.
    """
    pooling = model.config.pooling

    def read(kept: FrameCache, cut: Cut) -> Tensor | None:
        return kept.pooled(cut, pooling)

    cut_ids, pooled, skipped = _of_frames(model, cuts, level, cache, read, lambda *found: pool_one(*found, pooling))
    empty = torch.zeros(0, *model.speech_head.mean.shape)
    return Features(cut_ids, torch.stack(pooled) if pooled else empty, skipped)


def frozen_frames(model: FusionRetriever, cuts: CutSet, level: Level, cache: Path = CACHE) -> FrozenFrames:
    """As `frozen_features`, but the frames in a row: the mean of every `frames_per_token` of them.

    Those of a tuned backbone, which no other run has, are not kept on disk. All stay in memory, as fp16: with Whisper
    tiny and four frames a token, 48 kB per second of speech, so that RAVDESS and EmoDB take 0.33 GB.
    """
    n = model.config.frames_per_token

    def average(frames: Tensor, active: Tensor) -> Tensor:
        return pool_frames(frames[None].float(), torch.ones(1, frames.shape[1], dtype=torch.bool), n)[0][0].half()

    def read(kept: FrameCache, cut: Cut) -> Tensor | None:
        found = kept.read(cut)
        return found and average(*found)

    return FrozenFrames(*_of_frames(model, cuts, level, cache, read, average))


def padded_frames(frames: list[Tensor]) -> dict:
    """Clips' frames (L, T, D) as a batch: `frames` (B, L, T, D) float32, zero where invalid, and `mask` (B, T)."""
    padded = pad_sequence([one.transpose(0, 1) for one in frames], batch_first=True)  # (B, T, L, D)
    lengths = torch.tensor([one.shape[1] for one in frames])
    return {"frames": padded.transpose(1, 2).float(), "mask": torch.arange(padded.shape[1]) < lengths[:, None]}


@torch.no_grad()
def _of_frames(
    model: Retriever,
    cuts: CutSet,
    level: Level,
    cache: Path,
    read: Callable[[FrameCache, Cut], Tensor | None],
    reduce: Callable[[Tensor, Tensor], Tensor],
) -> tuple[list[str], list[Tensor], pd.DataFrame]:
    """Ids of the usable cuts, what is made of each, and the skipped.

    Args:
        read: what is made of a clip whose frames are kept, or None.
        reduce: the same of frames (L, T, D) and active frames (T,) that are computed here.
    """
    kept = None if model.speech_is_tuned else FrameCache(model.speech, level, cache, model.last_only)
    reduced, missing = {}, []
    progress = tqdm(total=len(cuts), desc="frames", unit="clip", leave=False)
    for cut in cuts:
        try:
            found = kept and read(kept, cut)
        except OSError:  # the audio file itself is gone: decoding it will say so
            found = None
        if found is None:
            missing.append(cut)
            continue
        reduced[cut.id] = found
        progress.update()
    skipped = []
    by_id = {cut.id: cut for cut in missing}
    # On the CPU one by one, at 1.5 times the cost: what is kept is then the same to the last bit, whatever was missing.
    size = 1 if model.device.type == "cpu" else _BATCH
    for batch in batches.ordered_batches(missing, size, level):
        skipped += batch["skipped"]
        if batch["cut_id"]:
            for cut_id, *found in zip(batch["cut_id"], *_fitted(*model.frames(batch)), strict=True):
                if kept:
                    kept.write(by_id[cut_id], *found)
                reduced[cut_id] = reduce(*found)
        progress.update(len(batch["cut_id"]) + len(batch["skipped"]))
    progress.close()
    cut_ids = [cut.id for cut in cuts if cut.id in reduced]
    return cut_ids, [reduced[cut_id] for cut_id in cut_ids], skipped_table(skipped)


def _fitted(layers: Tensor, mask: Tensor, active: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A padded batch to each clip's own frames as fp16, which is how they are kept, and its active frames."""
    lengths = mask.sum(1).tolist()
    frames = [one[:, :length] for one, length in zip(layers.half().cpu(), lengths, strict=True)]
    return frames, [one[:length] for one, length in zip(active.cpu(), lengths, strict=True)]


def skipped_table(skipped: list[tuple[str, str]]) -> pd.DataFrame:
    """(utterance_id, reason) pairs as a table, each utterance once."""
    return pd.DataFrame(skipped, columns=["utterance_id", "reason"]).drop_duplicates("utterance_id", ignore_index=True)


class FrozenClips:
    """What a frozen backbone gave, in memory: an epoch takes one window of each clip, in batches."""

    def __init__(
        self, features: Features | FrozenFrames, cuts: CutSet, batch_size: int, by_corpus: bool = False
    ) -> None:
        """
        Args:
            by_corpus: whether a batch is of one corpus, see `batches.by_corpus`; then an epoch takes of a small corpus
                some clips several times, and of a large one not all.
        """
        by_id = {cut.id: cut for cut in cuts}
        self.cuts = [by_id[cut_id] for cut_id in features.cut_ids]
        self.features, self.batch_size, self.by_corpus = features, batch_size, by_corpus
        windows: dict[str, list[int]] = {}
        for row, cut in enumerate(self.cuts):
            windows.setdefault(batches.utterance_id(cut), []).append(row)
        self.windows = list(windows.values())
        self.row = {cut.id: row for row, cut in enumerate(self.cuts)}

    def __len__(self) -> int:
        return len(self.windows)

    def plan(self, rng: np.random.Generator) -> list[list[Cut]]:
        """Batches of one random window of every clip, shuffled."""
        chosen = [windows[rng.integers(len(windows))] for windows in self.windows]
        cuts = [self.cuts[chosen[i]] for i in rng.permutation(len(chosen))]
        return (
            batches.by_corpus(cuts, self.batch_size, rng) if self.by_corpus else batches.batched(cuts, self.batch_size)
        )

    def load(self, plan: list[list[Cut]]) -> Iterator[dict]:
        """Batches as those of `batches.WaveformClips.load`, with `features.batch` for the waveform."""
        for cuts in plan:
            yield self.features.batch([self.row[cut.id] for cut in cuts]) | batches.about(cuts) | {"skipped": []}


@dataclass(frozen=True)
class Embeddings:
    """One unit vector an utterance.

    Attributes:
        utterance_ids: N ids, in the manifest's order, without the skipped ones.
        vectors: (N, d) float32, L2-normalised.
        logits: (N, 22) float32, the style classifier's, columns as STYLES; mean over a long clip's windows. (N, 0) of a
            model without one.
        skipped: columns utterance_id, reason.
    """

    utterance_ids: list[str]
    vectors: np.ndarray
    logits: np.ndarray
    skipped: pd.DataFrame


@torch.no_grad()
def embed(
    model: Retriever,
    cuts: CutSet,
    level: Level,
    cache: Path | None = CACHE,
    groups: Mapping[str, str] | None = None,
) -> Embeddings:
    """Embeds clips: whole up to 30 s, a longer one as the normalised mean over its windows of at most 8 s.

    Args:
        cache: where the frames of a frozen backbone are kept; None keeps nothing (and is what a tuned backbone gets).
        groups: utterance_id -> the group by whose own statistics its features are standardised, if there are
            `adaptation.MIN_CLIPS` in all; None takes those of the training for all.

    Raises:
        adaptation.AdaptationError: there are groups, and this retriever cannot adapt.
    """
    model.eval()
    parts = batches.pieces(cuts)
    owner = {cut.id: batches.utterance_id(cut) for cut in parts}
    if groups is not None:
        ids, found, skipped = _embed_adapted(model, parts, level, cache, [groups[owner[cut.id]] for cut in parts])
    elif cache is None or model.speech_is_tuned:
        ids, found, skipped = _embed_waveforms(model, parts, level)
    else:
        ids, found, skipped = _embed_frozen(model, parts, level, cache)
    windows: dict[str, list[int]] = {}
    for row, cut_id in enumerate(ids):
        windows.setdefault(owner[cut_id], []).append(row)
    order = [i for i in dict.fromkeys(owner.values()) if i in windows]
    means = [torch.stack([one[windows[i]].mean(0) for i in order]) if order else one[:0] for one in found]
    unused = skipped[~skipped["utterance_id"].isin(order)].reset_index(drop=True)
    return Embeddings(order, F.normalize(means[0], dim=-1).numpy(), means[1].numpy(), unused)


def _vectors_and_logits(model: Retriever, batch: dict) -> tuple[Tensor, Tensor]:
    """(B, d) unit vectors, and (B, 22) logits of the style classifier or (B, 0) without one."""
    vectors = model.speech_vectors(batch)
    logits = vectors[:, :0] if model.classifier is None else model.classifier(vectors)
    return F.normalize(vectors, dim=-1).float().cpu(), logits.float().cpu()


def _embed_frozen(
    model: Retriever, parts: CutSet, level: Level, cache: Path
) -> tuple[list[str], tuple[Tensor, Tensor], pd.DataFrame]:
    if isinstance(model, StyleRetriever):
        features = frozen_features(model, parts, level, cache)
        return features.cut_ids, _vectors_and_logits(model, {"pooled": features.pooled}), features.skipped
    kept = frozen_frames(model, parts, level, cache)
    order = sorted(range(len(kept.frames)), key=lambda i: kept.frames[i].shape[1])  # like lengths side by side
    rows = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
    found = [_vectors_and_logits(model, padded_frames([kept.frames[i] for i in part])) for part in rows]
    vectors, logits = zip(*found, strict=True) if found else zip(*[_nothing(model)], strict=True)
    return [kept.cut_ids[i] for i in order], (torch.cat(vectors), torch.cat(logits)), kept.skipped


def _embed_adapted(
    model: Retriever, parts: CutSet, level: Level, cache: Path | None, groups: list[str]
) -> tuple[list[str], tuple[Tensor, Tensor], pd.DataFrame]:
    training = adaptation.of_training(model)
    features = frozen_features(model, parts, level, cache or CACHE)
    of_cut = dict(zip((cut.id for cut in parts), groups, strict=True))
    group, pooled = np.array([of_cut[cut_id] for cut_id in features.cut_ids]), features.pooled.numpy()
    vectors, logits = (one.new_zeros(len(group), one.shape[1]) for one in _nothing(model))
    for name, own in adaptation.gather([(group, pooled)]).items():
        rows = np.flatnonzero(group == name)
        by = adaptation.shrunk(own, training) if len(group) >= adaptation.MIN_CLIPS else training
        batch = adaptation.batch(model, pooled[rows], by)
        vectors[rows], logits[rows] = _vectors_and_logits(model, batch)
    return features.cut_ids, (vectors, logits), features.skipped


def _nothing(model: Retriever) -> tuple[Tensor, Tensor]:
    """Vectors and logits of no clip."""
    return torch.zeros(0, model.config.dim), torch.zeros(0, 0 if model.classifier is None else len(STYLES))


def _embed_waveforms(
    model: Retriever, parts: CutSet, level: Level
) -> tuple[list[str], tuple[Tensor, Tensor], pd.DataFrame]:
    ids, skipped = [], []
    found = [_nothing(model)]
    with tqdm(total=len(parts), desc="embed", unit="clip", leave=False) as progress:
        for batch in batches.ordered_batches(parts, _BATCH, level):
            skipped += batch["skipped"]
            ids += batch["cut_id"]
            if batch["cut_id"]:
                found.append(_vectors_and_logits(model, batch))
            progress.update(len(batch["cut_id"]) + len(batch["skipped"]))
    vectors, logits = zip(*found, strict=True)
    return ids, (torch.cat(vectors), torch.cat(logits)), skipped_table(skipped)
