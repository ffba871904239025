"""Runs side by side: grouping by seed, paired differences, the paper's rows among ours, bins of duration."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pandas as pd
import pytest

from esr_utils import comparison, evaluation, intervals, paper, retriever, runs, training, trials
from esr_utils.comparison import DURATION_BINS, Entry, Estimate
from esr_utils.config import ModelConfig, TrainConfig
from esr_utils.scoring import Scorer

# Entries made of scores, without a model --------------------------------------------------------------------

STYLES = ("angry", "calm", "sad")


def clips_of(corpus: str, n: int = 90) -> pd.DataFrame:
    """Clips of three styles, six speakers and 1 to 13 s."""
    return pd.DataFrame(
        {
            "utterance_id": [f"{corpus}/{i:03d}" for i in range(n)],
            "corpus": corpus,
            "split": "test",
            "style": [STYLES[i % 3] for i in range(n)],
            "speaker": [f"s{i // 15}" for i in range(n)],
            "gender": "",
            "language": "",
            "duration_s": [1.0 + 12 * (i % 7) / 6 for i in range(n)],
        }
    )


def scores_of(clips: pd.DataFrame, signal: float, seed: int) -> np.ndarray:
    """(N, 3): noise, and more for a clip's own style."""
    noise = np.random.default_rng(seed).standard_normal((len(clips), 3))
    return noise + signal * (clips["style"].to_numpy()[:, None] == np.array(STYLES))


def evaluated(
    signal: float, seed: int, corpora=("toy",), system: str = "seen", noise: int = 0
) -> evaluation.Evaluation:
    found = evaluation.Evaluation(results={"split": "test"}, systems=(system,))
    for corpus in corpora:
        clips = clips_of(corpus)
        found.scorers[corpus] = Scorer(clips, trials.build_trials(clips, corpus, "test", n_trials=50), seed=0)
        scores = (
            scores_of(clips, signal, 1) + 0.3 * scores_of(clips, 0.0, 100 + seed) + scores_of(clips, 0.0, 7) * noise
        )
        found.scores[corpus] = {}
        evaluation._score(found, corpus, system, scores)
    return found


def entry(label: str, signal: float, seeds=(0,), **options) -> Entry:
    found = tuple(evaluated(signal, seed, **options) for seed in seeds)
    names, system = tuple(f"{label}-{seed}" for seed in seeds), options.get("system", "seen")
    return Entry(label, names, tuple(seeds), system, found, tuple("" for _ in seeds))


def test_a_difference_is_paired():
    """Of two systems that err on the same clips, the difference is far surer than their two intervals say."""
    better, worse = entry("better", 1.2).recall("toy", 5), entry("worse", 1.0).recall("toy", 5)
    cell = better.minus(worse)
    assert cell.value == pytest.approx(better.value - worse.value)
    expected = intervals.interval(better.replicates - worse.replicates, cell.value, (-1, 1))
    assert list(cell.interval) == pytest.approx(expected)
    width = cell.interval[1] - cell.interval[0]
    apart = better.replicates - np.random.default_rng(0).permutation(worse.replicates)  # not paired
    assert width < 0.6 * np.ptp(np.percentile(apart, [2.5, 97.5]))
    assert cell.settled and str(cell).startswith("+0.")


def test_nothing_is_claimed_of_a_difference_from_itself_or_from_noise():
    one = entry("one", 1.0).recall("toy", 1)
    assert one.minus(one).interval == (0.0, 0.0) and str(one.minus(one)) == "+0.000 [+0.000, +0.000] n.s."
    other = entry("other", 1.0, seeds=(5,)).recall("toy", 1)
    assert not one.minus(other).settled and str(one.minus(other)).endswith(" n.s.")


def test_a_difference_has_the_sign_of_row_minus_reference():
    rows = [entry("reference", 0.3), entry("row", 2.0)]
    table = comparison.difference_table(rows, rows[0])
    assert list(table.index) == ["row"] and table.index.name == "minus reference"
    assert all(table.loc["row", ("toy", f"R@{k}")].value > 0 for k in trials.KS)
    assert comparison.difference_table(rows, rows[1]).loc["reference", ("toy", "R@5")].value < 0
    assert comparison.difference_table(rows[:1], rows[0]).empty


