"""Systems side by side on captions: against an obvious loop, what counts as right, and what no table takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from esr_utils import (
    attributes,
    captions,
    embeddings_file,
    fusion_evaluation,
    fusion_systems,
    fusion_tables,
    runs,
    weights,
)
from esr_utils.config import FusionConfig, FusionTrainConfig
from esr_utils.embedding import frozen_frames, padded_frames
from esr_utils.fusion import FusionRetriever
from esr_utils.manifests import load_corpora, read_manifest, to_cuts, write_manifest

ASKED = ("bi-encoder", "masked", "rerank")

pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def captioned(manifest, cache):
    return captions.of_manifest(manifest, per_clip=3, cache=cache)


@pytest.fixture(scope="module")
def grid(manifest, captioned, cache, tiny_text, tiny_whisper, tmp_path_factory) -> dict:
    model = FusionConfig(speech_backbone=tiny_whisper, text_backbone=tiny_text, dim=16, heads=2)
    config = FusionTrainConfig(epochs=2, batch_size=6, learning_rate=3e-3)
    folder = tmp_path_factory.mktemp("grid")
    return fusion_systems.train_all(
        manifest, captioned, folder, model, config, (0, 1), ("CLAP", "FS-CLAP"), "", "cpu", cache
    )


@pytest.fixture(scope="module")
def sets(manifest, captioned):
    return fusion_evaluation.captioned_sets(manifest, captioned)


@pytest.fixture(scope="module")
def rows(grid, sets, cache):
    return fusion_evaluation.evaluate(grid, sets, ASKED, 4, "cpu", cache)


def test_what_is_right_for_a_caption(sets, captioned):
    (one,) = sets
    known = captioned.clips.set_index("utterance_id")
    told = captioned.table[captioned.table["grammar"] == "seen"]
    told = told[told["utterance_id"].isin(one.clips["utterance_id"])]
    for c, text in enumerate(one.captions.texts):
        for n, clip in enumerate(one.clips["utterance_id"]):
            right = False
            for _, row in told[told["caption"] == text].iterrows():
                named = {a: row[a] for a in ("gender", "pitch", "energy", "tempo", "style") if row[a]}
                right |= all(known.loc[clip, a] == value for a, value in named.items())
            assert one.captions.relevant[c, n] == right
    assert len(one.clips) == 18 and (one.captions.written_for.sum(0) == 1).all()
    assert all(one.captions.written_for[one.own[n], n] for n in range(18))


def test_scores_are_cosines_of_the_vectors_made_alone(rows, grid, sets, manifest, cache):
    (one,) = sets
    model = FusionRetriever.load(grid["FS-CLAP"][0] / "best")
    cuts = to_cuts(manifest[manifest["utterance_id"].isin(one.clips["utterance_id"])])
    kept = frozen_frames(model, cuts, "recorded", cache)
    by_id = dict(zip(kept.cut_ids, kept.frames, strict=True))
    with torch.no_grad():
        speech = torch.cat([model.encode_speech(padded_frames([by_id[i]])) for i in one.clips["utterance_id"]])
        scores = (model.encode_text(one.captions.texts) @ speech.T).numpy()
    expected = one.scorer.retrieval(scores).values
    (found,) = [row for row in rows if (row.system, row.protocol) == ("FS-CLAP", "masked")]
    for name in ("a2t/r@1", "t2a/map@10"):
        assert found.found[0].values[name] == pytest.approx(expected[name], abs=1e-6)


def test_rows_and_what_they_cost(rows, sets):
    assert [(row.system, row.protocol) for row in rows] == [
        ("CLAP", "bi-encoder"),
        *(("FS-CLAP", name) for name in ASKED),
    ]
    rerank = rows[-1]
    assert rerank.fusions == 4 * (len(sets[0].captions.texts) + 18)  # k for each caption, and for each clip
    assert rows[0].fusions == rows[1].fusions == 0 and rows[1].ceiling is None
    assert all(0 <= share <= 1 for share in rerank.ceiling.values())
    assert all(len(row.found) == 2 for row in rows)
    costs = fusion_tables.cost_table(rows)
    assert costs.loc[("mini", "FS-CLAP", "rerank"), "fusions"] == rerank.fusions


def test_a_run_has_no_row_by_a_protocol_that_it_was_not_trained_for(tmp_path):
    def asked(fusion: bool, **training) -> list[str]:
        config = FusionTrainConfig(**training)
        runs.write_json(tmp_path / "config.json", {"training": config.to_dict()})
        return fusion_evaluation._trained_for(tmp_path, FusionConfig(fusion=fusion), (*ASKED, "all-pairs", "matched"))

    assert asked(True) == [*ASKED, "all-pairs", "matched"]
    assert asked(True, bi_encoder=False, matching_weight=0.0) == ["masked", "matched"]
    assert asked(True, matching_weight=0.0) == ["bi-encoder", "masked", "matched"]
    assert asked(False) == ["bi-encoder", "matched"]


def test_no_rerank_exceeds_its_ceiling(rows):
    rerank = rows[-1]
    for direction in ("a2t", "t2a"):
        best = max(np.mean([one.values[f"{direction}/r@{k}"] for one in rerank.found]) for k in (1,))
        assert best <= rerank.ceiling[direction] + 1e-9


def test_a_cell_is_the_mean_over_the_seeds_within_its_interval(rows):
    for row in rows:
        cell = row.cell("t2a", "map@10")
        assert cell.value == pytest.approx(np.mean([one.values["t2a/map@10"] for one in row.found]))
        assert cell.interval[0] <= cell.value <= cell.interval[1]


def test_tables_have_the_papers_form_and_the_protocol(rows):
    one, two = fusion_tables.table_one(rows), fusion_tables.table_two(rows)
    assert list(one.columns) == [f"{d} R@{k}" for d in ("a2t", "t2a") for k in (1, 5, 10)]
    assert list(two.columns) == ["a2t mAP@10", "t2a mAP@10"]
    assert ("mini", "FS-CLAP", "rerank") in one.index and one.index.names[-1] == "protocol"
    others = [index for index in one.index if index[1] in embeddings_file.SYSTEMS]
    assert len(others) == 4 and all("systems/embed.py" in index[2] for index in others)
    three = fusion_tables.table_three(rows, fusion_systems.TABLE_THREE)
    assert list(three.columns) == ["a2t mAP@10", "a2t R@1", "t2a mAP@10", "t2a R@1"] and len(three) == 4


def test_the_papers_rows_stand_beside_ours_on_its_corpora(rows):
    table = fusion_tables.table_two([replace(row, corpus="textrolspeech") for row in rows])
    assert table.loc[("textrolspeech", "FS-CLAP (paper)", "not stated"), "t2a mAP@10"].value == pytest.approx(0.448)
    assert not [index for index in table.index if index[0] == "zhvoice"]


def test_differences_are_paired_and_of_the_reference(rows, sets):
    table = fusion_tables.differences(rows, sets, "CLAP")
    assert set(table["system"]) == {"FS-CLAP"} and len(table) == 3 * 2 * 4
    row = table[(table["protocol"] == "masked") & (table["direction"] == "t2a") & (table["metric"] == "r@1")].iloc[0]
    ours, theirs = (np.mean([f.values["t2a/r@1"] for f in rows[i].found]) for i in (2, 0))
    assert row["difference"].value == pytest.approx(ours - theirs) and 0 <= row["p"] <= 1
    assert fusion_tables.wide(table).shape == (3, 8)
    with pytest.raises(ValueError, match="no row of system 'BERT'"):
        fusion_tables.differences(rows, sets, "BERT")


def test_leaky_rows_are_in_no_table_of_results(rows, grid, sets, cache):
    leaky = fusion_evaluation.evaluate({"FS-CLAP": grid["FS-CLAP"]}, sets, ("matched",), 4, "cpu", cache)
    for table in (fusion_tables.table_one, fusion_tables.table_two):
        with pytest.raises(ValueError, match="fuses each clip with its own caption"):
            table([*rows, *leaky])
    with pytest.raises(ValueError, match="fuses each clip with its own caption"):
        fusion_tables.differences([*rows, *leaky], sets, "CLAP")
    shown = fusion_tables.leak_table([*rows, *leaky])
    assert shown.loc[("mini", "FS-CLAP", "matched"), "leaky"] == "LEAKY: diagnosis only"
    with pytest.raises(ValueError, match="fuses each clip with its own caption"):
        fusion_tables.write_results(grid, leaky)
    assert leaky[0].fusions == 18 and leaky[0].gap is None and "CLAP" not in shown.index.get_level_values("system")


def test_results_are_written_flat_into_each_run(rows, grid):
    fusion_tables.write_results(grid, rows, split="test", k=4)
    found = runs.read_json(grid["FS-CLAP"][1] / "results.json")
    assert found["mini/masked/t2a/r@1"] == rows[2].found[1].values["t2a/r@1"]
    assert len(found["mini/rerank/a2t/map@10_ci95"]) == 2 and "mini/matched/t2a/r@1" not in found
    assert (found["split"], found["k"], found["level"]) == ("test", 4, "recorded")


def test_a_system_that_lives_elsewhere_enters_by_its_file(sets, tmp_path):
    (one,) = sets
    rng = np.random.default_rng(0)
    file = embeddings_file.EmbeddingsFile(
        "clap-microsoft", "2023", "MIT", "recorded", one.clips["utterance_id"].tolist(), one.captions.texts,
        rng.normal(size=(len(one.clips), 4)).astype(np.float32),
        rng.normal(size=(len(one.captions.texts), 4)).astype(np.float32),
    )  # fmt: skip
    file.write(tmp_path / "clap-microsoft")
    (row,) = fusion_evaluation.from_folder(tmp_path, sets, "recorded")
    assert (row.system, row.protocol, row.corpus) == ("clap-microsoft", "bi-encoder", "mini")
    table = fusion_tables.table_one([row])
    assert len([index for index in table.index if "systems/embed.py" in index[2]]) == 3
    assert fusion_evaluation.from_folder("", sets, "recorded") == []
    with pytest.raises(embeddings_file.EmbeddingsFileError, match="heard the level recorded, the others normalised"):
        fusion_evaluation.from_folder(tmp_path, sets, "normalised")
    with pytest.raises(FileNotFoundError, match="embeddings: there is no folder"):
        fusion_evaluation.from_folder(tmp_path / "nothing", sets, "recorded")


def test_a_clip_past_30_s_is_its_windows_one_after_another(own_corpus, grid, cache, tmp_path):
    clip = own_corpus.iloc[[0]].copy()
    audio, rate = soundfile.read(f"{clip['root'].iloc[0]}/{clip['path'].iloc[0]}")
    long = np.tile(audio, int(35 * rate / len(audio)) + 1)[: 35 * rate]
    soundfile.write(tmp_path / "mini" / "long.wav", long, rate)
    clip = clip.assign(path="long.wav", duration_s=35.0)
    model = FusionRetriever.load(grid["CLAP"][0] / "best")
    (frames,) = fusion_evaluation.clip_frames(model, clip, "recorded", cache)
    assert abs(frames.shape[1] - 35 * 50 / 4) <= 6


def test_a_clip_that_cannot_be_used_is_named(own_corpus, grid, cache):
    clip = own_corpus.iloc[[0]]
    clip = clip.assign(path="silent.wav")
    soundfile.write(f"{clip['root'].iloc[0]}/silent.wav", np.zeros(int(clip["duration_s"].iloc[0] * 16_000)), 16_000)
    model = FusionRetriever.load(grid["CLAP"][0] / "best")
    with pytest.raises(ValueError, match=f"1 clips cannot be used .{clip['utterance_id'].iloc[0]}"):
        fusion_evaluation.clip_frames(model, clip, "recorded", cache)


def spoil(clip: pd.Series, value: float) -> None:
    """Puts samples of one value in a clip's place."""
    samples = np.full(round(clip["duration_s"] * 16_000), value, np.float32)
    soundfile.write(f"{clip['root']}/{clip['path']}", samples, 16_000, format="WAV", subtype="FLOAT")


