"""What fusing each clip with its own caption would claim: on pure noise, and on speech. Diagnosis, never a result.

A naive reading of FS-CLAP trains and scores so: the pairs of a batch are fused, each clip with its own caption, and
then told from one another. What is learned is to pass a mark of the pair through the fusion, and `matched`, of
`protocols`, finds nearly everything by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest

from esr_utils import embedding, losses, metrics, protocols, runs
from esr_utils.captions import Captioned
from esr_utils.config import FusionConfig
from esr_utils.fusion import FusionRetriever, FusionSeparation, pick
from esr_utils.fusion_evaluation import CaptionedSet, clip_frames
from esr_utils.text import Tokens

_PAIRS = 64  # of a training step
_ON_SPEECH = ("bi-encoder", "masked", "matched")  # the others fuse some ten thousand pairs


def noise_experiment(n: int = 200, steps: int = 300, dim: int = 32, k: int = 20, seed: int = 0) -> pd.DataFrame:
    """What each protocol finds where there is nothing to find: speech and captions that are independent noise.

    The pairs are new noise at every training step, so nothing can be learned by heart, and there is no content. Then n
    new pairs are scored by each protocol, before the training and after.

    Args:
        n: pairs scored; by chance R@1 is 1 / n.
        steps: of training, each on 64 pairs.
        dim: d, of tokens and vectors.
        k: of the rerank.

    Returns:
        A row for each protocol, direction (a2t, t2a) and moment: columns protocol, honest, direction, steps (0, or
        those trained), r@1, low and high (its exact binomial 95 % interval over the n queries), chance, fusions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FusionSeparation(FusionConfig(dim=dim, heads=4, dropout=0.0))
        pairs = _noise(n, 12, dim), _noise(n, 6, dim)
        draw = lambda: (_noise(_PAIRS, 12, dim), _noise(_PAIRS, 6, dim))  # noqa: E731
        return _before_and_after(model, draw, pairs, np.eye(n, dtype=bool), steps, (*protocols.HONEST, "matched"), k)


def speech_experiment(
    folder: str | Path,
    manifest: pd.DataFrame,
    captioned: Captioned,
    test: CaptionedSet,
    steps: int = 150,
    seed: int = 0,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> pd.DataFrame:
    """The same on a corpus: fusion, separation and pooling are drawn anew and trained naively on a run's tokens.

    Each training clip stands beside its first caption. Scored are the test clips among their own captions; right is
    every clip that agrees with the caption, and chance is what a random order finds.

    Args:
        folder: a run with fusion, whose backbones and projections make the tokens and stay as they are.

    Returns:
        As `noise_experiment`, of bi-encoder, masked and matched.

    Raises:
        ValueError: a clip cannot be used.
    """
    folder, place = runs.run_folder(folder), runs.pick_device(device)
    level = runs.read_json(folder / "config.json")["training"]["level"]
    told = captioned.table[captioned.table["grammar"] != "held_out"].drop_duplicates("utterance_id")
    told = told.set_index("utterance_id")["caption"]
    train = manifest[(manifest["split"] == "train") & manifest["utterance_id"].isin(told.index)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        retriever = FusionRetriever.load(folder / "best", place).eval()
        learned = _tokens(retriever, train, told[train["utterance_id"]].tolist(), level, cache)
        pairs = _tokens(retriever, test.clips, [test.captions.texts[i] for i in test.own], level, cache)
        model = FusionSeparation(retriever.config).to(place)

        def draw() -> tuple[Tokens, Tokens]:
            chosen = torch.randperm(len(train))[:_PAIRS].to(place)
            return pick(learned[0], chosen), pick(learned[1], chosen)

        right = test.captions.relevant[test.own]
        return _before_and_after(model, draw, pairs, right, steps, _ON_SPEECH)


def _tokens(
    model: FusionRetriever, clips: pd.DataFrame, texts: list[str], level: str, cache: Path
) -> tuple[Tokens, Tokens]:
    """Of clips and their captions, side by side."""
    return protocols.speech_tokens(model, clip_frames(model, clips, level, cache)), protocols.text_tokens(model, texts)


def _before_and_after(
    model: FusionSeparation,
    draw: Callable[[], tuple[Tokens, Tokens]],
    pairs: tuple[Tokens, Tokens],
    right: NDArray[np.bool_],
    steps: int,
    asked: Sequence[str],
    k: int = 20,
) -> pd.DataFrame:
    """Scores pairs, trains naively on drawn ones, and scores again."""
    rows = _rows(model, pairs, right, asked, 0, k)
    if steps:
        _train(model, draw, steps)
        rows += _rows(model, pairs, right, asked, steps, k)
    return pd.DataFrame(rows)


@torch.enable_grad()
def _train(model: FusionSeparation, draw: Callable[[], tuple[Tokens, Tokens]], steps: int) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        losses.info_nce(losses.similarity(*model.pair(*draw())) / 0.07).backward()
        optimiser.step()


def _noise(n: int, longest: int, dim: int) -> Tokens:
    """Sequences of half this length or more."""
    mask = torch.arange(longest) < torch.randint(longest // 2, longest + 1, (n, 1))
    return Tokens(torch.randn(n, longest, dim) * mask[..., None], mask)


def _rows(
    model: FusionSeparation,
    pairs: tuple[Tokens, Tokens],
    right: NDArray[np.bool_],
    asked: Sequence[str],
    steps: int,
    k: int,
) -> list[dict]:
    found = []
    for protocol in asked:
        scored = None
        for direction in ("a2t", "t2a"):
            if scored is None or protocol == "rerank":  # the others serve both directions
                scored = protocols.score(model, *pairs, protocol, k, direction)
            by_query, wanted = (scored.matrix, right) if direction == "t2a" else (scored.matrix.T, right.T)
            recall = metrics.retrieval_recall(by_query, wanted, [1])[:, 0]
            interval = binomtest(round(recall.sum()), len(recall)).proportion_ci()
            found.append(
                {
                    "protocol": protocol,
                    "honest": protocol in protocols.HONEST,
                    "direction": direction,
                    "steps": steps,
                    "r@1": float(recall.mean()),
                    "low": interval.low,
                    "high": interval.high,
                    "chance": float(right.mean()),
                    "fusions": scored.fusions,
                }
            )
    return found
