"""Embeds clips and captions by a system that has an environment of its own, and writes the embeddings file.

    python systems/embed.py clap-microsoft --manifest <corpus>/manifest.csv --split test --captions captions.csv

Needs numpy, pandas, scipy, soundfile and safetensors, and what the system needs (systems/<system>/requirements.txt);
nothing of esr_utils, which reads the file: `esr_utils.embeddings_file`. Python 3.8 is enough.

A system is a file encoder.py with LICENCE, RATE (Hz), WINDOW_S (the longest piece that it takes), CHECKPOINT (its
default, empty where one must be given) and load(checkpoint, repository, device) -> (audio, text): audio takes one
waveform (S,) float32 at RATE and gives (d,), text takes a list of sentences and gives (n, d).

A clip longer than WINDOW_S is cut into equal windows, and its vector is the mean of their unit vectors, so that all of
the clip is heard and nothing is drawn at random. A clip that cannot be used is named, and left out.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from safetensors.numpy import save
from scipy.signal import resample_poly

HERE = Path(__file__).resolve().parent
FORMAT, PROTOCOL = 1, "bi-encoder"  # as in esr_utils/embeddings_file.py; a test holds them together
TARGET_DBFS, SILENCE_DBFS, MIN_SECONDS = -26.0, -70.0, 0.025  # as in esr_utils/batches.py


def waveform(path, row, rate, level):
    """A manifest row's audio: (S,) float32, mono, at `rate` Hz.

    Raises:
        ValueError: there is nothing to be heard.
    """
    with soundfile.SoundFile(str(path)) as file:
        start = round(float(row.get("start_s") or 0) * file.samplerate)
        stop = round(float(row["end_s"]) * file.samplerate) if row.get("end_s") else file.frames
        file.seek(start)
        audio, given = file.read(stop - start, dtype="float32", always_2d=True), file.samplerate
    audio = audio[:, int(row["channel"])] if row.get("channel") else audio.mean(axis=1)
    if len(audio) < MIN_SECONDS * given:
        raise ValueError(f"{len(audio) / given:.3f} s long; the shortest allowed is {MIN_SECONDS} s")
    power = float(np.mean(np.square(audio, dtype=np.float64)))
    if not math.isfinite(power) or power < 10 ** (SILENCE_DBFS / 10):
        raise ValueError("silent, or not finite")
    if level == "normalised":
        audio = audio * math.sqrt(10 ** (TARGET_DBFS / 10) / power)
    if given != rate:
        common = math.gcd(given, rate)
        audio = resample_poly(audio, rate // common, given // common)
    return np.ascontiguousarray(audio, dtype=np.float32)


def windows(audio, longest):
    """Equal pieces of at most `longest` samples; one piece where it fits."""
    return np.array_split(audio, max(1, math.ceil(len(audio) / longest)))


def mean_direction(vectors):
    """(n, d) -> (d,) the mean of the unit vectors."""
    vectors = np.asarray(vectors, dtype=np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0).astype(np.float32)


def embed_clips(manifest, root, audio, rate, window_s, level, note):
    """Ids and vectors (N, d) of the clips that can be used; the others are told to `note`."""
    ids, vectors = [], []
    for n, row in enumerate(manifest.to_dict("records"), start=1):
        try:
            sound = waveform(Path(root) / row["path"], row, rate, level)
        except (ValueError, RuntimeError, OSError) as error:  # soundfile's errors are RuntimeErrors
            note(f"left out: {row['utterance_id']}: {error}")
            continue
        pieces = windows(sound, int(window_s * rate))
        ids.append(row["utterance_id"])
        vectors.append(mean_direction([np.asarray(audio(piece)).reshape(-1) for piece in pieces]))
        if n % 100 == 0:
            note(f"{n} of {len(manifest)} clips")
    if not ids:
        raise SystemExit(f"none of {len(manifest)} clips could be used; is --root the folder that paths start from?")
    return ids, np.stack(vectors)


def write(folder, about, utterance_vectors, caption_vectors):
    """vectors.safetensors, then embeddings.json, each put in place whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = save({"utterances": utterance_vectors, "captions": caption_vectors})
    about = {"format": FORMAT, "protocol": PROTOCOL, **about, "sha256": hashlib.sha256(tensors).hexdigest()}
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    for name, content in (("vectors.safetensors", tensors), ("embeddings.json", text.encode("utf-8"))):
        temporary = folder / f".{name}.part"
        temporary.write_bytes(content)
        os.replace(temporary, folder / name)