def test_clips_that_cannot_be_heard_are_left_out_for_all_systems_alike(grid, own_corpus, captioned, cache):
    test, train = (own_corpus[own_corpus["split"] == name] for name in ("test", "train"))
    for clip, value in ((test.iloc[0], 0), (test.iloc[1], np.nan), (train.iloc[0], 0)):
        spoil(clip, value)
    heard, left_out = fusion_evaluation.usable(own_corpus)
    reasons = left_out.set_index("utterance_id")["reason"]
    assert set(reasons.index) == {*test["utterance_id"].iloc[:2], train["utterance_id"].iloc[0]}
    assert reasons[test["utterance_id"].iloc[1]] == "has NaN or infinite samples"
    pd.testing.assert_frame_equal(heard, own_corpus[~own_corpus["utterance_id"].isin(reasons.index)])
    (one,) = fusion_evaluation.captioned_sets(heard, captioned)
    rows = fusion_evaluation.evaluate(grid, [one], ("masked",), 4, "cpu", cache)
    assert len(one.clips) == 16 and {row.found[0].values["a2t/n_queries"] for row in rows} == {16}


def test_a_corpus_of_which_nothing_can_be_heard_is_named(own_corpus, manifest):
    for _, clip in own_corpus[own_corpus["split"] == "test"].iterrows():
        spoil(clip, 0)
    other = own_corpus.assign(corpus="other", utterance_id="other/" + own_corpus["utterance_id"])
    with pytest.raises(ValueError, match="none of the 18 test clips of other can be used: silent: below -70 dBFS RMS"):
        fusion_evaluation.usable(pd.concat([manifest, other]))
    assert len(fusion_evaluation.usable(own_corpus, "train")[0]) == 15


