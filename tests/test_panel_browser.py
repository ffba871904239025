"""The panel as somebody uses it: notebook 11 in JupyterLab, in a headless Chromium of the system."""

from __future__ import annotations

import importlib.util

import pytest

from esr_utils import recordings, runs
from esr_utils.cards import file_name
from esr_utils.index import build

playwright = pytest.importorskip("playwright", reason="playwright, which drives the browser, is not installed")

QUERY, OTHER = "Someone whispering, half asleep", "an angry man, shouting at me"
N = 20


@pytest.fixture(scope="module")
def lab():
    """benchmarks/panel.py, which measures the same page."""
    spec = importlib.util.spec_from_file_location("lab", runs.PROJECT / "benchmarks" / "panel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_sentence_is_typed_and_its_results_are_seen_and_heard(lab, tmp_path, manifest, tiny_run):
    if (chromium := lab.find_chromium()) is None:
        pytest.skip("there is no Chromium on this system (apt install chromium)")
    model, level, _ = recordings.load_retriever(tiny_run)
    index, _ = build(model, manifest, tmp_path / "index", level, cache=None)
    expected = [[file_name(key) for key in index.search(query, N)["file"]] for query in (QUERY, OTHER)]
    assert expected[0] != expected[1]
    lab.prepare(tmp_path, query=QUERY, index=str(tmp_path / "index"), run=str(tiny_run), k=N)
    with lab.jupyter_lab(tmp_path) as url, lab.browser_page(chromium) as page:
        dialogs = []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        lab.run_notebook(page, url)
        names = page.locator(".esr-panel .esr-file")
        assert names.all_text_contents() == expected[0]
        lab.search(page, OTHER, N)
        assert names.all_text_contents() == expected[1]
        assert page.locator(".esr-panel .esr-wave").count() == N

        player = page.locator(".esr-panel audio").first
        player.focus()
        player.press("Space")
        page.wait_for_function("audio => audio.currentTime > 0.2 || audio.ended", arg=player.element_handle())

        page.locator(".esr-panel .esr-like").nth(2).press("Enter")  # by the keyboard: more like the third
        page.locator(".esr-panel [role=status]", has_text=f"like “{expected[1][2]}").wait_for()
        assert expected[1][2] not in names.all_text_contents()
        assert not dialogs
