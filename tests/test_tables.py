"""Tables: every number with its interval, differences that claim nothing, and files that others can read."""

from __future__ import annotations

import csv
import re

import pandas as pd
import pytest

from esr_utils import tables
from esr_utils.tables import Cell

RESULTS = {
    "esd/seen/r@1": 0.515, "esd/seen/r@1_ci95": [0.4, 0.625], "esd/seen/r@20": 1.0,
    "esd/seen/collection/p@10": 0.75, "esd/seen/gender=female/r@1": 0.5, "esd/seen/gender=female/clips": 12,
    "esd/seen/modality_gap": 0.5,
    "esd/zero_shot/accuracy": 0.25, "esd/zero_shot/accuracy_ci95": [0.2, 0.3],
    "esd/classifier/r@1": 0.9, "esd/classifier/accuracy": 0.8, "esd/classifier/accuracy_of_22": 0.7,
    "esd/control/chance/r@1": 0.0025,
    "esd/n_clips": 30, "esd/n_skipped": 1, "esd/n_candidates": 401, "esd/bootstrap": "speaker",
    "n_trials": 1000, "split": "test", "level": "recorded", "seed": 0, "seconds": 1.5,
}  # fmt: skip


def shown(table: pd.DataFrame) -> dict:
    return {name: {key: str(cell) for key, cell in row.items() if str(cell)} for name, row in table.T.items()}


def test_results_become_a_row_for_each_system():
    assert shown(tables.headline(RESULTS)) == {
        ("esd", "seen"): {"r@1": "0.52 [0.40, 0.62]", "r@20": "1.00", "accuracy": "0.25 [0.20, 0.30]"},
        ("esd", "classifier"): {"r@1": "0.90", "accuracy": "0.80"},
        ("esd", "chance"): {"r@1": "0.00"},
    }
    assert shown(tables.collection(RESULTS)) == {("esd", "seen"): {"p@10": "0.75"}}
    assert shown(tables.groups(RESULTS)) == {("esd", "gender=female", "seen"): {"clips": "12", "r@1": "0.50"}}
    protocol = tables.protocol(RESULTS)
    assert protocol.loc["esd"].to_dict() == {
        "n_clips": 30, "n_skipped": 1, "n_candidates": 401, "bootstrap": "speaker",
        "split": "test", "level": "recorded", "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (Cell(0.5), "0.50"),
        (Cell(0.8159, digits=4), "0.8159"),
        (Cell(0.5, (0.4, 0.6)), "0.50 [0.40, 0.60]"),
        (Cell(0.05, (0.01, 0.1), difference=True), "+0.05 [+0.01, +0.10]"),
        (Cell(-0.05, (-0.1, -0.01), difference=True), "-0.05 [-0.10, -0.01]"),
        (Cell(-0.05, (-0.1, 0.0), difference=True), "-0.05 [-0.10, +0.00] n.s."),
        (Cell(0.0, (0.0, 0.0), difference=True), "+0.00 [+0.00, +0.00] n.s."),
        (Cell(-0.001), "0.00"),
    ],
)
def test_a_cell_as_a_reader_sees_it(cell, expected):
    assert str(cell) == expected


# Files ------------------------------------------------------------------------------------------------------

HOSTILE = r"50 % of a_b & {c} #1 $x ~ ^ \ | <p> – ≥ τ"


@pytest.fixture
def table() -> pd.DataFrame:
    columns = pd.MultiIndex.from_tuples([("seeds", ""), ("esd", "R@1"), ("esd", "R@5"), ("my_corpus", "R@1")])
    rows = [
        ["0, 1", Cell(0.5, (0.4, 0.6)), Cell(0.9876, digits=4), Cell(-0.05, (-0.1, 0.02), difference=True)],
        ["", "", 0.25, ""],
    ]
    return pd.DataFrame(rows, pd.Index(["[bracket] first", HOSTILE], name="model_name"), columns)


def test_the_csv_holds_plain_numbers(table, tmp_path):
    written = tables.export(table, tmp_path / "new" / "t.v1")
    assert [path.name for path in written] == ["t.v1.csv", "t.v1.md", "t.v1.tex"]
    with written[0].open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "model_name": "[bracket] first", "seeds": "0, 1",
        "esd R@1": "0.5", "esd R@1 low": "0.4", "esd R@1 high": "0.6", "esd R@5": "0.9876",
        "my_corpus R@1": "-0.05", "my_corpus R@1 low": "-0.1", "my_corpus R@1 high": "0.02",
    }  # fmt: skip
    assert rows[1]["model_name"] == HOSTILE and rows[1]["esd R@1 low"] == "" and rows[1]["esd R@5"] == "0.25"


def test_the_markdown_is_a_table_with_as_many_cells_in_each_row(table, tmp_path):
    lines = tables.export(table, tmp_path / "t", "How it was made.")[1].read_text("utf-8").splitlines()
    assert lines[:2] == ["How it was made.", ""]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines[2:]]
    assert {len(row) for row in cells} == {5} and len(cells) == 4
    assert [cell.strip() for cell in cells[2]] == [
        "[bracket] first", "0, 1", "0.50 [0.40, 0.60]", "0.9876", "-0.05 [-0.10, +0.02] n.s.",
    ]  # fmt: skip
    assert cells[3][0].strip() == HOSTILE.replace("|", r"\|")


def test_the_latex_leaves_nothing_that_latex_takes_for_a_command(table, tmp_path):
    text = tables.export(table, tmp_path / "t", "100 % of my_runs & more")[2].read_text("utf-8")
    assert text.isascii()  # LaTeX's text fonts lack some of the rest
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 4  # two of the head
    for row in rows[1:]:
        bare = re.sub(r"\$(-|\\\w+)\$|\\[%&#$_{}]|\\text\w+\{\}|\{\[\}|\{\]\}", "", row.removesuffix(r" \\"))
        assert bare.count("&") == 4
        assert not re.search(r"[\\%#$_{}~^<>|\[\]]", bare), bare
    assert r"\caption{100 \% of my\_runs \& more}" in text
    assert r"\multicolumn{2}{c}{esd} & \multicolumn{1}{c}{my\_corpus} \\" in rows[0]
    assert r"\cmidrule(lr){3-4} \cmidrule(lr){5-5}" in text
    assert "$-$0.05 {[}$-$0.10, +0.02{]} n.s." in rows[2]
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\end{tabular}}", r"\end{table}"):
        assert text.count(rule) == 1
    assert text.count("{") == text.count("}")


def test_a_plain_table_is_exported_as_it_is_shown(tmp_path):
    table = pd.DataFrame({"styles": [7, 22], "train": [1.234, float("nan")]}, index=["esd", "Total"])
    table.index.name = "corpus"
    paths = tables.export(table, tmp_path / "t")
    assert paths[0].read_text().splitlines()[1] == "esd,7,1.234"
    assert paths[1].read_text().splitlines()[2:] == ["| esd | 7 | 1.23 |", "| Total | 22 |  |"]
    tables.export(table.iloc[:0], tmp_path / "empty")
    assert (tmp_path / "empty.md").read_text().startswith("| corpus | styles | train |")