def test_seeds_are_averaged_and_the_interval_covers_them():
    single, several = entry("x", 1.0, seeds=(0,)), entry("x", 1.0, seeds=(0, 1, 2))
    values = [found.results["toy/seen/r@5"] for found in several.evaluations]
    mean = several.recall("toy", 5)
    assert mean.value == pytest.approx(np.mean(values))
    np.testing.assert_array_equal(single.recall("toy", 5).replicates, several.evaluations[0].replicates["toy/seen/r@5"])
    by_hand = intervals.seed_weights(3, 1000)
    drawn = np.stack([found.replicates["toy/seen/r@5"] for found in several.evaluations])
    assert mean.replicates[17] == pytest.approx(by_hand[17] @ drawn[:, 17])
    assert several.seed_names == "0, 1, 2"


def test_the_spread_of_seeds_is_in_the_interval():
    """Seeds that differ, all certain of their clips: one seed's interval is nothing, the mean's is the seeds'."""
    certain = [np.full(1000, value) for value in (0.2, 0.5, 0.8)]
    one = Estimate.over_seeds([0.2], certain[:1]).cell()
    three = Estimate.over_seeds([0.2, 0.5, 0.8], certain).cell()
    assert one.interval == pytest.approx((0.2, 0.2))
    assert three.value == pytest.approx(0.5) and three.interval == pytest.approx((0.2, 0.8), abs=0.02)


def test_two_rows_of_the_same_seeds_are_compared_seed_by_seed():
    """Each seed gains 0.1, whatever it had: the gain is certain, though the seeds differ widely."""
    before = Estimate.over_seeds([0.2, 0.8], [np.full(1000, 0.2), np.full(1000, 0.8)])
    after = Estimate.over_seeds([0.3, 0.9], [np.full(1000, 0.3), np.full(1000, 0.9)])
    assert after.minus(before).interval == pytest.approx((0.1, 0.1))


def test_the_papers_rows_stand_in_columns_of_their_own_test_sets():
    def columns(*corpora: str) -> pd.DataFrame:
        return comparison.recall_table([entry("ours", 1.0, corpora=corpora)])

    assert list(columns("toy").index) == ["ours"]
    both = columns("esd", "expresso")
    assert len(both) == 11 and list(both.columns.get_level_values(0).unique()) == [
        "seeds", "esd", "expresso", "expresso-paper",
    ]  # fmt: skip
    assert both.loc["RoBERTa + emotion2vec (paper)", ("expresso-paper", "R@1")].value == 0.8159
    assert both.loc["RoBERTa + emotion2vec (paper)", ("expresso", "R@1")] == ""
    assert both.loc["ours", ("expresso-paper", "R@1")] == ""
    assert both.loc["ours", ("esd", "R@1")].value == entry("ours", 1.0, corpora=("esd",)).recall("esd", 1).value
    assert list(columns("expresso-paper").columns.get_level_values(0).unique()) == ["seeds", "expresso-paper"]


def test_the_papers_numbers():
    """Each is a whole number of trials: 5 styles of 1000 for ESD, 7 for Expresso."""
    table = paper.table_two().map(lambda cell: cell.value)
    assert table.shape == (10, 8)
    for corpus, trial_count in (("esd", 5000), ("expresso-paper", 7000)):
        hits = table[corpus].to_numpy() * trial_count
        assert np.abs(hits - np.round(hits)).max() < trial_count * 0.5e-4 + 1e-6
    assert (table["esd"].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)
    assert str(paper.table_two().iloc[0, 0]) == "0.6106"
    three = paper.table_three().droplevel("corpus")
    assert three.loc["w/o style classification (paper)"].tolist() == ["-"] * 4
    assert (
        three.loc["full (paper)", "R@20"].value
        == table.loc["RoBERTa + emotion2vec (paper)", ("expresso-paper", "R@20")]
    )
    assert paper.differences("w/o prompt augmentation")[1] == pytest.approx(0.5901 - 0.8159)
    assert paper.differences("w/o style classification") == {} and paper.differences("published code") is None


def test_an_entry_is_found_by_its_run():
    rows = [entry("a", 1.0, seeds=(0, 1)), entry("b", 1.0)]
    assert comparison.entry_of(rows, "") is rows[0] and comparison.entry_of(rows, "b-0") is rows[1]
    assert comparison.evaluation_of(rows, "a-1") is rows[0].evaluations[1]
    with pytest.raises(ValueError, match="reference is 'c'; it must be one of the runs compared: a-0, a-1, b-0"):
        comparison.entry_of(rows, "c")


