"""Attribute captions: levels by hand, train-only tertiles, sentences that differ, and who they are right for."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from esr_utils import attributes, captions
from esr_utils.captions import ATTRIBUTES, Thresholds, attribute_captions, clip_attributes, relevance
from esr_utils.manifests import load_corpora
from esr_utils.text_tables import read_table, write_table

PROJECT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ESR_DATA") or PROJECT.parent / "shared" / "data")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def written(manifest: pd.DataFrame, kept: Path) -> tuple:
    return attribute_captions(manifest, cache=kept)


# --- levels


def table_of(values: list[float], split: str = "train", gender: str = "female") -> tuple[pd.DataFrame, pd.DataFrame]:
    """A manifest and measures, all three attributes alike."""
    names = [f"c/{split}{gender}{i}" for i in range(len(values))]
    manifest = pd.DataFrame({"utterance_id": names, "corpus": "c", "split": split, "gender": gender})
    return manifest, pd.DataFrame({"pitch": values, "energy": values, "tempo": values}, index=names, dtype=float)


def test_tertiles_by_hand() -> None:
    """1 … 9: the first is at 8/3, counted from 0, which is 1 + 2.667; the second at 16/3."""
    thresholds = Thresholds.fit(*table_of([9, 1, 8, 2, 7, 3, 6, 4, 5]))
    first, second = thresholds.tertiles["c"]["female"]["pitch"]
    assert first == pytest.approx(3 + 2 / 3) and second == pytest.approx(6 + 1 / 3)
    levels = [thresholds.level("c", "female", "pitch", value) for value in range(1, 10)]
    assert levels == ["low"] * 3 + ["normal"] * 3 + ["high"] * 3
    assert [thresholds.level("c", "female", "pitch", v) for v in (first, second, np.nan)] == ["normal", "normal", ""]
    assert thresholds.level("c", "male", "pitch", 5.0) == thresholds.level("d", "female", "pitch", 5.0) == ""


def test_tertiles_are_of_the_train_split_and_of_one_gender_each() -> None:
    parts = [
        table_of([1, 2, 3, 4]),
        table_of([10, 20, 30, 40], gender="male"),
        table_of([500, 600, 700], split="val"),
        table_of([-500, 900], split="test"),
        table_of([77, 78, 79], gender="other"),
    ]
    manifest, measured = (pd.concat(side) for side in zip(*parts, strict=True))
    thresholds = Thresholds.fit(manifest, measured)
    assert set(thresholds.tertiles["c"]) == {"female", "male"}
    assert thresholds.tertiles["c"]["female"]["tempo"] == pytest.approx((2, 3))
    assert thresholds.tertiles["c"]["male"]["tempo"] == pytest.approx((20, 30))
    assert thresholds.clips == {"c": {"female": 4, "male": 4}}
    measured.loc[manifest.loc[manifest["split"] != "train", "utterance_id"]] *= 1000
    assert Thresholds.fit(manifest, measured) == thresholds


def test_too_few_clips_have_no_tertiles() -> None:
    manifest, measured = table_of([1, 2, 3])
    measured.iloc[0, 0] = np.nan
    assert set(Thresholds.fit(manifest, measured).tertiles["c"]["female"]) == {"energy", "tempo"}


def test_thresholds_are_saved_and_loaded(tmp_path: Path) -> None:
    thresholds = Thresholds.fit(*table_of([0.1, 0.7, 1 / 3, 5]))
    thresholds.save(tmp_path / "t.json")
    assert Thresholds.load(tmp_path / "t.json") == thresholds
    assert len(thresholds.table()) == 3
    for text, words in (("{}", "units"), ("[]", "no thresholds"), ('{"units": {"pitch": "st"}}', "its units are")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            Thresholds.load(tmp_path / "bad.json")


# --- measuring real clips


def test_levels_are_those_of_the_measures(manifest: pd.DataFrame, kept: Path) -> None:
    measured, _ = attributes.measures(manifest, kept)
    clips, thresholds, left_out = clip_attributes(manifest, cache=kept)
    assert clips["utterance_id"].equals(manifest["utterance_id"])
    assert clips["style"].equals(manifest["style"]) and clips["gender"].equals(manifest["gender"])
    for clip, row in zip(clips.to_dict("records"), manifest.to_dict("records"), strict=True):
        for attribute in attributes.UNITS:
            value = measured.loc[row["utterance_id"], attribute]
            low, high = thresholds.tertiles["mini"][row["gender"]][attribute]
            expected = "" if np.isnan(value) else "low" if value < low else "high" if value > high else "normal"
            assert clip[attribute] == expected
    energy = measured["energy"].groupby(manifest.set_index("utterance_id")["style"]).mean()
    assert energy["angry"] > energy["calm"] > energy["whispered"]
    whispered = set(manifest.loc[manifest["style"] == "whispered", "utterance_id"])
    mute = left_out[left_out["attribute"] == "pitch"]
    assert set(mute["reason"]) == {"hardly any voiced frames"} and set(mute["utterance_id"]) <= whispered
    assert len(mute) > len(whispered) / 2


def test_what_is_not_known_is_left_out_with_its_reason(own_corpus: pd.DataFrame) -> None:
    table = own_corpus.copy()
    table.loc[0, "gender"] = ""
    table.loc[1, ["gender", "style"]] = ["other", ""]
    path = Path(table.loc[2, "root"]) / table.loc[2, "path"]
    soundfile.write(path, np.zeros(round(48_000 * table.loc[2, "duration_s"])), 48_000, format="OGG", subtype="OPUS")
    found, _, left_out = attribute_captions(table, cache=None)
    first, second, silent = table["utterance_id"][:3]
    reasons = {(r.utterance_id, r.attribute): r.reason for r in left_out.itertuples()}
    assert reasons[first, "gender"] == "not known"
    assert reasons[first, "energy"] == "tertiles are by gender, which is not known"
    assert reasons[second, "caption"] == "none of its attributes is known"
    assert reasons[silent, "tempo"].startswith("audio silent")
    assert second not in set(found["utterance_id"]) and {first, silent} <= set(found["utterance_id"])
    assert set(found.loc[found["utterance_id"] == first, "style"]) == {table.loc[0, "style"]}
    assert (found.loc[found["utterance_id"] == first, ["gender", "pitch"]] == "").all(axis=None)


def test_a_corpus_without_train_clips_needs_thresholds(manifest: pd.DataFrame, written: tuple, kept: Path) -> None:
    test = manifest[manifest["split"] == "test"]
    with pytest.raises(ValueError, match="give a manifest with a train split"):
        attribute_captions(test, cache=kept)
    table = attribute_captions(test, thresholds=written[1], cache=kept)[0]
    all_of_it = written[0]
    expected = all_of_it[all_of_it["utterance_id"].isin(test["utterance_id"])]
    pd.testing.assert_frame_equal(table, expected.reset_index(drop=True))


# --- sentences


def test_sentences_of_a_clip(manifest: pd.DataFrame, written: tuple, kept: Path, tmp_path: Path) -> None:
    table, _, _ = written
    clips = clip_attributes(manifest, cache=kept)[0].set_index("utterance_id")
    counts = table.groupby(["utterance_id", "grammar"]).size()
    for name, clip in clips.iterrows():
        assert counts[name].to_dict() == ({"seen": 8} if clip["split"] == "train" else {"seen": 1, "held_out": 1})
    for row in table.to_dict("records"):
        clip = clips.loc[row["utterance_id"]]
        named = {key: row[key] for key in ATTRIBUTES if row[key]}
        assert named and all(clip[key] == value for key, value in named.items())
        if clip["split"] != "train":
            says = {"whispered": "energy"}.get(clip["style"])
            assert set(named) == {key for key in ATTRIBUTES if clip[key] and key != says}
    train = table[table["utterance_id"].map(clips["split"]) == "train"]
    assert not train.duplicated(["utterance_id", "caption"]).any()
    assert 0.5 < (train["gender"] != "").mean() < 0.95  # an attribute is left out now and then
    write_table(table, tmp_path / "captions.csv")
    pd.testing.assert_frame_equal(read_table(tmp_path / "captions.csv"), table)


def test_sentences_depend_on_seed_and_id_alone(manifest: pd.DataFrame, written: tuple, kept: Path) -> None:
    table, thresholds, _ = written
    shuffled = manifest.sample(frac=1, random_state=0)
    again = attribute_captions(shuffled, cache=kept)[0]
    order = ["utterance_id", "grammar", "caption"]
    pd.testing.assert_frame_equal(
        *(one.sort_values(order).reset_index(drop=True) for one in (table, again)), check_exact=True
    )
    other = attribute_captions(manifest, seed=1, per_clip=3, per_test_clip=2, cache=kept)[0]
    assert (other["caption"].isin(table["caption"])).mean() < 0.5
    assert set(other.groupby(["utterance_id", "grammar"]).size()) == {2, 3}


def test_ravdess_has_thousands_of_distinct_sentences(tmp_path: Path) -> None:
    """At least 500 are asked for; a quarter of the corpus, so that the test is quick, has them already."""
    if not (SHARED / "ravdess" / "manifest.csv").is_file():
        pytest.skip(f"needs the prepared corpus {SHARED / 'ravdess'}; set $ESR_DATA to the folder that holds it")
    whole = load_corpora("ravdess", SHARED)
    speakers = ["actor_01", "actor_02", "actor_03", "actor_04", "actor_17", "actor_18"]
    part = whole[whole["speaker"].isin(speakers)]
    table, _, left_out = attribute_captions(part, cache=tmp_path)
    seen, held_out = (set(table.loc[table["grammar"] == name, "caption"]) for name in ("seen", "held_out"))
    assert len(seen) > 1000 and len(held_out) > 100
    assert not seen & held_out
    assert left_out["attribute"].eq("pitch").all() and len(left_out) < 0.05 * len(part)


# --- relevance


def by_hand(table: pd.DataFrame, clips: pd.DataFrame) -> np.ndarray:
    """The obvious double loop."""
    right = np.zeros((len(table), len(clips)), dtype=bool)
    owned: dict[str, set] = {}
    for name, text in zip(table["utterance_id"], table["caption"], strict=True):
        owned.setdefault(text, set()).add(name)
    for name, text in zip(clips["utterance_id"], clips["caption"], strict=True):
        owned.setdefault(text, set()).add(name)
    for i, row in enumerate(table.to_dict("records")):
        named = [key for key in ATTRIBUTES if row[key] != ""]
        for j, clip in enumerate(clips.to_dict("records")):
            agrees = bool(named) and all(row[key] == clip[key] for key in named)
            right[i, j] = agrees or clip["utterance_id"] in owned[row["caption"]]
    return right


def test_relevance_is_that_of_the_double_loop(manifest: pd.DataFrame, written: tuple, kept: Path) -> None:
    clips = clip_attributes(manifest, cache=kept)[0]
    clips["caption"] = [f"text {i % 5}" if i % 3 else "" for i in range(len(clips))]
    free = captions.free_captions(clips)
    assert len(free) == (clips["caption"] != "").sum() and set(free["grammar"]) == {"free"}
    for table in (written[0], free, pd.concat([written[0].sample(40, random_state=0), free])):
        found = relevance(table, clips)
        assert found.shape == (len(table), len(clips)) and found.dtype == bool
        np.testing.assert_array_equal(found, by_hand(table, clips))
        own = clips["utterance_id"].to_numpy()[None] == table["utterance_id"].to_numpy()[:, None]
        assert found[own].all()  # a caption is right for the clip that it is about


def test_relevance_by_hand() -> None:
    clips = pd.DataFrame(
        [
            ("a", "female", "low", "high", "low", "sad"),
            ("b", "female", "low", "high", "low", "sad"),
            ("c", "female", "", "high", "low", "sad"),
            ("d", "male", "low", "high", "low", "sad"),
        ],
        columns=["utterance_id", *ATTRIBUTES],
    )
    table = pd.DataFrame(
        [
            ("a", "all five", "female", "low", "high", "low", "sad"),
            ("a", "style only", "", "", "", "", "sad"),
            ("d", "his pitch", "male", "low", "", "", ""),
            ("c", "free", "", "", "", "", ""),
            ("d", "free", "", "", "", "", ""),
            ("x", "of a clip that is not here", "", "", "", "", ""),
        ],
        columns=["utterance_id", "caption", *ATTRIBUTES],
    )
    assert relevance(table, clips).astype(int).tolist() == [
        [1, 1, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [0, 0, 0, 0],
    ]
    assert relevance(table.iloc[:0], clips).shape == (0, 4)


def test_mandarin_needs_a_backbone_that_knows_it() -> None:
    table = pd.DataFrame({"caption": ["A man", "伤心难过"]})
    for name in ("minilm", "roberta", "FacebookAI/roberta-base"):
        with pytest.raises(ValueError, match=f"Mandarin, of which '{name}' knows nothing: give the folder of a"):
            captions.check_language(table, name)
        captions.check_language(table.iloc[:1], name)
    captions.check_language(table, "/models/multilingual-minilm")


# --- describing


def test_descriptions_by_hand() -> None:
    manifest = pd.DataFrame(
        {"utterance_id": ["a/1", "a/2", "b/1"], "corpus": ["a", "a", "b"], "duration_s": [1800, 1800, 36]}
    )
    manifest["caption"] = ["A man's voice, half-asleep.", "A man's voice, half-asleep.", "悲伤 12"]
    found = captions.describe(captions.free_captions(manifest), manifest)
    assert found.loc["a"].tolist() == [2, 1.0, 2, 1, 4.0, 4] and found.loc["b"].tolist() == [1, 0.01, 1, 1, 2.0, 2]
    table = pd.DataFrame({"pitch": ["low", "", "low", "high"], "age": ["old"] * 4})
    assert captions.attribute_counts(table).to_numpy().tolist() == [
        ["pitch", "low", 2],
        ["pitch", "high", 1],
        ["age", "old", 4],
    ]
