"""SECap's test set: 600 clips of Mandarin, each with a free description of its emotion, 0.8 h, 16 kHz.

Xu et al. 2024, "SECap: Speech Emotion Captioning with Large Language Model" (AAAI).
Where: thuhcsi/SECap on GitHub, its folder `dataset`. Licence: none is stated.
Layout: `dataset/fid2captions.json` ({name: caption}), `dataset/text.txt` (name, blank or tab, text) and
`dataset/wav/<name>.wav`.

All of it is test. Captions are Mandarin, of which MiniLM knows nothing: score with a multilingual text backbone from a
folder. Neither speakers nor styles are named.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from esr_utils.audio_files import AudioError, Folder
from esr_utils.corpora import CorpusError
from esr_utils.corpora.captioned import Corpus, audio_by_name, row, unusable
from esr_utils.manifests import build_manifest
from esr_utils.text_tables import JsonError, json_items, text_lines

ABOUT = "SECap's test set: Mandarin speech with descriptions of its emotion."
SOURCE = "thuhcsi/SECap on GitHub"
LICENCE = "unstated (no licence file in repository)"
LAYOUT = "fid2captions.json, text.txt and wav/<name>.wav, in the folder or in dataset/ within it"

CAPTIONS = "fid2captions.json"


def prepare(root: Path) -> pd.DataFrame:
    """The manifest of the clips that fid2captions.json names. See `build_manifest` for what is left out.

    Raises:
        CorpusError: no fid2captions.json.
    """
    file = next(iter(sorted(root.rglob(CAPTIONS))), None)
    if file is None:
        raise CorpusError(f"there is no {CAPTIONS} under {root}. {ABOUT} Get it from {SOURCE}. Layout: {LAYOUT}.")
    left_out: dict[str, str] = {}
    files, texts = audio_by_name(root, left_out), _texts(file.with_name("text.txt"), left_out)
    corpus, folder = Corpus("secap_test", "zh", LICENCE, SOURCE), Folder(root)
    rows: dict[str, dict] = {}
    try:
        for name, caption in json_items(file):
            caption = caption.strip() if isinstance(caption, str) else ""
            reason = unusable(name, caption) or ("has no caption" if not caption else "")
            reason = reason or ("names a clip for the second time" if name in rows else "")
            try:
                if reason or name not in files:
                    raise AudioError(reason or "has no audio file")
                duration_s = folder.header(files[name]).duration_s
            except AudioError as error:
                left_out[f"{CAPTIONS}: {ascii(name)}"] = str(error)
                continue
            cells = {"caption": caption, "text": texts.get(name, "")}
            rows[name] = row(corpus, name, files[name], duration_s, "test", cells)
    except JsonError as error:
        left_out[CAPTIONS] = str(error)
    left_out |= {path: "has no caption" for name, path in files.items() if name not in rows and path not in left_out}
    return build_manifest([rows[name] for name in sorted(rows)], left_out)


def _texts(file: Path, left_out: dict[str, str]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for line, content in text_lines(file) if file.is_file() else ():
        name, *text = content.split(None, 1)
        if not text or "\ufffd" in content:
            left_out[f"{file.name} {line}"] = "malformed line"
        else:
            texts.setdefault(name, text[0].strip())
    return texts
