"""What the attributes' readers find: the agreement against a slow loop, and both ends of what they can read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from esr_utils import captions, fusion_evaluation, fusion_limits, fusion_systems
from esr_utils.config import FusionConfig, FusionTrainConfig
from esr_utils.grammar import ATTRIBUTES


def shares(rng: np.random.Generator, rows: int) -> fusion_limits.Shares:
    made = {a: rng.random((rows, len(values) + 1)) for a, values in ATTRIBUTES.items()}
    return {a: found / found.sum(1, keepdims=True) for a, found in made.items()}


def test_the_agreement_is_that_of_a_slow_loop():
    rng = np.random.default_rng(0)
    told, heard = shares(rng, 3), shares(rng, 4)
    found = fusion_limits._agreement(told, heard)
    for c in range(3):
        for n in range(4):
            slow = 1.0
            for a, values in ATTRIBUTES.items():
                same = sum(told[a][c, v] * heard[a][n, v] for v in range(len(values)))
                slow *= same + told[a][c, -1]  # or the caption does not name it
            assert found[c, n] == pytest.approx(np.log(slow))


def test_where_both_sides_are_known_a_caption_agrees_with_the_clips_it_is_right_for():
    clips = pd.DataFrame(
        [("female", "low", "high", "", "angry"), ("female", "low", "high", "low", "sad")], columns=list(ATTRIBUTES)
    )
    named = pd.DataFrame(
        [("female", "", "", "", "angry"), ("", "low", "", "", ""), ("", "", "", "low", "")], columns=list(ATTRIBUTES)
    )
    found = fusion_limits._agreement(fusion_limits._known(named), fusion_limits._known(clips))
    np.testing.assert_array_equal(found > -1, [[True, False], [True, True], [False, True]])


@pytest.mark.usefixtures("read_once")
def test_limits_of_a_corpus(manifest, tiny_text, tiny_whisper, tmp_path):
    told = captions.of_manifest(manifest, per_clip=3, cache=tmp_path)
    model = FusionConfig(speech_backbone=tiny_whisper, text_backbone=tiny_text, dim=16, heads=2)
    config = FusionTrainConfig(batch_size=8, max_steps=1)
    given = (manifest, told, tmp_path / "grid", model, config, (0,), ("CLAP",), "", "cpu", tmp_path)
    (folder,) = fusion_systems.train_all(*given)["CLAP"]
    sets = fusion_evaluation.captioned_sets(manifest, told, grammar="seen")
    table, accuracy = fusion_limits.limits(folder, manifest, told, sets, "cpu", tmp_path)
    assert table.index.tolist() == [("mini", reading) for reading in fusion_limits.READINGS]
    assert list(table.columns) == ["a2t mAP@10", "t2a mAP@10"]
    assert all(0 <= cell.interval[0] <= cell.value <= cell.interval[1] <= 1 for cell in table.to_numpy().ravel())
    assert accuracy.index.tolist() == [("mini", "clip"), ("mini", "caption")] and set(accuracy.columns) <= set(
        ATTRIBUTES
    )
    again, _ = fusion_limits.limits(folder, manifest, told, sets, "cpu", tmp_path)
    assert again.astype(str).equals(table.astype(str))
    free = captions.Captioned(told.table.assign(**dict.fromkeys(ATTRIBUTES, "")), told.clips, None, told.left_out)
    assert fusion_limits.limits(folder, manifest, free, sets, "cpu", tmp_path)[0].empty
