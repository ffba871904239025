"""What bounds every system: how well the attributes that captions name can be read from frozen features at all.

An attribute caption is right for a clip if they agree on gender, pitch, energy, tempo and style. So each side can be
read by itself, by a logistic regression for each attribute, trained with the labels: of a clip, on the mean and
standard deviation over time of the speech backbone's layers; of a caption, on the text backbone's sentence embedding.
Where one side is read and the other known, what is missing to a mAP@10 of 1 is that side's: it tells whether speech or
wording is what a system fails at. It is a yardstick and no bound in the strict sense, for another reader may read more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from esr_utils import embedding, intervals, runs
from esr_utils.captioned import DIRECTIONS, MAP_K, Found
from esr_utils.captions import Captioned
from esr_utils.fusion import FusionRetriever
from esr_utils.fusion_evaluation import CaptionedSet, clip_frames
from esr_utils.grammar import ATTRIBUTES
from esr_utils.tables import Cell

READINGS = ("clip read, caption known", "clip known, caption read", "both read")
_STRENGTHS = (1e-3, 1e-2, 1e-1)  # C of the regression, chosen on the val split
_LEAST = 1e-6  # probability of what a reader rules out: a sum of logarithms must stay finite

Shares = dict[str, NDArray[np.floating]]  # attribute -> (rows, values), the probability of each value


def limits(
    folder: str | Path,
    manifest: pd.DataFrame,
    captioned: Captioned,
    tests: Sequence[CaptionedSet],
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Readers trained on the manifest's train split, and what they find in each set.

    Args:
        folder: a run, whose backbones make the features.

    Returns:
        mAP@10 (index corpus, reading; a column a direction), and how many are read rightly (index corpus, side; a
        column an attribute: shares of the clips of which it is known, and of the captions). Empty where no caption
        names an attribute, or there is no train split.

    Raises:
        ValueError: a clip cannot be used.
    """
    tests = [test for test in tests if _named(captioned, test).ne("").any(axis=None)]
    if not tests or not (manifest["split"] == "train").any():
        return pd.DataFrame(), pd.DataFrame()
    folder, place = runs.run_folder(folder), runs.pick_device(device)
    level = runs.read_json(folder / "config.json")["training"]["level"]
    model = FusionRetriever.load(folder / "best", place).eval()
    speech, text = _speech_readers(model, manifest, captioned, level, cache), _text_readers(model, captioned)
    found, right = {}, {}
    for test in tests:
        named, of_clip = _named(captioned, test), _of_clips(captioned, test.clips["utterance_id"])
        clips, captions = _clip_features(model, test.clips, level, cache), _caption_features(model, test.captions.texts)
        read = {name: _read(speech, clips) for name in ("clip read, caption known", "both read")}
        told = {name: _read(text, captions) for name in ("clip known, caption read", "both read")}
        for reading in READINGS:
            scores = _agreement(told.get(reading, _known(named)), read.get(reading, _known(of_clip)))
            cells = _cells(test.scorer.retrieval(scores))
            found[test.corpus, reading] = cells
        right[test.corpus, "clip"] = _accuracy(speech, clips, of_clip)
        right[test.corpus, "caption"] = _accuracy(text, captions, named)
    table = pd.DataFrame.from_dict(found, orient="index")
    table.index = pd.MultiIndex.from_tuples(table.index, names=["corpus", "reading"])
    accuracy = pd.DataFrame.from_dict(right, orient="index")
    accuracy.index = pd.MultiIndex.from_tuples(accuracy.index, names=["corpus", "read from the"])
    return table, accuracy


def _values(attribute: str) -> tuple[str, ...]:
    """Those that an attribute can have, and "", which is not named or not known."""
    return (*ATTRIBUTES[attribute], "")


def _named(captioned: Captioned, test: CaptionedSet) -> pd.DataFrame:
    """(C, attributes): what each caption of a set names."""
    told = captioned.table.drop_duplicates("caption").set_index("caption")
    return told.loc[test.captions.texts, list(ATTRIBUTES)]


def _of_clips(captioned: Captioned, utterance_ids: Sequence[str]) -> pd.DataFrame:
    """(N, attributes): what is known of clips."""
    return captioned.clips.set_index("utterance_id").loc[utterance_ids, list(ATTRIBUTES)]


