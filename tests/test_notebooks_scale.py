"""Notebook 12, headless, in small: of recordings with one that is none, and of a corpus."""

import shutil

import pytest
from notebook_runs import execute

from esr_utils.index_table import IndexTable

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-scale.txt")


@pytest.mark.parametrize("source", ["recordings", "corpora"])
def test_scale_notebook_fills_an_index_and_compares_it(source, tmp_path, data_root, manifest, tiny_run):
    options = {"corpora": "mini", "data_root": str(data_root)}
    if source == "recordings":
        shutil.copytree(data_root / "mini", tmp_path / "mine")
        (tmp_path / "mine" / "broken.wav").write_text("no audio")
        options = {"recordings": str(tmp_path / "mine")}
    shown = execute("12_scale_out", tmp_path, **options, index=str(tmp_path / "index"), run=str(tiny_run), sample=5)
    files = IndexTable.open_named(tmp_path / "index").files()
    assert len(files) == len(manifest) + (source == "recordings") and files["moments"].sum() >= 25
    assert ("broken.wav" in shown) == (source == "recordings")
    assert ("Every file could be used" in shown) == (source == "corpora")
    assert "max |1 - cosine|" in shown and "hours an hour" in shown and "percentile" in shown
