"""The staged schedule and the one fit loop, run by Accelerate.

What is random in an epoch follows from (seed, epoch) alone, and the state at the end of every epoch is on disk, so
that a run that was stopped, or killed, goes on with the same losses to the last bit.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from esr_utils import batches, embedding, losses, runs
from esr_utils.config import SAMPLE_RATE, ConfigError, ModelConfig, TrainConfig
from esr_utils.manifests import load_corpora, to_cuts
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES, PromptBank

VALIDATION = 2**31  # stands where an epoch would, in the seed of the validation's fixed prompts and order


class RunExists(ValueError):
    """The run folder holds a run with other settings; the message names them."""


class Objective(nn.Module):
    """The retriever with the two networks that exist only for training: a batch in, a dict of named loss terms out."""

    def __init__(self, retriever: StyleRetriever, config: TrainConfig) -> None:
        super().__init__()
        self.retriever, self.config = retriever, config
        dim = retriever.config.dim
        self.classifier = losses.two_layer(dim, config.hidden, len(STYLES))
        self.discriminator = losses.two_layer(dim, config.hidden, 1)

    def forward(self, batch: dict, stage: str) -> dict[str, Tensor]:
        speech, text = self.retriever(batch)
        style = batch["style"].to(speech.device)
        terms = {"classification": losses.classification(self.classifier, speech, style)}
        if stage != "classify":
            logits = losses.similarity(speech, text) * self.retriever.logit_scale
            bias = self.retriever.bias
            terms["contrastive"] = losses.contrastive(self.config.objective, logits, style, bias)
        if stage == "adversarial":
            weight = self.config.adversarial_weight
            terms["adversarial"] = losses.modality(self.discriminator, speech, text, weight)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """ESR Eq. (5); the adversarial term carries its weight inside the gradient reversal (`losses.modality`)."""
        weights = {
            "classification": self.config.classification_weight,
            "contrastive": self.config.contrastive_weight,
            "adversarial": 1.0,
        }
        return sum(weights[name] * term for name, term in terms.items())


@dataclass
class _Progress:
    """What a stopped run needs besides the tensors; written as resume.json."""

    epoch: int = 0  # epochs done
    step: int = 0  # optimiser steps done
    best_loss: float | None = None  # validation contrastive loss of the checkpoint in best/
    best_epoch: int | None = None
    since_best: int = 0
    finished: bool = False
    state: str = ""  # the safetensors file beside it


def fit(
    manifest: pd.DataFrame,
    run: str | Path,
    model_config: ModelConfig | None = None,
    config: TrainConfig | None = None,
    device: str = "auto",
    cache: Path = embedding.CACHE,
) -> StyleRetriever:
    """Trains on the manifest's train split, chooses on its val split, and returns the best retriever.

    Writes the run folder (see `runs`). Called again with the same settings it goes on where it was, or, where the run
    is finished, returns its result. "Best" is the lowest contrastive loss over the whole validation split, once that
    loss is on, with prompts and order fixed; without a validation split it is the last epoch.

    Args:
        manifest: rows of `manifests.load_corpora`, with their `root`.
        run: name or path of the run folder.
        device: auto, cpu, cuda or mps.

    Raises:
        RunExists: the folder holds a run with other settings.
        ValueError: no usable training clip.
    """
    model_config, config = model_config or ModelConfig(), config or TrainConfig.demo()
    folder = runs.run_folder(run)
    _claim(folder, manifest, model_config, config)
    trainer = _Trainer(manifest, folder, model_config, config, device, cache)
    trainer.run()
    return StyleRetriever.load(folder / "best", trainer.accelerator.device)


def load_run(run: str | Path = runs.DEFAULT_RUN, device: str = "auto") -> tuple[StyleRetriever, dict]:
    """The best retriever of a run, and the settings in its config.json.

    The default run, and only that, is trained first (demo corpus, default settings) where it is not there yet.

    Raises:
        weights.WeightsError: no such run, or its files are damaged.
    """
    folder = runs.run_folder(run)
    if str(run) == runs.DEFAULT_RUN and not (folder / "best" / "config.json").is_file():
        fit(load_corpora("demo"), run, device=device)
    model = StyleRetriever.load(folder / "best", runs.pick_device(device))
    return model, runs.read_json(folder / "config.json")


def _claim(folder: Path, manifest: pd.DataFrame, model_config: ModelConfig, config: TrainConfig) -> None:
    """Writes config.json, or checks that the one there says the same."""
    split = manifest["split"].value_counts()
    decisive = ["utterance_id", "path", "start_s", "end_s", "channel", "split", "style", "caption"]
    settings = {
        "model": model_config.to_dict(),
        "training": config.to_dict(),
        "corpora": sorted(manifest["corpus"].unique()),
        "roots": sorted(manifest["root"].unique()),
        "clips": {name: int(split.get(name, 0)) for name in ("train", "val", "test")},
        "manifest_sha256": runs.text_sha256(manifest[decisive].to_csv(index=False)),
    }
    path = folder / "config.json"
    if not path.is_file():
        runs.write_json(path, settings | {"versions": runs.versions()})
        return
    there = runs.read_json(path)
    now = json.loads(json.dumps(settings))
    changed = [
        f"{part}.{key}: {there[part].get(key)!r} there, {value!r} now"
        for part in ("model", "training")
        for key, value in now[part].items()
        if there[part].get(key) != value
    ]
    changed += [f"{key}: other than now" for key in ("corpora", "manifest_sha256") if there[key] != now[key]]
    if changed:
        raise RunExists(
            f"{folder} holds another run ({'; '.join(changed)}): choose another `run`, or delete that folder"
        )


class _Trainer:
    def __init__(self, manifest, folder: Path, model_config, config: TrainConfig, device: str, cache: Path) -> None:
        self.folder, self.config = folder, config
        bf16 = device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.accelerator = Accelerator(
            cpu=device == "cpu",
            mixed_precision="bf16" if bf16 else "no",
            log_with="tensorboard",
            project_dir=folder,
        )
        self.bank = PromptBank.load()
        runs.seed_everything(config.seed)
        retriever = StyleRetriever.build(model_config).to(self.accelerator.device)
        retriever.speech.set_trainable(config.finetune == "full")
        self.caption = dict(zip(manifest["utterance_id"], manifest["caption"], strict=True))
        self.skipped: list[tuple[str, str]] = []
        self.clips = {split: self._clips(retriever, manifest, split, cache) for split in ("train", "val")}
        objective = Objective(retriever, config)
        discriminator = list(objective.discriminator.parameters())
        theirs = {id(parameter) for parameter in discriminator}
        ours = [p for p in objective.parameters() if p.requires_grad and id(p) not in theirs]
        optimizer = torch.optim.AdamW(
            [{"params": ours, "lr": config.learning_rate},
             {"params": discriminator, "lr": config.discriminator_learning_rate}],
            betas=config.betas, weight_decay=config.weight_decay, fused=True,
        )  # fmt: skip
        self._embed_prompts(retriever, manifest)
        if config.crop_s * SAMPLE_RATE > retriever.speech.max_samples:
            longest = retriever.speech.max_samples / SAMPLE_RATE
            raise ConfigError(
                f"crop_s is {config.crop_s:g}; {model_config.speech_backbone} takes at most {longest:g} s"
            )
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.progress = _Progress()

    @property
    def bare(self) -> Objective:
        return self.accelerator.unwrap_model(self.objective)

    def _clips(self, retriever, manifest, split: str, cache: Path) -> embedding.FrozenClips | batches.WaveformClips:
        rows = manifest[manifest["split"] == split]
        described = (rows["style"] != "") | (rows["caption"] != "")  # else there is no sentence to pair it with
        self._note_skipped([(name, "neither style nor caption") for name in rows.loc[~described, "utterance_id"]])
        cuts = to_cuts(rows[described])
        if self.config.finetune == "full":
            return batches.WaveformClips(cuts, self.config.batch_size, self.config.crop_s, self.config.level)
        cuts = batches.pieces(cuts, self.config.crop_s, self.config.crop_s)
        features = embedding.frozen_features(retriever, cuts, self.config.level, cache)
        self._note_skipped(list(features.skipped.itertuples(index=False, name=None)))
        if split == "train" and len(features.pooled):
            retriever.speech_head.fit(features.pooled.to(self.accelerator.device))
        return embedding.FrozenClips(features, cuts, self.config.batch_size)

    def _embed_prompts(self, retriever: StyleRetriever, manifest: pd.DataFrame) -> None:
        """Every prompt that training can draw, once and in large batches; after this the text backbone is not run."""
        used = manifest[manifest["split"].isin(("train", "val"))]
        styles = sorted(set(used["style"]) - {""})
        prompts = [prompt for style in styles for prompt in self.bank.all_prompts(style)]
        retriever.text.embed(prompts + sorted(set(used.loc[used["style"] == "", "caption"])))

    def _note_skipped(self, skipped: list[tuple[str, str]]) -> None:
        if new := [item for item in skipped if item not in self.skipped]:
            self.skipped += new
            with runs.atomic_path(self.folder / "skipped.csv") as temporary:
                embedding.skipped_table(self.skipped).to_csv(temporary, index=False)

    def run(self) -> None:
        self._resume()
        self.accelerator.init_trackers("tensorboard")
        config, progress = self.config, self.progress
        bar = tqdm(total=config.epochs, initial=progress.epoch, desc="train", unit="epoch")
        while not progress.finished:
            line = self._epoch()
            bar.set_postfix({k: f"{v:.3f}" for k, v in line.items() if k in ("train_contrastive", "val_contrastive")})
            bar.update()
        bar.close()
        self.accelerator.end_training()

    def _epoch(self) -> dict:
        config, progress = self.config, self.progress
        started = time.perf_counter()
        stage = config.stage(progress.epoch)
        rng = runs.seed_everything(config.seed, progress.epoch + 1)
        self.objective.train()
        if config.finetune == "frozen":
            self.bare.retriever.speech.eval()
        train = _Mean()
        for batch in self.clips["train"].epoch(rng):
            if config.max_steps and progress.step >= config.max_steps:
                break
            self._note_skipped(batch["skipped"])
            if len(batch["style"]):
                train.add(self._step(batch, stage, rng), len(batch["style"]))
        if not progress.step:
            raise ValueError(f"no usable training clip: {len(self.skipped)} refused, see {self.folder / 'skipped.csv'}")
        validation = self.validate(stage)
        progress.epoch += 1
        line = {"epoch": progress.epoch, "step": progress.step, "stage": stage}
        line |= {f"train_{name}": value for name, value in train.means().items()}
        line |= {f"val_{name}": value for name, value in validation.items()}
        line |= {"tau": 1 / float(self.bare.retriever.logit_scale.detach()), "seconds": time.perf_counter() - started}
        self._judge(validation.get("contrastive"))
        self._write(line)
        return line

    def _step(self, batch: dict, stage: str, rng: np.random.Generator) -> dict[str, float]:
        batch["prompt"] = self._prompts(batch, rng)
        with self.accelerator.autocast():
            terms = self.objective(batch, stage)
        self.accelerator.backward(self.bare.total(terms))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        values = {name: float(term.detach()) for name, term in terms.items()}
        self.accelerator.log({f"train/{name}": value for name, value in values.items()}, step=self.progress.step)
        return values

    def _prompts(self, batch: dict, rng: np.random.Generator) -> list[str]:
        """A random prompt of the clip's style; a clip without a style is described by its caption."""
        return [
            self.bank.sample(STYLES[style], rng) if style != losses.NO_STYLE else self.caption[utterance]
            for style, utterance in zip(batch["style"].tolist(), batch["utterance_id"], strict=True)
        ]

    @torch.no_grad()
    def validate(self, stage: str) -> dict[str, float]:
        """Mean of each term over the whole val split: the same prompts, crops and order every time."""
        rng = runs.seed_everything(self.config.seed, VALIDATION)
        self.objective.eval()
        mean = _Mean()
        for batch in self.clips["val"].epoch(rng):
            self._note_skipped(batch["skipped"])
            if len(batch["style"]):
                batch["prompt"] = self._prompts(batch, rng)
                with self.accelerator.autocast():
                    terms = self.bare(batch, stage)
                mean.add({name: float(term) for name, term in terms.items()}, len(batch["style"]))
        return mean.means()

    def _judge(self, loss: float | None) -> None:
        """Keeps the best checkpoint, and says when the run is over."""
        config, progress = self.config, self.progress
        out_of_steps = bool(config.max_steps) and progress.step >= config.max_steps
        last = progress.epoch >= config.epochs or out_of_steps
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(f"validation loss is {loss} in epoch {progress.epoch}: lower the learning rate")
        better = loss is not None and (progress.best_loss is None or loss < progress.best_loss)
        nothing_yet = last and progress.best_loss is None  # no val split, or stopped before the loss was on
        if better or nothing_yet:
            progress.best_loss, progress.best_epoch, progress.since_best = loss, progress.epoch, 0
            self.bare.retriever.save(self.folder / "best")
        elif loss is not None:
            progress.since_best += 1
        progress.finished = last or (config.patience > 0 and progress.since_best >= config.patience)

    def _write(self, line: dict) -> None:
        """The epoch's line, then its state; resume.json comes last, and what it does not name does not count."""
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.accelerator.log(
            {k.replace("_", "/", 1): v for k, v in line.items() if isinstance(v, float)}, step=self.progress.step
        )
        before = self.progress.state
        self.progress.state = f"resume-{self.progress.epoch}.safetensors"
        with runs.atomic_path(self.folder / self.progress.state) as temporary:
            save_file(self._tensors(), temporary)
        runs.write_json(self.folder / "resume.json", vars(self.progress))
        if before:
            (self.folder / before).unlink(missing_ok=True)

    def _tensors(self) -> dict[str, Tensor]:
        """What changes in training: trained parameters and buffers, and AdamW's moments."""
        state = {f"model.{name}": value for name, value in self._trained().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
        return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}

    def _trained(self) -> dict[str, Tensor]:
        frozen = ("retriever.text.",) if self.config.finetune == "full" else ("retriever.text.", "retriever.speech.")
        return {k: v for k, v in self.bare.state_dict().items() if not k.startswith(frozen)}

    def _resume(self) -> None:
        path = self.folder / "resume.json"
        metrics = self.folder / "metrics.jsonl"
        if not path.is_file():
            metrics.unlink(missing_ok=True)
            return
        self.progress = _Progress(**runs.read_json(path))
        state = load_file(self.folder / self.progress.state)
        trained = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        missing = set(self._trained()) - set(trained)
        if missing:
            raise ValueError(
                f"{self.folder / self.progress.state} lacks {sorted(missing)}: delete the run and start anew"
            )
        self.bare.load_state_dict(trained, strict=False)
        moments: dict[int, dict] = defaultdict(dict)
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments[int(index)][key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
        lines = metrics.read_text(encoding="utf-8").splitlines()[: self.progress.epoch]
        with runs.atomic_path(metrics) as temporary:
            temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


class _Mean:
    """Mean of named values, weighted by batch size."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.count: dict[str, int] = defaultdict(int)

    def add(self, values: dict[str, float], size: int) -> None:
        for name, value in values.items():
            self.sums[name] += value * size
            self.count[name] += size

    def means(self) -> dict[str, float]:
        return {name: total / self.count[name] for name, total in self.sums.items()}
