"""A folder of your own audio, with its subfolders: WAV, FLAC, Ogg, Opus or MP3, at any rate, mono or not.

Where: on your disk. Licence: yours to know; the column `licence` is for it. Layout: any, perhaps
with a labels.csv.

The labels are a CSV (UTF-8) with a column `path`, relative to the folder, and any columns of a manifest:
style, caption, text, speaker, split, start_s and end_s (several rows may cut one file), channel, ... Other
columns are kept. With labels, a row makes an utterance and files that no row names are left out; without,
each file is one, in split "test", style "".
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath

import pandas as pd

from esr_utils.audio_files import AudioError, Header, check_audio, read_header
from esr_utils.audio_folder import PLAIN
from esr_utils.corpora import CorpusError
from esr_utils.manifests import build_manifest, read_table

ABOUT = "Any folder of audio."
SOURCE = "your own disk"
LICENCE = "the audio's own"
LAYOUT = "any; labels.csv beside the audio may hold the columns of a manifest"


def prepare(root: Path, labels: str | Path | None = None, read_data: bool = False) -> pd.DataFrame:
    """The manifest of a folder; files that cannot be used are left out by name and the rest goes on.

    The corpus is named after the folder, an utterance after its file: `<corpus>/<path without suffix>`, with
    `#1`, `#2`, ... behind it where several rows cut one file.

    Args:
        labels: a CSV; None takes `labels.csv` in the folder if there is one.
        read_data: decode every file too, which also finds NaN, silence and files cut short. Slow on large
        folders.
    Returns:
        `.attrs["left_out"]` counts the reasons, `.attrs["left_out_files"]` names the files.
    Raises:
        CorpusError: no such folder, or labels without a column `path`.
        ManifestError: labels that are no CSV, or whose numbers are none.
    """
    root = Path(root).resolve()
    if not root.is_dir():
        raise CorpusError(f"there is no folder {root}")
    headers, left_out = _usable(root, read_data)
    labels = root / "labels.csv" if labels is None and (root / "labels.csv").is_file() else labels
    rows = [{"path": path} for path in headers]
    if labels is not None:
        rows, unlabelled = _labelled(labels, headers, left_out)
        left_out |= unlabelled
    names = _names([row["path"] for row in rows])
    return build_manifest(
        [_row(row, name, root.name, headers[row["path"]]) for row, name in zip(rows, names, strict=True)],
        left_out,
    )


def _usable(root: Path, read_data: bool) -> tuple[dict[str, Header], dict[str, str]]:
    """Headers of the files that can be used, and the reasons for those that cannot, by path."""
    headers, left_out = {}, {}
    for file in sorted(file for file in root.rglob("*") if file.suffix.lower() in PLAIN):
        path = file.relative_to(root).as_posix()
        if file.is_dir():
            continue
        if any(part.startswith(".") for part in PurePosixPath(path).parts):
            left_out[path] = "hidden file"  # such as the ._name.wav that macOS leaves behind
        elif not path.isprintable():
            left_out[path] = "name holds characters that cannot be written"
        else:
            try:
                headers[path] = read_header(root, path)
                if read_data:
                    check_audio(headers[path])
            except AudioError as error:
                headers.pop(path, None)
                left_out[path] = str(error)
    return headers, left_out


def _labelled(
    labels: str | Path, headers: dict[str, Header], unusable: dict[str, str]
) -> tuple[list[dict], dict[str, str]]:
    """The rows of the label file whose audio can be used, and what that leaves out."""
    table = read_table(labels)
    if "path" not in table:
        raise CorpusError(f"{labels} has no column 'path'; it has {', '.join(table.columns)}")
    table["path"] = [PurePosixPath(path).as_posix() for path in table["path"]]  # ./a.wav is a.wav
    rows = table.to_dict("records")
    missing = set(table["path"]) - set(headers) - set(unusable)
    left_out = dict.fromkeys(sorted(missing), "labelled, but no audio file in the folder")
    left_out |= dict.fromkeys(sorted(set(headers) - set(table["path"])), "not named in the labels")
    return [row for row in rows if row["path"] in headers], left_out


def _names(paths: list[str]) -> list[str]:
    """Ids: the path without its suffix, unless two files share it; numbered where a file has several rows."""
    stems = Counter(str(PurePosixPath(path).with_suffix("")) for path in set(paths))
    rows, seen, names = Counter(paths), Counter(), []
    for path in paths:
        stem = str(PurePosixPath(path).with_suffix(""))
        seen[path] += 1
        names.append((stem if stems[stem] == 1 else path) + (f"#{seen[path]}" if rows[path] > 1 else ""))
    return names


def _row(label: dict, name: str, corpus: str, header: Header) -> dict:
    """A row of the labels with what it lacks filled in. Cells that are no numbers are left to be refused."""
    corpus = label.get("corpus") or corpus
    filled = {
        "corpus": corpus,
        "utterance_id": f"{corpus}/{name}",
        "split": "test",
        "duration_s": _length_s(label, header),
    }
    return label | {column: label.get(column) or value for column, value in filled.items()}


def _length_s(label: dict, header: Header) -> float | str:
    try:
        start_s, end_s = float(label.get("start_s") or 0), float(label.get("end_s") or header.duration_s)
    except ValueError:
        return ""
    return round(end_s - start_s, 4)
