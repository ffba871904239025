"""Cross-validation over speakers: each is tested once, and differences are those of a slow loop over speakers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from esr_utils import captions, fusion_evaluation, fusion_folds, fusion_systems
from esr_utils.config import FusionConfig, FusionTrainConfig


def corpus(name: str, speakers: int) -> pd.DataFrame:
    rows = [(name, f"s{i:02}", f"{name}/{i}-{j}", "train") for i in range(speakers) for j in range(2)]
    return pd.DataFrame(rows, columns=["corpus", "speaker", "utterance_id", "split"])


def test_every_speaker_is_tested_once_and_is_in_one_split():
    manifest = pd.concat([corpus("a", 24), corpus("b", 10)], ignore_index=True)
    tested = []
    for k in range(4):
        rows = fusion_folds.fold(manifest, k, 4)
        assert (rows.groupby(["corpus", "speaker"])["split"].nunique() == 1).all()
        assert set(rows["split"]) == {"train", "val", "test"} and set(manifest["split"]) == {"train"}
        speakers = rows.drop_duplicates(["corpus", "speaker"])
        assert (speakers[speakers["split"] == "val"].groupby("corpus").size() == pd.Series({"a": 2, "b": 1})).all()
        tested += list(speakers.loc[speakers["split"] == "test", ["corpus", "speaker"]].itertuples(index=False))
    assert len(tested) == len(set(tested)) == 34


@pytest.mark.parametrize(("speakers", "n"), [(3, 4), (2, 2), (5, 1)])
def test_too_few_speakers_are_refused(speakers, n):
    with pytest.raises(ValueError, match=f"a has {speakers} speakers"):
        fusion_folds.fold(corpus("a", speakers), 0, n)


@pytest.fixture(scope="module")
def folded(manifest, tiny_text, tiny_whisper, read_once, tmp_path_factory) -> Path:
    """Three folds of "mini", and the frames' cache beside them."""
    folder = tmp_path_factory.mktemp("folds")
    model = FusionConfig(speech_backbone=tiny_whisper, text_backbone=tiny_text, dim=16, heads=2)
    config = FusionTrainConfig(batch_size=6, max_steps=2)
    given = (manifest, folder / "run", 3, model, config, (0,), ("CLAP", "FS-CLAP-M"), 2, "cpu", folder)
    shown = fusion_folds.train(*given)
    assert len(shown) == 3 * 2 and shown.index.names[0] == "fold"
    return folder


def test_differences_over_all_speakers(manifest, folded):
    table = fusion_folds.compare(folded / "run", manifest, (), "seen", device="cpu", cache=folded)
    assert set(table["corpus"]) == {"mini", "all"} and set(table["speakers"]) == {6} and set(table["clips"]) == {33}
    one = table[(table["corpus"] == "all") & (table["direction"] == "a2t")].set_index("system")
    values = {}
    for k in range(3):
        rows = fusion_folds.fold(manifest, k, 3)
        (test,) = fusion_evaluation.captioned_sets(rows, captions.of_manifest(rows))
        grid = fusion_systems.load_grid(folded / "run" / f"fold{k}")
        for row in fusion_evaluation.evaluate(grid, [test], ("masked",), device="cpu", cache=folded):
            values.setdefault(row.system, []).extend(row.found[0].by_clip["a2t/map@10"])
    for system, found in values.items():
        assert one.loc[system, "mAP@10"].value == pytest.approx(np.mean(found))
    difference = one.loc["FS-CLAP-M", "difference"]
    assert difference.value == pytest.approx(np.mean(values["FS-CLAP-M"]) - np.mean(values["CLAP"]))
    assert difference.interval[0] <= difference.value <= difference.interval[1]
    assert 0 < one.loc["FS-CLAP-M", "p"] <= 1 and one.loc["CLAP", "difference"] == ""


def test_clips_that_cannot_be_heard_leave_the_folds_as_they_are(manifest, folded):
    gone = manifest.loc[manifest["speaker"] == manifest["speaker"].iloc[0], "utterance_id"].tolist()
    table = fusion_folds.compare(folded / "run", manifest, gone, "seen", device="cpu", cache=folded)
    assert set(table["speakers"]) == {5} and set(table["clips"]) == {33 - len(gone)}
    with pytest.raises(ValueError, match="was trained on other speakers than one of 3 folds of this manifest leaves"):
        fusion_folds.compare(folded / "run", manifest[~manifest["utterance_id"].isin(gone)])


@pytest.mark.parametrize("kept", [(0,), (0, 2), (0, 1)])
def test_folds_of_which_one_is_missing_are_refused(manifest, folded, tmp_path, kept):
    """Two of three folds, taken for all, would be tested on speakers that they were trained on."""
    for k in kept:
        shutil.copytree(folded / "run" / f"fold{k}", tmp_path / f"fold{k}")
    with pytest.raises(ValueError, match="let notebook 08_fsclap_train finish the folds"):
        fusion_folds.compare(tmp_path, manifest)


def test_a_system_that_one_fold_lacks_is_no_row(manifest, folded, tmp_path):
    shutil.copytree(folded / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "fold1" / "fs-clap-m")
    with pytest.raises(ValueError, match="a system is not trained in every fold"):
        fusion_folds.compare(tmp_path / "run", manifest, (), "seen", device="cpu", cache=folded)


def test_without_folds_there_is_nothing_to_compare(manifest, tmp_path):
    assert fusion_folds.compare(tmp_path, manifest).empty
