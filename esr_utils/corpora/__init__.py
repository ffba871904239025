"""The corpora this project can read, one module each: what it is, where to get it, licence, layout.

A corpus module has ABOUT, SOURCE, LICENCE and LAYOUT (text) and `prepare(root) -> manifest`. To add one,
write the module and name it in CORPORA.

A variant reads the folder of another corpus in a second way. Its rows, ids and manifest bear its own name, so that
both can be loaded at once.
"""

from __future__ import annotations

import codecs
import io
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

CORPORA = (
    "demo", "iemocap", "esd", "expresso", "expresso-paper", "ravdess", "emodb", "nemo", "textrolspeech", "promptspeech",
    "gigaspeech-m", "zhvoice", "secap_test", "folder",
)  # fmt: skip

# variant → the corpus whose folder it reads, and what that corpus's `prepare` is told
VARIANTS: dict[str, tuple[str, dict]] = {"expresso-paper": ("expresso", {"paper_compat": True})}

DEMO_FOLDER = Path(__file__).resolve().parents[2] / "data_manifests" / "demo"


class CorpusError(ValueError):
    """A corpus that is not known, not there, or not laid out as expected; the message says what to do."""


def corpus_module(name: str) -> ModuleType:
    """The module that reads a corpus.

    Raises:
        CorpusError: unknown corpus.
    """
    if name not in CORPORA:
        raise CorpusError(
            f"unknown corpus {name!r}; known are {', '.join(CORPORA)}. For your own audio, write "
            "its manifest.csv: esr_utils.corpora.folder makes one, as data_manifests/README.md tells."
        )
    # imported when asked for: the corpus modules build manifests, and manifests.py imports this registry
    return import_module(f"esr_utils.corpora.{reading(name)[0].replace('-', '_')}")


def reading(name: str) -> tuple[str, dict]:
    """The corpus whose folder a name stands for, and what its `prepare` is told: of a variant, another's."""
    return VARIANTS.get(name, (name, {}))


def read_lines(file: Path) -> list[str]:
    """The lines of an annotation file in UTF-8, in UTF-16 with or without a byte order mark, or else in Latin-1."""
    text = _decoded(file.read_bytes())
    return [line.rstrip("\n") for line in io.StringIO(text, newline=None)]  # str.splitlines also ends lines at \x85


def _decoded(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    first, second = data[::2].count(0), data[1::2].count(0)
    if 4 * max(first, second) > len(data):  # in UTF-16 the high byte of a Latin letter is NUL
        return data.decode("utf-16-be" if first > second else "utf-16-le", errors="replace")
    data = data.replace(b"\0", b"")  # strays
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def manifest_file(corpus: str) -> str:
    """The manifest's name in the corpus folder: manifest.csv; a variant's is another, for both lie in one folder."""
    return f"manifest_{corpus}.csv" if corpus in VARIANTS else "manifest.csv"


def how_to_get(name: str) -> str:
    """Where to get a corpus, under what licence, and what its folder must look like."""
    module = corpus_module(name)
    corpus, options = reading(name)
    told = ", ".join(f"{option}={value}" for option, value in options.items())
    return (f"The folder of {corpus!r}, read with {told}. " if told else "") + (
        f"{module.ABOUT} Get it from {module.SOURCE}. Licence: {module.LICENCE}. Layout: {module.LAYOUT}."
    )


def corpus_folder(name: str, data_root: str | Path | None = None) -> Path:
    """The folder of a corpus: "demo" comes with the project, any other is `<data_root>/<name>`.

    A variant has the folder of the corpus it reads.

    Args:
        data_root: `$ESR_DATA` if None.
    Raises:
        CorpusError: no data_root, no such folder, or a folder without manifest.csv that no module can read.
    """
    if name == "demo":
        return DEMO_FOLDER
    if Path(name).name != name:
        raise CorpusError(f"corpus {name!r} must be the name of a folder in data_root, not a path")
    data_root = data_root or os.environ.get("ESR_DATA")
    if not data_root:
        raise CorpusError(
            f"corpus {name!r} needs a data_root, the folder that holds one folder per corpus: pass it, or "
            f"set $ESR_DATA. {how_to_get(name)}"
        )
    folder = Path(data_root).expanduser() / reading(name)[0]
    if not (folder / manifest_file(name)).is_file():
        corpus_module(name)
    if not folder.is_dir():
        raise CorpusError(f"there is no folder {folder}. {how_to_get(name)}")
    return folder


def prepare(name: str, root: str | Path) -> pd.DataFrame:
    """The manifest of a corpus in its original layout, not yet validated. See the corpus's own module.

    Raises:
        CorpusError: unknown corpus, or nothing of it under `root`.
    """
    manifest = corpus_module(name).prepare(Path(root), **reading(name)[1])
    if manifest.empty:
        reasons = ", ".join(f"{reason} ({n})" for reason, n in [*manifest.attrs["left_out"].items()][:3])
        left_out = f" Left out: {reasons}." if reasons else ""
        raise CorpusError(f"nothing of the corpus {name!r} is in {root}.{left_out} {how_to_get(name)}")
    return manifest
