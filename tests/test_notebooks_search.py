"""Notebook 11, headless: an index is made and searched; what is seen without a kernel. The rest is in test_panel."""

import nbformat
import pytest
import soundfile
from notebook_runs import execute

from esr_utils.cards import file_name
from esr_utils.index import Index
from esr_utils.recordings import load_retriever

RATE = 16_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory, speech):
    root = tmp_path_factory.mktemp("notebooks")
    (root / "recordings").mkdir()
    (root / "recordings" / "<b>broken.wav").write_text("no audio")
    for i in range(3):
        soundfile.write(root / "recordings" / f"part {i}.wav", speech[8 * i * RATE : 8 * (i + 1) * RATE], RATE)
    return root


def test_recordings_are_indexed_and_the_first_results_can_be_heard_without_a_kernel(folder, tiny_run):
    where = {"index": str(folder / "index"), "recordings": str(folder / "recordings")}
    execute("11_search", folder, **where, run=str(tiny_run), query="a calm voice", k=4)
    index = Index.open(folder / "index", load_retriever(tiny_run)[0])
    expected = index.search("a calm voice", 4)
    assert len(expected) == 4 and len(index.files()) == 4
    cells = nbformat.read(folder / "11_search.ipynb", as_version=4).cells
    notes, listed, panel = (
        output.data for cell in cells for output in cell.get("outputs", []) if "text/html" in output.get("data", {})
    )
    for told in ("&lt;b&gt;broken.wav", "is no audio that ffmpeg can decode (damaged, protected or of another kind)"):
        assert told in notes["text/html"]
    for page in (listed["text/html"], panel["text/html"]):
        assert page.count("<audio controls") == 4 and all(file_name(key) in page for key in expected["file"])
    assert panel["text/html"].count('class="esr-wave"') == 4 and "for “a calm voice”" in panel["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in panel
