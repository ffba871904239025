"""The loop that every training runs in: epochs, validation, the best checkpoint, and a state to go on from.

What is random in an epoch follows from (seed, epoch) alone, and the state at the end of every epoch is on disk, so
that a run that was stopped, or killed, goes on with the same losses to the last bit. What a step is, and on what, is a
subclass's: `training` for styles and prompts, `fusion_training` for captions.
"""

from __future__ import annotations

import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast, gather_object
from lhotse import CutSet
from torch import nn
from tqdm.auto import tqdm

from esr_utils import batches, checkpoints, embedding, provenance, runs
from esr_utils.config import SAMPLE_RATE, ConfigError
from esr_utils.objective import Mean, Values
from esr_utils.speech import SpeechBackbone

VALIDATION = 2**31  # stands where an epoch would, in the seed of the validation's fixed texts and order


class Fitting(ABC):
    """One run's training, in one process or in several that share each batch.

    A subclass sets `objective` (whose `retriever` is the model) and `optimizer`, and says what a batch is.

    Attributes:
        config: has epochs, stage(epoch), max_steps, patience, finetune and seed.
        judged: the validation term whose lowest value is the best checkpoint.
        skipped: utterance_id -> why the clip is not used.
    """

    objective: nn.Module
    optimizer: torch.optim.Optimizer
    judged = "contrastive"

    def __init__(self, folder: Path, config, device: str) -> None:
        self.folder, self.config = folder, config
        patient = InitProcessGroupKwargs(timeout=timedelta(days=2))  # the others wait while one makes frames
        self.accelerator = Accelerator(
            mixed_precision="no", log_with="tensorboard", project_dir=folder, kwargs_handlers=[patient]
        )
        # One process may train here and there in its life, which Accelerate's own choice of device does not allow.
        self.device = self.accelerator.device if self.accelerator.num_processes > 1 else runs.pick_device(device)
        self.skipped: dict[str, str] = {}
        self.progress = checkpoints.Progress()
        runs.seed_everything(config.seed)

    @abstractmethod
    def _batches(self, split: str, rng: np.random.Generator, limit: int | None = None) -> Iterator[tuple]:
        """(batch, texts) of a split in an order drawn from rng: of each batch, this process's share."""

    def _check_crop(self, speech: SpeechBackbone, name: str) -> None:
        """Raises ConfigError: clips are cropped to more than the backbone takes."""
        if self.config.crop_s * SAMPLE_RATE > speech.max_samples:
            longest = speech.max_samples / SAMPLE_RATE
            raise ConfigError(f"crop_s is {self.config.crop_s:g}; {name} takes at most {longest:g} s")

    def _waveforms(self, cuts: CutSet) -> batches.WaveformClips:
        """Clips for a backbone that is trained."""
        workers = min(4, os.cpu_count() or 1) if self.device.type == "cuda" else 0
        return batches.WaveformClips(cuts, self.config.batch_size, self.config.crop_s, self.config.level, workers)

    def run(self) -> None:
        with provenance.held(self.folder) if self.accelerator.is_main_process else nullcontext():
            self._run()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def _run(self) -> None:
        self._resume()
        self._write_skipped()
        self.accelerator.init_trackers("tensorboard")
        config, progress = self.config, self.progress
        hidden = not self.accelerator.is_main_process
        bar = tqdm(total=config.epochs, initial=progress.epoch, desc="train", unit="epoch", disable=hidden or None)
        while not progress.finished:
            line = self._epoch()
            bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if k in ("train_contrastive", "val_contrastive")})
            bar.update()
        bar.close()

    def _epoch(self) -> dict:
        config, progress = self.config, self.progress
        started = time.perf_counter()
        stage = config.stage(progress.epoch)
        rng = runs.seed_everything(config.seed, progress.epoch + 1)
        if process := self.accelerator.process_index:  # plans are the same in all processes, dropout is not
            runs.seed_everything(config.seed, progress.epoch + 1, process)
        self.objective.train()
        if config.finetune == "frozen":
            self.objective.retriever.speech.eval()
        train = Mean()
        left = max(0, config.max_steps - progress.step) if config.max_steps else None
        for batch, texts in self._batches("train", rng, left):
            train.add(self._step(batch, texts, stage))
        validation = self.validate(stage)
        self._write_skipped()
        if not progress.step:
            raise ValueError(f"no usable training clip: {len(self.skipped)} refused, see {self.folder / 'skipped.csv'}")
        progress.epoch += 1
        line = {"epoch": progress.epoch, "step": progress.step, "stage": stage}
        line |= {f"train_{name}": value for name, value in train.means().items()}
        line |= {f"val_{name}": value for name, value in validation.items()}
        if broken := [f"{k} is {v}" for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)]:
            raise FloatingPointError(f"{', '.join(broken)} in epoch {progress.epoch}: lower the learning rate")
        tau = 1 / float(self.objective.retriever.logit_scale.detach())
        line |= {"tau": tau, "seconds": time.perf_counter() - started}
        self._judge(validation.get(self.judged))
        if self.accelerator.is_main_process:
            self._write(line)
        return line

    def _step(self, batch: dict, texts: list[str], stage: str) -> Values:
        values = self.objective.backward(batch, texts, stage)
        if values:
            self._update(values)
        return values

    def _update(self, values: Values) -> None:
        """A step of the optimiser, counted and logged."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        terms = {f"train/{name}": value for name, (value, _) in values.items()}
        self.accelerator.log(terms, step=self.progress.step)

    def validate(self, stage: str) -> dict[str, float]:
        """Mean of each term over the whole val split: the same texts, crops and order every time."""
        rng = runs.seed_everything(self.config.seed, VALIDATION)
        self.objective.eval()
        mean = Mean()
        for batch, texts in self._batches("val", rng):
            mean.add(self.objective.evaluate(batch, texts, stage))
        means = mean.means()
        # All processes must choose alike, to the last bit.
        values = broadcast(torch.tensor(list(means.values()), device=self.device))
        return dict(zip(means, values.tolist(), strict=True)) if self.accelerator.num_processes > 1 else means

    def _write_skipped(self) -> None:
        """Lists the clips that cannot be used, of all processes; those of a stopped run are kept."""
        found = gather_object([self.skipped])
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "skipped.csv"
        if path.is_file() and self.progress.epoch:
            found.insert(0, dict(pd.read_csv(path, dtype=str).itertuples(index=False, name=None)))
        self.skipped = {name: reason for part in found for name, reason in part.items()}
        if self.skipped:
            with runs.atomic_path(path) as temporary:
                embedding.skipped_table(list(self.skipped.items())).to_csv(temporary, index=False)

    def _judge(self, loss: float | None) -> None:
        """Keeps the best checkpoint, and says when the run is over."""
        config, progress = self.config, self.progress
        out_of_steps = bool(config.max_steps) and progress.step >= config.max_steps
        last = progress.epoch >= config.epochs or out_of_steps
        better = loss is not None and (progress.best_loss is None or loss < progress.best_loss)
        nothing_yet = last and progress.best_loss is None  # no val split, or stopped before the loss was on
        if better or nothing_yet:
            progress.best_loss, progress.best_epoch, progress.since_best = loss, progress.epoch, 0
            if self.accelerator.is_main_process:
                self.objective.retriever.save(self.folder / "best")
        elif loss is not None:
            progress.since_best += 1
        progress.finished = last or (config.patience > 0 and progress.since_best >= config.patience)

    def _write(self, line: dict) -> None:
        """The epoch's line, then its state, without which the line does not count."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log(
            {k.replace("_", "/", 1): v for k, v in line.items() if isinstance(v, float)}, step=self.progress.step
        )
        checkpoints.write(self.folder, self.progress, self.objective, self.optimizer)

    def _resume(self) -> None:
        self.progress = checkpoints.read(self.folder, self.objective, self.optimizer)
        metrics = self.folder / "metrics.jsonl"
        if self.accelerator.is_main_process and metrics.is_file():
            lines = metrics.read_text(encoding="utf-8").splitlines()[: self.progress.epoch]
            with runs.atomic_path(metrics) as temporary:
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        self.accelerator.wait_for_everyone()
