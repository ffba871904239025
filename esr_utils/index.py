"""Search: a sentence, or a clip, against a collection's vectors. Exact: every clip is scored."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lhotse import CutSet, Recording
from numpy.typing import NDArray

from esr_utils.config import Level
from esr_utils.embedding import CACHE, Embeddings, embed
from esr_utils.manifests import to_cuts
from esr_utils.retriever import Retriever


class QueryError(ValueError):
    """A query that cannot be answered; the message says why."""


@dataclass(frozen=True)
class SearchIndex:
    """A collection that can be searched.

    Attributes:
        model: the retriever that made the vectors, which also encodes the queries.
        clips: manifest rows, one per vector.
        vectors: (N, d) float32, unit length.
        skipped: clips that could not be embedded: utterance_id, reason.
        level: how clips were levelled, and an example clip will be.
    """

    model: Retriever
    clips: pd.DataFrame
    vectors: NDArray[np.float32]
    skipped: pd.DataFrame
    level: Level = "normalised"

    @classmethod
    def build(
        cls,
        model: Retriever,
        manifest: pd.DataFrame,
        level: Level = "normalised",
        embeddings: Embeddings | None = None,
        cache: Path | None = CACHE,
    ) -> SearchIndex:
        """Embeds a manifest (rows of `manifests.load_corpora`), or takes embeddings that are there already."""
        embeddings = embeddings or embed(model, to_cuts(manifest), level, cache)
        clips = manifest.set_index("utterance_id", drop=False).loc[embeddings.utterance_ids].reset_index(drop=True)
        return cls(model, clips, embeddings.vectors, embeddings.skipped, level)

    @torch.no_grad()
    def search(self, query: str | list[str], k: int = 10, min_score: float = -1.0) -> pd.DataFrame:
        """The k clips that fit a sentence best, or several sentences on average.

        Args:
            min_score: cosine, -1 to 1; clips below it are left out.

        Returns:
            The clips' manifest rows, best first, with `rank` from 1 and `score` in front.

        Raises:
            QueryError: the query is empty, or k is below 1.
        """
        sentences = [query] if isinstance(query, str) else list(query)
        if not sentences or not all(sentence.strip() for sentence in sentences):
            raise QueryError(
                "the query is empty: describe how the speech should sound, e.g. 'an angry, shouting voice'"
            )
        return self._nearest(self.model.encode_text(sentences).mean(0).cpu().numpy(), k, min_score)

    def search_like(self, example: str | Path, k: int = 10, min_score: float = -1.0) -> pd.DataFrame:
        """The k clips that sound most like an example: an utterance_id of the collection, or an audio file.

        The example itself is not among the hits when it is of the collection. Returns and raises as `search`;
        QueryError also for an example that cannot be found or read.
        """
        _check_k(k)
        path = Path(example)
        files = [Path(root) / name for root, name in zip(self.clips["root"], self.clips["path"], strict=True)]
        same_file = [path.name == file.name and path.resolve() == file.resolve() for file in files]
        own = np.flatnonzero(
            (self.clips["utterance_id"] == str(example))
            | (self.clips["start_s"].isna() & np.array(same_file, dtype=bool))
        )
        if len(own):
            hits = self._nearest(self.vectors[own[0]], k + 1, min_score)
            hits = hits[hits["utterance_id"] != self.clips["utterance_id"].iloc[own[0]]].head(k).reset_index(drop=True)
            return hits.assign(rank=np.arange(1, len(hits) + 1))
        return self._nearest(self._embed_file(path), k, min_score)

    def _embed_file(self, path: Path) -> NDArray[np.float32]:
        if not path.is_file():
            raise QueryError(f"{path} is neither an utterance_id of this collection nor an audio file")
        try:
            recording = Recording.from_file(path)
        except Exception as error:
            raise QueryError(f"{path} is no readable audio file: {error}") from None
        cut = recording.to_cut()  # of all channels, which are averaged
        cut.custom = {"utterance_id": str(path), "style": ""}
        found = embed(self.model, CutSet.from_cuts([cut]), self.level, cache=None)
        if not len(found.vectors):
            raise QueryError(f"{path}: {found.skipped['reason'].iloc[0]}")
        return found.vectors[0]

    def _nearest(self, vector: NDArray[np.float32], k: int, min_score: float) -> pd.DataFrame:
        _check_k(k)
        scores = self.vectors @ vector
        best = np.argsort(-scores, kind="stable")[:k]
        best = best[scores[best] >= min_score]
        hits = self.clips.iloc[best].reset_index(drop=True)
        hits.insert(0, "score", scores[best])
        hits.insert(0, "rank", np.arange(1, len(hits) + 1))
        return hits


def _check_k(k: int) -> None:
    if k < 1:
        raise QueryError(f"k is {k}; it must be at least 1")
