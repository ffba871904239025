"""A panel to search an index by hand, in JupyterLab: `Panel(index, "a tired, sarcastic answer")` as a cell's last line.

Every control is an ordinary widget that the keyboard reaches: Enter in a box searches, Tab goes on in reading order.
What goes wrong is said in the panel, in a sentence. The cards and their buttons are made once and filled anew by each
search, which is most of what makes a page of twenty quick.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from esr_utils import cards
from esr_utils.index import Index
from esr_utils.index_rows import IndexUnusable, first_line
from esr_utils.index_snapshot import QueryError, Snapshot

ANY = ()  # what a list says that limits nothing; None would show as an empty box
MAX_LISTED = 30  # values of a column of text: of more one is typed, as nobody would look through the list
MAX_VALUES = 1000  # of which all are sent to the page; with more, or one for each moment, a column has no filter
_HIDDEN = ("id", "utterance_id", "path", "root")  # columns that tell nothing beside the file
_LAYOUT = """<style>
.esr-panel { max-width: 1280px; }
.esr-panel .widget-text input { font-size: 14px; }
.esr-panel .widget-hslider .slider-container { margin: 0 8px; }
.esr-cards .esr-box { position: relative; min-width: 0; box-sizing: border-box; }
.esr-cards .widget-html { width: 100%; margin: 0; }
.esr-cards .widget-html-content { flex: 1 1 auto; min-width: 0; }
.esr-cards .esr-card audio { width: calc(100% - 118px); }
.esr-cards .esr-like { position: absolute; right: 10px; bottom: 9px; width: 108px; margin: 0; }
</style>"""
_HINT = "Say how it should sound, e.g. “a tired, sarcastic answer”, and press Enter."


class Panel:
    """A search panel over an open index.

    Attributes:
        index: with a model.
        k: results a page.
        hits: what is shown: rows of `Index.search`.
        query, minus, example: boxes of text. The example, an audio file's path or a moment's id, comes before the
            sentence while there is one.
        threshold: slider of the least score.
        filters: by column, what limits it: a list of its values, a box to type one of many in, or a range.
        widget: all of it.
    """

    def __init__(self, index: Index, query: str = "", k: int = 20) -> None:
        self.index, self.k, self.offset = index, k, 0
        self.hits = pd.DataFrame()
        self._filling, self._example = False, ""  # whether widgets are being set; what the example is called
        self._make(query)
        for box in (self.query, self.minus, self.example, self.threshold, *self.filters.values()):
            box.observe(self._changed, "value")
        if query:
            self.search()
        else:
            self._show(_HINT)

    # Widgets ------------------------------------------------------------------------------------------------

    def _make(self, query: str) -> None:
        self.query = _text("How it sounds:", "a tired, sarcastic answer", query)
        self.minus = _text("But not:", "angry (may be left empty)")
        self.example = _text("Or like:", "an audio file’s path, or a result’s button")
        button = widgets.Button(description="Search", icon="search", button_style="primary")
        button.on_click(lambda _: self.search())
        self.filters = _filters(self.index)
        self.threshold = widgets.FloatSlider(
            value=-1, min=-1, max=1, step=0.01, readout=False, continuous_update=False, layout={"width": "100%"}
        )
        self.message, self.least, self.scores = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.slots = [widgets.HTML() for _ in range(self.k)]
        self.boxes = [self._card(place, slot) for place, slot in enumerate(self.slots)]
        self.before = _button("Previous page", "arrow-left", lambda: self.search(self.offset - self.k))
        self.after = _button("Next page", "arrow-right", lambda: self.search(self.offset + self.k))
        grid = widgets.GridBox(
            self.boxes, layout={"grid_template_columns": "repeat(auto-fill, minmax(380px, 1fr))", "grid_gap": "8px"}
        )
        wrapped = {"flex_flow": "row wrap", "align_items": "center"}
        rows = [
            widgets.HTML(cards.STYLE + _LAYOUT),
            widgets.HBox([self.query, button]),
            widgets.HBox([self.minus, self.example]),
            widgets.HBox(list(self.filters.values()), layout=wrapped),
            widgets.VBox([self.least, self.scores, self.threshold], layout={"width": "520px"}),
            self.message,
            grid.add_class("esr-cards"),
            widgets.HBox([self.before, self.after]),
        ]
        self.widget = widgets.VBox(rows).add_class("esr-panel")

    def _card(self, place: int, slot: widgets.HTML) -> widgets.VBox:
        like = widgets.Button(description="More like this", tooltip=f"Search by result {place + 1} of this page")
        like.on_click(lambda _: self.more_like(place))
        return widgets.VBox([slot, like.add_class("esr-like")], layout={"display": "none"}).add_class("esr-box")

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        """The widget; and, for where no kernel is alive, what it shows now."""
        return {**self.widget._repr_mimebundle_(**options), "text/html": self.static()}

    def static(self) -> str:
        """What is shown now as HTML that needs no kernel: the message, the histogram and the cards."""
        boxes = "".join(f'<div class="esr-box">{slot.value}</div>' for slot in self.slots[: len(self.hits)])
        return (
            f'{cards.STYLE}{self.least.value}{self.scores.value}{self.message.value}<div class="esr-grid">{boxes}</div>'
        )

    # Searching ----------------------------------------------------------------------------------------------

    def search(self, offset: int = 0) -> None:
        """Searches for what the widgets say, and shows the results from a place on; what goes wrong is said."""
        self.offset = max(0, offset)
        try:
            hits, scores = self._find()
            shown = hits.head(self.k)
            filled = [
                cards.card(hit, clip, self._labels())
                for hit, clip in zip(shown.to_dict("records"), cards.clips(shown), strict=True)
            ]
        except (QueryError, IndexUnusable) as error:
            self._fail(str(error))
        except Exception as error:  # a widget's error goes to a log that nobody reads; it would seem to do nothing
            self._fail(f"the search failed: {type(error).__name__}: {first_line(error)}")
        else:
            self.hits = shown
            self._count(scores)
            self._show(self._summary(), filled, more=len(hits) > self.k)

    def more_like(self, place: int) -> None:
        """Searches for what sounds like a result of this page, from 0."""
        with self._fill():
            self.example.value = str(self.hits["id"].iloc[place])
        self._example = f"{cards.file_name(self.hits['file'].iloc[place])}, {cards.times(self.hits.iloc[place])}"
        self.search()

    def where(self) -> dict[str, Any]:
        """Conditions by column, as `Index.search` takes them, of the filters that limit something."""
        found = {}
        for column, box in self.filters.items():
            if isinstance(box, widgets.Combobox):
                found |= {column: box.value} if box.value else {}
            elif isinstance(box, widgets.Dropdown):
                found |= {} if box.value == ANY else {column: box.value}
            else:
                low, high = box.value
                bounds = (low if low > box.min else None, high if high < box.max else None)
                found |= {} if bounds == (None, None) else {column: bounds}
        return found

    def _find(self) -> tuple[pd.DataFrame, np.ndarray]:
        """One hit more than a page holds, where there is one; and the scores of the whole index."""
        options = {"k": self.k + 1, "min_score": self.threshold.value, "where": self.where(), "offset": self.offset}
        if example := self.example.value.strip():
            return self.index.search_like(example, **options), self.index.scores_like(example)
        query, minus = self.query.value, self.minus.value.strip() or None
        return self.index.search(query, minus=minus, **options), self.index.scores(query, minus=minus)

    def _changed(self, change: dict[str, Any]) -> None:
        if self._filling:
            return
        if change["owner"] is self.query:  # what was said last counts
            with self._fill():
                self.example.value = ""
        self._example = self.example.value.strip()
        self.search()

    @contextmanager
    def _fill(self) -> Iterator[None]:
        """While values are set that should not search."""
        self._filling = True
        try:
            yield
        finally:
            self._filling = False

    # Showing ------------------------------------------------------------------------------------------------

    def _labels(self) -> list[str]:
        return [name for name, box in self.filters.items() if isinstance(box, widgets.Dropdown) and name != "file"]

    def _summary(self) -> str:
        if self.hits.empty and self.offset:
            return "There are no more results."
        if self.hits.empty:
            return "Nothing was found: lower the least score, or let the filters through."
        if self.example.value.strip():
            asked = f"like “{self._example}”"
        else:
            minus = self.minus.value.strip()
            asked = f"for “{self.query.value}”" + (f", not “{minus}”" if minus else "")
        return f"Results {self.hits['rank'].iloc[0]}–{self.hits['rank'].iloc[-1]} {asked}"

    def _count(self, scores: np.ndarray) -> None:
        least = self.threshold.value
        n = np.count_nonzero(scores >= least)
        self.least.value = (
            f'<span class="esr-card">Least score <b>{least:.2f}</b>: about {n} of {len(scores)} moments of the index '
            f"reach it ({n / max(len(scores), 1):.1%})</span>"
        )
        self.scores.value = cards.histogram(scores, least)

    def _fail(self, message: str) -> None:
        self.hits = pd.DataFrame()
        self._show(cards.problem(message[:1].upper() + message[1:]), escaped=True)

    def _show(self, message: str, filled: list[str] = (), more: bool = False, escaped: bool = False) -> None:
        for slot, box, card in zip(self.slots, self.boxes, [*filled] + [""] * (self.k - len(filled)), strict=True):
            slot.value = card
            box.layout.display = "" if card else "none"
        self.before.disabled, self.after.disabled = self.offset == 0, not more
        self.minus.disabled = bool(self.example.value.strip())
        message = message if escaped else html.escape(message)
        self.message.value = f'<span class="esr-card" role="status">{message}</span>'  # last: it says that all is there


def _text(description: str, placeholder: str, value: str = "") -> widgets.Text:
    """A box that tells its text when Enter is pressed, or the box is left."""
    layout = {"flex": "1 1 auto", "width": "auto"}
    return widgets.Text(
        value=value,
        description=description,
        placeholder=placeholder,
        continuous_update=False,
        layout=layout,
        style={"description_width": "100px"},
    )


def _button(description: str, icon: str, press: Any) -> widgets.Button:
    made = widgets.Button(description=description, icon=icon, disabled=True)
    made.on_click(lambda _: press())
    return made


# Filters ----------------------------------------------------------------------------------------------------


def _filters(index: Index) -> dict[str, widgets.Dropdown | widgets.Combobox | widgets.FloatRangeSlider]:
    """A widget for each column that tells moments apart: of numbers a range, of few other values a list of them, of
    more a box to type in."""
    kinds = {name: str(kind) for name, kind in index.columns().items() if name not in _HIDDEN}
    found: dict[str, set] = {name: set() for name in kinds}
    snapshot = Snapshot(index)
    for batch in index.batches(list(kinds), snapshot.alive()):
        for name, values in list(found.items()):
            values.update(batch[name].drop_null().unique().to_pylist())
            if kinds[name] in ("double", "int64"):
                found[name] = {min(values), max(values)} if values else values
            elif len(values) > MAX_VALUES:
                del found[name]
    made = {}
    for name, values in found.items():
        if len(values) > 1 and (len(values) <= MAX_LISTED or len(values) < snapshot.n_moments):
            made[name] = _range(name, *sorted(values)) if kinds[name] in ("double", "int64") else _list(name, values)
    return dict(sorted(made.items(), key=lambda item: isinstance(item[1], widgets.FloatRangeSlider)))  # lists first


def _list(column: str, values: set) -> widgets.Dropdown | widgets.Combobox:
    if len(values) > MAX_LISTED:
        return widgets.Combobox(
            options=sorted(values), description=f"{column}:", placeholder="any", continuous_update=False,
            style={"description_width": "auto"},
        )  # fmt: skip
    labels = {value: cards.file_name(value) if column == "file" else str(value) for value in values}
    twice = len(set(labels.values())) < len(labels)  # files of one name in several folders
    options = [("any", ANY), *sorted((value if twice else labels[value], value) for value in values)]
    return widgets.Dropdown(
        options=options, description=f"{column}:", style={"description_width": "auto"}, layout={"width": "auto"}
    )


def _range(column: str, low: float, high: float) -> widgets.FloatRangeSlider:
    step = 10.0 ** (math.floor(math.log10(high - low)) - 2)
    step = max(step, 1.0) if float(low).is_integer() and float(high).is_integer() else step
    low, high = (round(bound, 9) for bound in (math.floor(low / step) * step, math.ceil(high / step) * step))
    return widgets.FloatRangeSlider(
        value=(low, high), min=low, max=high, step=step, readout_format=".0f" if step >= 1 else ".2f",
        description=f"{column}:", continuous_update=False,
        style={"description_width": "auto"}, layout={"width": "320px"},
    )  # fmt: skip
