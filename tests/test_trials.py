"""Trials: what they hold, that they are rebuilt and read back exactly, and what they measure."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from esr_utils import metrics
from esr_utils.manifests import load_corpora
from esr_utils.trials import KS, Trials, build_trials, evaluate_trials, trial_values


def collection(sizes: dict[str, int], corpus="toy", split="test") -> pd.DataFrame:
    styles = [style for style, size in sizes.items() for _ in range(size)]
    ids = [f"{corpus}/{split}_{i:04d}" for i in range(len(styles))]
    gender = ["female" if i % 2 else "male" for i in range(len(styles))]
    return pd.DataFrame({"utterance_id": ids, "corpus": corpus, "split": split, "style": styles, "gender": gender})


SIZES = {"angry": 12, "happy": 20, "sad": 30, "": 9}


@pytest.fixture
def manifest() -> pd.DataFrame:
    """62 clips with a style to draw from; others without one, of another split, and of another corpus."""
    parts = [collection(SIZES), collection(SIZES, split="train"), collection(SIZES, corpus="other")]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture
def trials(manifest) -> Trials:
    return build_trials(manifest, "toy", "test", n_trials=300, n_distractors=25, seed=4)


def random_scores(trials: Trials, seed=0, distinct=12) -> dict[str, np.ndarray]:
    """Scores with ties."""
    rng = np.random.default_rng(seed)
    return {style: rng.integers(0, distinct, len(trials.utterances)).astype(float) for style in trials.table}


# What trials hold -------------------------------------------------------------------------------------------


def test_one_positive_and_distractors_of_other_styles(manifest, trials):
    style_of = manifest.set_index("utterance_id")["style"]
    chosen = manifest.query("corpus == 'toy' and split == 'test' and style != ''")
    assert trials.utterances == tuple(sorted(chosen["utterance_id"]))
    assert list(trials.table) == ["angry", "happy", "sad"]
    styles = style_of[list(trials.utterances)].to_numpy()
    for style, rows in trials.table.items():
        assert rows.shape == (300, 26)
        assert np.all(styles[rows[:, 0]] == style)
        assert np.all(styles[rows[:, 1:]] != style)
        assert all(len(set(row)) == 26 for row in rows)
    assert trials.n_candidates == 26 and trials.protocol == "1-in-26"


def test_the_demo_corpus_has_the_papers_trials():
    assert build_trials(load_corpora("demo"), "demo", "test").protocol == "1-in-401"


def test_every_clip_is_drawn_equally_often(manifest):
    # 25 of 32 to 50 others: both the case where the draw picks clips and the one where it leaves clips out.
    trials = build_trials(manifest, "toy", "test", n_trials=4000, n_distractors=25)
    for style, rows in trials.table.items():
        n_positive = SIZES[style]
        n_other = len(trials.utterances) - n_positive
        positives = np.bincount(rows[:, 0])[np.unique(rows[:, 0])]
        others = np.bincount(rows[:, 1:].ravel())[np.unique(rows[:, 1:])]
        assert len(positives) == n_positive and len(others) == n_other
        np.testing.assert_allclose(positives / 4000, 1 / n_positive, atol=5 * (1 / n_positive / 4000) ** 0.5)
        np.testing.assert_allclose(others / 4000, 25 / n_other, atol=5 * 0.5 / 4000**0.5)
        # Pairs too: two given clips are together as often as for a draw without replacement.
        first, last = np.unique(rows[:, 1:])[[0, -1]]
        together = np.mean((rows[:, 1:] == first).any(axis=1) & (rows[:, 1:] == last).any(axis=1))
        assert together == pytest.approx(25 * 24 / n_other / (n_other - 1), abs=0.04)


def test_a_small_collection_gives_all_it_has(manifest):
    trials = build_trials(manifest, "toy", "test", n_trials=5)
    assert trials.candidates_by_style == {"angry": 51, "happy": 43, "sad": 33}
    assert trials.n_candidates == 51 and trials.protocol == "1-in-33 to 1-in-51"
    assert all(len(set(row)) == len(row) for rows in trials.table.values() for row in rows)


def test_trials_are_rebuilt_from_the_seed_whatever_the_order_of_rows(manifest, trials):
    def build(rows, seed):
        return build_trials(rows, "toy", "test", n_trials=300, n_distractors=25, seed=seed)

    shuffled = manifest.sample(frac=1, random_state=1)
    assert build(manifest, 4) == trials == build(shuffled, 4)
    for style, rows in build(shuffled, 4).table.items():
        np.testing.assert_array_equal(rows, trials.table[style])
    assert build(manifest, 5) != trials
    assert build(manifest.replace({"style": {"": None}}), 4) == trials  # absent, as CSV readers give it


def test_manifests_without_trials_are_refused(manifest):
    with pytest.raises(ValueError, match="no column style"):
        build_trials(manifest.drop(columns="style"), "toy", "test")
    with pytest.raises(ValueError, match="'toy', split 'val', has no clip with a style"):
        build_trials(manifest, "toy", "val")
    with pytest.raises(ValueError, match="only the style 'sad'"):
        build_trials(manifest[manifest["style"] == "sad"], "toy", "test")
    with pytest.raises(ValueError, match="'toy/test_0003' occurs twice"):
        build_trials(pd.concat([manifest, manifest.iloc[[3]]]), "toy", "test")


# Files ------------------------------------------------------------------------------------------------------


def test_save_and_load(trials, tmp_path):
    trials.save(tmp_path / "trials.json.gz")
    loaded = Trials.load(tmp_path / "trials.json.gz")
    assert loaded == trials
    assert (loaded.corpus, loaded.split, loaded.seed) == ("toy", "test", 4)
    assert list(loaded.table) == list(trials.table)
    trials.save(tmp_path / "again.json.gz")
    assert (tmp_path / "again.json.gz").read_bytes() == (tmp_path / "trials.json.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json.gz", "trials.json.gz"]


def test_a_file_can_be_read_by_eye(trials, tmp_path):
    trials.save(tmp_path / "trials.json.gz")
    content = json.loads(gzip.decompress((tmp_path / "trials.json.gz").read_bytes()))
    ids = [content["utterances"][position] for position in content["table"]["sad"][7]]
    assert ids == [trials.utterances[position] for position in trials.table["sad"][7]]


def test_a_file_that_was_cut_is_refused(trials, tmp_path):
    path = tmp_path / "trials.json.gz"
    trials.save(path)
    whole = path.read_bytes()
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="trials.json.gz is not a whole trials file"):
            Trials.load(path)
    with pytest.raises(FileNotFoundError):
        Trials.load(tmp_path / "absent.json.gz")


def swap_ids(content):
    content["utterances"][:2] = content["utterances"][1::-1]


def one_distractor(content):
    row = content["table"]["angry"][0]
    row[-1] -= 1


EDITS = {
    "a distractor": one_distractor,
    "ids swapped": swap_ids,
    "an id twice": lambda content: content["utterances"].__setitem__(0, content["utterances"][1]),
    "another seed": lambda content: content.update(seed=5),
    "another split": lambda content: content.update(split="train"),
    "a style renamed": lambda content: content["table"].update(calm=content["table"].pop("sad")),
    "a style left out": lambda content: content["table"].pop("sad"),
    "no table": lambda content: content.pop("table"),
    "a table that is a list": lambda content: content.update(table=[1, 2]),
    "a short row": lambda content: content["table"]["sad"][0].pop(),
    "a position past the end": lambda content: content["table"]["sad"][0].__setitem__(0, 62),
    "a negative position": lambda content: content["table"]["sad"][0].__setitem__(0, -1),
    "a huge position": lambda content: content["table"]["sad"][0].__setitem__(0, 2**40),
    "another format": lambda content: content.update(format="esr-trials-0"),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_file_that_was_edited_is_refused(trials, tmp_path, edit):
    path = tmp_path / "trials.json.gz"
    trials.save(path)
    content = json.loads(gzip.decompress(path.read_bytes()))
    edit(content)
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    with pytest.raises(ValueError, match="trials.json.gz is not a whole trials file"):
        Trials.load(path)


@pytest.mark.parametrize("content", [b"[]", b"{}", b"nonsense", b"\xff\xfe", b"null"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "trials.json.gz"
    for data in (content, gzip.compress(content)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="trials.json.gz is not a whole trials file"):
            Trials.load(path)


# What they measure ------------------------------------------------------------------------------------------


def test_scores_equal_a_naive_loop(trials):
    scores = random_scores(trials)
    values = trial_values(trials, scores).set_index("style")
    for style, rows in trials.table.items():
        for row, (_, found) in zip(rows[:60], values.loc[style].iterrows(), strict=False):
            drawn = scores[style][row]
            above, tied = (drawn > drawn[0]).sum(), (drawn == drawn[0]).sum() - 1
            ranks = np.arange(above + 1, above + tied + 2)
            assert found["utterance_id"] == trials.utterances[row[0]]
            assert [found[f"r@{k}"] for k in KS] == pytest.approx([np.mean(ranks <= k) for k in KS])
            assert found["map@10"] == pytest.approx(np.mean((ranks <= 10) / ranks))


def test_perfect_constant_and_inverted_scores(manifest, trials):
    style_of = manifest.set_index("utterance_id")["style"][list(trials.utterances)].to_numpy()
    perfect = {style: (style_of == style).astype(float) for style in trials.table}  # a one-hot encoder
    table = evaluate_trials(trials, perfect)
    numbers = ["r@1", "r@5", "r@10", "r@20", "map@10"]
    assert list(table.columns) == ["style", "n_trials", "n_candidates", *numbers]
    assert list(table["style"]) == ["angry", "happy", "sad"]
    assert (table["n_trials"] == 300).all() and (table["n_candidates"] == 26).all()
    assert (table[numbers] == 1).all(axis=None)
    constant = evaluate_trials(trials, {style: np.zeros(62) for style in trials.table})
    for k in KS:
        np.testing.assert_allclose(constant[f"r@{k}"], k / 26)
    np.testing.assert_allclose(constant["map@10"], sum(1 / r for r in range(1, 11)) / 26)
    inverted = evaluate_trials(trials, {style: -score for style, score in perfect.items()})
    assert (inverted[numbers] == 0).all(axis=None)  # rank 26 of 26


def test_sampled_trials_agree_with_the_closed_form(manifest):
    trials = build_trials(manifest, "toy", "test", n_trials=4000, n_distractors=25)
    style_of = manifest.set_index("utterance_id")["style"][list(trials.utterances)].to_numpy()
    scores = random_scores(trials, seed=1, distinct=40)
    values = trial_values(trials, scores)
    for style, sampled in values.groupby("style"):
        ranks = metrics.trial_rank_distribution(scores[style], style_of == style, 25)
        exact = [*metrics.recall_from_ranks(ranks, KS), metrics.reciprocal_rank_from_ranks(ranks)]
        sampled = sampled[["r@1", "r@5", "r@10", "r@20", "map@10"]]
        error = sampled.std() / 4000**0.5
        assert (error > 0).all()  # else the comparison below could not fail
        assert ((sampled.mean() - exact).abs() < 4.5 * error).all()


def test_results_by_an_attribute_of_the_clip_to_be_found(manifest, trials):
    is_female = manifest.set_index("utterance_id")["gender"][list(trials.utterances)].to_numpy() == "female"
    style_of = manifest.set_index("utterance_id")["style"][list(trials.utterances)].to_numpy()
    scores = {style: (style_of == style) & is_female for style in trials.table}  # finds women only
    values = trial_values(trials, {style: score.astype(float) for style, score in scores.items()})
    by_gender = values.merge(manifest, on="utterance_id").groupby("gender")["r@1"].mean()
    assert by_gender["female"] == 1 and by_gender["male"] == pytest.approx(1 / 26)


def test_scores_that_do_not_fit_are_refused(trials):
    scores = random_scores(trials)
    with pytest.raises(ValueError, match="no scores for style 'sad'"):
        evaluate_trials(trials, {style: scores[style] for style in ("angry", "happy")})
    with pytest.raises(ValueError, match=r"'sad' have shape \(61,\); the trials have 62"):
        evaluate_trials(trials, scores | {"sad": scores["sad"][:-1]})
    with pytest.raises(ValueError, match="NaN"):
        evaluate_trials(trials, scores | {"sad": np.full(62, np.nan)})
