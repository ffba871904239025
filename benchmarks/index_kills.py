"""Kills `esr index` at random moments, runs it again, counts: python benchmarks/index_kills.py [kills] [run folder]

Before each kill recordings are added, changed, renamed, touched and removed, and given other labels; now and then the
index is thrown away, so that making it is interrupted too. The moment is drawn over the time in which the command is at
work, as learnt from those that came to their end. Right after the kill all that was there before of recordings that
have not changed must be there still; after the rerun the index must be what one made afresh is. Lost is a moment that
is not there, doubled one that is there twice or left over, also in what a search would not read.

Each command is `cli.main` in a process of its own, forked from a server that has imported torch and done nothing else:
a new interpreter would spend most of its time on imports, where a kill says nothing. What waits for a commit is cut
down to some seconds of speech, so that one of half a minute is written in as many steps as one of hours is otherwise.
Recordings are clips of the demo corpus, the retriever is the default one with heads that are not trained. Needs Linux.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pandas as pd
import soundfile

from esr_utils import manifests, runs
from esr_utils.audio_folder import absolute_key
from esr_utils.index_rows import IndexUnusable, moment_id
from esr_utils.index_table import IndexTable, matrix

KILLS, FILES, RATE = 200, 8, 16_000
CLIPS = [1, 2, 3, 4, 5, 6, 8, 12]  # in each of the recordings that the files are copies of: 3 s to 40 s
DRAWN = (0.5, 1.15)  # of the time that the command takes, which is half start-up; past its end, to see how lo


def esr(arguments: list[str], log: Path) -> None:
    """In a process of its own: the command, writing as often as it otherwise does in hours."""
    import torch

    from esr_utils import cli, index_writing, listening

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    listening.POOL_S, listening.PART_S, index_writing._COMMIT_ROWS, index_writing._COMMIT_S = 8.0, 0.05, 4, 0.1
    index_writing._SMALL_FRAGMENTS = index_writing._OLD_VERSIONS = 4
    index_writing._READ_S = 1.0
    sys.exit(cli.main(arguments))


@dataclass
class World:
    """A folder of recordings, and what an index of it must hold.

    Attributes:
        files: by name which recording each is a copy of.
        speakers: by name, perhaps empty.
        made: of each recording start_s, end_s and vector of its moments.
    """

    folder: Path
    run: str
    rng: random.Random
    files: dict[str, int] = field(default_factory=dict)
    speakers: dict[str, str] = field(default_factory=dict)
    made: list[list[tuple[float, float, np.ndarray]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.audio, self.index, self.originals = (self.folder / name for name in ("audio", "index", "originals"))
        self.context = multiprocessing.get_context("forkserver")
        modules = ["torch", "torchaudio", "esr_utils.recordings", "esr_utils.cli", "lance_namespace", "pyarrow.dataset"]
        models = [f"transformers.models.{name}.modeling_{name}" for name in ("whisper", "bert")]
        self.context.set_forkserver_preload(modules + models)  # not lancedb: it starts threads, which a fork loses

    def start(self, places: Path, index: Path) -> multiprocessing.Process:
        arguments = ["index", str(places), "--index", str(index), "--run", self.run]
        process = self.context.Process(target=esr, args=(arguments, self.folder / "log"))
        process.start()
        return process

    def finish(self, places: Path, index: Path) -> float:
        """Runs the command to its end; the seconds it took."""
        started, process = time.monotonic(), self.start(places, index)
        process.join()
        self.check(process)
        return time.monotonic() - started

    def check(self, process: multiprocessing.Process) -> None:
        """That it has done its work."""
        if process.exitcode:
            sys.exit(f"esr index ended with {process.exitcode}:\n{(self.folder / 'log').read_text()}")

    def record(self) -> None:
        """Writes the recordings, and learns their moments from an index that nothing disturbs."""
        self.originals.mkdir(), self.audio.mkdir()
        clips = iter(list(manifests.to_cuts(manifests.load_corpora("demo").sample(sum(CLIPS), random_state=0))))
        for number, n in enumerate(CLIPS):
            parts = [soundfile.read(next(clips).recording.sources[0].source, dtype="float32")[0] for _ in range(n)]
            samples = np.concatenate([np.pad(part, (RATE // 4, RATE // 4)) for part in parts])
            soundfile.write(self.originals / f"{number}.flac", samples, RATE)
        self.finish(self.originals, self.folder / "learnt")
        rows = moments(self.folder / "learnt")
        for number in range(len(CLIPS)):
            of = rows[rows["file"] == absolute_key(self.originals / f"{number}.flac")].sort_values("start_s")
            self.made.append(list(zip(of["start_s"], of["end_s"], of["vector"], strict=True)))
        assert all(self.made), "a recording without speech"
        for i in range(FILES):
            self.write(f"{i}.flac")

    def write(self, name: str) -> None:
        self.files[name] = self.rng.randrange(len(CLIPS))
        shutil.copy(self.originals / f"{self.files[name]}.flac", self.audio / name)

    def change(self) -> set[str]:
        """The names of those that stay as they are, but for their time or labels."""
        rng, before, same = self.rng, sorted(self.files), set(self.files)
        for name in rng.sample(before, max(0, len(before) - FILES) + rng.randrange(2)):
            (self.audio / name).unlink()
            del self.files[name]
        for name in sorted(self.files):
            if (drawn := rng.random()) < 0.25:
                self.write(name)
                same.discard(name)
            elif drawn < 0.4:
                (self.audio / name).touch()
        odd = rng.choice(["", "'", '"', "\n", "%41", " é", os.fsdecode(b"\xe9")])
        self.write(f"{rng.randbytes(4).hex()}{odd}.flac")
        if rng.random() < 0.5:
            self.speakers = {name: rng.choice(["anna", "ben", ""]) for name in self.files if _is_text(name)}
        with (self.audio / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            named = [name for name in self.files if _is_text(name)]
            csv.writer(file).writerows([("path", "speaker"), *((name, self.speakers.get(name, "")) for name in named)])
        return same & set(self.files)

    def wanted(self, names) -> dict[str, tuple[str | None, np.ndarray]]:
        """Speaker and vector of each moment of some files, by its id."""
        found = {}
        for name in names:
            key, speaker = absolute_key(self.audio / name), self.speakers.get(name) or None
            for start, end, vector in self.made[self.files[name]]:
                found[moment_id(key, None, start, end)] = speaker, vector
        return found


def _is_text(name: str) -> bool:
    return not any("\udc80" <= letter <= "\udcff" for letter in name)


def moments(index: Path, dead: bool = True) -> pd.DataFrame:
    """All moments, or those that count; none of what is no index yet."""
    try:
        table = IndexTable.open_named(index)
    except IndexUnusable:
        return pd.DataFrame(columns=["id", "file", "speaker", "vector"])
    _, versions, _ = table.entries()
    found = table.table.to_arrow()
    vectors = matrix(found["vector"].fill_null([0.0] * table.about["dim"]), table.about["dim"]).astype(np.float32)
    rows = found.drop_columns("vector").to_pandas().assign(vector=list(vectors))
    return rows[(rows["written"] == 0) & (dead | ~rows["version"].isin(versions))]


def compared(rows: pd.DataFrame, wanted: dict[str, tuple[str | None, np.ndarray]]) -> tuple[int, int]:
    """Moments that are lost, or have another vector or speaker than they should; and those that are too many."""
    lost = len(wanted.keys() - set(rows["id"]))
    for moment, speaker, vector in zip(rows["id"], rows["speaker"], rows["vector"], strict=True):
        if moment in wanted:
            same_speaker = wanted[moment][0] == (None if pd.isna(speaker) else speaker)
            lost += not (same_speaker and float(vector @ wanted[moment][1]) > 0.999)
    return lost, len(rows) - len(wanted.keys() & set(rows["id"]))


def version(index: Path) -> int:
    """Of the table: every commit raises it; 0 where there is none."""
    try:
        return IndexTable.open_named(index).table.version
    except IndexUnusable:
        return 0


def main(kills: int, run: str, folder: Path) -> int:
    rng = random.Random(0)
    world = World(folder, run or _untrained(folder), rng)
    world.record()
    world.finish(world.audio, world.index)
    world.change()
    takes = world.finish(world.audio, world.index)
    hit = attempts = lost = doubled = gone = between = 0
    while hit < kills:
        attempts += 1
        same = world.change()
        if thrown := rng.random() < 0.1:
            shutil.rmtree(world.index)
        before, started, process = version(world.index), time.monotonic(), world.start(world.audio, world.index)
        process.join(takes * rng.uniform(*DRAWN))
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            world.check(process)
            takes += 0.3 * (time.monotonic() - started - takes)
        else:
            hit += 1
            between += version(world.index) > before
        if not thrown:
            ids = set(moments(world.index, dead=False)["id"])
            gone += len(world.wanted(same).keys() - ids)
        world.finish(world.audio, world.index)
        more = compared(moments(world.index), world.wanted(world.files))
        lost, doubled = lost + more[0], doubled + more[1]
        if hit % 20 == 0 or any(more):
            print(f"  {hit} kills, {lost} lost, {doubled} doubled", file=sys.stderr, flush=True)
    world.finish(world.audio, folder / "afresh")
    afresh = moments(folder / "afresh").set_index("id")
    wanted = {row.Index: (None if pd.isna(row.speaker) else row.speaker, row.vector) for row in afresh.itertuples()}
    last = compared(moments(world.index), wanted)
    print(f"{hit} kills of esr index ({attempts} tried, {between} between its commits), each followed by a rerun: "
          f"{lost} moments lost, {doubled} doubled; {gone} gone from kill to rerun")  # fmt: skip
    print(f"beside an index made afresh, of {len(wanted)} moments: {last[0]} lost, {last[1]} doubled", flush=True)
    return int(lost + doubled + gone + sum(last) > 0)


def _untrained(folder: Path) -> str:
    from esr_utils.config import ModelConfig
    from esr_utils.retriever import StyleRetriever

    StyleRetriever.build(ModelConfig()).save(folder / "run" / "best")
    runs.write_json(folder / "run" / "config.json", {"training": {"level": "normalised"}})
    return str(folder / "run")


if __name__ == "__main__":
    kills, run = [*sys.argv[1:], *(str(KILLS), "")[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(int(kills), run, Path(temporary)))