def test_the_caption_says_how_the_numbers_came_about():
    said = comparison.caption([entry("a", 1.0, seeds=(0, 1))])
    assert "toy: 1-in-61, 90 clips of 6 speakers, intervals over speakers" in said
    assert "a row of several seeds is their mean" in said
    assert "several seeds" not in comparison.caption([entry("a", 1.0)])


# Duration ---------------------------------------------------------------------------------------------------


def test_bins_of_duration_at_their_edges():
    durations = [0.1, 3.999, 4.0, 5.999, 6.0, 8.0, 9.999, 10.0, 10.001, 40.0]
    assert comparison.duration_bin(durations).tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 4, 4]
    assert comparison.duration_bin([33.88 - 23.88 + 1e-9, 3.9999]).tolist() == [3, 1]  # to the millisecond


def test_recall_by_duration_averages_to_the_whole_and_an_empty_bin_is_empty():
    rows = [entry("a", 1.0, seeds=(0, 1)), entry("b", 0.5)]
    for row in rows:
        for found in row.evaluations:
            clips = found.scorers["toy"].clips
            clips["duration_s"] = clips["duration_s"].where(clips["duration_s"] != 7.0, 5.0)
    table = comparison.duration_table(rows)
    assert list(table.index.unique("duration")) == list(DURATION_BINS)
    one = table.loc[("toy", "a")]
    assert one["clips"].sum() == 90 and one["trials"].sum() == 150
    assert one.loc["6–8 s", "clips"] == 0 and one.loc["6–8 s", "R@1"] == ""
    filled = one[one["trials"] > 0]
    for k in trials.KS:
        mean = np.average([cell.value for cell in filled[f"R@{k}"]], weights=filled["trials"])
        assert mean == pytest.approx(rows[0].recall("toy", k).value)
        assert all(cell.interval[0] <= cell.value <= cell.interval[1] for cell in filled[f"R@{k}"])


def test_a_bin_that_is_found_whole_is_as_sure_as_its_clips_are_many():
    table = comparison.duration_table([entry("sure", 50.0)])
    clips = table["clips"].to_numpy()
    lows = [cell.interval[0] for cell in table["R@1"]]
    assert all(cell.value == 1 for cell in table["R@1"]) and clips.min() > 0
    assert lows == pytest.approx(0.025 ** (1 / clips))
    assert intervals.spread_of_none(1.0, 2) == pytest.approx([0.158, 1], abs=1e-3)
    assert intervals.spread_of_none(0.0, 16) == pytest.approx([0, 0.206], abs=1e-3)  # as tables of Clopper-Pearson have


# Run folders ------------------------------------------------------------------------------------------------


def run_folder(folder, seed: int = 0, corpora=("demo",), text: str = "bert", **training_settings) -> str:
    settings = {
        "model": ModelConfig().but(text_backbone=text, speech_backbone="/models/wavlm-base").to_dict(),
        "training": TrainConfig().but(seed=seed, **training_settings).to_dict(),
        "corpora": list(corpora),
        "manifest_sha256": "+".join(corpora),
        "prompts_sha256": "0" * 64,
    }
    runs.write_json(folder / "config.json", settings)
    return str(folder)


def test_runs_that_differ_by_seed_alone_are_one_row(tmp_path):
    first, second = run_folder(tmp_path / "a1", seed=1), run_folder(tmp_path / "a0", seed=0)
    t5, base = run_folder(tmp_path / "t5", text="t5"), run_folder(tmp_path / "c", objective="classifier")
    assert comparison.by_settings([first, t5, second, base, first]) == {
        "bert + wavlm-base": [second, first],
        "t5 + wavlm-base": [t5],
        "Baseline: wavlm-base classifier": [base],
    }


def test_rows_of_the_same_backbones_are_told_apart_by_their_settings(tmp_path):
    names = [
        run_folder(tmp_path / "a"),
        run_folder(tmp_path / "b", adversarial_weight=0.0),
        run_folder(tmp_path / "c", corpora=("esd", "expresso")),
    ]
    found = comparison.by_settings(names[:2])
    assert list(found) == ["bert + wavlm-base (adversarial weight 0.1)", "bert + wavlm-base (adversarial weight 0.0)"]
    assert "corpora esd+expresso" in list(comparison.by_settings(names))[2]


