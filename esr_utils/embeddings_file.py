"""Vectors that another system made of clips and captions, in a file of no system's own.

Systems that cannot live in this environment (CLAP-Microsoft's package needs numpy < 2; others pin torch 1.7) enter the
same tables through it: `systems/embed.py <system>`, run in a virtual environment of the system's own, embeds a manifest
and a table of captions; here they are scored as our own vectors are.

<folder>/vectors.safetensors     utterances (N, d), captions (C, d): float32, not necessarily normalised
<folder>/embeddings.json         format, system, checkpoint, licence, level, protocol, utterance_ids (N), captions (C),
                                 sha256 of the other

The protocol is `bi-encoder`: one vector a clip and one a caption, compared by their cosine, neither seeing the other.
What a file says is checked when it is read, so that a table never holds half of a system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from esr_utils import runs

FORMAT = 1
PROTOCOL = "bi-encoder"
VECTORS, ABOUT = "vectors.safetensors", "embeddings.json"
SYSTEMS = ("clap-microsoft", "audioclip", "mga-clap", "paraspeechclap")  # each a folder of systems/
_TEXTS = ("system", "checkpoint", "licence", "level")


class EmbeddingsFileError(ValueError):
    """A file that cannot be used; the message names it, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class EmbeddingsFile:
    """Attributes:
    system, checkpoint, licence: what made the vectors, from which weights, under what terms.
    level: normalised or recorded, of the sound that it heard.
    utterance_ids: N ids of clips, unique.
    captions: C texts, unique, as they were given.
    utterance_vectors, caption_vectors: (N, d), (C, d) float32; of any length but 0.
    """

    system: str
    checkpoint: str
    licence: str
    level: str
    utterance_ids: list[str]
    captions: list[str]
    utterance_vectors: NDArray[np.float32]
    caption_vectors: NDArray[np.float32]

    def __post_init__(self) -> None:
        if problems := self._problems():
            raise EmbeddingsFileError(
                f"embeddings of {self.system or 'a system without a name'}: {'; '.join(problems)}"
            )

    def _problems(self) -> list[str]:
        found = [f"{name} is empty" for name in _TEXTS if not getattr(self, name)]
        sides = (
            ("utterance", self.utterance_ids, self.utterance_vectors),
            ("caption", self.captions, self.caption_vectors),
        )
        for side, names, vectors in sides:
            if vectors.dtype != np.float32 or vectors.ndim != 2:
                found.append(f"{side} vectors are {vectors.dtype} of shape {vectors.shape}, not float32 (n, d)")
                continue
            if len(names) != len(vectors):
                found.append(f"{len(names)} {side} names for {len(vectors)} vectors")
                continue
            if (
                repeated := sorted({name for name in names if names.count(name) > 1})
                if len(set(names)) < len(names)
                else []
            ):
                found.append(f"{side} {_few(repeated)} more than once")
            for problem, rows in (
                ("not finite", ~np.isfinite(vectors).all(axis=1)),
                ("all zeros", (vectors == 0).all(axis=1)),
            ):
                if rows.any():
                    found.append(f"{side} vectors {problem}: {_few([names[i] for i in np.flatnonzero(rows)])}")
        if not found and self.utterance_vectors.shape[1] != self.caption_vectors.shape[1]:
            dims = self.utterance_vectors.shape[1], self.caption_vectors.shape[1]
            found.append(f"utterances have {dims[0]} dimensions, captions {dims[1]}")
        return found

    def scores(self, captions: Sequence[str], utterance_ids: Sequence[str]) -> NDArray[np.float32]:
        """(captions, utterances) cosines, in the order asked for.

        Raises:
            EmbeddingsFileError: some are not in the file; it says which, and how many.
        """
        rows = _places("captions", captions, self.captions, self.system)
        columns = _places("clips", utterance_ids, self.utterance_ids, self.system)
        return _unit(self.caption_vectors[rows]) @ _unit(self.utterance_vectors[columns]).T

    def write(self, folder: str | Path) -> None:
        """Writes both files, the description last: a folder without it is not yet whole."""
        folder = Path(folder)
        tensors = save({"utterances": self.utterance_vectors, "captions": self.caption_vectors})
        with runs.atomic_path(folder / VECTORS) as temporary:
            temporary.write_bytes(tensors)
        about = {
            "format": FORMAT,
            "system": self.system,
            "checkpoint": self.checkpoint,
            "licence": self.licence,
            "level": self.level,
            "protocol": PROTOCOL,
            "utterance_ids": self.utterance_ids,
            "captions": self.captions,
            "sha256": hashlib.sha256(tensors).hexdigest(),
        }
        runs.write_json(folder / ABOUT, about)

    @classmethod
    def read(cls, folder: str | Path) -> EmbeddingsFile:
        """
        Raises:
            FileNotFoundError: it is not there; the message is `what_to_run` where the folder has a system's name.
            EmbeddingsFileError: it is damaged, or not of this form.
        """
        folder = Path(folder)
        if not (folder / ABOUT).is_file() or not (folder / VECTORS).is_file():
            hint = f": {what_to_run(folder.name)}" if folder.name in SYSTEMS else ""
            raise FileNotFoundError(f"no embeddings file in {folder}{hint}")
        about = runs.read_json(folder / ABOUT)
        tensors = (folder / VECTORS).read_bytes()
        _check(folder, about, tensors)
        try:
            vectors = load(tensors)
            vectors = [np.asarray(vectors.pop(name)) for name in ("utterances", "captions")]
        except (SafetensorError, KeyError) as error:
            raise EmbeddingsFileError(f"{folder / VECTORS}: {error}; write it again") from None
        try:
            return cls(*(about[name] for name in (*_TEXTS, "utterance_ids", "captions")), *vectors)
        except EmbeddingsFileError as error:
            raise EmbeddingsFileError(f"{folder}: {error}") from None


