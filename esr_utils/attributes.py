"""What is known of a clip for a caption: gender and style as labelled, pitch, energy and tempo as measured.

Pitch (median F0), energy (level of the active frames) and tempo are measured on the audio as recorded, and are low,
normal or high by the tertiles of the clip's corpus and gender, which are fitted on the train split alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from esr_utils import acoustics, runs
from esr_utils.grammar import ATTRIBUTES, LEVELS
from esr_utils.manifests import to_cuts

CACHE = runs.RUNS / "cache"
UNITS = {
    "pitch": "Hz, median over voiced frames",
    "energy": "dBFS, mean over active frames",
    "tempo": "energy peaks a second, from the first active frame to the last",
}
VOICED = 0.12  # share of periodic frames below which a clip has no pitch: whispers have under 0.1, most speech 0.17
FEWEST = 3  # train clips of a gender that have tertiles


def measures(manifest: pd.DataFrame, cache: Path | None = CACHE) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Pitch, energy and tempo of each clip, in UNITS, NaN where they cannot be measured.

    Args:
        manifest: with the column `root` (`manifests.load_corpora`).
        cache: where a clip's measures are kept, by the content of its audio; None keeps nothing.
    Returns:
        Measures, indexed by utterance_id in the manifest's order; and what is left out: columns utterance_id,
        attribute, reason.
    """
    found = acoustics.measure(to_cuts(manifest), cache)
    skipped = found.attrs["skipped"]
    found = found.reindex(manifest["utterance_id"])
    voiced = found["periodic_share"] >= VOICED
    table = pd.DataFrame(
        {"pitch": found["f0_hz"].where(voiced), "energy": found["energy_db"], "tempo": found["rate_hz"]}
    )
    table = table.rename_axis("utterance_id")
    left_out = [(name, attribute, f"audio {reason}") for name, reason in skipped.items() for attribute in UNITS]
    left_out += [(name, "pitch", "hardly any voiced frames") for name in table.index[~voiced] if name not in skipped]
    return table, left_out_table(left_out)


def left_out_table(rows: list[tuple[str, str, str]]) -> pd.DataFrame:
    """(utterance_id, attribute, reason) rows as a table, also where there are none."""
    return pd.DataFrame(rows, columns=["utterance_id", "attribute", "reason"], dtype="str")


@dataclass(frozen=True)
class Thresholds:
    """Tertiles by corpus, gender and attribute: below the first is low, above the second is high.

    Attributes:
        tertiles: {corpus: {gender: {attribute: (first, second)}}}, in UNITS.
        clips: {corpus: {gender: train clips they were fitted on}}.
    """

    tertiles: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]]
    clips: Mapping[str, Mapping[str, int]]

    @classmethod
    def fit(cls, manifest: pd.DataFrame, measured: pd.DataFrame) -> Thresholds:
        """From the train split alone, each corpus and gender by itself.

        A tertile is at (n - 1) / 3 of the sorted values, counted from 0, interpolated.
        """
        train = manifest[(manifest["split"] == "train") & manifest["gender"].isin(ATTRIBUTES["gender"])]
        tertiles: dict[str, dict] = {}
        clips: dict[str, dict] = {}
        for (corpus, gender), part in train.groupby(["corpus", "gender"]):
            values = measured.loc[part["utterance_id"]]
            enough = [attribute for attribute in UNITS if values[attribute].notna().sum() >= FEWEST]
            quantiles = {key: np.nanquantile(values[key], [1 / 3, 2 / 3]).tolist() for key in enough}
            tertiles.setdefault(corpus, {})[gender] = {key: tuple(pair) for key, pair in quantiles.items()}
            clips.setdefault(corpus, {})[gender] = len(part)
        return cls(tertiles, clips)

    def level(self, corpus: str, gender: str, attribute: str, value: float) -> str:
        """low, normal or high; "" where there are no tertiles or no value."""
        pair = self.tertiles.get(corpus, {}).get(gender, {}).get(attribute)
        if pair is None or np.isnan(value):
            return ""
        return LEVELS[int(value >= pair[0]) + int(value > pair[1])]

    def table(self) -> pd.DataFrame:
        """A row per corpus, gender and attribute: its tertiles, unit and train clips."""
        rows = [
            (corpus, gender, attribute, *pair, UNITS[attribute], self.clips[corpus][gender])
            for corpus, genders in self.tertiles.items()
            for gender, attributes in genders.items()
            for attribute, pair in attributes.items()
        ]
        return pd.DataFrame(rows, columns=["corpus", "gender", "attribute", "low below", "high above", "unit", "clips"])

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        runs.write_json(path, {"units": UNITS, "level": "as recorded", "clips": self.clips, "tertiles": self.tertiles})

    @classmethod
    def load(cls, path: str | Path) -> Thresholds:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or thresholds in other units.
        """
        data = runs.read_json(path)
        try:
            if data["units"] != UNITS:
                raise ValueError(f"its units are {data['units']}; needed are {UNITS}")
            tertiles = {
                corpus: {
                    gender: {key: (float(pair[0]), float(pair[1])) for key, pair in attributes.items()}
                    for gender, attributes in genders.items()
                }
                for corpus, genders in data["tertiles"].items()
            }
            return cls(tertiles, data["clips"])
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} holds no thresholds of attributes: {error}") from None


def clip_attributes(
    manifest: pd.DataFrame, thresholds: Thresholds | None = None, cache: Path | None = CACHE
) -> tuple[pd.DataFrame, Thresholds, pd.DataFrame]:
    """What is known of each clip: gender, levels of pitch, energy and tempo, style; "" where it is not.

    Args:
        thresholds: None fits them on the manifest's train split.
    Returns:
        Columns utterance_id, split, caption (the corpus's own) and the attributes, in the manifest's order; the
        thresholds; and what is left out: columns utterance_id, attribute, reason.
    Raises:
        ValueError: no thresholds, and no train clip of a known gender to fit them on.
    """
    measured, left_out = measures(manifest, cache)
    if thresholds is None:
        thresholds = Thresholds.fit(manifest, measured)
        if not thresholds.tertiles:
            raise ValueError(
                "no train clip of a known gender, on which tertiles could be fitted: give a manifest with a train split"
            )
    clips = manifest[["utterance_id", "split", "caption", "gender", "style"]].reset_index(drop=True)
    known = manifest["gender"].isin(ATTRIBUTES["gender"]).to_numpy()
    clips["gender"] = clips["gender"].where(known, "")
    more = [(name, "gender", "not known") for name in clips["utterance_id"][~known]]
    places = list(zip(clips["utterance_id"], manifest["corpus"], clips["gender"], strict=True))
    for attribute in UNITS:
        values = measured[attribute].to_numpy()
        levels = [
            thresholds.level(corpus, gender, attribute, value)
            for (_, corpus, gender), value in zip(places, values, strict=True)
        ]
        clips[attribute] = pd.array(levels, dtype="str")
        for (name, corpus, gender), level, value in zip(places, levels, values, strict=True):
            if not level and not np.isnan(value):
                reason = (
                    f"no tertiles for gender {gender} of {corpus}"
                    if gender
                    else "tertiles are by gender, which is not known"
                )
                more.append((name, attribute, reason))
    left_out = pd.concat([left_out, left_out_table(more)], ignore_index=True)
    return clips[["utterance_id", "split", "caption", *ATTRIBUTES]], thresholds, left_out
