"""Data construction (FS-CLAP section 3.3): video and audio files -> described clips of single speakers, in a manifest.

`mine` runs it all; `stages` says what each stage reads and writes.
"""

from esr_utils.mining.media import MiningError, download, find_sources
from esr_utils.mining.pipeline import Mined, caveats, mine

__all__ = ["Mined", "MiningError", "caveats", "download", "find_sources", "mine"]
