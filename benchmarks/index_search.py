"""Search in a large index beside its rivals, in one run: python benchmarks/index_search.py [moments]

    exact        Index.search, all moments scored, a DataFrame   | faiss flat (fp32, fp16), numpy (fp32), LanceDB's scan
    approximate  Index.search by the approximate index           | its recall@10 against the exact search

The vectors are made from those of real clips plus noise: the clips of the demo corpus, and of RAVDESS and EmoDB if
$ESR_DATA is set, by a retriever of 256 dimensions trained on the demo corpus. Memory is the peak of a process that does
nothing but open its index and search. faiss is a rival and no part of the project: pip install faiss-cpu, or its lines
are left out. A million take 6 GB of memory, of which the rivals hold most.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pandas as pd

from esr_utils import runs
from esr_utils.index import Index
from esr_utils.index_rows import Embedded, File

FOLDER = runs.RUNS / "index_search"
DIM, K, QUERIES = 256, 10, 100
TURNS, IN_TURN = 5, 3  # queries timed in a turn, after one that is not: what a search leaves in caches is its own
NOISE = 0.3  # its length, beside a vector's 1
PER_FILE = 1000
LIMITS = {"exact": 60.0, "memory": 1.2, "approximate": 10.0, "recall": 0.95}  # ms, GB, ms, share


def real_vectors() -> np.ndarray:
    """(n, 256) of real clips, made once."""
    from esr_utils import manifests, training  # here: they are no part of what a search takes
    from esr_utils.config import ModelConfig, TrainConfig
    from esr_utils.embedding import embed

    path = FOLDER / "real.npy"
    if not path.is_file():
        corpora = "demo+ravdess+emodb" if os.environ.get("ESR_DATA") else "demo"
        demo = manifests.load_corpora("demo")
        model = training.fit(demo, FOLDER / "run", ModelConfig(dim=DIM), TrainConfig.demo())
        np.save(path, embed(model, manifests.to_cuts(manifests.load_corpora(corpora)), "normalised").vectors)
    return np.load(path)


def sentences() -> dict[str, np.ndarray]:
    """By kind, (n, 256) of sentences as users write them: they lie far from the vectors of speech."""
    from esr_utils import retriever
    from esr_utils.query_vectors import of_query, unit

    model = retriever.load(FOLDER / "run" / "best")
    styles = ["angry", "calm", "happy", "sad", "whispered", "bored", "excited", "fearful", "sarcastic", "sleepy"]
    forms = ["A {} voice.", "someone sounding very {} on the phone", "a {} answer, hardly audible"]
    alone = [of_query(form.format(style), model, DIM) for style in styles for form in forms]
    minus = [unit(one - 0.5 * other) for one, other in zip(alone, alone[4:] + alone[:4], strict=True)]
    return {"sentences": np.stack(alone), "sentences minus another": np.stack(minus)}


def more(real: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal((n, DIM), dtype=np.float32) * np.float32(NOISE / DIM**0.5)
    vectors = real[rng.integers(len(real), size=n)] + noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def fill(uri: Path, real: np.ndarray, n: int) -> np.ndarray:
    """An index of n moments, and their vectors (n, 256) as fp16."""
    rng, start = np.random.default_rng(0), np.arange(PER_FILE) * 4.0
    vectors = np.concatenate([more(real, PER_FILE, rng).astype(np.float16) for _ in range(n // PER_FILE)])
    rows = pd.DataFrame({"start_s": start, "end_s": start + 4, "channel": 0})
    files = (
        Embedded(
            File(f"recording {i}.wav", Path(), 1, 1, ""),
            rows.assign(speaker=f"speaker {i % 200}"),
            vectors[i * PER_FILE : (i + 1) * PER_FILE],
        )
        for i in range(n // PER_FILE)
    )
    Index.create_named(uri, "benchmark", DIM, replace=True).add(files)
    return vectors


def faiss_or_none():
    try:
        import faiss
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu): its lines are left out", flush=True)
        return None
    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    return faiss


def rivals(uri: Path, vectors: np.ndarray) -> dict[str, Callable[[np.ndarray], list[int]]]:
    """By name, from a query to the rows of the ten best."""
    index, wide = Index.open(uri), vectors.astype(np.float32)

    def place(hit) -> int:
        return int(hit.file.split()[1][:-4]) * PER_FILE + int(hit.start_s // 4)

    def numpy(query: np.ndarray) -> list[int]:
        scores = wide @ query
        best = np.argpartition(scores, -K)[-K:]
        return best[np.argsort(-scores[best])].tolist()

    def scan(query: np.ndarray) -> list[int]:
        found = index.table.search(query, vector_column_name="vector").distance_type("dot").bypass_vector_index()
        rows = found.limit(K).select(["file", "start_s", "_distance"]).to_pandas()
        return [place(hit) for hit in rows.itertuples()]

    found = {"ours": lambda query: [place(hit) for hit in index.search(query, approximate=False).itertuples()]}
    if faiss := faiss_or_none():
        flat = faiss.IndexFlatIP(DIM)
        half = faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        half.train(wide[:1000])
        for rival, name in ((flat, "faiss flat, fp32"), (half, "faiss flat, fp16")):
            rival.add(wide)
            found[name] = lambda query, rival=rival: rival.search(query[None], K)[1][0].tolist()
    return found | {"numpy, fp32": numpy, "LanceDB's scan": scan}


def exact(uri: Path, vectors: np.ndarray, queries: np.ndarray) -> None:
    contestants = rivals(uri, vectors)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, list] = {name: [] for name in contestants}
    for turn in range(TURNS):
        for name, search in contestants.items():
            search(queries[-1 - turn])
            for query in queries[turn * IN_TURN : (turn + 1) * IN_TURN]:
                started = time.perf_counter()
                answers[name].append(search(query))
                times[name].append(1000 * (time.perf_counter() - started))
    ours = float(np.median(times["ours"]))
    print(f"exact, {len(vectors)} x {DIM}, one query, warm, median of {TURNS * IN_TURN}, {IN_TURN} in turn")
    for name, of in times.items():
        median, same = np.median(of), np.mean([a == b for a, b in zip(answers[name], answers["ours"], strict=True)])
        ratio = (
            f", ratio {median / ours:.2f}, the same ten {same:.0%}" if name != "ours" else met(ours, LIMITS["exact"])
        )
        print(f"  {name}: {median:.1f} ms ({min(of):.1f}-{max(of):.1f}){ratio}", flush=True)


def approximate(uri: Path, queries: np.ndarray) -> None:
    index = Index.open(uri)
    started = time.perf_counter()
    index.build_approximate()
    built = time.perf_counter() - started
    for query in queries[:10]:
        index.search(query, approximate=True)
    times = []
    for query in queries:
        started = time.perf_counter()
        index.search(query, approximate=True)
        times.append(1000 * (time.perf_counter() - started))
    recall, median = index.recall(K, queries), float(np.median(times))
    print(f"approximate: {median:.1f} ms (95 %: {np.quantile(times, 0.95):.1f}){met(median, LIMITS['approximate'])}, "
          f"recall@{K} {recall:.3f}{met(-recall, -LIMITS['recall'])}; built in {built:.0f} s", flush=True)  # fmt: skip
    others = ", ".join(f"of {kind} {index.recall(K, vectors):.3f}" for kind, vectors in sentences().items())
    print(f"  recall@{K} {others}", flush=True)


def met(value: float, limit: float) -> str:
    return f" (limit {abs(limit):g}, {'met' if value <= limit else 'NOT MET'})"


def peak(name: str, uri: Path, queries: np.ndarray) -> None:
    """In a process of its own, so that its peak memory is its own."""
    index = Index.open(uri)
    started = time.perf_counter()
    for query in queries[:5]:
        index.search(query, approximate=name != "exact")
    gigabytes = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9  # Linux
    print(f"memory, {name}: peak {gigabytes:.2f} GB{met(gigabytes, LIMITS['memory'])}, of all that is imported too; "
          f"opened and 5 queries in {time.perf_counter() - started:.1f} s", flush=True)  # fmt: skip


def alone(name: str, uri: Path, queries: np.ndarray) -> None:
    process = multiprocessing.get_context("spawn").Process(target=peak, args=(name, uri, queries))
    process.start()
    process.join()


if __name__ == "__main__":
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    FOLDER.mkdir(parents=True, exist_ok=True)
    real = real_vectors()
    started = time.perf_counter()
    vectors = fill(FOLDER / "index", real, n)
    queries = more(real, QUERIES, np.random.default_rng(1))
    print(f"{n} moments from {len(real)} real vectors, written in {time.perf_counter() - started:.0f} s", flush=True)
    alone("exact", FOLDER / "index", queries)
    exact(FOLDER / "index", vectors, queries)
    del vectors
    approximate(FOLDER / "index", queries)
    alone("approximate", FOLDER / "index", queries)
    shutil.rmtree(FOLDER / "index")
