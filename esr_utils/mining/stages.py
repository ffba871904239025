"""The stages, each of which reads files of the one before and writes its own: what it does, and of what it depends.

<run>/sound/<id>.flac         44.1 kHz, what the file sounds like
      vocals/<id>.flac        24 kHz, the voices; <id>.16k.flac: the copy that the models hear
      speech/<id>.json        funasr alone: where somebody speaks
      words/<id>.json         funasr alone: words and their times
      segments/<id>.json      pieces of speech, or sentences
      vectors/<id>.safetensors  whose voice each piece is
      speakers/<id>.json      clips: speaker, Eq. (5), kept or why not
      emotions/<id>.json      of each clip that is kept: language, emotion, event, text
      <stage>/<id>.done.json  of what the stage's files were made
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from esr_utils import weights
from esr_utils.config import MiningConfig
from esr_utils.decoding import read_range
from esr_utils.mining import annotation, segments, separation, speakers, voices
from esr_utils.mining.funasr_models import find_funasr, funasr_model
from esr_utils.mining.media import Source, extract_sound
from esr_utils.mining.segments import Segment
from esr_utils.runs import atomic_path, read_json, write_json
from esr_utils.vad import silero_version

Work = Callable[[Source], None]
# Mean cosine at which two groups are one voice. resemblyzer: chosen on episodes of RAVDESS actors; CAM++: 3D-Speaker's
# own for agglomerative clustering.
MIN_COSINE = {"silero": 0.7, "funasr": 0.3}


@dataclass(frozen=True)
class Stage:
    """One step for every file.

    Attributes:
        settings: what its files depend on beside those of the stage before: settings, and its model's content.
        outputs: what it writes of a file, from its id.
        open: a context in which its model is in memory, which gives the work to be done on a file.
    """

    name: str
    settings: dict
    outputs: tuple[str, ...]
    open: Callable[[], AbstractContextManager[Work]]


def plan(run: Path, config: MiningConfig, device: torch.device) -> list[Stage]:
    """The stages of a run, in order; no model is loaded yet.

    Raises:
        weights.WeightsError: a model is not on this machine.
    """
    stages = [_sound(run), _vocals(run, config, device)]
    stages += _silero(run, config) if config.diariser == "silero" else _funasr(run, config, device)
    stages += [_vectors(run, config, device), _speakers(run, config)]
    return stages + ([_emotions(run, config, device)] if config.emotion else [])


def model_content(folder: Path, file: Path | None = None) -> str:
    """Hex sha256 of a model folder's weights and of its small files: another model in its place is noticed."""
    kinds = (".json", ".yaml", ".mvn", ".model")
    files = [file or weights.weights_file(folder), *sorted(p for p in folder.iterdir() if p.suffix in kinds)]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {weights.file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _funasr_content(name: str, kinds: tuple[str, ...]) -> str:
    return model_content(find_funasr(name, kinds))


@contextmanager
def _no_model(work: Work | None) -> Iterator[Work | None]:
    yield work


def _sound(run: Path) -> Stage:
    def work(source: Source) -> None:
        extract_sound(source.path, run / "sound" / f"{source.id}.flac")

    return Stage("sound", {}, ("{id}.flac",), lambda: _no_model(work))


def _vocals(run: Path, config: MiningConfig, device: torch.device) -> Stage:
    settings: dict = {"separator": ""}
    if config.separator:
        folder = separation.find_separator(config.separator)
        content = model_content(folder, separation.separator_file(folder))
        settings = {"separator": content, "chunk_s": config.chunk_s}

    @contextmanager
    def opened() -> Iterator[Work]:
        separator = None
        if config.separator:
            separator = separation.load_separator(config.separator, device, config.chunk_s)

        def work(source: Source) -> None:
            home = run / "vocals"
            rates = ((".flac", separation.VOICE_RATE), (".16k.flac", separation.MODEL_RATE))
            targets = [(home / f"{source.id}{suffix}", rate) for suffix, rate in rates]
            separation.write_voices(run / "sound" / f"{source.id}.flac", separator, targets)

        yield work

    return Stage("vocals", settings, ("{id}.flac", "{id}.16k.flac"), opened)


def heard(run: Path, source: Source) -> Path:
    """The 16 kHz copy of a file's voices."""
    return run / "vocals" / f"{source.id}.16k.flac"


def _json_stage(run: Path, name: str, settings: dict, model: Callable, make: Callable) -> Stage:
    """A stage that writes one JSON: `make(model, source)`, with the model open all the while."""

    @contextmanager
    def opened() -> Iterator[Work]:
        with model() as loaded:

            def work(source: Source) -> None:
                write_json(run / name / f"{source.id}.json", make(loaded, source))

            yield work

    return Stage(name, settings, ("{id}.json",), opened)


def _read_segments(run: Path, stage: str, source: Source) -> list[Segment]:
    return [Segment(**part) for part in read_json(run / stage / f"{source.id}.json")]


def _silero(run: Path, config: MiningConfig) -> list[Stage]:
    def make(_: None, source: Source) -> list[dict]:
        return [part.to_dict() for part in segments.silero_segments(heard(run, source), config.max_clip_s)]

    settings = {"silero-vad": silero_version(), "max_clip_s": config.max_clip_s}
    return [_json_stage(run, "segments", settings, lambda: _no_model(None), make)]


def _funasr(run: Path, config: MiningConfig, device: torch.device) -> list[Stage]:
    def stage(name: str, model: str, kinds: tuple[str, ...], make: Callable) -> Stage:
        content = {"model": _funasr_content(model, kinds)}
        return _json_stage(run, name, content, lambda: funasr_model(model, kinds, device), make)

    def speech(model, source: Source) -> list[dict]:
        return [part.to_dict() for part in segments.fsmn_segments(model, heard(run, source))]

    def words(model, source: Source) -> list[dict]:
        return segments.transcribe(model, heard(run, source), _read_segments(run, "speech", source))

    def whole(model, source: Source) -> list[dict]:
        said = read_json(run / "words" / f"{source.id}.json")
        return [part.to_dict() for part in segments.punctuate(model, said)]

    return [
        stage("speech", config.vad, segments.VAD, speech),
        stage("words", config.asr, segments.ASR, words),
        stage("segments", config.punctuation, segments.PUNCTUATION, whole),
    ]


def _vectors(run: Path, config: MiningConfig, device: torch.device) -> Stage:
    silero = config.diariser == "silero"
    if silero:
        content = weights.file_sha256(voices.resemblyzer_file())
    else:
        content = _funasr_content(config.speaker_encoder, voices.CAMPLUS)

    @contextmanager
    def opened() -> Iterator[Work]:
        opening = voices.resemblyzer(device) if silero else funasr_model(config.speaker_encoder, voices.CAMPLUS, device)
        with opening as model:
            encode = model if silero else voices.CamPlus(model)

            def work(source: Source) -> None:
                parts = _read_segments(run, "segments", source)
                found = [encode(read_range(heard(run, source), part.start_s, part.end_s)) for part in parts]
                with atomic_path(run / "vectors" / f"{source.id}.safetensors") as temporary:
                    save_file({"vectors": np.stack(found) if found else np.zeros((0, 1), np.float32)}, temporary)

            yield work

    return Stage("vectors", {"model": content}, ("{id}.safetensors",), opened)


def _speakers(run: Path, config: MiningConfig) -> Stage:
    min_cosine = config.min_cosine or MIN_COSINE[config.diariser]
    names = ("merge_gap_s", "min_clip_s", "max_clip_s", "threshold", "keep_single")
    settings = {"min_cosine": min_cosine} | {name: getattr(config, name) for name in names}

    def work(source: Source) -> None:
        parts = _read_segments(run, "segments", source)
        vectors = load_file(run / "vectors" / f"{source.id}.safetensors")["vectors"]
        labels = speakers.cluster(vectors, min_cosine)
        clips, labels, vectors = speakers.merge(parts, labels, vectors, config.merge_gap_s, config.max_clip_s)
        long = np.array([clip.duration_s >= config.min_clip_s for clip in clips], dtype=bool)
        similarity = np.full(len(clips), np.nan)
        similarity[long] = speakers.mean_similarity(vectors[long], labels[long])
        kept = long & speakers.is_kept(similarity, config.threshold, config.keep_single)
        rows = zip(clips, labels.tolist(), similarity.tolist(), long, kept, strict=True)
        write_json(run / "speakers" / f"{source.id}.json", [_clip(*row) for row in rows])

    return Stage("speakers", settings, ("{id}.json",), lambda: _no_model(work))


def _clip(clip: Segment, speaker: int, similarity: float, long: bool, kept: bool) -> dict:
    single = math.isnan(similarity)
    reason = "too short" if not long else "its speaker's only clip" if single else "unlike the rest of its speaker"
    return {
        "start_s": round(clip.start_s, 4),
        "end_s": round(clip.end_s, 4),
        "text": clip.text,
        "speaker": speaker,
        "similarity": None if single else similarity,
        "left_out": "" if kept else reason,
    }


def _emotions(run: Path, config: MiningConfig, device: torch.device) -> Stage:
    def make(model, source: Source) -> list[dict]:
        clips = [clip for clip in read_json(run / "speakers" / f"{source.id}.json") if not clip["left_out"]]
        sounds = (read_range(heard(run, source), clip["start_s"], clip["end_s"]) for clip in clips)
        return [annotation.annotate(model, sound).to_dict() for sound in sounds]

    settings = {"model": _funasr_content(config.emotion, annotation.SENSEVOICE)}
    return _json_stage(
        run, "emotions", settings, lambda: funasr_model(config.emotion, annotation.SENSEVOICE, device), make
    )
