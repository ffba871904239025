"""What the captioned corpora share: finding audio by name, splits where none are official, attributes in one wording.

Attributes are extra columns of the manifest, with the values of `esr_utils.captions`: `pitch`, `energy` and `tempo`
are low, normal or high; what a corpus says beyond that stays as it says it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from zlib import crc32

import pandas as pd

from esr_utils.audio_files import AudioError, Folder
from esr_utils.audio_folder import PLAIN
from esr_utils.corpora import CorpusError
from esr_utils.manifests import build_manifest
from esr_utils.styles import CAPTIONED_STYLES
from esr_utils.text_tables import csv_rows

LEVELS = ("low", "normal", "high")
_LEVELS = {
    **dict.fromkeys(("low", "slow", "quiet", "低", "慢"), "low"),
    **dict.fromkeys(("normal", "medium", "moderate", "中"), "normal"),
    **dict.fromkeys(("high", "fast", "loud", "高", "快"), "high"),
}
_GENDERS = {
    **dict.fromkeys(("female", "f", "woman", "女", "女性"), "female"),
    **dict.fromkeys(("male", "m", "man", "男", "男性"), "male"),
}
FOLDERS_ENOUGH = 20  # folders in a corpus, for them to stand for its speakers in the split


@dataclass(frozen=True)
class Corpus:
    """What is the same in every row."""

    name: str
    language: str
    licence: str
    source: str


def level(cell: str) -> str:
    """low, normal or high, from the words of several corpora; another word stays as it is, in lower case."""
    return intern(_LEVELS.get(cell := cell.strip().lower(), cell))


def gender(cell: str) -> str:
    """female or male, from the words of several corpora; another word stays as it is, in lower case."""
    return intern(_GENDERS.get(cell := cell.strip().lower(), cell))


def audio_by_name(root: Path, left_out: dict[str, str]) -> dict[str, str]:
    """{name without suffix: path relative to `root`} of all audio files under it.

    Of two files of one name the first is taken, in the order of their paths; the other goes into `left_out`.
    """
    found: dict[str, str] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in PLAIN or name.startswith("."):
                continue
            path = name if relative == "." else f"{relative}/{name}"
            if not path.isprintable():
                left_out[ascii(path)] = "name holds characters that cannot be written"
            elif found.setdefault(stem, path) != path:
                left_out[path] = "same name as another file"
    return found


def split_of(group: str) -> str:
    """test and val for 5 % of the groups each, else train, by a hash: for corpora without an official split.

    Args:
        group: what stays together: a recording or a folder, where those stand for speakers, or else the clip.
    """
    place = crc32(group.encode()) % 100
    return "test" if place < 5 else "val" if place < 10 else "train"


def by_folder(paths: Iterable[str]) -> bool:
    """Whether the folders of these files are many enough to stand for speakers, and so to be split as wholes."""
    folders: set[str] = set()
    for path in paths:
        folders.add(path.rpartition("/")[0])
        if len(folders) >= FOLDERS_ENOUGH:
            return True
    return False


def unusable(name: str, caption: str) -> str:
    """Why a name or caption cannot stand in a manifest, or ""."""
    if not name or not name.isprintable():
        return "has no name, or one that cannot be written"
    return "caption is not UTF-8" if "\ufffd" in caption else ""


def row(corpus: Corpus, name: str, path: str, duration_s: float, split: str, cells: dict[str, str]) -> dict:
    """A row of the manifest; `cells` are columns of it by name, `emotion` among them, and any attributes."""
    emotion = cells.pop("emotion", "").strip()
    return {
        "utterance_id": f"{corpus.name}/{name}",
        "path": path,
        "corpus": corpus.name,
        "split": split,
        "language": corpus.language,
        "style": CAPTIONED_STYLES.get(emotion.lower(), ""),
        "style_raw": intern(emotion),
        "duration_s": round(duration_s, 4),
        "licence": corpus.licence,
        "source": corpus.source,
    } | cells


# --- corpora whose captions are a CSV


def from_csv(root: Path, corpus: Corpus, columns: dict[str, str]) -> pd.DataFrame:
    """The manifest of the CSV files under `root` that have the captions' column, one row a clip.

    A file whose name holds train, val, dev, valid or test as a word gives its rows that split, else see `split_of`.

    Args:
        columns: column of the manifest → column of the CSV. `caption` is needed, and `path` or `name`: without `path`
            the audio is the file of that name, wherever it lies; without `name` the name is the path without suffix.
            The others may be absent.
    Raises:
        CorpusError: no CSV with these columns.
    """
    files = [file for file in sorted(root.rglob("*.csv")) if _has_columns(file, columns)]
    if not files:
        needed = " and ".join(columns[key] for key in ("caption", "path", "name") if key in columns)
        raise CorpusError(f"under {root} is no CSV with columns {needed}")
    left_out: dict[str, str] = {}
    named = audio_by_name(root, left_out)
    reader = _Csv(root, corpus, columns, named, by_folder(named.values()), left_out)
    return build_manifest((made for file in files for made in reader.rows(file)), left_out)


def _has_columns(file: Path, columns: dict[str, str]) -> bool:
    if file.name.startswith("manifest"):
        return False
    first = next(csv_rows(file, header=True), None)
    return first is not None and columns["caption"] in first[1] and bool({"path", "name"} & _present(first[1], columns))


def _present(row: dict[str, str], columns: dict[str, str]) -> set[str]:
    return {key for key, column in columns.items() if column in row}


class _Csv:
    def __init__(self, root: Path, corpus: Corpus, columns: dict, named: dict, folders: bool, left_out: dict) -> None:
        self.root, self.corpus, self.columns = root, corpus, columns
        self.named, self.folders, self.left_out = named, folders, left_out
        self.folder, self.seen = Folder(root), set()

    def rows(self, file: Path) -> Iterator[dict]:
        place = file.relative_to(self.root).as_posix()
        official = re.search(r"(?<![a-z])(train|val|dev|valid|test)(?![a-z])", file.stem.lower())
        official = {"dev": "val", "valid": "val"}.get(official[1], official[1]) if official else ""
        for line, cells in csv_rows(file):
            if cells is None:
                self.left_out[f"{place} {line}"] = "malformed line"
                continue
            cells = {key: cells[column].strip() for key, column in self.columns.items() if column in cells}
            written = cells.pop("path", "")
            name = os.path.splitext(cells.pop("name", "") or written.replace("\\", "/"))[0].strip("/")
            try:
                if reason := unusable(name, cells["caption"]) or ("caption is empty" if not cells["caption"] else ""):
                    raise AudioError(reason)
                if name in self.seen:
                    raise AudioError("names a clip for the second time")
                path = self._path(written, name)
                duration_s = self.folder.header(path).duration_s
            except AudioError as error:
                self.left_out[f"{place} {line}: {name}"] = str(error)
                continue
            self.seen.add(name)
            group = path.rpartition("/")[0] if self.folders else name
            split = cells.pop("split", "").lower() or official
            yield row(self.corpus, name, path, duration_s, split if split in _SPLITS else split_of(group), _told(cells))

    def _path(self, written: str, name: str) -> str:
        """Where the clip is: at the path as written, or, if that was of another machine, at its end; or by name."""
        parts = [part for part in written.replace("\\", "/").split("/") if part not in ("", ".")]
        if ".." in parts:
            raise AudioError("leaves the corpus folder")
        for first in range(len(parts)):
            path = "/".join(parts[first:])
            if os.path.isfile(os.path.join(self.folder.root, path)):
                return path
        stem = os.path.basename(name)
        if stem not in self.named:
            raise AudioError("is not there")
        return self.named[stem]


_SPLITS = ("train", "val", "test")


def _told(cells: dict[str, str]) -> dict[str, str]:
    """Attributes in one wording; short cells, which repeat, are held once."""
    for key, cell in cells.items():
        if key in ("pitch", "energy", "tempo"):
            cells[key] = level(cell)
        elif key == "gender":
            cells[key] = gender(cell)
        elif key not in ("caption", "text"):
            cells[key] = intern(cell)
    return cells
