"""The search panel and its cards, without a browser: what is found, filtered, shown, played and said."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
import pytest
import soundfile

from esr_utils import cards, recordings
from esr_utils.audio_folder import absolute_key, absolute_path
from esr_utils.index import Index, build
from esr_utils.panel import ANY, Panel

QUERY, OTHER = "Someone whispering, half asleep", "an angry man, shouting at me"
HOSTILE = "<img src=x onerror=alert(1)>"
RATE, K = 16_000, 5


@pytest.fixture(scope="module")
def index(_tiny_model, manifest) -> Index:
    """Of the clips of "mini". Do not change it; `own` is one that belongs to a test."""
    return build(_tiny_model, manifest, cache=None)[0]


@pytest.fixture
def own(tiny_model, own_corpus, tmp_path) -> Index:
    return build(tiny_model, own_corpus, tmp_path / "index", cache=None)[0]


@pytest.fixture
def panel(index) -> Panel:
    return Panel(index, QUERY, K)


def text_of(value: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<style>.*?</style>|<[^>]*>", " ", value, flags=re.S)).strip()


def shown(panel: Panel) -> list[str]:
    """The cards that can be seen."""
    visible = [box.layout.display != "none" for box in panel.boxes]
    assert visible == [bool(slot.value) for slot in panel.slots]
    return [slot.value for slot in panel.slots if slot.value]


def check(panel: Panel, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(panel.hits.reset_index(drop=True), expected)
    found = shown(panel)
    assert len(found) == len(expected)
    for card, hit in zip(found, expected.to_dict("records"), strict=True):
        name, share = Path(hit["file"]).name, f"{100 * hit['percentile']:.1f} %"
        assert f"{hit['rank']} {name} whole file {hit['score']:.2f} above {share}" in text_of(card)


def samples_of(card: str) -> np.ndarray:
    (sound,) = re.findall(r'src="data:audio/flac;base64,([^"]+)"', card)
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(sound)), dtype="float32")
    assert rate == RATE
    return samples


def message(panel: Panel) -> str:
    return text_of(panel.message.value).replace("&quot;", '"').replace("&#x27;", "'")


# Searching --------------------------------------------------------------------------------------------------


def test_the_first_results_are_there_and_a_new_sentence_brings_others(panel, index):
    check(panel, index.search(QUERY, K))
    assert message(panel) == f"Results 1–{K} for “{QUERY}”"
    panel.query.value = OTHER
    check(panel, index.search(OTHER, K))
    panel.minus.value = "calm"
    check(panel, index.search(OTHER, K, minus="calm"))
    assert message(panel) == f"Results 1–{K} for “{OTHER}”, not “calm”"


def test_without_a_sentence_it_says_what_to_do(index):
    panel = Panel(index)
    assert "press Enter" in message(panel) and shown(panel) == []
    panel.query.value = QUERY
    check(panel, index.search(QUERY, 20))


def test_pages_follow_each_other(panel, index):
    pages = [panel.hits]
    assert panel.before.disabled
    while not panel.after.disabled:
        panel.after.click()
        pages.append(panel.hits)
    everything = index.search(QUERY, 1000)
    assert len(pages) == -(-len(everything) // K)
    pd.testing.assert_frame_equal(pd.concat(pages, ignore_index=True), everything)
    panel.before.click()
    check(panel, index.search(QUERY, K, offset=K * (len(pages) - 2)))
    panel.query.value = OTHER  # begins at the first page
    check(panel, index.search(OTHER, K))


def test_the_last_page_may_be_full(index):
    panel = Panel(index, QUERY, len(index.search(QUERY, 1000)))
    assert panel.after.disabled and panel.before.disabled


def test_a_threshold_ends_the_results_and_is_counted(index):
    scores = index.search(QUERY, 1000)["score"].to_numpy()
    panel = Panel(index, QUERY, 40)
    panel.threshold.value = least = float(np.round(np.median(scores), 2))
    n = int((scores >= least).sum())
    assert 0 < n < len(scores)
    check(panel, index.search(QUERY, n))
    (counted,) = re.findall(
        rf"Least score {least:.2f} : about (\d+) of {len(scores)} moments", text_of(panel.least.value)
    )
    assert (scores >= least + 0.03).sum() <= int(counted) <= (scores >= least - 0.03).sum()
    panel.threshold.value = 1
    assert shown(panel) == [] and message(panel).startswith("Nothing was found: lower the least score")


def test_filters_are_of_the_columns_that_tell_moments_apart(panel, manifest):
    lists = {name: box.options for name, box in panel.filters.items() if isinstance(box, widgets.Dropdown)}
    for name in ("style", "speaker", "split", "gender"):
        values = sorted(manifest[name].unique())
        assert lists[name] == (("any", ANY), *((value, value) for value in values))
    assert "corpus" not in panel.filters  # one value
    assert not {"id", "utterance_id", "file", "path", "start_s"} & set(panel.filters)  # one each, or none


def test_of_many_values_one_is_typed(index, manifest, monkeypatch):
    monkeypatch.setattr("esr_utils.panel.MAX_LISTED", 5)
    panel, speakers = Panel(index, QUERY, K), sorted(manifest["speaker"].unique())
    box = panel.filters["speaker"]
    assert isinstance(box, widgets.Combobox) and list(box.options) == speakers and len(speakers) == 6
    box.value = speakers[2]
    check(panel, index.search(QUERY, K, where={"speaker": speakers[2]}))
    box.value = "nobody"
    assert shown(panel) == [] and message(panel).startswith("Nothing was found")
    box.value = ""
    check(panel, index.search(QUERY, K))
    monkeypatch.setattr("esr_utils.panel.MAX_VALUES", 5)
    assert "speaker" not in Panel(index).filters


def test_filters_limit_what_is_found(panel, index):
    panel.filters["style"].value = "calm"
    check(panel, index.search(QUERY, K, where={"style": "calm"}))
    panel.filters["duration_s"].value = (0.5, 2.5)
    low, high = panel.filters["duration_s"].value
    assert low == panel.filters["duration_s"].min and high < panel.filters["duration_s"].max
    expected = index.search(QUERY, K, where={"style": "calm", "duration_s": (None, high)})
    check(panel, expected)
    assert len(expected) > 0 and set(expected["style"]) == {"calm"} and expected["duration_s"].max() <= high
    panel.filters["style"].value = ANY
    check(panel, index.search(QUERY, K, where={"duration_s": (None, high)}))


def test_a_range_covers_all_values(panel, manifest):
    box, values = panel.filters["duration_s"], manifest["duration_s"].astype(float)
    assert box.min <= values.min() and values.max() <= box.max and box.value == (box.min, box.max)
    assert panel.where() == {}


def test_more_like_a_result_until_a_sentence_is_given(panel, index):
    example = panel.hits.iloc[2]
    panel.boxes[2].children[1].click()
    check(panel, index.search_like(example["id"], K))
    assert message(panel) == f"Results 1–{K} like “{Path(example['file']).name}, whole file”"
    assert panel.minus.disabled and panel.query.value == QUERY
    panel.after.click()
    check(panel, index.search_like(example["id"], K, offset=K))
    panel.query.value = OTHER
    check(panel, index.search(OTHER, K))
    assert panel.example.value == "" and not panel.minus.disabled


def test_like_a_file(panel, index, data_root, tmp_path):
    clip = shutil.copy(next((data_root / "mini").rglob("*whispered*.opus")), tmp_path / "example.opus")
    panel.example.value = f" {clip} "
    check(panel, index.search_like(clip, K))
    assert message(panel) == f"Results 1–{K} like “{clip}”"
    panel.example.value = ""
    check(panel, index.search(QUERY, K))


# What is heard and seen -------------------------------------------------------------------------------------


def test_a_card_plays_its_clip(panel):
    for card, key in zip(shown(panel), panel.hits["file"], strict=True):
        expected, rate = soundfile.read(absolute_path(key), dtype="float32")
        assert rate == RATE
        np.testing.assert_allclose(samples_of(card), expected.clip(-1, 1), atol=1e-4)


def test_moments_of_a_recording_are_cut_out_by_time_and_channel(tiny_model, tmp_path, speech):
    (tmp_path / "calls").mkdir()
    call = np.stack([speech[: 14 * RATE], speech[14 * RATE : 28 * RATE]], axis=1)
    soundfile.write(tmp_path / "calls" / "call.wav", call, RATE)
    index = Index.create(tmp_path / "index", tiny_model, channels="split")
    recordings.refresh(index, recordings.find(tmp_path / "calls"))
    panel = Panel(index, QUERY, 40)
    assert len(panel.hits) > 4 and set(panel.hits["channel"]) == {0, 1} and {"channel", "start_s"} <= set(panel.filters)
    for card, hit in zip(shown(panel), panel.hits.to_dict("records"), strict=True):
        part = call[round(hit["start_s"] * RATE) : round(hit["end_s"] * RATE), hit["channel"]]
        np.testing.assert_allclose(samples_of(card), part, atol=1e-4)
        assert f"{cards.times(hit)} {hit['score']:.2f}" in text_of(card)
    panel.filters["channel"].value = (1, 1)
    assert set(panel.hits["channel"]) == {1}


def test_all_channels_are_mixed_and_brought_to_what_the_retriever_hears(tmp_path, speech):
    stereo = np.stack([speech[: 2 * RATE], np.zeros(2 * RATE)], axis=1).repeat(3, axis=0)
    soundfile.write(tmp_path / "both.wav", stereo, 3 * RATE)
    hits = pd.DataFrame({"file": [absolute_key(tmp_path / "both.wav")], "start_s": [0.5], "end_s": [1.5]})
    (clip,) = cards.clips(hits)
    assert len(clip.samples) == RATE
    assert np.corrcoef(clip.samples, speech[RATE // 2 : 3 * RATE // 2])[0, 1] > 0.95
    assert np.abs(clip.samples).max() == pytest.approx(np.abs(speech[RATE // 2 : 3 * RATE // 2]).max() / 2, rel=0.1)


def test_a_long_file_is_cut(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.full(40 * 8000, 0.1), 8000)
    (clip,) = cards.clips(
        pd.DataFrame({"file": [absolute_key(tmp_path / "long.wav")], "start_s": [None], "end_s": [None]})
    )
    assert len(clip.samples) == cards.MAX_S * RATE


@pytest.mark.parametrize("n", [1, 100, 240, 241, 50_000])
def test_a_picture_goes_from_the_lowest_to_the_highest_of_each_column(n):
    samples = np.random.default_rng(n).uniform(-0.5, 0.5, n).astype(np.float32)
    lines = [tuple(map(int, line)) for line in re.findall(r"M(\d+) (\d+)V(\d+)", cards.waveform(samples))]
    assert [x for x, _, _ in lines] == list(range(240))
    peak = np.abs(samples).max()
    for x, top, bottom in lines:
        first = min(x * n // 240, n - 1)
        part = samples[first : max(first + 1, (x + 1) * n // 240)]
        assert top == pytest.approx(50 - 50 * part.max() / peak, abs=0.51)
        assert bottom == pytest.approx(max(50 - 50 * part.min() / peak, top + 1), abs=0.51)


def test_a_histogram_by_hand():
    found = cards.histogram(np.array([-1, 0.01, 0.02, 0.02, 0.99], np.float32), 0.02)
    below, above = re.findall(r'<path class="(esr-\w+)" d="([^"]*)"', found)
    assert below == ("esr-below", "M0 100v-34h0.9v34z")
    assert above == ("esr-above", "M40 100v-100h0.9v100zM79 100v-34h0.9v34z")


def test_scores_of_the_whole_index_are_those_of_its_moments(index):
    for found, hits in (
        (index.scores(OTHER, minus="calm"), index.search(OTHER, 1000, minus="calm")),
        (index.scores_like(str(hits_id := index.search(OTHER, 1)["id"][0])), index.search_like(hits_id, 1000)),
    ):
        expected = sorted([*hits["score"], *[1.0] * (len(found) - len(hits))])  # the example itself
        assert len(found) == 33
        np.testing.assert_allclose(np.sort(found), expected, atol=0.03)


# What goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "value", "said"),
    [
        ("query", "", "The query is empty: describe"),
        ("query", "  \t ", "The query is empty: describe"),
        ("query", "angry " * 10_000, "(10000 words) long; at most 2000 are taken"),
        ("query", HOSTILE * 200, "words) long"),
        ("minus", "angry " * 10_000, "(10000 words) long; at most 2000 are taken"),
        ("minus", QUERY, ""),
        ("example", f"/nowhere/{HOSTILE}.wav", "is neither the id of a moment of this index nor an audio file"),
        ("example", __file__, "is no readable audio file"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_sentence(panel, index, box, value, said, capsys):
    getattr(panel, box).value = value
    assert said in message(panel) and "Traceback" not in panel.message.value and "<img" not in panel.message.value
    if said:
        assert 'role="alert"' in panel.message.value and shown(panel) == [] and panel.after.disabled
    assert capsys.readouterr() == ("", "")
    getattr(panel, box).value = ""
    panel.query.value = OTHER
    check(panel, index.search(OTHER, K))


def test_an_index_that_is_gone_is_said_to_be(own, tmp_path):
    panel = Panel(own, QUERY, K)
    shutil.rmtree(tmp_path / "index")
    panel.query.value = OTHER
    assert 'role="alert"' in panel.message.value and shown(panel) == [] and "Traceback" not in panel.message.value


def test_a_file_that_is_gone_or_damaged_is_said_to_be_on_its_card(own):
    panel = Panel(own, QUERY, K)
    gone, damaged = (absolute_path(key) for key in panel.hits["file"][:2])
    gone.unlink()
    damaged.write_bytes(b"no sound at all" * 100)
    panel.search()
    cards_shown = shown(panel)
    assert len(cards_shown) == K
    assert "cannot be played: the file is not there" in text_of(cards_shown[0])
    assert "cannot be played: the file is" in text_of(cards_shown[1])
    assert [card.count("<audio") for card in cards_shown] == [0, 0, 1, 1, 1]
    soundfile.write(gone, np.full(10, 0.1), 48_000, format="WAV")  # another one in its place
    panel.search()
    assert samples_of(shown(panel)[0]).size > 0


class Tags(HTMLParser):
    """Tags and attributes of HTML, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.said = set(), set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.said += data