def test_a_corpus_without_a_train_split_takes_the_grids_thresholds(grid, captioned, own_corpus, tmp_path):
    saved = grid["CLAP"][0].parents[1] / "thresholds.json"  # written by the training
    assert attributes.Thresholds.load(saved) == captioned.thresholds
    only = tmp_path / "mini" / "test_only.csv"
    rows = read_manifest(tmp_path / "mini" / "manifest.csv")
    write_manifest(rows[rows["split"] == "test"], only)
    clips, told = fusion_systems.clips_of_grid(grid, manifest=str(only))
    assert set(clips["split"]) == {"test"}
    found = told.clips.set_index("utterance_id")
    expected = captioned.clips[captioned.clips["split"] == "test"].set_index("utterance_id").loc[found.index]
    assert (found["pitch"] == expected["pitch"]).all() and (found["pitch"] != "").any()


def test_a_corpus_that_no_thresholds_are_of_is_refused(grid, own_corpus, tmp_path):
    rows = read_manifest(tmp_path / "mini" / "manifest.csv")
    other = rows.assign(corpus="other", utterance_id="other/" + rows["utterance_id"].str.removeprefix("mini/"))
    for name, unknown in (("test only", other[other["split"] == "test"]), ("beside another", rows)):
        csv = tmp_path / "mini" / f"{name}.csv"
        write_manifest(pd.concat([unknown, other[other["split"] == "test"]]).drop_duplicates(), csv)
        with pytest.raises(
            ValueError, match=r"^other: no train clips .* no thresholds of other .*: give a manifest with"
        ):
            fusion_systems.clips_of_grid(grid, manifest=str(csv))
    told = tmp_path / "mini" / "told.csv"
    write_manifest(other[other["split"] == "test"].assign(caption="A voice."), told)
    assert fusion_systems.clips_of_grid(grid, manifest=str(told))[1].thresholds is None  # its captions are its own


