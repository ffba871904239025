"""Search hits as HTML to see and hear: cards, a table, the histogram of scores.

Pictures are inline SVG, made of the highest and lowest sample of each of 240 columns: a millisecond and 3 kB each,
where a figure of matplotlib takes 50 times that; a page of twenty should be there at once. Sound goes into the page as
FLAC, mono, at 16 kHz, which is what the retriever hears: half the size of WAV, and made in a twentieth of the time of
MP3. It is as loud as recorded, while a picture fills its height.

All text that is not ours is escaped: a file's name, a label and an error message may hold any HTML.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import soundfile
import soxr
from numpy.typing import NDArray

from esr_utils.audio_folder import absolute_path, path_or_key, printable, shown
from esr_utils.config import SAMPLE_RATE
from esr_utils.decoding import read_spans

if TYPE_CHECKING:
    from esr_utils.index import Index
    from esr_utils.index_rows import Report

MAX_S = 30.0  # seconds of a hit that are shown and played: a moment is shorter, a whole file may be hours long
_COLUMNS, _HEIGHT = 240, 100  # of a picture, which is stretched to its card
_NOTES = 100  # files of which it is told what was wrong with them
_BINS = 80  # of the histogram, from -1 to 1
_THREADS = 4  # files decoded at a time; reading leaves Python free
# Colours are JupyterLab's, so that a dark theme stays dark; those after the comma are for where there is no JupyterLab.
STYLE = """<style>
.esr-card { font: 13px/1.4 var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color1, #222); }
.esr-head { display: flex; gap: 8px; align-items: baseline; }
.esr-file { font-weight: 600; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.esr-when, .esr-labels, .esr-ticks { color: var(--jp-ui-font-color2, #666); white-space: nowrap; }
.esr-score { margin-left: auto; white-space: nowrap; font-variant-numeric: tabular-nums; }
.esr-labels { overflow: hidden; text-overflow: ellipsis; min-height: 1.4em; }
.esr-wave { display: block; width: 100%; height: 44px; margin: 3px 0; }
.esr-wave path { stroke: var(--jp-brand-color1, #1976d2); stroke-width: 1.6; vector-effect: non-scaling-stroke; }
.esr-card audio { display: block; width: 100%; height: 34px; }
.esr-bars { display: block; width: 100%; height: 56px; }
.esr-below { fill: var(--jp-border-color1, #bdbdbd); }
.esr-above { fill: var(--jp-brand-color1, #1976d2); }
.esr-ticks { display: flex; justify-content: space-between; font: 11px var(--jp-ui-font-family, sans-serif); }
.esr-problem { color: var(--jp-error-color1, #b71c1c); }
.esr-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)); gap: 8px; }
.esr-box { border: 1px solid var(--jp-border-color2, #ddd); border-radius: 6px; padding: 8px 10px; overflow: hidden; }
</style>"""


@dataclass(frozen=True)
class Clip:
    """The sound of a hit.

    Attributes:
        samples: (S,) at 16 kHz; none if it cannot be had.
        problem: why not.
    """

    samples: NDArray[np.float32]
    problem: str = ""


def clips(hits: pd.DataFrame) -> list[Clip]:
    """The sound of each hit (rows of `Index.search`): its channel, or the mean of all, at most 30 s of it.

    Each file is opened once, however many hits are in it; several files at a time.
    """
    found: dict[int, Clip] = {}
    groups = [(str(key), rows) for key, rows in hits.reset_index(drop=True).groupby("file", sort=False)]
    with ThreadPoolExecutor(_THREADS) as threads:
        for (_, rows), part in zip(groups, threads.map(lambda group: _clips_of(*group), groups), strict=True):
            found.update(zip(rows.index, part, strict=True))
    return [found[row] for row in range(len(hits))]


def _clips_of(key: str, rows: pd.DataFrame) -> list[Clip]:
    spans = []
    for row in rows.to_dict("records"):
        start = given(row, "start_s") or 0.0
        spans.append((start, min(start + MAX_S, given(row, "end_s") or np.inf)))
    try:
        pieces, rate = read_spans(absolute_path(key), spans)
    except (ValueError, OSError) as error:  # AudioError is a ValueError
        return [Clip(np.zeros(0, np.float32), f"the file {error}")] * len(rows)
    return [
        _clip(piece, rate, given(row, "channel")) for piece, row in zip(pieces, rows.to_dict("records"), strict=True)
    ]


def _clip(samples: NDArray[np.float32], rate: int, channel: float | None) -> Clip:
    heard = samples if channel is None else samples[:, int(channel) : int(channel) + 1]
    if not heard.size:
        return Clip(np.zeros(0, np.float32), "the recording no longer has this part")
    return Clip(soxr.resample(heard.mean(1), rate, SAMPLE_RATE).clip(-1, 1))


def given(row: dict[str, Any], column: str) -> float | None:
    """A number of a hit; None where it is empty, or there is no such column."""
    value = row.get(column)
    return None if value is None or pd.isna(value) else float(value)


# What a hit is called ---------------------------------------------------------------------------------------


def file_name(key: str) -> str:
    """A file's own name, for people to read."""
    return printable(path_or_key(key).rpartition("/")[2])


def times(hit: dict[str, Any]) -> str:
    """From when to when, and the channel if it is of one: "1:02.5 – 1:06.0, channel 1"."""
    start, end, channel = (given(hit, name) for name in ("start_s", "end_s", "channel"))
    place = "whole file" if start is None or end is None else f"{_clock(start)} – {_clock(end)}"
    return place if channel is None else f"{place}, channel {channel:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


# HTML -------------------------------------------------------------------------------------------------------


def card(hit: dict[str, Any], clip: Clip, labels: Sequence[str] = ()) -> str:
    """A hit as HTML, for pages that have STYLE.

    Args:
        hit: a row of `Index.search`.
        labels: columns that are shown too, where they hold something.
    """
    said = [f"{name}: {hit[name]}" for name in labels if not pd.isna(hit[name]) and hit[name] != ""]
    below, path = f"{100 * hit['percentile']:.1f} %", shown(hit["file"])
    return (
        f'<div class="esr-card"><div class="esr-head"><span>{hit["rank"]}</span>'
        f'<span class="esr-file" title="{_escaped(path)}">{_escaped(file_name(hit["file"]))}'
        f'</span><span class="esr-when">{times(hit)}</span>'
        f'<span class="esr-score" title="cosine; {below} of the index scores below">'
        f"<b>{hit['score']:.2f}</b> above {below}</span></div>"
        f'<div class="esr-labels">{_escaped(" · ".join(said))}</div>{_heard(clip, hit["rank"])}</div>'
    )


def table(hits: pd.DataFrame, labels: Sequence[str] = ()) -> str:
    """Hits as an HTML table, a row each, with players; arguments as `card`."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "rank": lambda hit: str(hit["rank"]),
        "score": lambda hit: f"{hit['score']:.3f}",
        "percentile": lambda hit: f"{hit['percentile']:.3f}",
        "file": lambda hit: file_name(hit["file"]),
        "when": times,
        **{name: lambda hit, name=name: "" if pd.isna(hit[name]) else str(hit[name]) for name in labels},
    }
    rows = []
    for hit, clip in zip(hits.to_dict("records"), clips(hits), strict=True):
        cells = "".join(f"<td>{_escaped(shown(hit))}</td>" for shown in columns.values())
        rows.append(f"<tr>{cells}<td>{_player(clip, hit['rank'])}</td></tr>")
    head = "".join(f"<th>{_escaped(name)}</th>" for name in (*columns, "listen"))
    return f"{STYLE}<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def notes(index: Index, report: Report) -> str:
    """What there is to know before an index is searched: files that could not be used, or not whole, and why; groups
    that are not adapted to."""
    files = index.files()
    told = files.loc[files["problem"] != "", "problem"].to_dict() | report.left_out
    rows = [(shown(key), why) for key, why in told.items()]
    rows += [(group or "all", why) for group, why in report.not_adapted(index.about["adapt"]).items()]
    if not rows:
        return "<p>Every file could be used.</p>"
    with pd.option_context("display.max_colwidth", None):
        return pd.DataFrame(rows, columns=["of", "note"]).to_html(index=False, max_rows=_NOTES)


def problem(message: str) -> str:
    """A sentence that says what went wrong."""
    return f'<span class="esr-problem" role="alert">{_escaped(message)}</span>'


def _heard(clip: Clip, rank: int) -> str:
    return _player(clip, rank) if clip.problem else waveform(clip.samples) + _player(clip, rank)


def _player(clip: Clip, rank: int) -> str:
    if clip.problem:
        return problem(f"cannot be played: {clip.problem}")
    sound = io.BytesIO()
    soundfile.write(sound, clip.samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    source = base64.b64encode(sound.getvalue()).decode()
    return (
        f'<audio controls preload="metadata" aria-label="result {rank}" src="data:audio/flac;base64,{source}"></audio>'
    )


def waveform(samples: NDArray[np.float32]) -> str:
    """SVG of (S,) samples: a line from the lowest to the highest in each of 240 columns, the peak at full height."""
    edges = np.linspace(0, len(samples), _COLUMNS + 1).astype(int)
    starts = np.minimum(edges[:-1], len(samples) - 1)  # of a clip with fewer samples than columns, some count twice
    high, low = np.maximum.reduceat(samples, starts), np.minimum.reduceat(samples, starts)
    middle = _HEIGHT / 2
    scale = middle / max(float(np.abs(samples).max()), 1e-6)
    top, bottom = np.round(middle - high * scale).astype(int), np.round(middle - low * scale).astype(int)
    lines = "".join(f"M{x} {y}V{max(z, y + 1)}" for x, (y, z) in enumerate(zip(top, bottom, strict=True)))
    return _picture("esr-wave", _COLUMNS, f'<path d="{lines}"/>', "waveform")


def histogram(scores: NDArray[np.float32], threshold: float) -> str:
    """HTML of the scores of an index, from -1 to 1; those that reach the threshold are coloured."""
    counts, edges = np.histogram(scores, _BINS, (-1, 1))
    heights = np.ceil(_HEIGHT * counts / max(counts.max(), 1)).astype(int)
    bars = {"esr-below": "", "esr-above": ""}
    for x, (height, right) in enumerate(zip(heights, edges[1:], strict=True)):
        if height:
            bars["esr-above" if right > threshold else "esr-below"] += f"M{x} {_HEIGHT}v-{height}h0.9v{height}z"
    paths = "".join(f'<path class="{name}" d="{lines}"/>' for name, lines in bars.items())
    about = f"{len(scores)} scores, {scores.min():.2f} to {scores.max():.2f}" if len(scores) else "no scores"
    ticks = "".join(f"<span>{tick}</span>" for tick in ("−1", "−0.5", "0", "0.5", "1"))
    return _picture("esr-bars", _BINS, paths, about) + f'<div class="esr-ticks">{ticks}</div>'


def _picture(kind: str, width: int, paths: str, about: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width} {_HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{about}">{paths}</svg>'
    )


def _escaped(text: str) -> str:
    return html.escape(text, quote=True)
