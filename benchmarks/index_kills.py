"""Kills a process that refreshes an index at random moments, reruns it, counts: python benchmarks/index_kills.py 200

Before each kill some files are changed, added and removed, and now and then the index is thrown away, so that making it
is interrupted too. After the kill the index is opened as the kill left it, and then
refreshed to the end. Lost is a moment that is not there after the rerun, doubled one that is there more than once, also
in what a search would not read. Vectors are made of the files' bytes, so a moment of old content is noticed too.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from esr_utils import index_table
from esr_utils.index_rows import Embedded, File, IndexUnusable
from esr_utils.index_table import IndexTable

FILES, DIM = 30, 16


def embedded(file: File) -> Embedded:
    """As many moments as the first byte says, with vectors made of the others."""
    content = file.path.read_bytes()
    n = content[0] % 8
    vectors = np.random.default_rng(list(content)).standard_normal((n, DIM))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    start = np.arange(n, dtype=float)
    return Embedded(file, pd.DataFrame({"start_s": start, "end_s": start + 1, "channel": 0}), vectors)


def refresh(folder: Path, pause_s: float = 0.0) -> None:
    """Brings the index up to date, a commit for every few files."""
    index_table._COMMIT_ROWS = 16

    def slowly(files):
        for file in files:
            time.sleep(pause_s)
            yield embedded(file)

    found = [(f"audio/{path.name}", path) for path in (folder / "audio").iterdir()]
    IndexTable.create_named(folder / "index", "made of bytes", DIM).refresh("audio", found, slowly)


def change(folder: Path, rng: random.Random) -> None:
    """About a third of the files are written anew, one is removed, one is touched, one is added."""
    audio = folder / "audio"
    for path in sorted(audio.iterdir()):
        if rng.random() < 0.3:
            path.write_bytes(rng.randbytes(32))
    for path in rng.sample(sorted(audio.iterdir()), 1):
        path.unlink()
    rng.choice(sorted(audio.iterdir())).touch()
    (audio / f"{rng.randbytes(6).hex()}'\n\".wav").write_bytes(rng.randbytes(32))


def rows(folder: Path) -> list[tuple]:
    """(file, start, vector) of every row of the table but the entries, dead ones included."""
    table = IndexTable.open_named(folder / "index").table.to_arrow().to_pylist()
    return [(row["file"], row["start_s"], tuple(row["vector"])) for row in table if row["written"] == 0]


def wanted(folder: Path) -> list[tuple]:
    made = [embedded(File(f"audio/{path.name}", path, 0, 0, "")) for path in (folder / "audio").iterdir()]
    return [
        (one.file.key, float(start), tuple(vector.astype(np.float16)))
        for one in made
        for start, vector in zip(one.moments["start_s"], one.vectors, strict=True)
    ]


def version(folder: Path) -> int:
    """Of the table; 0 where there is none."""
    try:
        return IndexTable.open_named(folder / "index").table.version
    except IndexUnusable:
        return 0


def torn(folder: Path) -> int:
    """Files whose entry and moments disagree, right after the kill."""
    if not version(folder):
        return 0
    table = IndexTable.open_named(folder / "index")
    entries, dead, _ = table.entries()
    live = table.table.to_pandas().query("written == 0 and version not in @dead").groupby("file").size()
    return int((live.reindex(entries.index).fillna(0) != entries["file_moments"]).sum())


def main(kills: int) -> int:
    rng, context = random.Random(0), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["esr_utils.index_table", "lance_namespace", "pyarrow.dataset"]
    )  # not lancedb: threads
    folder = Path(tempfile.mkdtemp())
    (folder / "audio").mkdir()
    for i in range(FILES):
        (folder / "audio" / f"{i}.wav").write_bytes(rng.randbytes(32))
    lost = doubled = disagreeing = killed = 0
    for _ in range(kills):
        change(folder, rng)
        if rng.random() < 0.1:
            shutil.rmtree(folder / "index", ignore_errors=True)
        process = context.Process(target=refresh, args=(folder, 0.01))
        before = version(folder)
        process.start()
        for _ in range(rng.randrange(6)):  # commits that it is left to make
            while process.is_alive() and version(folder) == before:
                time.sleep(0.001)
            before = version(folder)
        time.sleep(rng.random() * 0.02)
        killed += process.is_alive()
        process.kill()
        process.join()
        disagreeing += torn(folder)
        refresh(folder)
        there, should = rows(folder), wanted(folder)
        lost += len(set(should) - set(there))
        doubled += len(there) - len(set(there)) + len(set(there) - set(should))
    shutil.rmtree(folder)
    print(f"{kills} refreshes, {killed} of them killed before their end, each followed by a rerun: {lost} moments "
          f"lost, {doubled} doubled or left over; {disagreeing} files torn when killed", flush=True)  # fmt: skip
    return int(lost + doubled + disagreeing > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
