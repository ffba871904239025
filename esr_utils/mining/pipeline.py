"""Runs the stages one after the other over all files, and puts together what they found: clips, manifest, report."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import soundfile
import torch
from tqdm.auto import tqdm

from esr_utils import runs
from esr_utils.config import MiningConfig
from esr_utils.manifests import build_manifest, write_manifest
from esr_utils.mining.annotation import Annotation, describe
from esr_utils.mining.media import MiningError, Source, find_sources
from esr_utils.mining.stages import Stage, plan
from esr_utils.prompts import PromptBank

_CLIP_COLUMNS = ["file", "id", "speaker", "start_s", "end_s", "text", "similarity", "left_out"]


@dataclass(frozen=True)
class Mined:
    """What a run found.

    Attributes:
        folder: of the run; its `manifest.csv` can be used as a corpus.
        manifest: the clips that are kept.
        clips: all clips: file, id, speaker, start_s, end_s, text, similarity (Eq. 5; NaN: a speaker's only clip), and
            why it is left out ("" if it is kept).
        stages: a row a stage: files worked on, files that were done already, failed, seconds.
        failures: a row a file that could not be used: file, stage, reason.
        files: a row a file: seconds, clips, kept, speakers.
    """

    folder: Path
    manifest: pd.DataFrame
    clips: pd.DataFrame
    stages: pd.DataFrame
    failures: pd.DataFrame
    files: pd.DataFrame


def mine(
    media: str | Path,
    run: str | Path,
    config: MiningConfig | None = None,
    device: str = "auto",
    language: str = "",
    licence: str = "",
) -> Mined:
    """Video and audio files -> a run folder with `manifest.csv` (FS-CLAP section 3.3).

    What is done is not done again: each stage notes of which file, settings and model its own were made. A file that
    cannot be used is reported and the others go on. One model is in memory at a time.

    Args:
        media: a file, or a folder with its subfolders.
        run: name of a folder under `runs/`, or a path.
        language: two letters, where SenseVoice does not say it.
        licence: of the audio, for the manifest.

    Raises:
        MiningError: there is no media, or none of it could be used.
        weights.WeightsError: a model is missing or damaged; the message says what to do.
    """
    folder, config = runs.run_folder(run), config or MiningConfig()
    stages = plan(folder, config, runs.pick_device(device))
    sources = [source for source in find_sources(media) if not source.path.is_relative_to(folder)]
    if not sources:
        raise MiningError(f"{media} holds nothing but the run folder {folder} itself")
    runs.write_json(folder / "config.json", {"mining": config.to_dict(), "versions": runs.versions()})
    failures: list[dict] = []
    report: list[dict] = []
    keys = {source.id: _key("source", source.identity) for source in sources}
    alive = sources
    for stage in stages:
        alive = _run_stage(stage, folder / stage.name, alive, keys, failures, report)
    mined = _collect(folder, sources, alive, bool(config.emotion), language, licence, report, failures)
    for name in ("clips", "stages", "failures", "files"):
        with runs.atomic_path(folder / f"{name}.csv") as temporary:
            getattr(mined, name).to_csv(temporary, index=False)
    if not alive:
        reasons = "; ".join(f"{row['file']}: {row['reason']}" for row in failures[:5])
        raise MiningError(f"none of {len(sources)} files could be used (all: {folder / 'failures.csv'}): {reasons}")
    write_manifest(mined.manifest, folder / "manifest.csv")
    return mined


def caveats(config: MiningConfig) -> list[str]:
    """What a run with these settings does not do, in plain words."""
    said = []
    if not config.separator:
        said.append("No separator: music and noise under the voices stay there.")
    if config.diariser == "silero":
        said.append(
            "resemblyzer's vectors have no negative part, so Eq. (5) cannot fall below 0.5, and its threshold leaves "
            "out little; 0.65 was set for CAM++ (diariser funasr)."
        )
        said.append("silero-vad cuts at pauses, not at the ends of sentences, and nothing is transcribed.")
    if not config.emotion:
        said.append("No emotion model: clips have no style and no description.")
    return said


def _run_stage(
    stage: Stage, home: Path, alive: list[Source], keys: dict[str, str], failures: list[dict], report: list[dict]
) -> list[Source]:
    """Does what is not done yet, and returns the files that go on; `keys` become those of this stage."""
    began, failed = time.perf_counter(), set()
    for source in alive:
        keys[source.id] = _key(stage.name, stage.settings, keys[source.id])
    waiting = [source for source in alive if not _is_done(stage, home, source, keys[source.id])]
    if waiting:
        with stage.open() as work:
            for source in tqdm(waiting, desc=stage.name, unit="file", leave=False):
                try:
                    work(source)
                    _note_done(stage, home, source, keys[source.id])
                except Exception as error:  # whatever is wrong with one file, the others go on
                    reason = str(error) or type(error).__name__
                    failures.append({"file": source.name, "stage": stage.name, "reason": reason})
                    failed.add(source.id)
        del work
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    counts = {"files": len(waiting), "done before": len(alive) - len(waiting), "failed": len(failed)}
    report.append({"stage": stage.name, **counts, "seconds": round(time.perf_counter() - began, 2)})
    return [source for source in alive if source.id not in failed]


def _key(*parts: object) -> str:
    return runs.text_sha256(json.dumps(parts, sort_keys=True))


def _note(home: Path, source: Source) -> Path:
    return home / f"{source.id}.done.json"


def _stamps(stage: Stage, home: Path, source: Source) -> dict[str, list[int]]:
    files = [home / name.format(id=source.id) for name in stage.outputs]
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _is_done(stage: Stage, home: Path, source: Source, key: str) -> bool:
    """Made of the same file by the same settings and models, and not touched since."""
    try:
        return runs.read_json(_note(home, source)) == {"key": key, "files": _stamps(stage, home, source)}
    except (OSError, ValueError):
        return False


def _note_done(stage: Stage, home: Path, source: Source, key: str) -> None:
    runs.write_json(_note(home, source), {"key": key, "files": _stamps(stage, home, source)})


def _collect(
    folder: Path,
    sources: list[Source],
    alive: list[Source],
    described: bool,
    language: str,
    licence: str,
    report: list[dict],
    failures: list[dict],
) -> Mined:
    corpus, bank = re.sub(r"[^\w.-]+", "-", folder.name), PromptBank.load()
    rows, clips, files = [], [], []
    for source in alive:
        found = list(_clips(folder, source, described))
        clips += [clip for clip, _ in found]
        for clip, heard in found:
            if not clip["left_out"]:
                rows.append(_row(clip, heard, source, corpus, bank) | {"licence": licence})
        kept = [clip for clip, _ in found if not clip["left_out"]]
        files.append(
            {
                "file": source.name,
                "id": source.id,
                "seconds": round(soundfile.info(folder / "vocals" / f"{source.id}.flac").duration, 2),
                "clips": len(found),
                "kept": len(kept),
                "speakers": len({clip["speaker"] for clip in kept}),
            }
        )
    manifest = build_manifest(rows, {})
    if language:
        manifest["language"] = manifest["language"].replace("", language)
    return Mined(
        folder,
        manifest,
        pd.DataFrame(clips, columns=_CLIP_COLUMNS).astype({"similarity": float}),
        pd.DataFrame(report),
        pd.DataFrame(failures, columns=["file", "stage", "reason"]),
        pd.DataFrame(files, columns=["file", "id", "seconds", "clips", "kept", "speakers"]),
    )


def _clips(folder: Path, source: Source, described: bool) -> Iterator[tuple[dict, Annotation]]:
    """The clips of a file, and what was heard in each that is kept."""
    emotions = iter(runs.read_json(folder / "emotions" / f"{source.id}.json") if described else [])
    for i, clip in enumerate(runs.read_json(folder / "speakers" / f"{source.id}.json")):
        heard = Annotation(**next(emotions)) if described and not clip["left_out"] else Annotation()
        names = {"file": source.name, "id": f"{source.id}_{i:04d}", "speaker": f"{source.id}-{clip['speaker']}"}
        yield clip | names, heard


def _row(clip: dict, heard: Annotation, source: Source, corpus: str, bank: PromptBank) -> dict:
    """A manifest row. The audio is a range of the file's voices; all are of the train split, for they have no truth."""
    utterance_id = f"{corpus}/{clip['id']}"
    return {
        "utterance_id": utterance_id,
        "path": f"vocals/{source.id}.flac",
        "corpus": corpus,
        "split": "train",
        "speaker": clip["speaker"],
        "language": heard.language,
        "style": heard.style,
        "style_raw": heard.emotion,
        "caption": describe(heard.style, utterance_id, bank),
        "text": clip["text"] or heard.text,
        "start_s": clip["start_s"],
        "end_s": clip["end_s"],
        "duration_s": clip["end_s"] - clip["start_s"],
        "source": source.name,
        "similarity": "" if clip["similarity"] is None else f"{clip['similarity']:.4f}",
        "event": heard.event,
    }