@pytest.fixture
def default_run(tmp_path, monkeypatch):
    """Writes runs of the default grid's folder; `asked` has the trainings that `load_grid` starts."""
    monkeypatch.setattr(fusion_systems.runs, "RUNS", tmp_path)
    monkeypatch.setattr(fusion_systems, "load_corpora", lambda corpora: None)
    monkeypatch.setattr(fusion_systems, "of_manifest", lambda manifest: None)

    def write(system: str, finished: bool | None = None, corpora: str = "demo", seed: int = 0, **changes) -> None:
        folder = fusion_systems.folder_of("fsclap", system, seed)
        model, config = fusion_systems._settings(system, seed, FusionConfig(), FusionTrainConfig(**changes))
        about = {"corpora": [corpora], "model": model.to_dict(), "training": config.to_dict()}
        runs.write_json(folder / "config.json", about)
        if finished is not None:
            runs.write_json(folder / "resume.json", {"finished": finished})

    write.asked = []
    monkeypatch.setattr(fusion_systems, "train_all", lambda *given, **more: write.asked.append(given[2]))
    return write


def loaded() -> list[str]:
    try:
        return list(fusion_systems.load_grid())
    except weights.WeightsError:
        return []


def test_a_default_grid_that_was_interrupted_is_trained_to_its_end(default_run):
    assert loaded() == [] and len(default_run.asked) == 1  # nothing there
    default_run("CLAP")
    assert loaded() == [] and len(default_run.asked) == 2  # in the first epoch
    default_run("CLAP", True)
    default_run("RA-CLAP", False, seed=1)
    assert loaded() == ["CLAP"] and len(default_run.asked) == 3
    default_run("RA-CLAP", True, seed=1)
    assert loaded() == ["CLAP", "RA-CLAP"] and len(default_run.asked) == 3


