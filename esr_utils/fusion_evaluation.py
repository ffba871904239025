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
from tqdm.auto import tqdm

from esr_utils import batches, embedding, intervals, modality, protocols, runs
from esr_utils.captioned import DIRECTIONS, Captions, CaptionScorer, Found
from esr_utils.captions import Captioned, relevance
from esr_utils.config import FusionConfig, FusionTrainConfig, Level
from esr_utils.embeddings_file import ABOUT, PROTOCOL, EmbeddingsFile, EmbeddingsFileError
from esr_utils.fusion import FusionRetriever, Way, pick
from esr_utils.manifests import to_cuts
from esr_utils.objective import in_bf16
from esr_utils.tables import Cell
from esr_utils.text import Tokens


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


def usable(manifest: pd.DataFrame, split: str = "test") -> tuple[pd.DataFrame, pd.DataFrame]:
    """A manifest without the clips that cannot be heard: by their audio alone, so the same for all systems.

    Every clip is decoded and none is kept in memory.

    Args:
        split: that is scored.

    Returns:
        The manifest's other rows; and what is left out: columns utterance_id, reason.

    Raises:
        ValueError: of a corpus's clips of the split, none can be used.
    """
    skipped = []
    for cut in tqdm(batches.pieces(to_cuts(manifest)), desc="decode", unit="clip", leave=False):
        skipped += batches.load_batch([cut], "recorded")["skipped"]
    left_out = embedding.skipped_table(skipped)
    for corpus, rows in manifest[manifest["split"] == split].groupby("corpus"):
        unheard = left_out[left_out["utterance_id"].isin(rows["utterance_id"])]
        if len(unheard) == len(rows):
            reasons = "; ".join(unheard["reason"].unique()[:3])
            raise ValueError(f"none of the {len(rows)} {split} clips of {corpus} can be used: {reasons}")
    return manifest[~manifest["utterance_id"].isin(left_out["utterance_id"])], left_out


@dataclass(frozen=True)
class Row:
    """A system's result on one corpus by one protocol.

    Attributes:
        found: one for each seed.
        fusions: pairs fused to score the set both ways.
        seconds: that it took, mean over the seeds, without the speech backbone.
        ceiling: of a rerank, by direction: the share of queries with a right item on their shortlist, mean over seeds.
        gap: modality gap of the vectors made alone, mean over the seeds; None where the sides are fused.
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
        n_queries = self.found[0].values[f"{direction}/n_queries"]
        return Cell(value, tuple(intervals.interval_of_few(replicates, value, n_queries)), digits=3)


def evaluate(
    systems: Mapping[str, Sequence[str | Path]],
    tests: Sequence[CaptionedSet],
    asked: Sequence[str] = ("bi-encoder", "masked", "rerank"),
    k: int = 50,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> list[Row]:
    """Scores systems (label -> run folders, one for each seed) on every set by every protocol.

    A model without fusion has one way to be scored, so all honest protocols are one row for it, `bi-encoder`. One with
    fusion has no row by an honest protocol that it was not trained for. A clip past 30 s is the sequence of its
    windows' frames.

    Args:
        asked: of `protocols.HONEST`, and `matched`, whose rows no table but `leak_table` takes.
        k: of the rerank.

    Raises:
        ValueError: no such protocol; or a clip cannot be used.
    """
    if unknown := set(asked) - {*protocols.HONEST, *protocols.LEAKY}:
        raise ValueError(f"protocol {', '.join(sorted(unknown))}: there are {', '.join(protocols.HONEST)}, matched")
    rows = []
    progress = tqdm(total=sum(map(len, systems.values())) * len(tests), desc="score", unit="set", leave=False)
    for system, folders in systems.items():
        made: dict[tuple[str, str], list[tuple]] = {}
        for folder in folders:
            model, level, bf16 = _loaded(folder, device)
            for test in tests:
                sides = _tokens(model, clip_frames(model, test.clips, level, cache), test.captions.texts)
                for protocol in _trained_for(folder, model.config, asked):
                    scored = _scored(model, *sides, test, protocol, k, bf16)
                    made.setdefault((test.corpus, protocol), []).append(scored)
                progress.update()
        for (corpus, protocol), results in made.items():
            found, fusions, seconds, ceilings, gaps = zip(*results, strict=True)
            ceiling = {d: float(np.mean([one[d] for one in ceilings])) for d in ceilings[0]} or None
            mean_seconds, gap = float(np.mean(seconds)), None if gaps[0] is None else float(np.mean(gaps))
            rows.append(Row(corpus, system, protocol, found, fusions[0], mean_seconds, ceiling, gap))
    progress.close()
    return rows


def from_file(file: EmbeddingsFile, tests: Sequence[CaptionedSet], level: Level) -> list[Row]:
    """The rows of a system that lives elsewhere, by the vectors that it made of these clips and captions.

    A corpus of which the file has nothing gets no row: it may be in another file.

    Args:
        level: at which the systems beside it heard the clips.

    Raises:
        EmbeddingsFileError: it heard them at another level, or has a part of a corpus's clips and captions only.
    """
    if file.level != level:
        raise EmbeddingsFileError(f"{file.system} heard the level {file.level}, the others {level}: write it anew")
    inside = [test for test in tests if set(file.utterance_ids) & set(test.clips["utterance_id"])]
    scores = [file.scores(test.captions.texts, test.clips["utterance_id"].tolist()) for test in inside]
    return [
        Row(test.corpus, file.system, PROTOCOL, (test.scorer.retrieval(one),))
        for test, one in zip(inside, scores, strict=True)
    ]


def from_folder(folder: str | Path, tests: Sequence[CaptionedSet], level: Level) -> list[Row]:
    """`from_file` of every embeddings file in a folder, one a subfolder; none for "".

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if folder and not Path(folder).is_dir():
        raise FileNotFoundError(f"embeddings: there is no folder {folder}")
    files = sorted(path.parent for path in Path(folder).glob(f"*/{ABOUT}")) if folder else []
    return [row for file in files for row in from_file(EmbeddingsFile.read(file), tests, level)]


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

    Vectors are those of the clips and of the captions written for them, made alone as an index keeps them (`masked`).
    A title has their modality gap. About: columns style ("" where there is none), modality (speech, text).
    """
    first_clip = test.captions.written_for.argmax(axis=1)
    styles = [*test.clips["style"], *test.clips["style"].iloc[first_clip]]
    names = ["speech"] * len(test.clips) + ["text"] * len(test.captions.texts)
    about = pd.DataFrame({"style": styles, "modality": names})
    found = {}
    for system, (folder, *_) in systems.items():
        model, level, _ = _loaded(folder, device)
        sides = _tokens(model, clip_frames(model, test.clips, level, cache), test.captions.texts)
        vectors = _alone(model, *sides, "masked")
        found[f"{system}, modality gap {modality.gap(*vectors):.2f}"] = np.concatenate(vectors), about
    return found


def level_of(systems: Mapping[str, Sequence[str | Path]]) -> Level:
    """The level at which the systems heard their clips."""
    return runs.read_json(runs.run_folder(next(iter(systems.values()))[0]) / "config.json")["training"]["level"]


def _loaded(folder: str | Path, device: str) -> tuple[FusionRetriever, Level, bool]:
    """A run's best retriever, the level that it was trained at, and whether pairs are fused in bf16, as there."""
    folder, place = runs.run_folder(folder), runs.pick_device(device)
    training = runs.read_json(folder / "config.json")["training"]
    return FusionRetriever.load(folder / "best", place), training["level"], in_bf16(training["precision"], place)


