"""Exact scoring: bounds that hold, at every size; candidates among which the best always are; ties and shares."""

from __future__ import annotations

import platform
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from esr_utils import nearest


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def kept(stored: np.ndarray, piece: int = 50) -> nearest.Vectors:
    vectors = nearest.Vectors(len(stored), stored.shape[1])
    for start in range(0, len(stored), piece):
        vectors.add(stored[start : start + piece])
    return vectors


@pytest.mark.parametrize("dim", [8, 100, 256, 700, 1100])
@pytest.mark.parametrize("n", [0, 1, 63, 300])
def test_scores_are_the_dot_products_but_for_what_they_say(monkeypatch, n, dim):
    monkeypatch.setattr(nearest, "_PART", 64)
    stored = unit(n, dim).astype(np.float16)
    vectors = kept(stored)
    for seed in (1, 2):
        query = unit(1, dim, seed)[0]
        expected = np.array([sum(float(a) * float(b) for a, b in zip(row, query, strict=True)) for row in stored])
        scores, errors = vectors.scores(query)
        assert scores.dtype == errors.dtype == np.float32 and scores.shape == errors.shape == (n,)
        assert (abs(scores - expected) <= errors).all() and (errors < 0.01).all()


@pytest.mark.parametrize("dim", [8, 64, 256])
def test_the_bounds_hold_where_rounding_would_be_worst(dim):
    """One large number and many of half a step, all rounded the same way, and a query that adds them up; and zeros."""
    row = np.array([1.0] + [0.5 / 127 * 1.001] * (dim - 1))
    query = np.array([0.0] + [1.0] * (dim - 1)) / (dim - 1) ** 0.5
    stored = np.stack([row, -row, 0 * row, query]).astype(np.float16)
    scores, errors = kept(stored).scores(query.astype(np.float32))
    assert (abs(scores - stored.astype(float) @ query) <= errors).all() and (errors < 0.02).all() and scores[2] == 0


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="AMX is asked for on Linux on x86-64 alone"
)
def test_scores_where_the_system_keeps_amx_from_a_program():
    """As kernels before 5.16 and some containers do: here a filter refuses arch_prctl, by which it is asked for."""
    program = """
        import ctypes

        class Step(ctypes.Structure):
            _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]

        class Filter(ctypes.Structure):
            _fields_ = [("len", ctypes.c_ushort), ("steps", ctypes.POINTER(Step))]

        # the call's number; if it is 158, EINVAL, else let it be
        steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 158), (6, 0, 0, 0x50016), (6, 0, 0, 0x7FFF0000)]
        steps = (Step * 4)(*(Step(*step) for step in steps))
        libc = ctypes.CDLL(None)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        assert libc.prctl(22, 2, ctypes.byref(Filter(4, steps)), 0, 0) == 0
        assert libc.syscall(158, 0x1022, 0) == -1

        import numpy as np
        from esr_utils import nearest

        vectors = nearest.Vectors(2, 256)
        vectors.add(np.eye(2, 256, dtype=np.float16))
        print(vectors.scores(np.eye(1, 256, dtype=np.float32)[0])[0].round(2).tolist())
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "[1.0, 0.0]"), run.stderr


@pytest.mark.parametrize("block", [1, 16, 256])
@pytest.mark.parametrize("n", [1, 5, 50, 399, 400, 1000])
def test_the_best_are_among_the_candidates(monkeypatch, n, block):
    """Of vectors that lie so close that int8 alone confuses them."""
    monkeypatch.setattr(nearest, "_BLOCK", block)
    near = unit(1, 64, 3) + 0.02 * unit(400, 64, 4)
    stored = (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float16)
    stored[[7, 70, 300]] = stored[200]
    query = unit(1, 64, 3)[0]
    true = (stored.astype(np.float64) @ query).astype(np.float32)
    scores, errors = kept(stored).scores(query)
    found = nearest.candidates(scores, errors, n)
    wanted = nearest.best(true, n)
    assert (np.diff(found) > 0).all() and set(wanted) <= set(found)
    lows = np.sort(scores - errors)[::-1]
    all_that_may_be = np.flatnonzero(scores + errors >= lows[min(n, len(lows)) - 1])
    assert set(all_that_may_be) <= set(found) and len(found) <= 1.2 * len(all_that_may_be) + 1
    if n == 5:
        assert set(nearest.best(scores, n)) != set(wanted)  # else this tests nothing


def test_best_are_all_that_tie_with_the_last_in_the_order_of_the_rows():
    scores = np.array([0.1, 0.5, 0.9, 0.5, 0.5, -1], np.float32)
    assert nearest.best(scores, 1).tolist() == [2]
    assert nearest.best(scores, 2).tolist() == nearest.best(scores, 4).tolist() == [2, 1, 3, 4]
    assert nearest.best(scores, 5).tolist() == [2, 1, 3, 4, 0]
    assert nearest.best(scores, 6).tolist() == nearest.best(scores, 99).tolist() == [2, 1, 3, 4, 0, 5]
    assert nearest.best(scores[:0], 3).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_share_below_is_what_counting_gives(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-5, 6, 200).astype(np.float32) / 5
    values = rng.choice(scores, 7)
    expected = [sum(score < value for score in scores) / 200 for value in values]
    assert nearest.share_below(scores, values).tolist() == expected
    assert nearest.share_below(scores, values[:0]).tolist() == []