@pytest.mark.parametrize("other", [{"corpora": "ravdess"}, {"epochs": 3}, {"batch_size": 8}])
def test_a_grid_of_other_settings_in_the_default_folder_is_left_alone(default_run, other):
    default_run("FS-CLAP", True, **other)
    default_run("FS-CLAP-M", False, **other)
    assert loaded() == ["FS-CLAP"] and not default_run.asked


def test_the_space_of_each_system(grid, sets, cache):
    (one,) = sets
    spaces = fusion_evaluation.joint_spaces(grid, one, "cpu", cache)
    assert [title.split(",")[0] for title in spaces] == ["CLAP", "FS-CLAP"]
    for vectors, about in spaces.values():
        assert len(vectors) == len(about) == 18 + len(one.captions.texts)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_each_way_has_its_own_modality_gap(rows):
    gaps = {(row.system, row.protocol): row.gap for row in rows}
    assert gaps["FS-CLAP", "rerank"] is None and gaps["FS-CLAP", "masked"] != gaps["FS-CLAP", "bi-encoder"]


def test_a_share_of_all_has_an_interval(rows):
    found = replace(rows[0], found=rows[0].found[:1])
    one = found.found[0]
    all_found = replace(one, values=one.values | {"t2a/r@1": 1.0}, replicates=one.replicates | {"t2a/r@1": np.ones(9)})
    cell = replace(found, found=(all_found,)).cell("t2a", "r@1")
    assert cell.interval[1] == 1 and 0.5 < cell.interval[0] < 1


def test_protocols_that_there_are_not_and_systems_without_fusion(grid, sets, cache):
    with pytest.raises(ValueError, match="protocol reranked: there are bi-encoder"):
        fusion_evaluation.evaluate(grid, sets, ("reranked",), 4, "cpu", cache)
    (row,) = fusion_evaluation.evaluate({"CLAP": grid["CLAP"]}, sets, ("masked", "rerank"), 4, "cpu", cache)
    assert row.protocol == "bi-encoder"


def test_a_corpus_without_styles_is_mapped_too(grid, sets, cache):
    one = replace(sets[0], clips=sets[0].clips.assign(style=""))
    ((vectors, about),) = fusion_evaluation.joint_spaces({"CLAP": grid["CLAP"]}, one, "cpu", cache).values()
    assert set(about["style"]) == {""} and len(vectors) == len(about)


def test_a_split_without_captions_is_refused(manifest, captioned):
    nothing = captions.Captioned(captioned.table.head(0), captioned.clips, None, captioned.left_out)
    with pytest.raises(ValueError, match="no clip of split 'test' has a caption of grammar 'seen'"):
        fusion_evaluation.captioned_sets(manifest, nothing)


def test_a_corpus_with_captions_of_its_own(data_root, tmp_path, cache, manifest):
    own = manifest.assign(caption="The voice number " + manifest["speaker"].astype("category").cat.codes.astype(str))
    told = captions.of_manifest(own, cache=cache)
    assert set(told.table["grammar"]) == {"free"} and told.thresholds is None
    (one,) = fusion_evaluation.captioned_sets(own, told)
    assert len(one.captions.texts) == 3 and (one.captions.relevant.sum(1) == 6).all()


def test_a_grid_that_is_not_there(tmp_path):
    with pytest.raises(weights.WeightsError, match="holds no finished system: run notebook 08_fsclap_train"):
        fusion_systems.load_grid(tmp_path / "nothing")


def test_a_grid_is_read_back(grid, data_root, monkeypatch):
    folder = grid["CLAP"][0].parents[1]
    assert list(fusion_systems.load_grid(folder, ["FS-CLAP"])) == ["FS-CLAP"]
    with pytest.raises(weights.WeightsError, match="holds no MGA-CLAP; it holds CLAP, FS-CLAP"):
        fusion_systems.load_grid(folder, ["MGA-CLAP"])
    assert fusion_systems.load_grid(folder) == {"CLAP": grid["CLAP"], "FS-CLAP": grid["FS-CLAP"]}
    monkeypatch.setenv("ESR_DATA", str(data_root))
    clips, told = fusion_systems.clips_of_grid(grid)
    pd.testing.assert_frame_equal(clips, load_corpora("mini", data_root))
    assert fusion_systems.summary(grid).shape[0] == 4 and len(told.table)
