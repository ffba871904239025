"""SpeechCraft's annotations, which Zhvoice and GigaSpeech-M come with: label JSON and description files.

Jin et al. 2024, "SpeechCraft: A Fine-Grained Expressive Speech Dataset with Natural Language Description" (ACM
Multimedia). Labels are `{"LJSpeech_LJ010-0227": {"labels": "age:Elderly\\tgender:male\\tpitch:low"}}`. Descriptions
vary: a JSON object of texts or of objects, a JSON array, JSON lines, CSV, or lines of name, blank or tab, text. All are
read, and what cannot be is reported. A file with "instruction" in its name is not: instructions quote what is
said.

Nothing is held in memory but the captions, the files' paths and the finished rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from sys import intern
from typing import Any

import pandas as pd

from esr_utils.audio_files import AudioError, Folder
from esr_utils.audio_folder import PLAIN
from esr_utils.corpora import CorpusError
from esr_utils.corpora.captioned import Corpus, audio_by_name, gender, level, row, split_of, unusable
from esr_utils.manifests import build_manifest
from esr_utils.text_tables import JsonError, csv_rows, json_items, text_lines

NAMES = ("id", "key", "name", "item_name", "utt", "utt_id", "segment_id", "file", "audio", "wav", "path")
DESCRIPTIONS = ("description", "descriptions", "caption", "desc", "style_prompt", "prompt", "描述")
# a label's name in either language → column; None: known and not kept
KEYS: dict[str, str | None] = {
    "age": "age", "年龄": "age", "gender": "gender", "性别": "gender", "pitch": "pitch", "音高": "pitch",
    "speed": "tempo", "tempo": "tempo", "语速": "tempo", "volume": "energy", "energy": "energy", "音量": "energy",
    "emotion": "emotion", "情感": "emotion", "tone": "tone", "emotion tone": "tone", "语气": "tone",
    "emphasis": "emphasis", "重读": "emphasis", "topic": "topic", "category": "topic", "topic/category": "topic",
    "transcript": "text", "text": "text", "文本": "text",
}  # fmt: skip
_PEEKED = 50  # entries by which a file is known for labels or descriptions


def prepare(root: Path, corpus: Corpus, group: Callable[[str, str], str]) -> pd.DataFrame:
    """The manifest of the clips that are labelled or described, and that have audio under `root`.

    Args:
        group: (name, path) → what stays in one split (`captioned.split_of`).
    Raises:
        CorpusError: no label and no description file.
    """
    left_out: dict[str, str] = {}
    labels, descriptions = _annotations(root, left_out)
    if not labels and not descriptions:
        raise CorpusError(f"under {root} is neither a JSON of labels nor a file of descriptions")
    captions = _captions(root, descriptions, left_out)
    files = audio_by_name(root, left_out)
    rows = _rows(root, labels, corpus, group, captions, files, left_out)
    return build_manifest(rows, left_out)


def _annotations(root: Path, left_out: dict[str, str]) -> tuple[list[Path], list[Path]]:
    """Files of labels (and perhaps descriptions), and those of descriptions alone."""
    labels, descriptions = [], []
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        for name in sorted(names):
            file = Path(folder, name)
            suffix = file.suffix.lower()
            if suffix not in (".json", ".jsonl", ".csv", ".tsv", ".txt") or name.startswith(("manifest", ".")):
                continue
            if "instruction" in name.lower():
                left_out[file.relative_to(root).as_posix()] = "instructions, which quote what is said"
            elif any(labels_of(value) is not None for _, value in islice(_items(file, ""), _PEEKED)):
                labels.append(file)
            else:
                descriptions.append(file)
    return labels, descriptions


def _items(file: Path, place: str, left_out: dict[str, str] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, what a file says of it), one at a time. What cannot be read goes into `left_out`."""
    left_out = {} if left_out is None else left_out
    suffix = file.suffix.lower()
    if suffix in (".json", ".jsonl"):
        entries = json_items(file)
    elif suffix == ".csv":
        entries = csv_rows(file)
    else:
        entries = ((line, _name_and_text(text)) for line, text in text_lines(file))
    try:
        for key, value in entries:
            if value is None:
                left_out[f"{place} {key}"] = "malformed line"
            elif isinstance(value, tuple):
                yield value
            elif isinstance(value, dict) and (own := next((value[n] for n in NAMES if n in value), None)):
                yield str(own), value
            else:
                yield key, value
    except JsonError as error:
        left_out[place] = str(error)


