"""Demo corpus: 880 synthetic English clips in 22 styles, 8 voices, 5 sentences, 0.70 h, 16 kHz mono Ogg Opus.

Where: in this project, data_manifests/demo. Licence: Apache-2.0 (voices made with Kokoro-82M).
Layout: manifest.csv, `<voice>/<voice>_<style>_<sentence>.opus`, rules.json, README.md.

Its labels are rules applied to synthetic voices, not human acting: it shows that the whole path runs, and
says nothing about human emotion.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from esr_utils.corpora import DEMO_FOLDER
from esr_utils.manifests import read_manifest

ABOUT = "Demo corpus: synthetic voices whose styles are made by rule."
SOURCE = "this project, data_manifests/demo"
LICENCE = "Apache-2.0"
LAYOUT = "manifest.csv and one folder per voice"


def prepare(root: Path = DEMO_FOLDER) -> pd.DataFrame:
    """The committed manifest, validated. Nothing is left out.

    Raises:
        FileNotFoundError, ManifestError: the folder is not whole.
    """
    manifest = read_manifest(root / "manifest.csv")
    manifest.attrs = {"left_out": {}, "left_out_files": {}}
    return manifest
