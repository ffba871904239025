"""Figures: what is drawn, read back from the axes, and the files they are written to."""

from __future__ import annotations

import errno

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from esr_utils import plots
from esr_utils.comparison import DURATION_BINS
from esr_utils.styles import STYLES
from esr_utils.tables import Cell


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def durations(models=("a", "b"), corpora=("demo",)) -> pd.DataFrame:
    """Bins of 30 and 5 clips, then none."""
    rows = {}
    for corpus in corpora:
        for m, model in enumerate(models):
            for i, name in enumerate(DURATION_BINS):
                value = 0.5 + 0.1 * m
                cell = Cell(value, (value - 0.2, value + 0.1)) if i < 2 else ""
                rows[corpus, model, name] = {"clips": (30, 5, 0, 0, 0)[i], "trials": 10, "R@1": cell, "R@5": cell}
    index = pd.MultiIndex.from_tuples(rows, names=["corpus", "model", "duration"])
    return pd.DataFrame(list(rows.values()), index)


def test_bars_by_duration_show_values_intervals_clips_and_empty_bins():
    figure = plots.recall_by_duration(durations(), {"demo": "1-in-401"})
    first, second = figure.axes
    assert [first.get_title(), second.get_title()] == ["demo: R@1, 1-in-401", "demo: R@5, 1-in-401"]
    assert [bar.get_height() for bar in first.patches] == pytest.approx([0.5, 0.5, 0.6, 0.6])
    np.testing.assert_allclose(first.collections[0].get_segments()[0][:, 1], [0.3, 0.6])
    labels = [label.get_text() for label in first.get_xticklabels()]
    assert labels[0] == "< 4 s\nn = 30" and labels[4] == "> 10 s\nn = 0"
    assert [(text.get_text(), text.get_position()[0]) for text in first.texts] == [("no clips", i) for i in (2, 3, 4)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    overlap = [bar.get_x() + bar.get_width() for bar in first.patches[:2]]
    assert all(bar.get_x() >= end for bar, end in zip(first.patches[2:], overlap, strict=True))


def test_a_corpus_is_a_row_of_panels():
    figure = plots.recall_by_duration(
        durations(("a",), ("demo", "esd")), {"demo": "1-in-401", "esd": "1-in-9 to 1-in-12"}
    )
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"demo: R@{k}, 1-in-401" for k in (1, 5)] + [f"esd: R@{k}, 1-in-9 to 1-in-12" for k in (1, 5)]


