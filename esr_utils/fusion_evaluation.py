"""Captioned retrieval of systems side by side, by each protocol; `fusion_tables` makes FS-CLAP's tables of it.

A row is a system, a protocol and a corpus; runs of a system that differ by seed alone are one row, their mean, and its
interval covers other seeds too. All rows of a corpus are scored on the same clips, captions and bootstrap replicates,
and compared by paired differences. What each number means stands in `captioned`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from esr_utils import batches, embedding, intervals, modality, protocols, runs
from esr_utils.captioned import DIRECTIONS, Captions, CaptionScorer, Found
from esr_utils.captions import Captioned, relevance
from esr_utils.config import Level
from esr_utils.embeddings_file import ABOUT, PROTOCOL, EmbeddingsFile
from esr_utils.fusion import FusionRetriever
from esr_utils.manifests import to_cuts
from esr_utils.tables import Cell


@dataclass(frozen=True)
class CaptionedSet:
    """A corpus's clips and captions, on which all systems are scored.

    Attributes:
        clips: rows of the manifest, each with a caption, sorted by utterance_id.
        captions: their distinct texts, and what each is right for.
        own: (N,) the first caption that was written for each clip: what `matched` fuses it with.
    """

    corpus: str
    clips: pd.DataFrame
    captions: Captions
    own: np.ndarray
    scorer: CaptionScorer


def captioned_sets(
    manifest: pd.DataFrame, captioned: Captioned, split: str = "test", grammar: str = "seen", seed: int = 0
) -> list[CaptionedSet]:
    """The test set of each corpus of a manifest.

    Args:
        grammar: seen or held_out: which attribute captions; a corpus's own captions are taken either way.
        seed: of the bootstrap.

    Raises:
        ValueError: no clip of the split has such a caption.
    """
    told = captioned.table[captioned.table["grammar"].isin((grammar, "free"))]
    rows = manifest[(manifest["split"] == split) & manifest["utterance_id"].isin(told["utterance_id"])]
    if rows.empty:
        raise ValueError(f"no clip of split {split!r} has a caption of grammar {grammar!r}")
    found = []
    for corpus, clips in rows.groupby("corpus", sort=False):
        clips = clips.sort_values("utterance_id").reset_index(drop=True)
        captions = _captions(clips, told, captioned.clips)
        own = captions.written_for.argmax(axis=0)
        scorer = CaptionScorer(captions.relevant, clips["speaker"], seed, captions.written_for)
        found.append(CaptionedSet(str(corpus), clips, captions, own, scorer))
    return found


def _captions(clips: pd.DataFrame, told: pd.DataFrame, attributes: pd.DataFrame) -> Captions:
    """Each text once: right for the clips that agree on what it names (`captions.relevance`)."""
    told = told[told["utterance_id"].isin(clips["utterance_id"])]
    texts = sorted(set(told["caption"]))
    column = pd.Series(np.arange(len(clips)), index=clips["utterance_id"])
    written_for = np.zeros((len(texts), len(clips)), dtype=bool)
    row = pd.Series(np.arange(len(texts)), index=texts)
    written_for[told["caption"].map(row), told["utterance_id"].map(column)] = True
    of_clip = attributes.set_index("utterance_id").loc[clips["utterance_id"]].reset_index()
    right = np.zeros_like(written_for)
    np.logical_or.at(right, told["caption"].map(row).to_numpy(), relevance(told, of_clip))
    return Captions(texts, right | written_for, written_for)


@dataclass(frozen=True)
class Row:
    """A system's result on one corpus by one protocol.

    Attributes:
        found: one for each seed.
        fusions: pairs fused to score the set both ways.
        seconds: that it took, mean over the seeds, without the speech backbone.
        ceiling: of a rerank, by direction: the share of queries with a right item on their shortlist, mean over seeds.
        gap: modality gap of the vectors made alone, mean over the seeds; None where there are none.
    """

    corpus: str
    system: str
    protocol: str
    found: tuple[Found, ...]
    fusions: int = 0
    seconds: float = 0.0
    ceiling: Mapping[str, float] | None = None
    gap: float | None = None

    def cell(self, direction: str, metric: str) -> Cell:
        name = f"{direction}/{metric}"
        drawn = np.stack([one.replicates[name] for one in self.found])
        value = float(np.mean([one.values[name] for one in self.found]))
        replicates = np.einsum("rs,sr->r", intervals.seed_weights(*drawn.shape), drawn)
        return Cell(value, tuple(intervals.interval(replicates, value)), digits=3)


def evaluate(
    systems: Mapping[str, Sequence[str | Path]],
    tests: Sequence[CaptionedSet],
    asked: Sequence[str] = ("bi-encoder", "masked", "rerank"),
    k: int = 50,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> list[Row]:
    """Scores systems (label -> run folders, one for each seed) on every set by every protocol.

    A model without fusion has one way to be scored, and gets the row `bi-encoder` alone, and `matched`, which is the
    same for it. A clip past 30 s is the sequence of its windows' frames.

    Args:
        asked: of `protocols.HONEST`, and `matched`, whose rows no table but `leak_table` takes.
        k: of the rerank.
    """
    rows = []
    for system, folders in systems.items():
        made: dict[tuple[str, str], list[tuple]] = {}
        for folder in folders:
            model, level = _loaded(folder, device)
            for test in tests:
                frames, texts = clip_frames(model, test.clips, level, cache), test.captions.texts
                gap = modality.gap(_unit(model, frames, "speech"), _unit(model, texts, "text"))
                for protocol in asked:
                    if model.config.fusion or protocol in ("bi-encoder", "matched"):
                        made.setdefault((test.corpus, protocol), []).append(
                            (*_scored(model, frames, test, protocol, k), gap)
                        )
        for (corpus, protocol), results in made.items():
            found, fusions, seconds, ceilings, gaps = zip(*results, strict=True)
            ceiling = {d: float(np.mean([one[d] for one in ceilings])) for d in ceilings[0]} or None
            mean_seconds, gap = float(np.mean(seconds)), float(np.mean(gaps))
            rows.append(Row(corpus, system, protocol, found, fusions[0], mean_seconds, ceiling, gap))
    return rows


def from_file(file: EmbeddingsFile, tests: Sequence[CaptionedSet]) -> list[Row]:
    """The rows of a system that lives elsewhere, by the vectors that it made of these clips and captions.

    Raises:
        EmbeddingsFileError: a clip or caption is not in the file.
    """
    scores = {test.corpus: file.scores(test.captions.texts, test.clips["utterance_id"].tolist()) for test in tests}
    return [Row(test.corpus, file.system, PROTOCOL, (test.scorer.retrieval(scores[test.corpus]),)) for test in tests]


def from_folder(folder: str | Path, tests: Sequence[CaptionedSet]) -> list[Row]:
    """`from_file` of every embeddings file in a folder, one a subfolder; none for ""."""
    files = sorted(path.parent for path in Path(folder).glob(f"*/{ABOUT}")) if folder else []
    return [row for file in files for row in from_file(EmbeddingsFile.read(file), tests)]


def clip_frames(model: FusionRetriever, clips: pd.DataFrame, level: str, cache: Path) -> list[Tensor]:
    """The frames of each clip, (L, T, D) fp16: of one past 30 s, those of its windows one after another.

    Raises:
        ValueError: a clip cannot be used; it names those, and the reasons.
    """
    parts = batches.pieces(to_cuts(clips))
    owner = {cut.id: batches.utterance_id(cut) for cut in parts}
    kept = embedding.frozen_frames(model, parts, level, cache)
    if len(kept.skipped):
        named = "; ".join(f"{name}: {reason}" for name, reason in kept.skipped.head(5).itertuples(index=False))
        raise ValueError(f"{len(kept.skipped)} clips cannot be used ({named}): leave them out of the manifest")
    windows: dict[str, list[Tensor]] = {}
    for cut_id, frames in zip(kept.cut_ids, kept.frames, strict=True):
        windows.setdefault(owner[cut_id], []).append(frames)
    return [torch.cat(windows[name], dim=1) for name in clips["utterance_id"]]


def joint_spaces(
    systems: Mapping[str, Sequence[str | Path]],
    test: CaptionedSet,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> dict[str, tuple[np.ndarray, pd.DataFrame]]:
    """The space of each system's first run, for maps side by side (FS-CLAP Fig. 2): title -> vectors, about.

    Vectors are those of the clips with a style and of the captions written for them, each made alone. A title has the
    modality gap. About: columns style, modality (speech, text).
    """
    clips = test.clips[test.clips["style"] != ""]
    written = test.captions.written_for[:, clips.index]
    texts = [text for text, used in zip(test.captions.texts, written.any(1), strict=True) if used]
    styles = [*clips["style"], *clips["style"].iloc[written[written.any(1)].argmax(1)]]
    about = pd.DataFrame({"style": styles, "modality": ["speech"] * len(clips) + ["text"] * len(texts)})
    found = {}
    for system, (folder, *_) in systems.items():
        model, level = _loaded(folder, device)
        sides = _unit(model, clip_frames(model, clips, level, cache), "speech"), _unit(model, texts, "text")
        found[f"{system}, modality gap {modality.gap(*sides):.2f}"] = np.concatenate(sides), about
    return found


def _loaded(folder: str | Path, device: str) -> tuple[FusionRetriever, Level]:
    """A run's best retriever, and the level that it was trained at."""
    folder = runs.run_folder(folder)
    level = runs.read_json(folder / "config.json")["training"]["level"]
    return FusionRetriever.load(folder / "best", runs.pick_device(device)), level


