"""Cross-validation over speakers: every speaker is tested once, by systems that never heard them.

A corpus's own test split has few speakers, eight in RAVDESS and three in EmoDB, and voices differ more than systems do.
So the same comparison is made n times, each time on other speakers, and its differences are taken over all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from esr_utils import embedding, fusion_systems, intervals, provenance, runs
from esr_utils.captioned import DIRECTIONS, MAP_K, sign_flip_p
from esr_utils.captions import of_manifest
from esr_utils.config import FusionConfig, FusionTrainConfig
from esr_utils.fusion_evaluation import CaptionedSet, Row, captioned_sets, evaluate
from esr_utils.scoring import REPLICATES
from esr_utils.tables import Cell

_PROTOCOLS = ("bi-encoder", "masked")  # those without a fusion of pairs, which takes most of the time
_METRIC = f"map@{MAP_K}"


def fold(manifest: pd.DataFrame, k: int, n: int) -> pd.DataFrame:
    """The k-th of n folds: the manifest with its speakers split anew, corpus by corpus.

    Of a corpus's speakers, sorted, every n-th is tested; of the others one in nine, at least one, is for validation.

    Raises:
        ValueError: a corpus has fewer speakers than folds, or too few for three splits.
    """
    split = pd.Series("train", index=manifest.index)
    for corpus, rows in manifest.groupby("corpus"):
        speakers = sorted(rows["speaker"].unique())
        test, rest = speakers[k::n], [name for i, name in enumerate(speakers) if i % n != k]
        if n < 2 or len(speakers) < max(n, 3):
            raise ValueError(f"{corpus} has {len(speakers)} speakers: too few for {n} folds, or for three splits")
        count = max(1, len(rest) // 9)
        val = rest[:: len(rest) // count][:count]
        split[rows.index[rows["speaker"].isin(test)]] = "test"
        split[rows.index[rows["speaker"].isin(val)]] = "val"
    return manifest.assign(split=split)


def train(
    manifest: pd.DataFrame,
    run: str | Path,
    n: int,
    model_config: FusionConfig,
    config: FusionTrainConfig,
    seeds: Sequence[int] = (0,),
    systems: Sequence[str] = ("CLAP", "FS-CLAP-M"),
    captions_per_clip: int = 8,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> pd.DataFrame:
    """`fusion_systems.train_all` on each fold, in `<run>/fold<k>`: captions are written, and what is low and high is
    fitted, on that fold's training speakers. What is finished is taken as it is.

    Returns:
        `fusion_systems.summary` of all, a row for each fold, system and seed.
    """
    found = {}
    for k in range(n):
        rows = fold(manifest, k, n)
        told, folder = of_manifest(rows, captions_per_clip), runs.run_folder(run) / f"fold{k}"
        given = (rows, told, folder, model_config, config, seeds, systems, "", device, cache)
        found[k] = fusion_systems.summary(fusion_systems.train_all(*given))
    return pd.concat(found, names=["fold"])


def compare(
    run: str | Path,
    manifest: pd.DataFrame,
    left_out: Collection[str] = (),
    grammar: str = "held_out",
    reference: str = "CLAP",
    seed: int = 0,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> pd.DataFrame:
    """mAP@10 over all speakers, and each system minus the reference, paired: rows of the folds that `train` made.

    Every query is asked among its own fold's clips and captions. Intervals (95 %, bootstrap) and p (sign flips) are
    over speakers; a system's values are means over its seeds.

    Args:
        manifest: the one that the folds were made of, whole.
        left_out: ids of its clips that cannot be heard (`fusion_evaluation.usable`).
        grammar: seen or held_out, as in `captioned_sets`.

    Returns:
        Columns corpus ("all" for all together), system, protocol, direction, speakers, clips, mAP@10, difference, p;
        empty where there are no folds.

    Raises:
        ValueError: a fold is missing, not finished, or of another manifest.
    """
    folds = _folds(run, manifest)
    tables = [_of_fold(folder, rows, left_out, grammar, seed, device, cache) for folder, rows in folds]
    if not tables:
        return pd.DataFrame()
    values = pd.concat(tables, ignore_index=True)
    if values.groupby(["system", "protocol", "direction"])["utterance_id"].count().nunique() > 1:
        raise ValueError(f"{run}: a system is not trained in every fold: let notebook 08_fsclap_train finish the folds")
    values["speaker"] = values["corpus"] + "/" + values["speaker"]
    rows = []
    for corpus, part in [*values.groupby("corpus", sort=False), ("all", values)]:
        wide = part.pivot(
            index=["utterance_id", "speaker"], columns=["system", "protocol", "direction"], values="value"
        )
        speakers = wide.index.get_level_values("speaker")
        weights, _ = intervals.speaker_bootstrap_weights(speakers, REPLICATES, np.random.default_rng(seed))
        for column in wide:
            system, protocol, direction = column
            theirs = wide[reference].xs(direction, axis=1, level="direction").iloc[:, 0]
            row = {"corpus": corpus, "system": system, "protocol": protocol, "direction": direction}
            row |= {"speakers": speakers.nunique(), "clips": len(wide), f"mAP@{MAP_K}": _cell(wide[column], weights)}
            if system != reference:
                by_speaker = (wide[column] - theirs).groupby(level="speaker").sum()
                row["difference"] = _cell(wide[column] - theirs, weights, difference=True)
                row["p"] = sign_flip_p(by_speaker.to_numpy(), np.random.default_rng(seed))
            rows.append(row)
    return pd.DataFrame(rows).fillna("")


def _folds(run: str | Path, manifest: pd.DataFrame) -> list[tuple[Path, pd.DataFrame]]:
    """Folder and manifest of each fold there is. None may be missing: k of fewer are other speakers, trained on."""
    folders = {int(folder.name.removeprefix("fold")): folder for folder in runs.run_folder(run).glob("fold*")}
    folds = [(folders[k], fold(manifest, k, max(len(folders), 2))) for k in sorted(folders)]
    for folder, rows in folds:
        trained = {runs.read_json(path)["manifest_sha256"] for path in folder.glob("*/seed*/config.json")}
        if trained != {provenance.fingerprint(rows)}:
            raise ValueError(
                f"{folder} was trained on other speakers than one of {len(folders)} folds of this manifest leaves: "
                "let notebook 08_fsclap_train finish the folds, or delete them"
            )
    return folds


def _of_fold(
    folder: Path,
    rows: pd.DataFrame,
    left_out: Collection[str],
    grammar: str,
    seed: int,
    device: str,
    cache: Path,
) -> pd.DataFrame:
    """A row for each test clip, system, protocol and direction: the mean average precision of the clip's queries."""
    heard = rows[~rows["utterance_id"].isin(left_out)]
    tests = captioned_sets(heard, of_manifest(rows), "test", grammar, seed)
    found = evaluate(fusion_systems.load_grid(folder), tests, _PROTOCOLS, device=device, cache=cache)
    by_corpus = {test.corpus: test for test in tests}
    return pd.concat([_of_row(row, by_corpus[row.corpus], d) for row in found for d in DIRECTIONS], ignore_index=True)


def _of_row(row: Row, test: CaptionedSet, direction: str) -> pd.DataFrame:
    asked = test.captions.written_for.sum(0) if direction == "t2a" else 1
    value = np.mean([one.by_clip[f"{direction}/{_METRIC}"] for one in row.found], axis=0) / asked
    about = {"corpus": row.corpus, "system": row.system, "protocol": row.protocol, "direction": direction}
    return test.clips[["utterance_id", "speaker"]].assign(**about, value=value)


def _cell(values: pd.Series, weights: np.ndarray, difference: bool = False) -> Cell:
    """The mean over clips, with its interval."""
    drawn = weights @ values.to_numpy() / weights.sum(1)
    bounds = (-1.0, 1.0) if difference else (0.0, 1.0)
    return Cell(values.mean(), tuple(intervals.interval(drawn, values.mean(), bounds)), difference=difference, digits=3)