def test_names_and_labels_are_text_whatever_they_hold(tiny_model, tmp_path, speech):
    folder = tmp_path / "odd"
    folder.mkdir()
    for i, name in enumerate([HOSTILE, "\"><script>alert('2')</script>".replace("/", "|"), "plain & simple"]):
        soundfile.write(folder / f"{name}.wav", speech[6 * i * RATE : 6 * (i + 1) * RATE], RATE)
    (folder / "labels.csv").write_text(
        f'path,tone,mood\n{HOSTILE}.wav,one,{HOSTILE}\nplain & simple.wav,two,"<b>""calm""</b>"\n'
    )
    index = Index.create(tmp_path / "index", tiny_model)
    recordings.refresh(index, recordings.find(folder))
    panel = Panel(index, QUERY, 40)
    assert {"tone", "mood", "file"} <= set(panel.filters)
    for page in (panel.static(), *shown(panel), cards.table(panel.hits, ["mood", "tone"])):
        found = Tags(page)
        assert not found.tags & {"img", "script"} and "onerror" not in found.attributes
        assert {"div", "table"} & found.tags
    said = Tags(panel.static()).said
    assert f"{HOSTILE}.wav" in said and "><script>alert('2')<|script>.wav" in said and 'mood: <b>"calm"</b>' in said
    panel.query.value = HOSTILE
    assert HOSTILE in message(panel).replace("&lt;", "<").replace("&gt;", ">") and "<img" not in panel.message.value
    panel.boxes[0].children[1].click()
    assert "<img" not in panel.message.value