def test_maps_side_by_side_share_their_colours():
    rng = np.random.default_rng(0)
    about = pd.DataFrame({"style": ["awe", "sad"] * 6, "modality": ["speech"] * 8 + ["text"] * 4})
    joint = {name: (rng.standard_normal((12, 4)), about.copy()) for name in ("with_d", "without_d")}
    joint["with_d"][1].attrs["checkpoint"] = "epoch 9 of 40"
    figure = plots.joint_maps(joint, "tsne")
    assert [axis.get_title() for axis in figure.axes] == [
        "with-d, t-SNE\nepoch 9 of 40\n8 dots: speech, 4 crosses: text",
        "without-d, t-SNE\n8 dots: speech, 4 crosses: text",
    ]
    for axis in figure.axes:
        dots, crosses = axis.collections
        assert len(dots.get_offsets()) == 8 and len(crosses.get_offsets()) == 4
        np.testing.assert_allclose(dots.get_facecolors()[0, :3], plots.COLOURS["awe"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["awe", "sad"]
    points = plots.project_2d(joint["with_d"][0], "tsne")
    alone = plots.joint_map(points, list(about["style"]), list(about["modality"]), "x")
    np.testing.assert_allclose(alone.axes[0].collections[0].get_offsets(), figure.axes[0].collections[0].get_offsets())


def test_a_confusion_matrix_names_shares_in_percent():
    counts = pd.DataFrame([[3, 1.0], [0, 0]], index=["awe", "sad"], columns=["awe", "sad"])
    axis = plots.confusion(counts, "t").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["awe (4)", "sad (0)"]
    assert [text.get_text() for text in axis.texts] == ["75", "25", "", ""]


def test_recall_per_style_has_a_bar_for_each_system():
    rows = [
        {"style": s, "system": system, "corpus": "demo", "n_candidates": 41, "clips": 20 + i}
        | {"r@10": 0.1 * i, "r@10 low": 0.0, "r@10 high": 0.6}
        for i, s in enumerate(STYLES[:4])
        for system in ("seen", "held_out", "classifier")
    ]
    figure = plots.recall_by_style(pd.DataFrame(rows))
    (axis,) = figure.axes
    assert axis.get_title() == "demo: R@10 per style, 1-in-41"
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([0.0, 0.1, 0.2, 0.3] * 3)
    np.testing.assert_allclose([line[:, 1] for c in axis.collections for line in c.get_segments()], [[0.0, 0.6]] * 12)
    assert [label.get_text() for label in axis.get_xticklabels()][1] == f"{STYLES[1]} (21)"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "seen prompts", "held-out prompts", "style classifier",
    ]  # fmt: skip


def test_losses_over_stages_of_which_some_are_short():
    stages = ["classify"] * 5 + ["align"] * 5 + ["adversarial"] * 100
    lines = [
        {"epoch": i + 1, "stage": stage, "train_classification": 1.0, "val_classification": 2.0}
        | ({"train_contrastive": 3.0} if stage != "classify" else {})
        for i, stage in enumerate(stages)
    ]
    figure = plots.training_curves(lines)
    assert [axis.get_title() for axis in figure.axes] == ["classification", "contrastive"]
    assert [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches] == [(0.5, 5), (5.5, 5), (10.5, 100)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["classify", "align", "adversarial"]
    assert len(figure.axes[0].lines) == 2 and len(figure.axes[1].lines) == 1


def test_a_figure_is_written_as_png_and_svg_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        figure, axis = plt.subplots()
        axis.plot([0, 1], [0, 1])
        assert plots.save_figure(figure, tmp_path / name / "f.v1.png") == tmp_path / name / "f.v1.png"
    assert (tmp_path / "a" / "f.v1.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "a" / "f.v1.svg").read_bytes()
    assert b"<svg" in svg and svg == (tmp_path / "b" / "f.v1.svg").read_bytes()


def test_a_figure_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    figure, _ = plt.subplots()
    plots.save_figure(figure, tmp_path / "f.png")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, **_):
        path.write_bytes(b"half a figure")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        plots.save_figure(figure, tmp_path / "f.png")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def mined() -> pd.DataFrame:
    """Four clips of two speakers, one left out; one after the first five minutes."""
    rows = [(1.0, 3.0, "x-0", 0.9, ""), (4.0, 5.0, "x-1", 0.5, "unlike"), (6.0, 8.0, "x-0", 0.8, "")]
    rows.append((400.0, 402.0, "x-7", np.nan, ""))
    return pd.DataFrame(rows, columns=["start_s", "end_s", "speaker", "similarity", "left_out"])


def test_similarities_are_counted_and_the_threshold_is_drawn():
    (axis,) = plots.similarities(mined(), 0.65).axes
    assert sum(bar.get_height() for bar in axis.patches) == 3
    assert axis.lines[0].get_xdata() == [0.65, 0.65]
    assert axis.get_title() == "3 clips, 1 below the threshold; not shown: 1, too short or alone"
    assert axis.get_legend().get_texts()[0].get_text() == "threshold 0.65 (mean cosine 0.30)"


def test_a_timeline_has_a_row_a_speaker_and_the_true_ones_colours():
    figure = plots.timeline(mined(), ["ana", "ben", "ana", "ben"])
    (axis,) = figure.axes
    boxes = [collection.get_paths()[0].get_extents() for collection in axis.collections]
    assert [(box.x0, box.x1, (box.y0 + box.y1) / 2) for box in boxes] == [(1, 3, 0), (4, 5, 1), (6, 8, 0)]
    assert [collection.get_alpha() for collection in axis.collections] == [1, 0.3, 1]
    colours = [tuple(collection.get_facecolor()[0][:3]) for collection in axis.collections]
    assert colours[0] == colours[2] != colours[1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ana", "ben"]
    assert not plots.timeline(mined()).legends


def test_a_file_without_clips_has_its_figures_too():
    none = mined().head(0)
    assert not plots.timeline(none, []).axes[0].collections
    assert plots.similarities(none, 0.65).axes[0].get_title().startswith("0 clips")


def test_a_map_leaves_the_number_of_threads_as_it_was():
    """numba raises it; what torch computes after that was twenty times slower where one thread was asked for."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        plots.project_2d(np.random.default_rng(0).normal(size=(40, 8)), "umap")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
