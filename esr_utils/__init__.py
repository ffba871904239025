"""Expressive speech retrieval: find speech by how it is said, from a sentence in plain words.

Imports go one way: leaves (config, runs, weights, styles, metrics, intervals, losses) <- data (manifests, corpora,
batches, acoustics, trials) <- models (speech, text, retriever, embedding) <- top (training, evaluation, index, plots).
"""

import pandas as pd

# Text in tables as Python's own strings. Where pandas finds pyarrow, which the search index needs, it would hold text
# in Arrow's buffers: no faster here, and half as much memory again for a manifest whose cells repeat.
pd.options.mode.string_storage = "python"