def _name_and_text(line: str) -> tuple[str, str] | None:
    parts = line.strip().split("\t", 1) if "\t" in line else line.strip().split(None, 1)
    parts = parts if len(parts) == 2 else line.strip().split("|", 1)
    return (parts[0].strip(), parts[1].strip()) if len(parts) == 2 else None


def labels_of(value: Any) -> str | None:
    """The labels "age:Elderly\\tgender:male" among what a file says of a clip, or None."""
    found = value.get("labels", value.get("label")) if isinstance(value, dict) else value
    if isinstance(found, list):
        found = "\t".join(part for part in found if isinstance(part, str))
    return found if isinstance(found, str) and ":" in found.partition("\t")[0] and _known(found) else None


def _known(labels: str) -> bool:
    return labels.partition(":")[0].strip().lower() in KEYS


def description_of(value: Any) -> str:
    """The description among what a file says of a clip, on one line; of several the first; or ""."""
    if isinstance(value, dict):
        value = next((value[name] for name in DESCRIPTIONS if value.get(name)), "")
    if isinstance(value, list):
        value = next((text for text in value if isinstance(text, str) and text.strip()), "")
    return " ".join(value.split()) if isinstance(value, str) else ""


def _stem(name: str) -> str:
    name = name.replace("\\", "/").rpartition("/")[2]
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PLAIN else name


def _captions(root: Path, files: list[Path], left_out: dict[str, str]) -> dict[str, str]:
    captions: dict[str, str] = {}
    for file in files:
        place = file.relative_to(root).as_posix()
        for name, value in _items(file, place, left_out):
            name, caption = _stem(name), description_of(value)
            if reason := unusable(name, caption) or ("describes nothing" if not caption else ""):
                left_out[f"{place}: {ascii(name)}"] = reason
            elif captions.setdefault(name, caption) is not caption:
                left_out[f"{place}: {name}"] = "describes a clip for the second time"
    return captions


def _rows(
    root: Path, labels: list[Path], corpus: Corpus, group: Callable, captions: dict, files: dict, left_out: dict
) -> Iterator[dict]:
    """The rows; the captions and paths go over into them, so that they are not held twice."""
    folder = Folder(root)

    def made(place: str, name: str, caption: str, cells: dict[str, str]) -> Iterator[dict]:
        stem = name if name in files else name.partition("_")[2]
        path = files.get(stem)
        reason = unusable(name, caption)
        if not reason and not path:
            reason = "has no audio file" if path is None else "names a clip for the second time"
        try:
            if reason:
                raise AudioError(reason)
            duration_s = folder.header(path).duration_s
        except AudioError as error:
            left_out[f"{place}: {ascii(name)}"] = str(error)
            if path:
                files[stem] = ""
            return
        files[stem] = ""
        cells = {"caption": caption} | cells
        yield row(corpus, name, path, duration_s, split_of(group(stem, path)), cells)

    for file in labels:
        place = file.relative_to(root).as_posix()
        for name, value in _items(file, place, left_out):
            name, told = _stem(name), labels_of(value)
            if told is None:
                left_out[f"{place}: {ascii(name)}"] = "has no labels"
                continue
            own = description_of(value) if isinstance(value, dict) else ""
            yield from made(place, name, captions.pop(name, "") or own, _cells(told, place, left_out))
    for name in list(captions):
        yield from made("descriptions", name, captions.pop(name), {})
    left_out |= dict.fromkeys(sorted(filter(None, files.values())), "neither labelled nor described")


def _cells(labels: str, place: str, left_out: dict[str, str]) -> dict[str, str]:
    """Columns of the manifest from "age:Elderly\\tgender:male". A label that is not known is reported once a file."""
    cells = {}
    for label in labels.split("\t"):
        key, colon, text = label.partition(":")
        key, text = key.strip().lower(), text.strip()
        if not colon or key not in KEYS:
            left_out[f"{place}: label {key!r}"] = "label is not known"
        elif text:
            cells[KEYS[key]] = text
    for key, text in cells.items():
        if key in ("pitch", "energy", "tempo"):
            cells[key] = level(text)
        elif key == "gender":
            cells[key] = gender(text)
        elif key in ("age", "topic"):
            cells[key] = intern(text)
    return cells
