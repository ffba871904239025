"""How a model that fuses the two sides of a pair may be scored, and how it may not.

Fusion reads speech and caption of one pair together. Where test clip i is fused with its own caption i, what comes out
of either side knows of the other, and the clip is found by that: on pure noise, R@1 is 100 % (`leakage`). So a
score must come from a pair that was made without knowing whether it is right:

    bi-encoder   no fusion: each side past the blocks, then cosine                    0 fusions; can be indexed
    masked       each side through the blocks alone, then cosine                      0 fusions; can be indexed
    rerank       the k best by one of these, then each (query, candidate) fused       Q k fusions
    all-pairs    every caption fused with every clip                                  N M fusions
    matched      each clip fused with its own caption only. Leaky: diagnosis only     N fusions

FS-CLAP does not say which of them its tables are of.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from esr_utils.embedding import padded_frames
from esr_utils.fusion import FusionRetriever, FusionSeparation, Modality, Way, half_precision, pick
from esr_utils.text import Tokens

HONEST = ("bi-encoder", "masked", "rerank", "all-pairs")
LEAKY = ("matched",)
Direction = Literal["t2a", "a2t"]

_BATCH = 128  # clips, captions or pairs at a time
_BELOW = 3.0  # taken off the cosine of candidates outside a shortlist: they keep their order, below all of it


@dataclass(frozen=True)
class Scored:
    """What `score` found.

    Attributes:
        matrix: (M, N) float32, a row for each caption, a column for each clip: cosines; of a rerank, 3 less for
            candidates outside the query's shortlist.
        protocol: of HONEST or LEAKY.
        direction: whose shortlists they are: t2a, the captions are the queries; a2t, the clips. Only rerank differs.
        fusions: pairs that went through the fusion blocks together.
        seconds: that the scoring took, with the projection of the tokens and without the speech backbone.
        shortlist: (Q, k) int64 of a rerank: for each query its candidates, best first. Else None.
    """

    matrix: NDArray[np.float32]
    protocol: str
    direction: Direction
    fusions: int
    seconds: float
    shortlist: NDArray[np.int64] | None = None


def refuse_leaky(protocol: str) -> None:
    """What a table of results calls with each row's protocol.

    Raises:
        ValueError: the protocol is leaky, or unknown.
    """
    if protocol in LEAKY:
        raise ValueError(
            f"{protocol!r} fuses each clip with its own caption before it looks for it, so the answer is in the "
            f"question: it finds 100 % of pure noise. It is for diagnosis only; results are of {', '.join(HONEST)}"
        )
    if protocol not in HONEST:
        raise ValueError(f"protocol {protocol!r}; it must be one of {', '.join((*HONEST, *LEAKY))}")


@torch.no_grad()
def score(
    model: FusionRetriever | FusionSeparation,
    speech: Tokens | list[Tensor],
    captions: Tokens | list[str],
    protocol: str,
    k: int = 50,
    direction: Direction = "t2a",
    first: Way = "bi-encoder",
    bf16: bool = False,
    vectors: Tensor | None = None,
) -> Scored:
    """Scores every caption against every clip. Leaves the model in eval mode.

    Args:
        speech: N clips: tokens of width d, or a frozen backbone's frames (`embedding.frozen_frames`).
        captions: M of them: tokens of width d, or the sentences.
        protocol: of HONEST or LEAKY; see the module's docstring.
        k: candidates that a rerank fuses with each query.
        direction: whose queries a rerank serves: captions' (t2a) or clips' (a2t). The others serve both.
        first: what makes a rerank's shortlist.
        vectors: (N, d) the clips' `unit_vectors`, made in the protocol's way or a rerank's `first`, where they are kept
            as an index keeps them: only the queries are then encoded.
        bf16: fuses pairs in half precision; where the CPU has it (`objective.has_bf16`) it takes less time.

    Raises:
        ValueError: an unknown protocol, direction or way, k below 1, vectors of another number of clips, or `matched`
            with M other than N.
    """
    if protocol not in (*HONEST, *LEAKY) or direction not in ("t2a", "a2t") or k < 1:
        raise ValueError(
            f"protocol {protocol!r}, direction {direction!r}, k {k}: a protocol is one of "
            f"{', '.join((*HONEST, *LEAKY))}, a direction t2a or a2t, k at least 1"
        )
    started = time.perf_counter()
    model.eval()
    clips = speech if isinstance(speech, Tokens) else speech_tokens(model, speech)
    texts = captions if isinstance(captions, Tokens) else text_tokens(model, captions)
    n_texts, n_clips = len(texts.mask), len(clips.mask)
    if vectors is not None and len(vectors) != n_clips:
        raise ValueError(f"{len(vectors)} vectors, {n_clips} clips: they must be of the same clips, in one order")
    shortlist, fusions = None, 0
    if protocol == "matched":
        if n_texts != n_clips:
            raise ValueError(f"matched pairs caption i with clip i, but there are {n_texts} captions, {n_clips} clips")
        own, fusions = np.arange(n_clips), n_clips
        found, spoken = (F.normalize(v, dim=-1) for v in reversed(_pairs(model, clips, texts, own, own, bf16)))
        matrix = (found @ spoken.T).cpu().numpy()
    elif protocol == "all-pairs":
        fusions, rows = n_texts * n_clips, np.repeat(np.arange(n_texts), n_clips)
        matrix = _cosines(model, clips, texts, np.tile(np.arange(n_clips), n_texts), rows, bf16)
        matrix = matrix.reshape(n_texts, n_clips)
    else:
        way = first if protocol == "rerank" else protocol
        spoken = unit_vectors(model, clips, "speech", way) if vectors is None else vectors
        found = unit_vectors(model, texts, "text", way)
        matrix = (found @ spoken.T).cpu().numpy()
    if protocol == "rerank":
        by_query = matrix if direction == "t2a" else matrix.T
        shortlist = np.argsort(-by_query, axis=1, kind="stable")[:, :k]
        queries, candidates = np.repeat(np.arange(len(by_query)), shortlist.shape[1]), shortlist.ravel()
        rows, columns = (queries, candidates) if direction == "t2a" else (candidates, queries)
        fusions = len(rows)
        matrix = matrix - _BELOW
        matrix[rows, columns] = _cosines(model, clips, texts, columns, rows, bf16)
        by_query = matrix if direction == "t2a" else matrix.T
        shortlist = np.argsort(-by_query, axis=1, kind="stable")[:, : shortlist.shape[1]]
    return Scored(matrix, protocol, direction, fusions, time.perf_counter() - started, shortlist)


@torch.no_grad()
def unit_vectors(model: FusionRetriever | FusionSeparation, tokens: Tokens, modality: Modality, way: Way) -> Tensor:
    """(N, d) unit vectors of clips or captions, each alone (`FusionSeparation.alone`), in batches of like length."""
    lengths = tokens.mask.sum(1)
    vectors = tokens.values.new_zeros(len(lengths), tokens.values.shape[2])
    for part in lengths.argsort(stable=True).split(_BATCH):
        vectors[part] = model.alone(pick(tokens, part), modality, way)
    return F.normalize(vectors, dim=-1)


def _pairs(
    model: FusionRetriever | FusionSeparation,
    clips: Tokens,
    texts: Tokens,
    columns: NDArray[np.int64],
    rows: NDArray[np.int64],
    bf16: bool,
) -> tuple[Tensor, Tensor]:
    """(P, d) and (P, d): clip columns[p] fused with caption rows[p], in batches of pairs of like length."""
    width, device = clips.values.shape[2], clips.values.device
    columns, rows = torch.from_numpy(columns).to(device), torch.from_numpy(rows).to(device)
    longest_text = texts.mask.shape[1] + 1
    key = clips.mask.sum(1)[columns] // 8 * longest_text + texts.mask.sum(1)[rows]
    vectors = clips.values.new_zeros(2, len(rows), width)
    for part in key.argsort(stable=True).split(_BATCH):
        with half_precision(device, bf16):
            vectors[:, part] = torch.stack(model.pair(pick(clips, columns[part]), pick(texts, rows[part]))).float()
    return vectors[0], vectors[1]


def _cosines(
    model: FusionRetriever | FusionSeparation,
    clips: Tokens,
    texts: Tokens,
    columns: NDArray[np.int64],
    rows: NDArray[np.int64],
    bf16: bool,
) -> NDArray[np.float32]:
    """(P,) scores of the fused pairs, some thousands at a time: their vectors need not all be there at once."""
    found = np.empty(len(rows), dtype=np.float32)
    for start in range(0, len(rows), 2**15):
        part = slice(start, start + 2**15)
        pairs = _pairs(model, clips, texts, columns[part], rows[part], bf16)
        found[part] = F.cosine_similarity(*pairs, dim=-1).cpu().numpy()
    return found


def speech_tokens(model: FusionRetriever, frames: list[Tensor]) -> Tokens:
    """N clips' tokens, padded to the longest, of a frozen backbone's frames (`embedding.frozen_frames`)."""
    parts = [frames[start : start + _BATCH] for start in range(0, len(frames), _BATCH)]
    return _joined([model.speech_tokens(padded_frames(part)) for part in parts])


@torch.no_grad()
def text_tokens(model: FusionRetriever, texts: list[str]) -> Tokens:
    """M captions' tokens, padded to the longest."""
    return _joined([model.text_tokens(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH)])


def _joined(parts: list[Tokens]) -> Tokens:
    """Batches as one, padded to the longest."""
    longest = max(part.mask.shape[1] for part in parts)
    padded = [(part, longest - part.mask.shape[1]) for part in parts]
    values = torch.cat([F.pad(part.values, (0, 0, 0, spare)) for part, spare in padded])
    return Tokens(values, torch.cat([F.pad(part.mask, (0, spare)) for part, spare in padded]))
