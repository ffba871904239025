"""A corpus of GigaSpeech-M's size: python benchmarks/large_corpus.py [rows]

Makes label JSON, descriptions and audio files for 670,070 clips in a temporary folder (the audio is hard links to a few
short files, so every clip has a path of its own to be checked), then times, in a process of its own each:

    ours    prepare, write_manifest, read_manifest (which validates), load_corpora, one after the other in one process
    whole   the same by json.load, pandas and pandera on whole tables, each path resolved and each header read
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ROWS = 670_070
PER_FOLDER = 1000
LINKS = 30_000  # to one file; file systems allow 65,000
WORDS = (
    "a",
    "calm",
    "young",
    "woman",
    "speaks",
    "slowly",
    "in",
    "low",
    "warm",
    "voice",
    "with",
    "energy",
    "while",
    "man",
)


def make(root: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    kinds = {"age": ("Child", "Youth adult", "Elderly"), "gender": ("Male", "Female"), "emotion": ("Happy", "Neutral")}
    kinds |= dict.fromkeys(("pitch", "volume"), ("low", "normal", "high")) | {"speed": ("slow", "normal", "fast")}
    chosen = {kind: rng.integers(len(values), size=rows) for kind, values in kinds.items()}
    words = rng.integers(len(WORDS), size=(rows, 25))
    with (root / "labels.json").open("w") as labels, (root / "descriptions.json").open("w") as descriptions:
        for file in (labels, descriptions):
            file.write("{")
        for i in range(rows):
            name, comma = f"YOU{i // 60:010d}_S{i % 60:07d}", "," * (i > 0)
            told = "\t".join(f"{kind}:{values[chosen[kind][i]]}" for kind, values in kinds.items())
            labels.write(f'{comma}\n"GigaSpeech_{name}": {json.dumps({"labels": told})}')
            told = " ".join(WORDS[w] for w in words[i])
            descriptions.write(f'{comma}\n"GigaSpeech_{name}": {json.dumps(told)}')
            folder = root / "audio" / f"{i // PER_FOLDER:04d}"
            if i % PER_FOLDER == 0:
                folder.mkdir(parents=True)
            if i % LINKS == 0:
                first = folder / f"{name}.wav"
                soundfile.write(first, 0.1 * rng.standard_normal(4000 + i % 1000), 16_000)
            else:
                os.link(first, folder / f"{name}.wav")
        for file in (labels, descriptions):
            file.write("\n}\n")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class Stages:
    """Times named stages, and says the peak of the process so far."""

    def __init__(self, who: str) -> None:
        self.who, self.started, self.total = who, time.perf_counter(), 0.0

    def done(self, stage: str, rows: int) -> None:
        seconds = time.perf_counter() - self.started
        self.total += seconds
        print(f"{self.who}: {stage}: {rows:,} rows, {seconds:.1f} s, peak memory {peak_mib():.0f} MiB", flush=True)
        self.started = time.perf_counter()


def ours(data_root: str, told) -> None:
    from esr_utils import manifests
    from esr_utils.corpora import prepare

    root = Path(data_root) / "gigaspeech-m"
    stages = Stages("ours")
    manifest = prepare("gigaspeech-m", root)
    stages.done("prepare", len(manifest))
    manifests.write_manifest(manifest, root / "manifest.csv")
    stages.done("write", len(manifest))
    del manifest
    stages.done("validate", len(manifests.read_manifest(root / "manifest.csv")))
    stages.done("load", len(manifests.load_corpora("gigaspeech-m", data_root)))
    told.put((stages.total, peak_mib()))


def whole(data_root: str, told) -> None:
    import pandas as pd

    from esr_utils.manifest_schema import COLUMNS, NUMERIC, SCHEMA

    root = Path(data_root) / "gigaspeech-m"

    def check(table: pd.DataFrame) -> None:
        SCHEMA.validate(table)
        assert table["utterance_id"].is_unique
        for path, duration_s in zip(table["path"], table["duration_s"], strict=True):
            full = (root / path).resolve()
            assert full.is_relative_to(root.resolve()) and abs(soundfile.info(full).duration - duration_s) < 0.05

    def read() -> pd.DataFrame:
        types = {column: "str" for column in COLUMNS if column not in NUMERIC} | {"channel": "Int64"}
        table = pd.read_csv(root / "whole.csv", dtype=types, keep_default_na=False, na_values={c: "" for c in NUMERIC})
        table = table.astype(dict.fromkeys(("start_s", "end_s", "duration_s"), "float64"))
        check(table)
        return table

    stages = Stages("whole")
    labels, captions = (json.loads((root / name).read_text()) for name in ("labels.json", "descriptions.json"))
    files = {file.stem: file.relative_to(root).as_posix() for file in sorted(root.rglob("*.wav"))}
    rows = []
    for name, entry in labels.items():
        path = files[name.removeprefix("GigaSpeech_")]
        about = dict(label.split(":") for label in entry["labels"].split("\t"))
        duration_s = round(soundfile.info(root / path).duration, 4)
        fixed = {"utterance_id": f"gigaspeech-m/{name}", "path": path, "corpus": "gigaspeech-m", "split": "train"}
        rows.append(dict.fromkeys(COLUMNS, "") | fixed | about | {"caption": captions[name], "duration_s": duration_s})
    table = pd.DataFrame(rows)
    for column in ("start_s", "end_s"):
        table[column] = pd.to_numeric(table[column])
    table["channel"] = pd.to_numeric(table["channel"]).astype("Int64")
    stages.done("prepare", len(table))
    check(table)
    table.to_csv(root / "whole.csv", index=False)
    stages.done("write", len(table))
    del labels, captions, files, rows, table
    stages.done("validate", len(read()))
    stages.done("load", len(read()))
    told.put((stages.total, peak_mib()))


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    context, found = multiprocessing.get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "gigaspeech-m"
        root.mkdir()
        started = time.perf_counter()
        make(root, rows)
        print(f"made {rows:,} clips in {time.perf_counter() - started:.0f} s", flush=True)
        for run in (ours, whole):
            told = context.Queue()
            process = context.Process(target=run, args=(folder, told))
            process.start()
            process.join()
            found[run.__name__] = told.get(timeout=60)
    seconds, peak = (theirs / own for own, theirs in zip(found["ours"], found["whole"], strict=True))
    for name, (total, memory) in found.items():
        print(f"{name}: all stages {total:.0f} s, peak memory {memory:.0f} MiB")
    print(f"whole / ours: {seconds:.2f} in time, {peak:.2f} in memory")


if __name__ == "__main__":
    main()
