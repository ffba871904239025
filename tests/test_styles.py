"""The 22 styles and the corpora's labels."""

from __future__ import annotations

from esr_utils.styles import CORPUS_STYLES, STYLES, style_table


def test_there_are_22_styles_in_alphabetical_order():
    assert len(STYLES) == 22
    assert list(STYLES) == sorted(set(STYLES))


def test_every_corpus_label_leads_to_a_known_style():
    table = style_table()
    assert set(table["style"]) <= set(STYLES)
    assert len(table) == sum(len(labels) for labels in CORPUS_STYLES.values())
    sizes = {"demo": 22, "iemocap": 9, "esd": 5, "expresso": 19, "ravdess": 8, "emodb": 7, "nemo": 6}
    assert table.groupby("corpus").size().to_dict() == sizes
    assert not table.duplicated(["corpus", "style"]).any()  # no corpus of these has two labels for one style


def test_labels_that_are_spelled_unlike_their_style():
    assert CORPUS_STYLES["ravdess"]["disgust"] == "disgusted"
    assert CORPUS_STYLES["emodb"]["anxiety/fear"] == "fearful"
    assert CORPUS_STYLES["nemo"]["sadness"] == "sad"
