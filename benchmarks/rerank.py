"""What an honest fused score costs, beside the naive way, in one run: python benchmarks/rerank.py

    rerank    4 frames a token, the 50 best of 1,000 clips fused with each query; the clips' vectors are kept
    naive     every clip fused with the query, no shortlist; a sample of the pairs is timed and scaled, and says so
    pooling   the same rerank with a token for every frame

Whisper tiny, MiniLM, width 256, weights of the fusion as drawn: they do not change the time. Clips: RAVDESS under
$ESR_DATA if it is there, else the demo corpus.
"""

from __future__ import annotations

import os
import time

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import torch

from esr_utils import manifests, protocols
from esr_utils.config import FusionConfig
from esr_utils.embedding import frozen_frames
from esr_utils.fusion import FusionRetriever
from esr_utils.objective import has_bf16
from esr_utils.prompts import PromptBank
from esr_utils.styles import STYLES
from esr_utils.text import Tokens

K, N_CLIPS, N_QUERIES, ROUNDS = 50, 1000, 100, 3
NAIVE_CLIPS, NAIVE_QUERIES = 200, 2  # of the naive way's pairs, how many are timed
LIMITS = (1.0, 60.0)  # seconds: one query; a hundred at once


def best_of(call) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


class Collection:
    """Clips as an index holds them: tokens and vectors, at so many frames a token."""

    def __init__(self, clips, frames_per_token: int) -> None:
        torch.manual_seed(0)
        self.model = FusionRetriever.build(FusionConfig(frames_per_token=frames_per_token)).eval()
        kept = frozen_frames(self.model, manifests.to_cuts(clips), "normalised")
        self.tokens = protocols.speech_tokens(self.model, kept.frames)
        started = time.perf_counter()
        self.vectors = protocols.unit_vectors(self.model, self.tokens, "speech", "bi-encoder")
        self.seconds = time.perf_counter() - started

    def rerank(self, queries: list[str], bf16: bool = False) -> protocols.Scored:
        return protocols.score(self.model, self.tokens, queries, "rerank", K, bf16=bf16, vectors=self.vectors)

    def naive(self, query: str) -> protocols.Scored:
        sample = Tokens(self.tokens.values[:NAIVE_CLIPS], self.tokens.mask[:NAIVE_CLIPS])
        return protocols.score(self.model, sample, [query], "all-pairs")


if __name__ == "__main__":
    rows = manifests.load_corpora("ravdess" if os.environ.get("ESR_DATA") else "demo")
    rows = rows.sample(min(N_CLIPS, len(rows)), random_state=0)
    queries = [prompt for style in STYLES for prompt in PromptBank.load().all_prompts(style, "seen")[:5]][:N_QUERIES]
    pooled = Collection(rows, 4)
    tokens = pooled.tokens.mask.sum(1).float()
    print(f"{len(rows)} clips, mean {rows['duration_s'].mean():.1f} s, {tokens.mean():.0f} tokens each; "
          f"{torch.get_num_threads()} threads; clips' vectors, once: {pooled.seconds:.1f} s", flush=True)  # fmt: skip
    pooled.model.text_tokens(queries)  # a frozen backbone runs a sentence once; its part is timed by itself
    started = time.perf_counter()
    pooled.model.text.tokens(queries[:1])
    sentence = time.perf_counter() - started

    one = best_of(lambda: pooled.rerank(queries[:1])) + sentence
    many = best_of(lambda: pooled.rerank(queries))
    print(f"rerank, k = {K}: {one:.3f} s a query (limit {LIMITS[0]:g}, {'met' if one <= LIMITS[0] else 'NOT MET'}), of "
          f"which MiniLM {sentence:.3f}; {len(queries)} queries at once: {many:.1f} s (limit {LIMITS[1]:g}, "
          f"{'met' if many <= LIMITS[1] else 'NOT MET'})", flush=True)  # fmt: skip
    if has_bf16(torch.device("cpu")):
        half = best_of(lambda: pooled.rerank(queries, bf16=True))
        print(f"the same in bf16: {half:.1f} s; ratio {many / half:.2f}", flush=True)

    whole = Collection(rows, 1)
    whole.model.text_tokens(queries)
    unpooled = best_of(lambda: whole.rerank(queries[:10])) * len(queries) / 10
    per_clip = whole.tokens.mask.sum(1).float().mean()
    print(f"a token a frame, {per_clip:.0f} each: {unpooled:.1f} s (10 of {len(queries)} queries timed, scaled); "
          f"pooling 4:1 saves a factor of {unpooled / many:.1f}", flush=True)  # fmt: skip
    sample = best_of(lambda: [whole.naive(query) for query in queries[:NAIVE_QUERIES]])
    pairs = NAIVE_QUERIES * min(NAIVE_CLIPS, len(rows))
    naive = sample / pairs * len(rows)
    print(f"naive, no shortlist, no pooling: {naive:.1f} s a query ({pairs} pairs timed, scaled); ratio to rerank, "
          f"{len(queries)} at once: {naive / (many / len(queries)):.0f}", flush=True)  # fmt: skip
