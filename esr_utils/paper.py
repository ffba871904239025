"""The published numbers, digit by digit: Tables II and III of Kang & Roy (ESR, ASRU 2025), Tables 1 to 3 of FS-CLAP.

ESR: Recall@k of 1-in-401 trials, means over the styles of the ESD and Expresso test sets. The published test set of
Expresso holds 7 of its 19 styles (every figure is a whole number of 7000 trials), so its numbers compare with the
corpus `expresso-paper` here, not with `expresso`.

FS-CLAP: fractions of its test sets, of which every figure fits n = 199 (TextrolSpeech) and n = 526 (Zhvoice): at n =
199 a share of 0.286 has a 95 % interval of +- 0.063. How pairs were fused at test time it does not say (`protocols`).
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


# R@1, 5, 10 audio-to-text, then text-to-audio, in percent; None: not given.
_FSCLAP_ONE = {
    "CLAP-Laion": (
        (21.1, 53.3, 71.0, 21.1, 54.1, 69.8), (19.6, 57.8, 80.9, 23.1, 57.8, 84.4), (40.1, 74.3, 87.3, 39.2, 73.0, 85.7)
    ),
    "CLAP-Microsoft": (
        (24.6, 58.4, 72.8, 23.6, 57.6, 72.5), (20.1, 60.3, 75.9, 21.6, 62.3, 79.9), (38.4, 77.2, 85.2, 35.4, 75.1, 86.1)
    ),
    "AudioCLIP": (
        (24.1, 57.8, 70.6, 24.7, 56.4, 71.6), (20.1, 54.8, 76.4, 24.6, 60.3, 81.4), (43.9, 75.1, 83.5, 45.2, 74.3, 85.7)
    ),
    "RA-CLAP": (None, (23.5, 59.0, 82.0, 25.5, 64.5, 81.0), None),
    "MGA-CLAP": (
        (22.4, 52.0, 67.1, 20.3, 52.2, 67.0), (23.1, 55.8, 79.4, 22.1, 64.8, 78.4), (22.4, 53.6, 67.1, 19.4, 51.5, 65.4)
    ),
    "FS-CLAP": (
        (25.5, 56.8, 71.7, 24.8, 57.9, 72.2), (28.6, 63.3, 82.4, 28.6, 64.3, 84.9), (42.6, 77.6, 87.3, 43.5, 76.0, 86.1)
    ),
}  # fmt: skip
# mAP@10 audio-to-text, text-to-audio, in percent.
_FSCLAP_TWO = {
    "CLAP-Laion": ((35.0, 34.9), (36.6, 39.6), (54.5, 54.0)),
    "CLAP-Microsoft": ((38.5, 37.7), (36.4, 39.2), (54.2, 51.6)),
    "AudioCLIP": ((38.1, 38.5), (36.4, 40.1), (56.2, 57.1)),
    "RA-CLAP": (None, (39.9, 43.5), None),
    "MGA-CLAP": ((34.9, 33.8), (37.8, 39.3), (35.0, 32.8)),
    "FS-CLAP": ((38.6, 39.0), (43.4, 44.8), (57.6, 57.9)),
}
# mAP@10 and R@1 audio-to-text, the same text-to-audio, in percent. Rows as in `fusion_systems.TABLE_THREE`.
_FSCLAP_THREE = {
    "CLAP": ((36.6, 19.6, 39.6, 23.1), (54.5, 40.1, 54.0, 39.2)),
    "FU": ((40.8, 25.6, 43.8, 29.7), (57.4, 44.3, 57.7, 43.9)),
    "SE": ((38.5, 22.6, 41.6, 24.1), (57.3, 41.4, 56.1, 40.9)),
    "HN": ((40.4, 25.6, 41.3, 25.6), (56.5, 42.2, 55.3, 40.9)),
    "FU-SE": ((40.8, 23.6, 43.6, 27.1), (55.4, 40.5, 56.4, 41.4)),
    "FS-CLAP": ((43.4, 28.6, 44.8, 28.6), (57.6, 42.6, 57.9, 43.5)),
}
_FSCLAP_COLUMNS = {
    1: (
        _FSCLAP_ONE,
        ("gigaspeech-m", "textrolspeech", "zhvoice"),
        [f"{d} R@{k}" for d in ("a2t", "t2a") for k in (1, 5, 10)],
    ),
    2: (_FSCLAP_TWO, ("gigaspeech-m", "textrolspeech", "zhvoice"), ["a2t mAP@10", "t2a mAP@10"]),
    3: (_FSCLAP_THREE, ("textrolspeech", "zhvoice"), ["a2t mAP@10", "a2t R@1", "t2a mAP@10", "t2a R@1"]),
}


def fsclap_table(number: int) -> pd.DataFrame:
    """Table 1, 2 or 3 of FS-CLAP, marked as the paper's: a row per corpus and system; protocol "not stated"."""
    published, corpora, columns = _FSCLAP_COLUMNS[number]
    rows = {
        (corpus, system + MARK, "not stated"): [Cell(value / 100, digits=3) for value in values]
        for i, corpus in enumerate(corpora)
        for system, of_corpora in published.items()
        if (values := of_corpora[i]) is not None
    }
    index = pd.MultiIndex.from_tuples(rows, names=["corpus", "system", "protocol"])
    return pd.DataFrame(list(rows.values()), index, columns)
