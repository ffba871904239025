"""What simple cues give: documented keys, chance worked out, and cues that tell or do not."""

from __future__ import annotations

import pytest

from esr_utils.controls import simple_cues


@pytest.fixture(scope="module")
def control(manifest) -> dict:
    return simple_cues(manifest, "mini", n_trials=60)


def test_controls_have_the_documented_keys(control):
    names = {f"chance/{name}" for name in ("r@1", "r@5", "r@10", "r@20", "accuracy")}
    for cue in ("loudness", "prosody", "text"):
        values = ("r@1", "r@5", "r@10", "r@20", "map@10", "accuracy", "uar")
        names |= {f"{cue}/{name}{end}" for name in values for end in ("", "_ci95")}
    assert set(control) == {f"mini/control/{name}" for name in names}
    assert all(0 <= value <= 1 for key, value in control.items() if not key.endswith("_ci95"))


def test_chance(control):
    assert control["mini/control/chance/r@1"] == pytest.approx(1 / 13)
    assert control["mini/control/chance/r@20"] == 1
    assert control["mini/control/chance/accuracy"] == pytest.approx(1 / 3)


def test_chance_where_styles_differ_in_size(manifest):
    test, calm = manifest["split"] == "test", manifest["style"] == "calm"
    rows = manifest[~(test & calm) | (manifest["speaker"] == "m_mid")].reset_index(drop=True)
    found = simple_cues(rows, "mini", n_trials=5)
    # 6 angry, 2 calm and 6 whispered clips: trials of 1 + 8, 1 + 12 and 1 + 8
    assert found["mini/control/chance/r@1"] == pytest.approx((1 / 9 + 1 / 13 + 1 / 9) / 3)


def test_words_alone_are_at_chance_where_every_sentence_is_said_in_every_style(control):
    assert control["mini/control/text/r@1"] == pytest.approx(control["mini/control/chance/r@1"])
    assert control["mini/control/text/uar"] == pytest.approx(1 / 3)


def test_words_alone_are_enough_where_they_name_the_style(manifest):
    telling = manifest.assign(text="I am " + manifest["style"])
    found = simple_cues(telling, "mini", n_trials=30)
    assert found["mini/control/text/r@1"] == 1 and found["mini/control/text/accuracy"] == 1


def test_loudness_as_recorded_gives_whispers_away_and_words_do_not(control):
    """The demo corpus's whispered clips are quieter by rule."""
    assert control["mini/control/loudness/accuracy"] > 1 / 3 + 0.1
    assert control["mini/control/prosody/r@1"] > 2 / 13


def test_without_a_train_split_there_is_chance_only(manifest):
    found = simple_cues(manifest[manifest["split"] == "test"], "mini", n_trials=5)
    assert {key.split("/")[2] for key in found} == {"chance"}
