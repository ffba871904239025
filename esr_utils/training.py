"""The paper's training: styles and their prompts, in stages (ESR section IV-B); `fitting` has the loop.

With `standardise` "mixed" a clip's pooled features are standardised by the statistics of the whole training split, of
its corpus or of its speaker, drawn anew each epoch: what an index that adapts will give (`adaptation`). Validation is
by the split's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from lhotse import CutSet
from lhotse.cut import Cut

from esr_utils import adaptation, batches, checkpoints, embedding, provenance, runs, weights
from esr_utils.config import ConfigError, ModelConfig, TrainConfig
from esr_utils.fitting import Fitting
from esr_utils.losses import NO_STYLE, Mixed
from esr_utils.manifests import load_corpora, to_cuts
from esr_utils.objective import Objective
from esr_utils.processes import end_with_parent, launch
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES


def fit(
    manifest: pd.DataFrame,
    run: str | Path,
    model_config: ModelConfig | None = None,
    config: TrainConfig | None = None,
    device: str = "auto",
    cache: Path = embedding.CACHE,
    processes: int = 1,
) -> StyleRetriever:
    """Trains on the manifest's train split, chooses on its val split, and returns the best retriever.

    Writes the run folder (see `runs`). Called again with the same settings it goes on where it was, or, where the run
    is finished, returns its result. "Best" is the lowest contrastive loss over the whole validation split, once that
    loss is on, with prompts and order fixed; without a validation split, or if that is trained on, the last epoch.

    Args:
        manifest: rows of `manifests.load_corpora`, with their `root`.
        run: name or path of the run folder.
        device: auto, cpu, cuda or mps.
        processes: how many share each batch, one a GPU; the loss and its gradients are those of the whole batch. From
            a shell the same is `accelerate launch --multi_gpu --num_processes N -m esr_utils.training RUN`, which goes
            on with a run that was begun.

    Raises:
        provenance.RunExists: the folder holds a run with other settings, or another process trains it.
        ConfigError: settings that do not go together or name what is not there.
        ValueError: no usable training clip, or no such device.
        FloatingPointError: a loss is no longer a number.
        RuntimeError: one of several processes has failed.
    """
    model_config, config = model_config or ModelConfig(), config or TrainConfig.demo()
    if config.prompt_bank:
        config = config.but(prompt_bank=str(Path(config.prompt_bank).expanduser().resolve()))
    folder, place = runs.run_folder(run), runs.pick_device(device)
    _check_first_stage(manifest, config)
    provenance.begin(manifest, folder, model_config, config)
    if checkpoints.finished(folder):
        return StyleRetriever.load(folder / "best", place)  # without reading a clip
    if processes > 1:
        _fit_in_processes(manifest, folder, device, cache, processes)
    else:
        _Trainer(manifest, folder, model_config, config, device, cache).run()
    return StyleRetriever.load(folder / "best", place)


def _check_first_stage(manifest: pd.DataFrame, config: TrainConfig) -> None:
    """Refuses a stage of classification alone that has nothing to classify: its epochs would pass for training."""
    clips = manifest[(manifest["split"] == "train") & ~manifest["style"].isin(config.held_out_styles)]
    if clips.empty or config.stage(0) != "classify":
        return
    if (unlabelled := (clips["style"] == "").all()) or config.classification_weight == 0:
        why = "no training clip has a style" if unlabelled else "classification_weight is 0"
        advice = "" if config.objective == "classifier" else ": set classify_epochs to 0"
        raise ConfigError(f"{why}, so the stage of classification alone would train nothing{advice}")


def _fit_in_processes(manifest: pd.DataFrame, folder: Path, device: str, cache: Path, count: int) -> None:
    """`go_on` in several processes, which read the run's settings and clips themselves."""
    found = provenance.clips_of_run(runs.read_json(folder / "config.json"))
    if provenance.fingerprint(found) != provenance.fingerprint(manifest):
        raise ValueError("several processes read the corpora themselves: give the manifest as load_corpora has it")
    arguments = [str(folder), device, str(cache)]
    if status := launch("esr_utils.training", arguments, count, cpu=device == "cpu"):
        raise RuntimeError(f"training {folder} by {count} processes ended with status {status}; see their messages")


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


