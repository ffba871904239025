"""Exact search in a quarter of the memory of fp32: every vector scored by an int8 copy, with how far off that may be.

A query reads each vector once, so the memory's speed is the limit, and a quarter of the bytes is a quarter of the time.
All vectors are turned by one random rotation, so that rounding them has no direction in common with any query. A vector
x is then kept as whole numbers c, one scale s and the length of what was rounded away, e = ||x - s c||: a unit query q
scores q.(s c), off by a random number of standard deviation e / sqrt(d). Only the few that reach the n-th best score,
give or take seven of these, can be among the n best: they are scored again by their own values, by whoever keeps them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numkong
import numpy as np
from numpy.typing import NDArray

_THREADS = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)
_PART = 1 << 16  # rows that a thread scores at a time
_BLOCK = 256  # scores of which the best is looked at first
_FINE = 254  # steps of a query's second byte in one of its first
_DEVIATIONS = 7.0  # a score is further off in one of 10^11 cases
TIE = 1e-6  # scores closer than this are the same; more than what fp32 is off by in a product

# A system may keep AMX from a program, and NumKong, which does not ask, would end it. It saves a twentieth of a search.
for _name in numkong.get_capabilities():
    if "amx" in _name:
        numkong.disable_capability(_name)


class Vectors:
    """Up to N unit vectors (d,) in memory as int8, N (d + 8) bytes. They are added in pieces, and scored together."""

    def __init__(self, n: int, dim: int) -> None:
        # all at once: pieces between what is let go while they are made would leave holes in the memory
        self._codes = np.empty((n, dim), np.int8)
        self._scales, self._errors = np.empty(n, np.float32), np.empty(n, np.float32)
        self._rows = 0
        self._rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0].astype(np.float32)
        self._threads = ThreadPoolExecutor(_THREADS, "scores")

    def add(self, vectors: NDArray[np.float16]) -> None:
        """Adds (n, d) rows; some thousand at a time are best."""
        rows = slice(self._rows, self._rows + len(vectors))
        turned = vectors.astype(np.float32) @ self._rotation
        scales = np.maximum(np.abs(turned).max(axis=1), 1e-30) / 127
        codes = np.rint(turned / scales[:, None])
        turned -= codes * scales[:, None]
        off = min(1.0, _DEVIATIONS / turned.shape[1] ** 0.5)
        self._codes[rows], self._scales[rows] = codes, scales
        self._errors[rows] = off * np.linalg.norm(turned, axis=1) + TIE
        self._rows = rows.stop

    def scores(self, query: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Of a unit query (d,): (n,) dot products in the order of the rows, and (n,) how far off each is at most."""
        halves, values, rounded = self._halves(query)
        found, errors = np.empty(self._rows, np.float32), np.empty(self._rows, np.float32)
        packed = numkong.dots_pack(halves)

        def score(start: int) -> None:
            rows = slice(start, min(start + _PART, self._rows))
            products = np.asarray(numkong.dots_packed(self._codes[rows], packed))
            np.matmul(products.astype(np.float32), values, out=found[rows])
            found[rows] *= self._scales[rows]
            np.add(self._errors[rows], rounded, out=errors[rows])

        list(self._threads.map(score, range(0, self._rows, _PART)))
        return found, errors

    def _halves(self, query: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32], np.float32]:
        """A query turned, as (2, d) int8 and what these are worth (2,), and the length of what was rounded away."""
        turned = query.astype(np.float32) @ self._rotation
        scale = np.abs(turned).max() / 127
        first = np.rint(turned / scale)
        halves = np.stack([first, np.rint((turned / scale - first) * _FINE)])
        values = np.array([scale, scale / _FINE], np.float32)
        return halves.astype(np.int8), values, np.linalg.norm(turned - values @ halves)


def candidates(scores: NDArray[np.float32], errors: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Rows, ascending, that may be among the n best or tie with them, by scores that are off by at most the errors."""
    if n >= len(scores):
        return np.arange(len(scores))
    bound, n_blocks = -np.inf, len(scores) // _BLOCK
    if n_blocks > n:  # by blocks: the n best of those above it are n good ones, found in one pass over all
        tops = scores[: n_blocks * _BLOCK].reshape(n_blocks, _BLOCK).max(axis=1)
        bound = np.partition(tops, -n)[-n]
    some = np.flatnonzero(scores >= bound)
    limit = np.partition(scores[some] - errors[some], -n)[-n]
    near = np.flatnonzero(scores >= limit - errors.max())
    return near[scores[near] + errors[near] >= limit]


def best(scores: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Rows of the n highest scores and of all that tie with the last, best first; ties in the order of the rows."""
    rows = np.argsort(-scores, kind="stable")
    return rows[: np.count_nonzero(scores >= scores[rows[n - 1]])] if n < len(scores) else rows


def share_below(scores: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each value the share of the scores that lie below it, 0 to 1; what ties with it does not."""
    if not len(values):
        return np.zeros(0)
    limits = values - TIE
    above = np.sort(scores[scores >= limits.min()])
    return (len(scores) - len(above) + np.searchsorted(above, limits)) / len(scores)
