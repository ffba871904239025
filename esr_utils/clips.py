"""Hits cut out of their recordings, to files that can be heard and sent.

clips.export(index.search("a tired, sarcastic answer"), "clips")    # one WAV file a hit, and hits.csv
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from numpy.typing import NDArray

from esr_utils import runs
from esr_utils.audio_folder import absolute_path, at_home, shown
from esr_utils.decoding import read_spans

_OURS = ("audio", "problem", "path")  # columns of hits.csv besides the hits'
_AT_ONCE = 100  # hits of one file that are in memory together when they are cut


def export(hits: pd.DataFrame, folder: str | Path) -> pd.DataFrame:
    """Cuts hits to WAV files (16 bit, at the recording's rate and with its channels, or the one of the hit).

    Args:
        hits: rows of `Index.search`: file, and perhaps start_s, end_s, channel; other columns are kept.
        folder: a new or empty one. `hits.csv` in it names the files, in the order of the hits.

    Returns:
        What hits.csv holds: `audio`, the file's name, empty where there is none; `problem`, why; `path`, where the
        recording is, for people; the hits' columns, of which one of such a name is called `problem_label` or the like.

    Raises:
        FileExistsError: there is something in the folder.
        OSError: it cannot be written, as when the disk is full.
    """
    folder = at_home(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder for what is cut out")
    if [*hits.columns[:3]] == [*_OURS]:  # of an export before
        hits = hits.drop(columns=[*_OURS])
    hits = hits.rename(columns={name: f"{name}_label" for name in _OURS}).reset_index(drop=True)
    about: dict[int, tuple[str, str]] = {}
    for key, rows in hits.groupby("file", sort=False):
        for start in range(0, len(rows), _AT_ONCE):
            about.update(_cut(str(key), rows.iloc[start : start + _AT_ONCE], folder))
    columns = pd.DataFrame([about[row] for row in hits.index], columns=[*_OURS[:2]], index=hits.index)
    columns["path"] = [shown(key) for key in hits["file"]]
    if "channel" in hits:
        hits["channel"] = hits["channel"].astype("Int64")  # where some are empty they came as 0.0
    table = pd.concat([columns, hits], axis=1)
    with runs.atomic_path(folder / "hits.csv") as temporary:
        table.to_csv(temporary, index=False)
    return table


def _cut(key: str, rows: pd.DataFrame, folder: Path) -> Iterator[tuple[int, tuple[str, str]]]:
    """Writes the hits of one file; of each its row, and the name of what was written or the problem."""
    spans = [(_number(row, "start_s") or 0.0, _number(row, "end_s")) for _, row in rows.iterrows()]
    try:
        path = absolute_path(key)
        pieces, rate = read_spans(path, spans)
    except ValueError as error:  # AudioError is one
        yield from ((row, ("", str(error))) for row in rows.index)
        return
    for (number, row), span, samples in zip(rows.iterrows(), spans, pieces, strict=True):
        if (channel := _number(row, "channel")) is not None:
            samples = samples[:, int(channel) : int(channel) + 1]
        if not samples.size:
            yield number, ("", "the recording no longer has this part")
            continue
        name = _name(number + 1, path, *span)
        _write_wav(folder / name, samples, rate)
        yield number, (name, "")


def _number(row: pd.Series, column: str) -> float | None:
    value = row.get(column)
    return None if value is None or pd.isna(value) else float(value)


def _name(number: int, path: Path, start_s: float, end_s: float | None) -> str:
    """Of a hit's file: letters, digits, _ and - of the recording's own name, and when it is."""
    stem = re.sub(r"[^\w-]+", "_", path.stem.encode("utf-8", "replace").decode())[:40]
    return f"{number:03d}_{stem}_{start_s:.2f}" + (".wav" if end_s is None else f"-{end_s:.2f}.wav")


def _write_wav(path: Path, samples: NDArray[np.float32], rate: int) -> None:
    """By way of memory: libsndfile does not say that a disk is full."""
    wav = io.BytesIO()
    soundfile.write(wav, samples, rate, format="WAV", subtype="PCM_16")
    with runs.atomic_path(path) as temporary:
        temporary.write_bytes(wav.getvalue())
