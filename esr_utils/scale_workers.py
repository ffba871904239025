"""What a worker of `scale` does: it holds a retriever, and makes of files what the single process makes of them.

Nothing here knows Ray, which calls a worker with one batch after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from esr_utils.audio_folder import absolute_path
from esr_utils.index import model_id, of_clips, stated
from esr_utils.index_rows import Changes, Embedded, IndexUnusable, Report, first_line
from esr_utils.listening import Embedder
from esr_utils.manifest_schema import ManifestError
from esr_utils.recordings import load_retriever

if TYPE_CHECKING:
    from lhotse import CutSet


@dataclass
class Done:
    """What was made of a batch.

    Attributes:
        keys: of its files.
        report: of these.
        seconds: of audio.
    """

    keys: list[str]
    embedded: list[Embedded] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    seconds: float = 0.0


class Worker:
    """A process with a retriever of its own. Of a batch that fails, the files are tried by themselves."""

    def __init__(self, run: str, about: dict[str, Any], threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self.model, _, _ = load_retriever(run, device)
        self.model.eval()
        self.about = about
        if (found := model_id(self.model)) != about["model"]:
            raise IndexUnusable(f"the index was made by model {about['model']!r}, and {run} holds {found!r}")

    def __call__(self, batch: pd.DataFrame) -> pd.DataFrame:
        """Args: batch: rows with a column `key`. Returns one row with a column `done`."""
        done = Done(batch["key"].unique().tolist())
        try:
            self.embed(batch, done)
        except Exception as error:
            if len(done.keys) > 1:
                raise
            done = Done(done.keys)
            done.report.left_out[done.keys[0]] = f"failed: {type(error).__name__}: {first_line(error)}"
        return pd.DataFrame({"done": [done]})

    def embed(self, batch: pd.DataFrame, done: Done) -> None:
        """Notes in `done` what was made of a batch."""
        raise TypeError(f"{type(self).__name__} does not define embed")


class Listener(Worker):
    """Recordings to moments."""

    def embed(self, batch: pd.DataFrame, done: Done) -> None:
        files = Changes(new=[(key, absolute_path(key)) for key in done.keys])
        embedder = Embedder(self.model, self.about, done.report)
        done.embedded.extend(embedder(files.to_embed()))
        done.report.left_out |= dict(files.unreadable)
        done.seconds = embedder.heard_s


class Clips(Worker):
    """A manifest's clips; all those of a file are in one batch."""

    def embed(self, batch: pd.DataFrame, done: Done) -> None:
        from esr_utils.embedding import embed

        cuts, problems = self._cuts(batch)
        found = embed(self.model, cuts, self.about["level"], cache=None)
        clips = batch.drop(columns="key").reset_index(drop=True)
        key_of = dict(zip(batch["utterance_id"], batch["key"], strict=True))
        for utterance_id, reason in found.skipped.itertuples(index=False):
            problems.setdefault(key_of[utterance_id], []).append(f"{utterance_id}: {reason}")
        made = {one.file.key: one for one in of_clips(clips, found)}
        for key in done.keys:
            none = Embedded(stated(key), clips[:0], np.zeros((0, self.model.config.dim), np.float32))
            done.embedded.append(replace(made.get(key, none), problem="; ".join(problems.get(key, []))))
        done.report.problems |= {one.file.key: one.problem for one in done.embedded if one.problem}
        done.seconds = float(clips["duration_s"].sum())
        done.report.embedded = len(made)
        done.report.moments = len(found.utterance_ids)
        done.report.speech_s = float(clips.set_index("utterance_id")["duration_s"][found.utterance_ids].sum())

    @staticmethod
    def _cuts(batch: pd.DataFrame) -> tuple[CutSet, dict[str, list[str]]]:
        """Cuts of the clips whose audio is there, and what is wrong with that of the others, by file."""
        from lhotse import CutSet

        from esr_utils.manifests import to_cuts

        cuts, problems = [], {}
        for key, clips in batch.drop(columns="key").groupby(batch["key"], sort=False):
            try:
                cuts.extend(to_cuts(clips))
            except ManifestError as error:
                problems[key] = [f"{one.utterance_id}: {one.reason}" for one in error.problems]
        return CutSet.from_cuts(cuts), problems