@torch.no_grad()
def _tokens(model: FusionRetriever, frames: list[Tensor], texts: list[str]) -> tuple[Tokens, Tokens]:
    return protocols.speech_tokens(model.eval(), frames), protocols.text_tokens(model, texts)


@torch.no_grad()
def _alone(model: FusionRetriever, clips: Tokens, texts: Tokens, way: Way) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of clips and captions, (N, d) and (C, d)."""
    sides = ((clips, "speech"), (texts, "text"))
    speech, text = (protocols.unit_vectors(model, tokens, side, way).cpu().numpy() for tokens, side in sides)
    return speech, text


def _trained_for(folder: str | Path, config: FusionConfig, asked: Sequence[str]) -> list[str]:
    """Of the protocols asked for, those that a run's losses were made for; without fusion all honest ones are one."""
    if not config.fusion:
        return list(dict.fromkeys(name if name in protocols.LEAKY else "bi-encoder" for name in asked))
    training = FusionTrainConfig.from_dict(runs.read_json(runs.run_folder(folder) / "config.json")["training"])
    untrained = set() if training.bi_encoder else {"bi-encoder"}
    untrained |= set() if training.matching_weight else {"rerank", "all-pairs"}
    return [name for name in asked if name not in untrained]


def _scored(
    model: FusionRetriever, clips: Tokens, texts: Tokens, test: CaptionedSet, protocol: str, k: int, bf16: bool
) -> tuple[Found, int, float, dict[str, float], float | None]:
    """What is found, by how many fusions and seconds; the ceiling of a rerank; the gap of vectors made alone."""
    if protocol in protocols.LEAKY:
        own = pick(texts, torch.from_numpy(test.own).to(texts.mask.device))
        scored = protocols.score(model, clips, own, protocol, bf16=bf16)
        right = test.captions.relevant[test.own]
        scorer = CaptionScorer(right, test.clips["speaker"], test.scorer.seed, np.eye(len(test.own), dtype=bool))
        return scorer.retrieval(scored.matrix), scored.fusions, scored.seconds, {}, None
    asked = DIRECTIONS if protocol == "rerank" else ("t2a",)
    ways = {side: protocols.score(model, clips, texts, protocol, k, side, bf16=bf16) for side in asked}
    used, ways["a2t"] = list(ways.values()), ways.get("a2t", ways["t2a"])
    found = test.scorer.retrieval(ways["t2a"].matrix, ways["a2t"].matrix)
    ceiling, gap = {}, None
    if protocol == "rerank":
        values = test.scorer.ceiling(ways["t2a"].matrix, k, ways["a2t"].matrix)
        ceiling = {direction: values[f"{direction}/ceiling@{k}"] for direction in DIRECTIONS}
    elif protocol != "all-pairs":
        gap = modality.gap(*_alone(model, clips, texts, protocol))
    return found, sum(way.fusions for way in used), sum(way.seconds for way in used), ceiling, gap
