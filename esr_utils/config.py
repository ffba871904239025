"""The settings of a run: frozen dataclasses that are written to `config.json` and read back from it.

`.paper()` is the recipe of Kang & Roy (ESR, ASRU 2025, section IV-B); `.demo()` is the same recipe sized for a laptop
with frozen backbones. Units stand in the comments.
"""

from __future__ import annotations

import ast
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, Self, TypeVar, get_args

SAMPLE_RATE = 16_000  # Hz, of every waveform that reaches a backbone

Level = Literal["normalised", "recorded"]
Finetune = Literal["frozen", "full"]
Objective = Literal[
    "infonce",
    "multi-positive",
    "hard-negative",
    "hard-negative-mga-clap",
    "hard-negative-robinson",
    "sigmoid",
    "classifier",
]
Precision = Literal["auto", "fp32", "bf16"]
Schedule = Literal["constant", "cosine"]
Standardise = Literal["training", "mixed"]
Batches = Literal["any", "corpus"]
Pooling = Literal["mean", "stats"]
Diariser = Literal["silero", "funasr"]


_NUMBER = {"int": "a whole number", "float": "a number"}


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


class _Config:
    """What both configs share: checking of named choices, and dict in and out."""

    def _check_choices(self, **choices: object) -> None:
        for name, choice in choices.items():
            allowed = get_args(choice)
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")

    def _check_numbers(self) -> None:
        """Every number is finite and not negative, whole where it is declared so; a truth value is one."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name} is {value!r}; it must be True or False")
            if field.type not in ("int", "float"):
                continue
            if isinstance(value, bool) or not isinstance(value, int if field.type == "int" else (int, float)):
                raise ConfigError(f"{field.name} is {value!r}; it must be {_NUMBER[field.type]}")
            if not 0 <= value < math.inf:
                raise ConfigError(f"{field.name} is {value!r}; it must be finite and at least 0")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be above 0")

    def to_dict(self) -> dict:
        return asdict(self)

    def but(self, **changes) -> Self:
        """A copy with some settings changed.

        Raises:
            ConfigError: a setting that does not exist, or a value that is not allowed.
        """
        return self.from_dict({**self.to_dict(), **changes})

    @classmethod
    def from_dict(cls, values: dict) -> Self:
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise ConfigError(f"unknown setting {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
        return replace(cls(), **{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


Config = TypeVar("Config", bound=_Config)


def with_settings(settings: str, *configs: Config) -> tuple[Config, ...]:
    """Configs with further settings, each of the one that has it.

    Args:
        settings: name=value joined by +, values as Python writes them, words without quotes: `schedule=cosine+dim=256`.

    Raises:
        ConfigError: a setting that none of the configs has, a value that is not allowed, or text of another form.
    """
    changes: list[dict] = [{} for _ in configs]
    for one in settings.split("+") if settings else []:
        name, equals, text = one.partition("=")
        owners = [i for i, config in enumerate(configs) if name in {field.name for field in fields(config)}]
        if not equals or not owners:
            known = sorted({field.name for config in configs for field in fields(config)})
            raise ConfigError(f"settings: {one!r} is not name=value of a known setting; known: {', '.join(known)}")
        try:
            changes[owners[0]][name] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            changes[owners[0]][name] = text
    return tuple(config.but(**change) for config, change in zip(configs, changes, strict=True))


@dataclass(frozen=True)
class ModelConfig(_Config):
    """A StyleRetriever: which backbones, and what is put on top of them."""

    speech_backbone: str = "whisper-tiny"  # short name, hub id or folder
    text_backbone: str = "minilm"  # short name, hub id or folder
    pooling: Pooling = "stats"  # over time: mean of all frames, or mean and deviation of those that carry speech
    mix_layers: bool = True  # learned weights over all layers; False reads the last layer only, as the paper does
    concat_layers: bool = False  # True: all layers side by side in place of their mix
    dropout: float = 0.5  # share of the pooled features dropped in training, before the projection
    hidden: int = 256  # units between pooled speech features and the projection; 0 = projected directly, as the paper
    dim: int = 512  # d, of the joint space
    classifier_hidden: int = 128  # d_C, hidden units of the style classifier
    temperature: float = 0.07  # tau at the start; learned from there

    def __post_init__(self) -> None:
        self._check_choices(pooling=Pooling)
        self._check_numbers()
        self._check_positive("dim", "classifier_hidden", "temperature")
        if self.concat_layers and not self.mix_layers:
            raise ConfigError(
                "concat_layers is True, and mix_layers False: of the last layer alone there are no others"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")

    @classmethod
    def released(cls) -> Self:
        """Of models/esr-tiny; see `TrainConfig.released`."""
        return cls(speech_backbone="whisper-base", concat_layers=True, dim=256, temperature=0.15)

    @classmethod
    def paper(cls) -> Self:
        return cls(
            speech_backbone="emotion2vec",
            text_backbone="roberta",
            pooling="mean",
            mix_layers=False,
            dropout=0.0,
            hidden=0,
        )


@dataclass(frozen=True)
class FusionConfig(_Config):
    """A FusionRetriever (FS-CLAP): which backbones, and which parts stand on their tokens."""

    speech_backbone: str = "whisper-tiny"  # short name, hub id or folder
    text_backbone: str = "minilm"  # short name, hub id or folder
    dim: int = 256  # d, width of a token and of the joint space
    heads: int = 4  # of each attention; they share the width
    fusion: bool = True  # FU of Table 3: False leaves the two self-attention blocks out
    separation: bool = True  # SE of Table 3: False leaves the two feed-forward networks out
    frames_per_token: int = 4  # speech frames averaged into one token; 1 = none
    codebook: int = 0  # entries of a codebook shared by both modalities, in place of attention pooling; 0 = none
    dropout: float = 0.1  # share of the projected tokens' and the branches' numbers dropped in training
    temperature: float = 0.07  # tau at the start; learned from there
    gamma: float = 0.15  # scaling ratio of the hard-negative loss, Eq. (2); learned from there with `learn_gamma`

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_positive("dim", "heads", "frames_per_token", "temperature")
        if self.dim % self.heads:
            raise ConfigError(f"dim is {self.dim!r}; it must be a multiple of heads, {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")

    @classmethod
    def paper(cls) -> Self:
        return cls(speech_backbone="clap", text_backbone="clap", frames_per_token=1)


@dataclass(frozen=True)
class TrainConfig(_Config):
    """The staged schedule: classification only, then + contrastive, then + adversarial."""

    epochs: int = 40
    classify_epochs: int = 5  # stage 1: style classification alone
    align_epochs: int = 5  # stage 2: + contrastive; stage 3, + adversarial, is the rest
    max_steps: int = 0  # stop after so many optimiser steps; 0 = no limit
    batch_size: int = 32  # N, pairs in a contrastive batch
    batches: Batches = (
        "any"  # corpus: each of one, and a corpus as often as it has speakers named (`batches.by_corpus`)
    )
    crop_s: float = 8.0  # seconds, longest piece of a clip seen in training
    learning_rate: float = 1e-3  # encoders, projections, classifier
    discriminator_learning_rate: float = 4e-4  # the paper's is 0.4 of the encoders' too
    schedule: Schedule = "constant"  # of both rates; cosine: from epoch to epoch down to 0 after `epochs`
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    weight_decay: float = 0.01  # of AdamW
    contrastive_weight: float = 1.0  # lambda_contrast
    adversarial_weight: float = 0.1  # lambda_adv: the encoders receive -lambda_adv of the discriminator's gradient
    classification_weight: float = 0.5  # lambda_cls
    discriminator_hidden: int = 128  # d_D, hidden units of the modality discriminator
    objective: Objective = "infonce"  # classifier: no text at all, the paper's baseline
    fixed_temperature: bool = False  # True: tau stays where it starts, as in the published code
    augment_prompts: bool = True  # False: one template with the bare label (ESR section V-C)
    held_out_styles: tuple[str, ...] = ()  # styles that training and validation never see
    finetune: Finetune = "frozen"  # of the speech backbone; the text backbone is always frozen, as in the paper
    layer_decay: float = 1.0  # learning rate of a backbone layer, relative to the layer above it
    chunk_size: int = 0  # clips in the speech encoder at a time: less memory, same gradients; 0 = the whole batch
    recompute: bool = False  # run backbone layers again in the backward pass instead of keeping what they computed
    precision: Precision = "auto"  # of matrix products; auto: bf16 on a GPU that has it, else fp32
    level: Level = "normalised"  # loudness gives the style away in acted corpora, so it is taken out by default
    speeds: tuple[float, ...] = ()  # each clip also at these, one of all at random in an epoch: e.g. (0.9, 1.1)
    mixup: float = 0.0  # alpha of Beta(alpha, alpha), by which the features of two clips are mixed; 0 = not mixed
    standardise: Standardise = "training"  # pooled features, by the whole split's statistics; mixed: see `training`
    prompt_bank: str = ""  # path of another bank than data_manifests/prompts.json
    train_on_val: bool = False  # val is trained on too, and the last epoch kept: for a run of which all is settled
    patience: int = 0  # stop after so many epochs without a better validation loss; 0 = never
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choices(objective=Objective, finetune=Finetune, level=Level, precision=Precision)
        self._check_choices(schedule=Schedule, standardise=Standardise, batches=Batches)
        self._check_numbers()
        self._check_positive("epochs", "batch_size", "crop_s", "learning_rate", "discriminator_learning_rate")
        self._check_positive("discriminator_hidden", "layer_decay")
        if self.layer_decay > 1:
            raise ConfigError(f"layer_decay is {self.layer_decay!r}; it must be at most 1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas is {self.betas!r}; both must be at least 0 and below 1")
        if isinstance(self.held_out_styles, str):
            raise ConfigError(f"held_out_styles is {self.held_out_styles!r}; it must be a list of styles")
        speeds = self.speeds if isinstance(self.speeds, tuple) else ("",)
        if not all(isinstance(s, int | float) and 0.5 <= s <= 2 and s != 1 for s in speeds) or len({*speeds}) < len(
            speeds
        ):
            raise ConfigError(f"speeds is {self.speeds!r}; it must be different numbers from 0.5 to 2, without 1")
        if self.mixup and self.objective != "multi-positive":
            raise ConfigError(f"mixup is {self.mixup!r}, for which objective must be 'multi-positive'")
        for name in ("standardise", "batches", "mixup", "speeds") if self.finetune == "full" else ():
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                raise ConfigError(
                    f"{name} is {value!r}, which is for features that stay as they are: finetune 'frozen'"
                )
        if self.objective == "classifier" and not self.classification_weight > 0:
            raise ConfigError("objective is 'classifier' with a classification_weight of 0: nothing would be trained")

    @classmethod
    def paper(cls) -> Self:
        return cls(
            epochs=110,
            learning_rate=5e-5,
            discriminator_learning_rate=2e-5,
            finetune="full",
            precision="bf16",
            level="recorded",
        )

    @classmethod
    def demo(cls) -> Self:
        return cls()

    @classmethod
    def released(cls) -> Self:
        """Of models/esr-tiny, whose card says how it was chosen."""
        return cls(
            epochs=20,
            learning_rate=3e-4,
            batch_size=64,
            batches="corpus",
            objective="multi-positive",
            schedule="cosine",
            speeds=(0.9, 1.1),
            mixup=0.4,
            standardise="mixed",
            train_on_val=True,
            adversarial_weight=0.0,
        )

    def stage(self, epoch: int) -> Literal["classify", "align", "adversarial"]:
        """Which stage an epoch (0-based) belongs to (ESR section IV-B)."""
        if epoch < self.classify_epochs or self.objective == "classifier":
            return "classify"
        return "align" if epoch < self.classify_epochs + self.align_epochs else "adversarial"

    def rate(self, epoch: int) -> float:
        """The learning rates in an epoch (0-based), relative to those above."""
        return 1.0 if self.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


Contrast = Literal["infonce", "hard-negative", "hard-negative-mga-clap", "hard-negative-robinson"]


@dataclass(frozen=True)
class FusionTrainConfig(_Config):
    """Training on captions, for FS-CLAP and its baselines (FS-CLAP section 4.2)."""

    epochs: int = 12
    warmup_epochs: int = 1  # the learning rate rises over these, then falls by a cosine to 0 after `epochs`
    max_steps: int = 0  # stop after so many optimiser steps; 0 = no limit
    batch_size: int = 32  # B, pairs in a contrastive batch; the paper's is 96
    accumulation_steps: int = 1  # batches whose gradients are added up before a step of the optimiser; the paper's is 2
    crop_s: float = 8.0  # seconds, longest piece of a clip seen in training
    learning_rate: float = 1e-3  # at its peak: of the heads and of fusion and separation
    backbone_learning_rate: float = 4e-5  # at its peak: of the speech backbone, with finetune "full"
    weight_decay: float = 0.01  # of AdamW
    objective: Contrast = "hard-negative"
    learn_gamma: bool = False  # True: gamma is trained, and goes down to 0, where the loss is InfoNCE
    mask_false_negatives: bool = True  # pairs whose caption is true of the other's clip too are no negatives
    regulariser_weight: float = 0.0  # of Eq. (3)'s term; the paper's is 1
    bi_encoder: bool = True  # of a model with fusion: contrast vectors made past it too; False: through it alone
    matching_weight: float = 1.0  # of the loss on fused pairs; 0 = pairs are not fused in training
    mined_negatives: int = 1  # for each clip and each caption, fused with it beside its own: 2 m B fusions a step
    teacher: str = ""  # trained run whose similarities are targets too (RA-CLAP): path from the run folder, or as `run`
    finetune: Finetune = "frozen"  # of the speech backbone; the text backbone is always frozen
    precision: Precision = "auto"  # of matrix products; auto: bf16 on a GPU that has it, else fp32
    level: Level = "recorded"  # captions name the energy, which normalising takes out
    patience: int = 0  # stop after so many epochs without a better validation loss; 0 = never
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_choices(objective=Contrast, finetune=Finetune, level=Level, precision=Precision)
        self._check_numbers()
        self._check_positive("epochs", "batch_size", "accumulation_steps", "crop_s", "learning_rate")
        self._check_positive("backbone_learning_rate", "mined_negatives")

    @classmethod
    def paper(cls) -> Self:
        """10 epochs, two batches of 96 a step, Eq. (3) with weight 1. What it does to pairs, the paper does not say."""
        return cls(
            epochs=10,
            batch_size=96,
            accumulation_steps=2,
            learning_rate=1e-4,
            mask_false_negatives=False,
            regulariser_weight=1.0,
            finetune="full",
            precision="bf16",
        )

    def stage(self, epoch: int) -> Literal["contrastive"]:
        """Of an epoch (0-based): there is one stage."""
        return "contrastive"

    def rate(self, step: int, steps_an_epoch: int) -> float:
        """The learning rate at an optimiser step (0-based), relative to its peak."""
        warm, total = self.warmup_epochs * steps_an_epoch, self.epochs * steps_an_epoch
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


@dataclass(frozen=True)
class MiningConfig(_Config):
    """From video and audio to described clips (FS-CLAP section 3.3). Models are short names, hub ids or folders."""

    separator: str = ""  # hdemucs | folder; empty: what is heard under the voices stays
    chunk_s: float = 10.0  # seconds separated at a time
    diariser: Diariser = "silero"  # silero: silero-vad + resemblyzer, from packages; funasr: the four models below
    vad: str = "fsmn-vad"  # where somebody speaks
    asr: str = "paraformer"  # words and their times
    punctuation: str = "ct-punc"  # where sentences end
    speaker_encoder: str = "cam++"  # whose voice it is
    min_cosine: float = 0.0  # mean cosine at which two groups of segments are one speaker; 0: the encoder's own
    merge_gap_s: float = 0.5  # seconds; a speaker's segments no further apart become one clip (sentences never do)
    min_clip_s: float = 1.0  # seconds; shorter clips are left out
    max_clip_s: float = 15.0  # seconds that joined segments last at most
    threshold: float = 0.65  # of Eq. (5): mean of (cos + 1) / 2 to the speaker's other clips
    keep_single: bool = True  # a speaker's only clip, which has no others to be like
    emotion: str = ""  # sensevoice | folder; empty: clips are not described

    def __post_init__(self) -> None:
        self._check_choices(diariser=Diariser)
        self._check_numbers()
        self._check_positive("min_clip_s", "max_clip_s")
        if not self.chunk_s >= 2:
            raise ConfigError(f"chunk_s is {self.chunk_s!r}; it must be at least 2: chunks overlap by 1 s")
        for name in ("threshold", "min_cosine"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be at most 1")

    @classmethod
    def paper(cls) -> Self:
        return cls(separator="hdemucs", diariser="funasr", emotion="sensevoice")


# The rows of Table III, and below them what the paper leaves open: changes to TrainConfig.
ABLATIONS: dict[str, dict] = {
    "full": {},
    "w/o pre-training": {"classify_epochs": 0},
    "w/o style classification": {"classification_weight": 0.0, "classify_epochs": 0},  # a stage 1 without it is idle
    "w/o modality discriminator": {"adversarial_weight": 0.0},
    "w/o prompt augmentation": {"augment_prompts": False},
    "multi-positive targets": {"objective": "multi-positive"},
    "published code": {"adversarial_weight": 1.1, "fixed_temperature": True},
}
