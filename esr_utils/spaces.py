"""The joint spaces of several runs on the same clips and sentences, for maps side by side (ESR Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from esr_utils import evaluation, intervals, modality, training
from esr_utils.embedding import embed
from esr_utils.manifests import to_cuts
from esr_utils.scoring import REPLICATES
from esr_utils.tables import Cell


def joint_spaces(
    named: Mapping[str, str | Path], clips: pd.DataFrame, split: str, prompts: str, device: str = "auto"
) -> dict[str, tuple[NDArray[np.float32], pd.DataFrame]]:
    """The space of each run (title -> run), on the same clips and prompts: title -> `evaluation.joint_space`.

    Raises:
        ValueError: a run has no text side, or the split no clip with a style.
    """
    clips = clips[(clips["split"] == split) & (clips["style"] != "")]
    if clips.empty:
        raise ValueError(f"no clip of split {split!r} has a style")
    found = {}
    for title, run in named.items():
        model, settings = training.load_run(run, device)
        how = evaluation.options(settings)
        if prompts not in how["systems"]:
            raise ValueError(f"{run} cannot be mapped with {prompts!r} prompts; it is for: {', '.join(how['systems'])}")
        embedded = embed(model, to_cuts(clips), how["level"])
        found[title] = evaluation.joint_space(model, embedded, clips, prompts, how["bank"])
        found[title][1].attrs["checkpoint"] = evaluation.checkpoint(run, settings)
    return found


def modality_table(spaces: Mapping[str, tuple[NDArray, pd.DataFrame]], seed: int = 0) -> pd.DataFrame:
    """What the eye sees in Figure 4 as numbers: a row per space; see `modality`.

    Columns: clips and sentences; the modality gap, with its 95 % interval over the clips (`intervals`); for comparison,
    how far two styles are apart in speech and in text; the linear probe; and which epoch the run's checkpoint is of.

    Args:
        seed: of the bootstrap; the spaces share its replicates.
    """
    rows = []
    for vectors, about in spaces.values():
        is_speech, style = (about["modality"] == "speech").to_numpy(), about["style"].to_numpy()
        speech, text, rng = vectors[is_speech], vectors[~is_speech], np.random.default_rng(seed)
        weights, _ = intervals.speaker_bootstrap_weights(about["speaker"][is_speech], REPLICATES, rng)
        gap, drawn = modality.gap(speech, text), modality.gap_replicates(speech, text, weights)
        measured = {
            "style distance, speech": modality.style_distance(speech, style[is_speech]),
            "style distance, text": modality.style_distance(text, style[~is_speech]),
            "linear probe, accuracy": modality.probe_accuracy(vectors, style, about["modality"]),
        }
        row: dict = {"clips": len(speech), "sentences": len(text)}
        row["modality gap"] = Cell(gap, tuple(intervals.interval(drawn, gap, (0.0, modality.LARGEST_GAP))), digits=3)
        row |= {name: Cell(value, digits=3) for name, value in measured.items()}
        rows.append(row | {"checkpoint": about.attrs["checkpoint"]})
    return pd.DataFrame(rows, pd.Index(spaces, name="space"))
