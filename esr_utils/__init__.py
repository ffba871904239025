"""Expressive speech retrieval: find speech by how it is said, from a sentence in plain words.

Imports go one way: leaves (config, runs, weights, styles, metrics, intervals, losses) <- data (manifests, corpora,
batches, acoustics, trials) <- models (speech, text, retriever, embedding) <- top (training, evaluation, index, plots).
"""