def go_on(run: str | Path, device: str = "auto", cache: Path = embedding.CACHE) -> StyleRetriever:
    """`fit` with all settings from the config.json of a run that was begun.

    Raises:
        weights.WeightsError: no such run.
        provenance.RunExists: the corpora are not what they were.
    """
    folder = runs.run_folder(run)
    if not (folder / "config.json").is_file():
        raise weights.WeightsError(f"{folder} holds no config.json: begin the run with notebook 03_train")
    settings = runs.read_json(folder / "config.json")
    if settings.get("kind", "style") != "style":
        raise weights.WeightsError(f"{folder} is a run on captions: go on with it by notebook 08_fsclap_train")
    configs = ModelConfig.from_dict(settings["model"]), TrainConfig.from_dict(settings["training"])
    return fit(provenance.clips_of_run(settings), folder, *configs, device, cache)


class _Trainer(Fitting):
    def __init__(self, manifest, folder: Path, model_config, config: TrainConfig, device: str, cache: Path) -> None:
        super().__init__(folder, config, device)
        self.judged = "classification" if config.objective == "classifier" else "contrastive"
        self.bank = provenance.bank_of_run(config)
        retriever = StyleRetriever.build(model_config).to(self.device)
        retriever.speech.set_trainable(config.finetune == "full")
        retriever.speech.recompute = config.recompute
        self._check_crop(retriever.speech, model_config.speech_backbone)
        if unknown := set(config.held_out_styles) - set(STYLES):
            raise ConfigError(f"held_out_styles: {', '.join(sorted(unknown))} unknown; styles: {', '.join(STYLES)}")
        if config.mixup and self.accelerator.num_processes > 1:
            raise ConfigError("mixup mixes clips of a whole batch, of which each process has a part: use one process")
        self.mixture: adaptation.Mixture | None = None
        with self.accelerator.main_process_first():  # the others then find the frames
            self.clips = {split: self._clips(retriever, manifest, split, cache) for split in ("train", "val")}
        if config.objective != "classifier":
            self._embed_prompts(retriever, manifest)
        self.objective = Objective(retriever, config, self.accelerator).to(self.device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.objective), betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def _clips(self, retriever, manifest, split: str, cache: Path) -> embedding.FrozenClips | batches.WaveformClips:
        used = {"train": ["train", "val"], "val": []}[split] if self.config.train_on_val else [split]
        rows = manifest[manifest["split"].isin(used) & ~manifest["style"].isin(self.config.held_out_styles)]
        described = (rows["style"] != "") | (rows["caption"] != "")  # else there is no sentence to pair it with
        self.skipped |= dict.fromkeys(rows.loc[~described, "utterance_id"], "neither style nor caption")
        cuts = to_cuts(rows[described])
        if self.config.finetune == "full":
            return self._waveforms(cuts)
        if split == "train":
            cuts = batches.at_speeds(cuts, self.config.speeds)
        cuts = batches.pieces(cuts, self.config.crop_s, self.config.crop_s)
        features = embedding.frozen_features(retriever, cuts, self.config.level, cache)
        self.skipped |= dict(features.skipped.itertuples(index=False, name=None))
        if split == "train" and len(features.pooled):
            retriever.speech_head.fit(features.pooled.to(retriever.device))
            if self.config.standardise == "mixed":
                self.mixture = _mixture(retriever, features, cuts)
        by_corpus = split == "train" and self.config.batches == "corpus"
        return embedding.FrozenClips(features, cuts, self.config.batch_size, by_corpus)

    def _embed_prompts(self, retriever: StyleRetriever, manifest: pd.DataFrame) -> None:
        """Every prompt that training can draw, once and in large batches; then the text backbone is let go."""
        used = manifest[manifest["split"].isin(("train", "val"))]
        styles = sorted(set(used["style"]) - {""} - set(self.config.held_out_styles))
        prompts = [prompt for style in styles for prompt in self.bank.all_prompts(style)]
        prompts += sorted(set(used.loc[used["style"] == "", "caption"]) - {""})
        if prompts:
            retriever.text.embed(prompts)
        retriever.text.release()

    def _epoch(self) -> dict:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.config.rate(self.progress.epoch)
        return super()._epoch()

    def _batches(self, split: str, rng: np.random.Generator, limit: int | None = None):
        """(batch, prompts) of a split in an order drawn from rng: of each batch, this process's share."""
        plan = self.clips[split].plan(rng)[:limit]
        prompts = {batches.utterance_id(cut): self._prompt(cut, rng) for cuts in plan for cut in cuts}
        heard = [cut.id for cuts in plan for cut in cuts]
        statistics = self.mixture.draw(heard, rng) if self.mixture and split == "train" else {}
        shares = [cuts[self.accelerator.process_index :: self.accelerator.num_processes] for cuts in plan]
        for batch in self.clips[split].load(shares):
            self.skipped |= dict(batch["skipped"])
            if statistics and batch["cut_id"]:
                batch["statistics"] = adaptation.stacked([statistics[cut_id] for cut_id in batch["cut_id"]])
            if self.config.mixup and split == "train":
                mix(batch, self.config.mixup, rng)
            yield batch, [prompts[utterance] for utterance in batch["utterance_id"]]

    def _prompt(self, cut: Cut, rng: np.random.Generator) -> str:
        """A random prompt of the clip's style; a clip without a style is described by its caption."""
        style = batches.style_label(cut)
        if style == NO_STYLE:
            return cut.custom["caption"]
        return self.bank.sample(STYLES[style], rng, self.config.augment_prompts)


