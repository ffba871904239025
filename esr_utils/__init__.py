"""Expressive speech retrieval: find speech by how it is said, from a sentence in plain words.

Imports go one way: leaves (config, runs, weights, styles, metrics, intervals, losses) <- data (manifests, corpora,
batches, acoustics, trials) <- models (speech, text, retriever, embedding) <- top (training, evaluation, index, plots).
"""

import os

import pandas as pd

# PyTorch's threads wait for one another awake, for ms. Beside another program that does the same they keep the cores
# from those that have work, and embedding takes many times as long; asleep after 0.1 ms they do not, and alone they are
# as fast (`benchmarks/index_command.py beside`). Its OpenMP reads this on Linux, when PyTorch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

# Text in tables as Python's own strings. Where pandas finds pyarrow, which the search index needs, it would hold text
# in Arrow's buffers: no faster here, and half as much memory again for a manifest whose cells repeat.
pd.options.mode.string_storage = "python"