def read_table(path, *needed):
    """A CSV as text.

    Raises:
        SystemExit: it has not the columns that are needed.
    """
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := [column for column in needed if column not in table]:
        raise SystemExit(f"{path} has no column {', '.join(missing)}; it has {', '.join(table)}")
    return table


def encoder(system):
    """The module of a system: a name in systems/, or the path of an encoder.py; and what it is called."""
    path = Path(system) if system.endswith(".py") else HERE / system / "encoder.py"
    if not path.is_file():
        known = ", ".join(sorted(folder.parent.name for folder in HERE.glob("*/encoder.py")))
        raise SystemExit(f"no system {system!r}; there are {known}, or give the path of an encoder.py")
    spec = importlib.util.spec_from_file_location("encoder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, path.resolve().parent.name


def arguments(given):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", help="a folder of systems/, or the path of an encoder.py")
    parser.add_argument("--manifest", required=True, help="CSV: utterance_id, path, and start_s, end_s, channel, split")
    parser.add_argument("--captions", default="", help="CSV with a column caption; empty: the manifest's own")
    parser.add_argument("--root", default="", help="folder that the paths start from; empty: the manifest's")
    parser.add_argument("--split", default="", help="train, val or test; empty: all")
    parser.add_argument("--out", default="", help="folder to write; empty: runs/embeddings/<system>")
    parser.add_argument("--checkpoint", default="", help="weights; empty: the system's own default")
    parser.add_argument("--repository", default="", help="clone of the system's code, where it is not a package")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--level", default="recorded", choices=["recorded", "normalised"], help="as the others heard it"
    )
    return parser.parse_args(given)


def main(given=None):
    options = arguments(given)
    module, name = encoder(options.system)
    checkpoint = options.checkpoint or module.CHECKPOINT
    if not checkpoint:
        raise SystemExit(f"{name} needs --checkpoint: {module.__doc__}")
    manifest = read_table(options.manifest, "utterance_id", "path")
    if options.split:
        manifest = manifest[manifest["split"] == options.split]
    table = read_table(options.captions, "caption") if options.captions else manifest
    if "caption" not in table:
        raise SystemExit(f"{options.manifest} has no captions of its own: give --captions")
    captions = [text for text in dict.fromkeys(table["caption"].str.strip()) if text]
    if not captions or not len(manifest):
        raise SystemExit(f"nothing to embed: {len(manifest)} clips, {len(captions)} captions")

    def note(line):
        print(line, file=sys.stderr, flush=True)

    audio, text = module.load(checkpoint, options.repository, options.device)
    root = options.root or Path(options.manifest).resolve().parent
    ids, vectors = embed_clips(manifest, root, audio, module.RATE, module.WINDOW_S, options.level, note)
    parts = [np.asarray(text(captions[i : i + 64]), dtype=np.float32) for i in range(0, len(captions), 64)]
    out = Path(options.out or HERE.parent / "runs" / "embeddings" / name)
    about = {"system": name, "checkpoint": checkpoint, "licence": module.LICENCE, "level": options.level}
    write(out, {**about, "utterance_ids": ids, "captions": captions}, vectors, np.concatenate(parts))
    note(f"{len(ids)} of {len(manifest)} clips, {len(captions)} captions, {vectors.shape[1]} dimensions: {out}")


if __name__ == "__main__":
    main()
