"""The published numbers: Tables II and III of Kang & Roy (ESR, ASRU 2025), digit by digit.

Recall@k of 1-in-401 trials, means over the styles of the ESD and Expresso test sets. The published test set of Expresso
holds 7 of its 19 styles (every figure is a whole number of 7000 trials), so its numbers compare with the corpus
`expresso-paper` here, not with `expresso`.
"""

from __future__ import annotations

import pandas as pd

from esr_utils.tables import Cell

KS = ("R@1", "R@5", "R@10", "R@20")
CORPORA = ("esd", "expresso-paper")  # of Table II, as they are called here
MARK = " (paper)"  # after the name of a row that is the paper's

_TABLE_TWO = {
    "Baseline: WavLM classifier": (0.6106, 0.9270, 0.9562, 0.9792, 0.8144, 0.9399, 0.9650, 0.9820),
    "Baseline: emotion2vec classifier": (0.6814, 0.9288, 0.9582, 0.9764, 0.9467, 0.9784, 0.9821, 0.9894),
    "BERT + WavLM": (0.3350, 0.8400, 0.9394, 0.9710, 0.3623, 0.9013, 0.9631, 0.9720),
    "RoBERTa + WavLM": (0.4830, 0.9024, 0.9484, 0.9610, 0.6284, 0.8640, 0.9397, 0.9616),
    "T5 + WavLM": (0.4100, 0.8718, 0.9506, 0.9714, 0.4846, 0.8677, 0.9511, 0.9616),
    "Flan-T5 + WavLM": (0.3326, 0.8974, 0.9544, 0.9660, 0.6104, 0.8826, 0.9526, 0.9619),
    "BERT + emotion2vec": (0.3414, 0.8726, 0.9600, 0.9738, 0.8317, 0.9773, 0.9846, 0.9846),
    "RoBERTa + emotion2vec": (0.6026, 0.9338, 0.9660, 0.9760, 0.8159, 0.9826, 0.9857, 0.9894),
    "T5 + emotion2vec": (0.6438, 0.9114, 0.9494, 0.9666, 0.7617, 0.9793, 0.9830, 0.9853),
    "Flan-T5 + emotion2vec": (0.3864, 0.9232, 0.9618, 0.9730, 0.8284, 0.9806, 0.9860, 0.9873),
}

# On Expresso, RoBERTa + emotion2vec. Names as in `config.ABLATIONS`; None: "-", the model collapsed.
_TABLE_THREE: dict[str, tuple[float, ...] | None] = {
    "full": (0.8159, 0.9826, 0.9857, 0.9894),
    "w/o pre-training": (0.7789, 0.9196, 0.9803, 0.9811),
    "w/o style classification": None,
    "w/o modality discriminator": (0.6714, 0.8653, 0.9733, 0.9749),
    "w/o prompt augmentation": (0.5901, 0.8487, 0.9683, 0.9761),
}


def table_two() -> pd.DataFrame:
    """Table II, its rows marked as the paper's: a row per model, columns (corpus, R@k)."""
    columns = pd.MultiIndex.from_product([CORPORA, KS])
    rows = [[Cell(value, digits=4) for value in row] for row in _TABLE_TWO.values()]
    return pd.DataFrame(rows, pd.Index([name + MARK for name in _TABLE_TWO], name="model"), columns)


def table_three() -> pd.DataFrame:
    """Table III, its rows marked as the paper's: a row per variant, columns R@k; "-" where the model collapsed."""
    rows = [[Cell(value, digits=4) for value in row] if row else ["-"] * len(KS) for row in _TABLE_THREE.values()]
    index = pd.MultiIndex.from_product([CORPORA[1:], [name + MARK for name in _TABLE_THREE]], names=["corpus", "model"])
    return pd.DataFrame(rows, index, list(KS))


def differences(variant: str) -> dict[int, float] | None:
    """Recall@k of a row of Table III minus the full model's, by k; {} where the model collapsed, None for no row."""
    if variant not in _TABLE_THREE or variant == "full":
        return None
    row, full = _TABLE_THREE[variant], _TABLE_THREE["full"]
    return {int(k[2:]): a - b for k, a, b in zip(KS, row, full, strict=True)} if row else {}