def _speech_readers(model, manifest, captioned: Captioned, level: str, cache: Path) -> dict[str, Pipeline]:
    sides = []
    for split in ("train", "val"):
        rows = manifest[(manifest["split"] == split) & manifest["utterance_id"].isin(captioned.clips["utterance_id"])]
        features = _clip_features(model, rows, level, cache)
        sides.append((features, _of_clips(captioned, rows["utterance_id"])))
    known = [
        [(features[(c := about[a] != "").to_numpy()], about[a][c]) for features, about in sides] for a in ATTRIBUTES
    ]
    return {a: _reader(*pair) for a, pair in zip(ATTRIBUTES, known, strict=True) if len(pair[0][1])}


def _text_readers(model: FusionRetriever, captioned: Captioned) -> dict[str, Pipeline]:
    """Of captions of the seen grammar; that an attribute is not named is read like a value."""
    told = captioned.table[captioned.table["grammar"] == "seen"].drop_duplicates("caption")
    split = told["utterance_id"].map(captioned.clips.set_index("utterance_id")["split"])
    parts = [told[split == name] for name in ("train", "val")]
    features = [_caption_features(model, part["caption"].tolist()) for part in parts]
    return {a: _reader(*((x, part[a]) for x, part in zip(features, parts, strict=True))) for a in ATTRIBUTES}


def _reader(train: tuple, val: tuple) -> Pipeline:
    """The regression with the strength that fits the val split best; the weakest where there is none."""
    made = [make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)).fit(*train) for c in _STRENGTHS]

    def loss(reader: Pipeline) -> float:
        known = np.isin(val[1], reader.classes_)
        if not known.any():
            return 0.0
        return log_loss(val[1][known], reader.predict_proba(val[0][known]), labels=reader.classes_)

    return min(made, key=loss)


def _clip_features(model: FusionRetriever, clips: pd.DataFrame, level: str, cache: Path) -> NDArray[np.floating]:
    """(N, 2 L D): mean and standard deviation over time of each layer."""
    frames = (one.float() for one in clip_frames(model, clips, level, cache))
    return np.stack([torch.cat([one.mean(1), one.std(1, correction=0)]).flatten().numpy() for one in frames])


def _caption_features(model: FusionRetriever, texts: list[str]) -> NDArray[np.floating]:
    """(C, D) sentence embeddings of the text backbone."""
    return model.text.embed(texts).cpu().numpy()


def _read(readers: dict[str, Pipeline], features: NDArray[np.floating]) -> Shares:
    shares = {}
    for attribute, reader in readers.items():
        shares[attribute] = np.zeros((len(features), len(_values(attribute))))
        columns = [_values(attribute).index(value) for value in reader.classes_]
        shares[attribute][:, columns] = reader.predict_proba(features)
    return shares


def _known(about: pd.DataFrame) -> Shares:
    """All on the value that is there."""
    return {a: (about[a].to_numpy()[:, None] == np.array(_values(a))).astype(float) for a in ATTRIBUTES}


def _agreement(captions: Shares, clips: Shares) -> NDArray[np.floating]:
    """(C, N) log probabilities that clip and caption agree on all that is named, attributes taken as independent."""
    total = 0.0
    for attribute in (a for a in captions if a in clips):
        told, heard = captions[attribute], clips[attribute]
        total = total + np.log(np.maximum(told[:, :-1] @ heard[:, :-1].T + told[:, -1:], _LEAST))
    return total


def _accuracy(readers: dict[str, Pipeline], features: NDArray[np.floating], about: pd.DataFrame) -> dict[str, Cell]:
    shares = {}
    for attribute, reader in readers.items():
        known = (about[attribute] != "").to_numpy()
        if known.any():
            shares[attribute] = Cell(float((reader.predict(features[known]) == about[attribute][known]).mean()))
    return shares


def _cells(found: Found) -> dict[str, Cell]:
    cells = {}
    for direction in DIRECTIONS:
        value, drawn = found.values[f"{direction}/map@{MAP_K}"], found.replicates[f"{direction}/map@{MAP_K}"]
        n_queries = found.values[f"{direction}/n_queries"]
        cells[f"{direction} mAP@{MAP_K}"] = Cell(
            value, tuple(intervals.interval_of_few(drawn, value, n_queries)), digits=3
        )
    return cells