# In a notebook ----------------------------------------------------------------------------------------------


def test_where_no_kernel_is_alive_the_first_results_are_seen(panel):
    shown_as = panel._repr_mimebundle_()
    assert shown_as["application/vnd.jupyter.widget-view+json"]["model_id"] == panel.widget.model_id
    for card in shown(panel):
        assert card in shown_as["text/html"]
    assert message(panel) in text_of(shown_as["text/html"]) and "esr-bars" in shown_as["text/html"]


def test_a_table_has_a_row_and_a_player_for_each_hit(index):
    hits = index.search(QUERY, 3)
    found = cards.table(hits, ["style"])
    assert found.count("<audio controls") == 3 and found.count("<tr>") == 4
    for hit in hits.to_dict("records"):
        numbers = f"{hit['rank']} {hit['score']:.3f} {hit['percentile']:.3f}"
        assert f"{numbers} {Path(hit['file']).name} whole file {hit['style']}" in text_of(found)


# The index of a notebook ------------------------------------------------------------------------------------


def test_an_index_is_opened_with_its_run_made_or_brought_up_to_date(tiny_run, tmp_path, speech):
    folder, uri = tmp_path / "folder", tmp_path / "index"
    folder.mkdir()
    soundfile.write(folder / "one.wav", speech[: 8 * RATE], RATE)
    with pytest.raises(recordings.IndexUnusable, match="holds no index"):
        recordings.open_index(uri)
    index, report = recordings.open_index(uri, folder, tiny_run)
    assert (report.embedded, index.about["run"], index.about["level"]) == (1, str(tiny_run), "recorded")
    soundfile.write(folder / "two.wav", speech[8 * RATE : 16 * RATE], RATE)
    index, report = recordings.open_index(uri)  # as it is, by the run that it names
    assert report.embedded == 0 and len(index.files()) == 1 and len(index.search(QUERY, 1)) == 1
    index, report = recordings.open_index(uri, [folder])
    assert (report.embedded, report.unchanged) == (1, 1) and len(index.files()) == 2