def _mixture(retriever: StyleRetriever, features: embedding.Features, cuts: CutSet) -> adaptation.Mixture:
    """Of the training split's cuts: their corpora, and their speakers."""
    about = {cut.id: cut.custom for cut in cuts}
    corpora = [about[cut_id]["corpus"] for cut_id in features.cut_ids]
    speakers = [f"{about[cut_id]['corpus']}/{about[cut_id]['speaker']}" for cut_id in features.cut_ids]
    groups, training = [corpora, speakers], adaptation.of_training(retriever)
    return adaptation.Mixture(features.cut_ids, groups, features.pooled.numpy(), training)


def mix(batch: dict, alpha: float, rng: np.random.Generator) -> None:
    """Mixes the standardised features of each clip with those of another of the batch (mixup: Zhang et al. 2018).

    Each keeps at least half of itself, the share drawn from Beta(alpha, alpha); with `statistics`, each is standardised
    by its own. A clip without a style stays as it is. The batch gets `mixed`, a `losses.Mixed`.
    """
    style, pooled = batch["style"], batch["pooled"]
    partner = torch.from_numpy(rng.permutation(len(style)))
    share = torch.from_numpy(rng.beta(alpha, alpha, len(style)).astype(np.float32))
    share = torch.maximum(share, 1 - share).where((style != NO_STYLE) & (style[partner] != NO_STYLE), 1.0)
    other = pooled[partner]
    if "statistics" in batch:
        mean, std = batch["statistics"]
        other = (other - mean[partner]) / std[partner] * std + mean  # as if it were of the clip's own group
    batch["pooled"] = torch.lerp(other, pooled, share[:, None, None])
    batch["mixed"] = Mixed(share, style[partner])


def parameter_groups(objective: Objective) -> list[dict]:
    """AdamW's parameter groups: what is trained, by learning rate; the discriminator has its own (ESR section IV-B).

    With `layer_decay` below 1 each layer of the speech backbone learns more slowly than the one above it by that
    factor; the heads, above all, have the full rate.
    """
    config, speech = objective.config, objective.retriever.speech
    by_rate: dict[float, list] = {config.learning_rate: []}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad or name.startswith("discriminator."):
            continue
        rate = config.learning_rate
        if name.startswith("retriever.speech.") and config.layer_decay != 1:
            rate *= config.layer_decay ** (speech.n_layers - speech.depth(name.removeprefix("retriever.speech.")))
        by_rate.setdefault(rate, []).append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    groups.append({"params": list(objective.discriminator.parameters()), "lr": config.discriminator_learning_rate})
    return [group | {"peak": group["lr"]} for group in groups]


if __name__ == "__main__":  # accelerate launch --multi_gpu --num_processes 2 -m esr_utils.training RUN
    if torch.distributed.is_torchelastic_launched():  # not from a shell, which may go while this goes on
        end_with_parent()
    go_on(sys.argv[1], *sys.argv[2:3], *map(Path, sys.argv[3:4]))