def test_an_older_run_that_lacks_newer_settings_has_their_defaults(tmp_path):
    names = [
        run_folder(tmp_path / "older"),
        run_folder(tmp_path / "newer", seed=1),
        run_folder(tmp_path / "t", text="t5"),
    ]
    settings = runs.read_json(tmp_path / "older" / "config.json")
    del settings["training"]["chunk_size"], settings["model"]["classifier_hidden"]
    runs.write_json(tmp_path / "older" / "config.json", settings)
    assert list(comparison.by_settings(names).values()) == [names[:2], names[2:]]
    chunks = run_folder(tmp_path / "chunks", chunk_size=4)
    assert list(comparison.by_settings([names[0], chunks]))[1] == "bert + wavlm-base (chunk size 4)"


def test_runs_that_are_not_there_or_the_same_twice_are_refused(tmp_path):
    names = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    with pytest.raises(ValueError, match="same settings, and a seed occurs twice"):
        comparison.by_settings(names)
    with pytest.raises(ValueError, match="there is no run .*nowhere.*03_train"):
        comparison.by_settings([str(tmp_path / "nowhere")])


def test_names_of_runs():
    assert comparison.listed("a+b, c/d ,,") == ["a", "b", "c/d"] and comparison.listed("") == []


# Real runs, tiny --------------------------------------------------------------------------------------------

CONFIG = TrainConfig().but(epochs=3, classify_epochs=1, align_epochs=1, batch_size=6, crop_s=1.5, learning_rate=1e-2)


@pytest.fixture(scope="module")
def tiny_runs(manifest, tiny_config, tmp_path_factory):
    """Two seeds of a retriever, and a baseline, with the backbones read from disk once."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_speech_backbone", "load_text_backbone"):
            load = functools.cache(getattr(retriever, name))
            patch.setattr(retriever, name, lambda backbone, load=load: copy.deepcopy(load(backbone)))
        small = functools.partial(evaluation.evaluate, cache=folder / "cache", n_trials=30)
        patch.setattr(evaluation, "evaluate", small)
        for name, changes in (("s0", {}), ("s1", {"seed": 1}), ("base", {"objective": "classifier"})):
            training.fit(manifest, folder / name, tiny_config, CONFIG.but(**changes), cache=folder / "cache")
        yield folder


def test_runs_are_evaluated_on_the_same_clips_and_trials(tiny_runs, manifest):
    groups = comparison.by_settings([str(tiny_runs / name) for name in ("s0", "s1", "base")])
    rows = comparison.evaluate_groups(groups, manifest, prompts="held_out")
    retriever_row, baseline = rows
    assert retriever_row.seeds == (0, 1) and (retriever_row.system, baseline.system) == ("held_out", "classifier")
    assert len({found.trials["mini"] for row in rows for found in row.evaluations}) == 1
    found = retriever_row.evaluations[0].results
    assert retriever_row.recall("mini", 5).value == pytest.approx(
        (found["mini/held_out/r@5"] + retriever_row.evaluations[1].results["mini/held_out/r@5"]) / 2
    )
    assert not [key for key in baseline.evaluations[0].results if "/seen/" in key or "zero_shot" in key]
    assert baseline.accuracy("mini").value == baseline.evaluations[0].results["mini/classifier/accuracy"]
    assert baseline.modality_gap("mini") == "" and retriever_row.modality_gap("mini").value > 0
    assert retriever_row.checkpoints[0].endswith("with discriminator")
    table = comparison.recall_table(rows)
    assert table[("mini", "R@1")].map(lambda cell: cell.interval is not None).all()


def test_a_clip_that_only_one_run_can_use_is_refused_by_name(tiny_runs, manifest, monkeypatch):
    honest, calls = evaluation.embed, []

    def forgets_a_clip(model, cuts, *rest):
        calls.append(1)
        kept = [cut for cut in cuts if len(calls) == 1 or cut.id != "mini/f_mix_calm_1"]
        return honest(model, type(cuts).from_cuts(kept), *rest)

    monkeypatch.setattr(evaluation, "embed", forgets_a_clip)
    with pytest.raises(ValueError, match="cannot use the same clips.*leave mini/f_mix_calm_1 out"):
        comparison.evaluate_groups({"x": [tiny_runs / "s0"], "y": [tiny_runs / "s1"]}, manifest)