def _scored(
    model: FusionRetriever, frames: list[Tensor], test: CaptionedSet, protocol: str, k: int
) -> tuple[Found, int, float, dict[str, float]]:
    """What is found, by how many fusions and seconds, and the ceiling of a rerank."""
    if protocol in protocols.LEAKY:
        own = [test.captions.texts[i] for i in test.own]
        scored = protocols.score(model, frames, own, protocol)
        right = test.captions.relevant[test.own]
        scorer = CaptionScorer(right, test.clips["speaker"], test.scorer.seed, np.eye(len(own), dtype=bool) & right)
        return scorer.retrieval(scored.matrix), scored.fusions, scored.seconds, {}
    texts = test.captions.texts
    ways = {"t2a": protocols.score(model, frames, texts, protocol, k, "t2a")}
    ways["a2t"] = protocols.score(model, frames, texts, protocol, k, "a2t") if protocol == "rerank" else ways["t2a"]
    used = {id(way): way for way in ways.values()}.values()
    found = test.scorer.retrieval(ways["t2a"].matrix, ways["a2t"].matrix)
    ceiling = {}
    if protocol == "rerank":
        values = test.scorer.ceiling(ways["t2a"].matrix, k, ways["a2t"].matrix)
        ceiling = {direction: values[f"{direction}/ceiling@{k}"] for direction in DIRECTIONS}
    return found, sum(way.fusions for way in used), sum(way.seconds for way in used), ceiling


@torch.no_grad()
def _unit(model: FusionRetriever, items: list, side: str) -> np.ndarray:
    """(N, d) unit vectors of frames or sentences, made alone."""
    batched = [items[start : start + 128] for start in range(0, len(items), 128)]
    if side == "text":
        return torch.cat([model.encode_text(part).cpu() for part in batched]).numpy()
    return torch.cat([model.encode_speech(embedding.padded_frames(part)).cpu() for part in batched]).numpy()
