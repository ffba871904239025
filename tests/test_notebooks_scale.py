"""Notebook 12, headless, in small: of recordings with one that is none."""

import shutil

import pytest
from notebook_runs import execute

from esr_utils.index_table import IndexTable

pytest.importorskip("ray", reason="Ray is not installed: pip install -r requirements-scale.txt")


def test_scale_notebook_fills_an_index_and_compares_it(tmp_path, data_root, manifest, tiny_run):
    shutil.copytree(data_root / "mini", tmp_path / "mine")
    (tmp_path / "mine" / "broken.wav").write_text("no audio")
    options = {"recordings": str(tmp_path / "mine"), "index": str(tmp_path / "index"), "run": str(tiny_run)}
    shown = execute("12_scale_out", tmp_path, **options, sample=5)
    files = IndexTable.open_named(tmp_path / "index").files()
    assert len(files) == len(manifest) + 1 and files["moments"].sum() >= 25
    assert "broken.wav" in shown and "max |1 - cosine|" in shown
    assert "hours an hour" in shown and "percentile" in shown
