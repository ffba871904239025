"""FS-CLAP's training (section 4.2), and its baselines': clips and their captions; `fitting` has the loop."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lhotse.cut import Cut

from esr_utils import batches, captions, checkpoints, embedding, provenance, retriever, runs
from esr_utils.config import ConfigError, FusionConfig, FusionTrainConfig
from esr_utils.fitting import Fitting
from esr_utils.fusion import FusionRetriever
from esr_utils.fusion_objective import FusionObjective
from esr_utils.manifests import to_cuts
from esr_utils.objective import Values
from esr_utils.text import TextBackbone


def fit(
    manifest: pd.DataFrame,
    captioned: captions.Captioned,
    run: str | Path,
    model_config: FusionConfig | None = None,
    config: FusionTrainConfig | None = None,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> FusionRetriever:
    """Trains on the manifest's train split, chooses on its val split, and returns the best retriever.

    As `training.fit`: the run folder, going on where a run was, what "best" is. In each epoch a clip is seen once, with
    one of its captions, drawn anew.

    Args:
        manifest: rows of `manifests.load_corpora`, with their `root`.
        captioned: of `captions.of_manifest`. Held-out captions, and those of the test split, are not used.
        run: name or path of the run folder.

    Raises:
        provenance.RunExists: the folder holds a run with other settings, or another process trains it.
        ConfigError: settings that do not go together or name what is not there.
        ValueError: no usable training clip with a caption, captions that the text backbone cannot read, or no such
            device.
        FloatingPointError: a loss is no longer a number.
    """
    model_config, config = model_config or FusionConfig(), config or FusionTrainConfig()
    folder, place = runs.run_folder(run), runs.pick_device(device)
    begin(manifest, captioned, folder, model_config, config)
    if not checkpoints.finished(folder):
        _Trainer(manifest, captioned, folder, model_config, config, device, cache).run()
    return FusionRetriever.load(folder / "best", place)


def begin(
    manifest: pd.DataFrame,
    captioned: captions.Captioned,
    folder: Path,
    model_config: FusionConfig,
    config: FusionTrainConfig,
) -> None:
    """`provenance.begin` for a run on captions."""
    captions.check_language(captioned.table, model_config.text_backbone)
    provenance.begin(manifest, folder, model_config, config, _learned(manifest, captioned))


@functools.lru_cache(maxsize=1)
def _text_backbone(name: str) -> TextBackbone:
    """One for all trainings of a grid, since it is frozen: what it made of the captions stays with it."""
    return retriever.load_text_backbone(name)


def _teacher(run: str, folder: Path, model_config: FusionConfig, device: torch.device) -> FusionRetriever:
    """The teacher of the run in `folder`, which reads the same frames.

    Raises:
        weights.WeightsError: it is not there.
        ConfigError: it reads others.
    """
    beside = (folder / run).resolve()
    teacher = FusionRetriever.load((beside if beside.is_dir() else runs.run_folder(run)) / "best", device)
    for name in ("speech_backbone", "frames_per_token"):
        if (theirs := getattr(teacher.config, name)) != (ours := getattr(model_config, name)):
            raise ConfigError(f"teacher {run}: its {name} is {theirs!r}, the run's {ours!r}; they must read the same")
    if teacher.config.text_backbone == model_config.text_backbone:
        teacher.text = _text_backbone(model_config.text_backbone)
    return teacher


def _learned(manifest: pd.DataFrame, captioned: captions.Captioned) -> pd.DataFrame:
    """The captions that are trained and chosen on."""
    split = manifest.set_index("utterance_id")["split"]
    table = captioned.table[captioned.table["grammar"] != "held_out"]
    return table[table["utterance_id"].map(split).isin(("train", "val"))]


class _Trainer(Fitting):
    def __init__(self, manifest, captioned, folder: Path, model_config, config: FusionTrainConfig, device, cache):
        super().__init__(folder, config, device)
        self.step_is_whole = self.waiting = False  # waiting: gradients that no step of the optimiser has taken yet
        if self.accelerator.num_processes > 1:
            raise ConfigError("captions are trained on in one process: start it without a launcher")
        model = FusionRetriever.build(model_config, _text_backbone(model_config.text_backbone)).to(self.device)
        model.speech.set_trainable(config.finetune == "full")
        self._check_crop(model.speech, model_config.speech_backbone)
        teacher = _teacher(config.teacher, folder, model_config, self.device) if config.teacher else None
        learned = _learned(manifest, captioned)
        self.captions = {name: part.to_dict("records") for name, part in learned.groupby("utterance_id")}
        self.attributes = captioned.clips.set_index("utterance_id", drop=False)
        # All before the first step and in one order: batched otherwise, they would round otherwise.
        for part in batches.batched(sorted(set(learned["caption"]), key=lambda text: (len(text), text)), 256):
            model.text.sequences(part)
        self.clips = {split: self._clips(model, manifest, split, cache) for split in ("train", "val")}
        self.objective = FusionObjective(model, config, teacher).to(self.device)
        heads = [p for name, p in self.objective.named_parameters() if p.requires_grad and ".speech." not in name]
        backbone = [p for p in model.speech.parameters() if p.requires_grad]
        groups = [{"params": heads, "peak": config.learning_rate}]
        groups += [{"params": backbone, "peak": config.backbone_learning_rate}] if backbone else []
        self.optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)

    def _clips(self, model, manifest, split: str, cache: Path) -> embedding.FrozenClips | batches.WaveformClips:
        rows = manifest[manifest["split"] == split]
        described = rows["utterance_id"].isin(self.captions)
        self.skipped |= dict.fromkeys(rows.loc[~described, "utterance_id"], "no caption")
        cuts = to_cuts(rows[described])
        if self.config.finetune == "full":
            return self._waveforms(cuts)
        cuts = batches.pieces(cuts, self.config.crop_s, self.config.crop_s)
        kept = embedding.frozen_frames(model, cuts, self.config.level, cache)
        self.skipped |= dict(kept.skipped.itertuples(index=False, name=None))
        if split == "train" and kept.frames:
            model.speech_head.fit(kept.frames)
        return embedding.FrozenClips(kept, cuts, self.config.batch_size)

    def _batches(self, split: str, rng: np.random.Generator, limit: int | None = None) -> Iterator[tuple]:
        """(batch with `relevant`, captions) of a split in an order drawn from rng."""
        plan, together = self.clips[split].plan(rng), self.config.accumulation_steps
        if split == "train":
            self.steps_an_epoch = math.ceil(len(plan) / together)
        plan = plan if limit is None else plan[: limit * together]
        drawn = {batches.utterance_id(cut): self._caption(cut, rng) for cuts in plan for cut in cuts}
        for number, batch in enumerate(self.clips[split].load(plan), 1):
            self.skipped |= dict(batch["skipped"])
            self.step_is_whole = number % together == 0 or number == len(plan)
            if not batch["utterance_id"]:
                self._finish_step({})  # else gradients would run into the next step
            else:
                rows = pd.DataFrame([drawn[utterance] for utterance in batch["utterance_id"]])
                true_of = captions.relevance(rows, self.attributes.loc[batch["utterance_id"]])  # (captions, clips)
                yield batch | {"relevant": torch.from_numpy(true_of.T.copy())}, rows["caption"].tolist()

    def _caption(self, cut: Cut, rng: np.random.Generator) -> dict[str, str]:
        of_clip = self.captions[batches.utterance_id(cut)]
        return of_clip[rng.integers(len(of_clip))]

    def _step(self, batch: dict, texts: list[str], stage: str) -> Values:
        """One batch; the optimiser steps when the gradients of all batches of a step are there."""
        values = self.objective.backward(batch, texts, stage)
        self.waiting = True
        self._finish_step(values)
        return values

    def _finish_step(self, values: Values) -> None:
        if self.step_is_whole and self.waiting:
            self.waiting = False
            rate = self.config.rate(self.progress.step, self.steps_an_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["peak"]
            self._update(values)