def what_to_run(system: str) -> str:
    """What a table's row says where a system's file is not there.

    Raises:
        ValueError: there is no script for such a system.
    """
    if system not in SYSTEMS:
        raise ValueError(f"system is {system!r}; there are scripts for {', '.join(SYSTEMS)}")
    return (
        f"not run: python systems/embed.py {system} --manifest <corpus>/manifest.csv --captions <run>/captions.csv, in "
        f"an environment of its own (systems/{system}/)"
    )


def _check(folder: Path, about: object, tensors: bytes) -> None:
    """That the description has what it must have, and is of these tensors."""
    kinds = dict.fromkeys((*_TEXTS, "protocol", "sha256"), str) | {"utterance_ids": list, "captions": list}
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise EmbeddingsFileError(f"{folder / ABOUT}: format is {found}, not {FORMAT}; write it with systems/ of today")
    if wrong := [name for name, kind in kinds.items() if not isinstance(about.get(name), kind)]:
        raise EmbeddingsFileError(f"{folder / ABOUT}: {', '.join(wrong)} missing or of the wrong type")
    if odd := [name for name in ("utterance_ids", "captions") if not all(isinstance(n, str) for n in about[name])]:
        raise EmbeddingsFileError(f"{folder / ABOUT}: {', '.join(odd)} must hold texts only")
    if about["protocol"] != PROTOCOL:
        raise EmbeddingsFileError(
            f"{folder / ABOUT}: protocol is {about['protocol']!r}; a file of vectors is {PROTOCOL}"
        )
    if hashlib.sha256(tensors).hexdigest() != about["sha256"]:
        raise EmbeddingsFileError(
            f"{folder / VECTORS} is not what {ABOUT} describes (sha256 differs); write both again"
        )


def _places(kind: str, asked: Sequence[str], known: list[str], system: str) -> list[int]:
    place = {name: i for i, name in enumerate(known)}
    if missing := [name for name in asked if name not in place]:
        raise EmbeddingsFileError(
            f"{system}: {len(missing)} of {len(asked)} {kind} are not in the file: {_few(missing)}; "
            f"run its script on this manifest and these captions"
        )
    return [place[name] for name in asked]


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + f" and {len(names) - 3} more" * (len(names) > 3)


def _unit(vectors: NDArray) -> NDArray:
    """In double precision, so that a vector of very large or small numbers keeps its direction."""
    vectors = vectors.astype(np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
