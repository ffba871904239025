"""Training: exact resume, one seed, the three stages, the best checkpoint, what may and may not change."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from esr_utils import adaptation, checkpoints, objective, provenance, runs, training, weights
from esr_utils.config import ConfigError, ModelConfig, TrainConfig, with_settings
from esr_utils.prompts import PROMPTS_PATH, PromptBank
from esr_utils.provenance import RunExists
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES
from esr_utils.training import fit

CONFIG = TrainConfig(
    epochs=5,
    classify_epochs=1,
    align_epochs=2,
    max_steps=0,
    batch_size=5,
    crop_s=1.5,
    learning_rate=1e-2,
    discriminator_learning_rate=4e-3,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    contrastive_weight=1.0,
    adversarial_weight=0.1,
    classification_weight=0.5,
    discriminator_hidden=8,
    objective="infonce",
    finetune="frozen",
    level="normalised",
    patience=0,
    seed=0,
)

pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Kept frames, shared by the runs here as the runs of a user share theirs."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model_config(tiny_config) -> ModelConfig:
    """With dropout, so that a resumed run must also draw the same masks."""
    return tiny_config.but(dropout=0.3)


@pytest.fixture
def train(manifest, model_config, cache, tmp_path):
    """Runs `fit` on "mini" in the folder of that name, with some settings changed."""

    def run(name: str, rows: pd.DataFrame = manifest, model: ModelConfig = model_config, processes: int = 1, **changes):
        return fit(rows, tmp_path / name, model, CONFIG.but(**changes), "cpu", cache, processes)

    run.folder = tmp_path
    return run


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without the one value that is a time."""
    found = runs.read_metrics(folder)
    for line in found:
        assert line.pop("seconds") > 0
    return found


def best(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "best" / "model.safetensors")


def assert_equal(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(other)
    different = [name for name in state if not torch.equal(state[name], other[name])]
    assert not different


def assert_near(found: list[dict], expected: list[dict]) -> None:
    for line, other in zip(found, expected, strict=True):
        assert line.pop("stage") == other.pop("stage")
        assert line == pytest.approx(other, rel=1e-3)


# What a run leaves ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(manifest, model_config, cache, tmp_path_factory) -> Path:
    """A whole frozen run, to be looked at."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    fit(manifest, folder, model_config, CONFIG, device="cpu", cache=cache)
    return folder


def test_the_folder_of_a_run(run, model_config):
    there = {path.name for path in run.iterdir()}
    assert {"config.json", "metrics.jsonl", "best", "resume.json"} <= there
    assert len(list(run.glob("resume-*.safetensors"))) == 1
    assert not list(run.rglob("*.pkl")) + list(run.rglob("*.pt")) + list(run.rglob("*.bin"))
    settings = runs.read_json(run / "config.json")
    assert ModelConfig.from_dict(settings["model"]) == model_config
    assert TrainConfig.from_dict(settings["training"]) == CONFIG
    assert settings["corpora"] == ["mini"] and settings["clips"] == {"train": 12, "val": 3, "test": 18}
    assert settings["versions"]["torch"]


def test_a_line_an_epoch_with_the_terms_of_its_stage(run):
    found = lines(run)
    assert [line["epoch"] for line in found] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in found] == [3, 6, 9, 12, 15]  # 12 clips in batches of 5
    assert [line["stage"] for line in found] == ["classify", "align", "align", "adversarial", "adversarial"]
    terms = {
        "classify": {"classification"},
        "align": {"classification", "contrastive"},
        "adversarial": {"classification", "contrastive", "adversarial"},
    }
    for line in found:
        for side in ("train", "val"):
            assert {k.removeprefix(f"{side}_") for k in line if k.startswith(side)} == terms[line["stage"]]
    assert all(np.isfinite(value) for line in found for value in line.values() if isinstance(value, float))


def test_it_learns(run):
    """Random features of three styles: enough to tell the clips of the training split apart."""
    found = lines(run)
    assert found[-1]["train_classification"] < 0.9 * found[0]["train_classification"]
    assert found[0]["train_classification"] == pytest.approx(np.log(len(STYLES)), rel=0.25)  # chance at first


def test_the_temperature_is_learned_once_the_contrastive_loss_is_on(run):
    taus = [line["tau"] for line in lines(run)]
    assert taus[0] == pytest.approx(0.07, rel=1e-5)
    assert len(set(taus)) == 5 and all(0.01 <= tau < 1 for tau in taus)


def test_tensorboard_has_a_log(run):
    assert list(run.rglob("events.out.tfevents*"))


def plan_validation(patch: pytest.MonkeyPatch, planned: list[float | None]) -> None:
    """Validation losses of the coming epochs; None where the contrastive loss is not on."""
    coming = iter(planned)

    def validate(self, stage):
        loss = next(coming)
        return {} if loss is None else {"contrastive": loss}

    patch.setattr(training._Trainer, "validate", validate)


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(train, monkeypatch):
    states, judge = [], training._Trainer._judge

    def noted(self, *args):
        states.append({k: v.clone() for k, v in self.objective.retriever.state_dict().items()})
        judge(self, *args)

    plan_validation(monkeypatch, [None, 3.0, 1.0, 2.0, 1.0])
    monkeypatch.setattr(training._Trainer, "_judge", noted)
    model = train("run")
    trained = {k: v for k, v in model.state_dict().items() if not k.startswith("text.")}  # the text's is let go
    assert_equal(trained, states[2])
    assert not any(torch.equal(states[2]["text_head.weight"], states[i]["text_head.weight"]) for i in (1, 3, 4))
    resume = runs.read_json(train.folder / "run" / "resume.json")
    assert (resume["best_epoch"], resume["best_loss"]) == (3, 1.0)


def test_the_validation_loss_is_that_of_the_whole_split(train, run, manifest):
    """One clip of the split less, and it is another."""
    fewer = manifest.drop(manifest.index[manifest["split"] == "val"][-1]).reset_index(drop=True)
    train("fewer", fewer)
    for line, other in zip(lines(train.folder / "fewer"), lines(run), strict=True):
        assert line["train_classification"] == other["train_classification"]
        assert line["val_classification"] != other["val_classification"]


def test_without_a_validation_split_it_is_the_last_epoch(train, manifest):
    model = train("run", manifest[manifest["split"] != "val"].reset_index(drop=True))
    state = load_file(next((train.folder / "run").glob("resume-5.safetensors")))
    assert torch.equal(model.text_head.weight, state["model.retriever.text_head.weight"])
    assert not [key for line in lines(train.folder / "run") for key in line if key.startswith("val_")]


def test_val_is_trained_on_too_where_that_is_said(train, manifest):
    train("run", train_on_val=True)
    moved = manifest.assign(split=manifest["split"].replace("val", "train"))
    train("moved", moved)
    assert_equal(best(train.folder / "run"), best(train.folder / "moved"))
    assert runs.read_json(train.folder / "run" / "resume.json")["best_epoch"] == CONFIG.epochs


def test_patience_without_a_validation_split_does_not_stop_the_run(train, manifest):
    train("run", manifest[manifest["split"] != "val"].reset_index(drop=True), patience=1)
    assert len(lines(train.folder / "run")) == 5


# Stages -----------------------------------------------------------------------------------------------------


def changed(train, name: str, **changes) -> dict[str, bool]:
    """Which part of the model a run of one stage has changed, compared with its start."""
    starts = {}

    def noted(self):
        starts.update({k: v.clone() for k, v in self.objective.state_dict().items()})
        return resume(self)

    resume = training._Trainer._resume
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Trainer, "_resume", noted)
        train(name, **changes)
    (file,) = (train.folder / name).glob("resume-*.safetensors")
    ends = {k.removeprefix("model."): v for k, v in load_file(file).items() if k.startswith("model.")}
    found: dict[str, bool] = {}
    for key, value in ends.items():
        parts = key.split(".")
        part = parts[1] if parts[0] == "retriever" else parts[0]
        found[part] = found.get(part, False) or not torch.equal(value, starts[key])
    return found


def test_stage_1_is_the_classifier_alone(train):
    found = changed(train, "classify", epochs=2, classify_epochs=2)
    assert found == {
        "speech_head": True,
        "classifier": True,
        "text_head": False,
        "discriminator": False,
        "log_scale": False,
        "bias": False,
    }


def test_stage_2_adds_the_contrastive_loss(train):
    found = changed(train, "align", epochs=2, classify_epochs=0, align_epochs=2)
    assert found["text_head"] and found["log_scale"] and found["speech_head"] and found["classifier"]
    assert not found["discriminator"] and not found["bias"]


def test_stage_3_adds_the_discriminator(train):
    found = changed(train, "adversarial", epochs=2, classify_epochs=0, align_epochs=0)
    assert found["discriminator"] and found["text_head"] and found["classifier"]


def test_the_sigmoid_objective_learns_its_bias(train):
    assert changed(train, "sigmoid", epochs=2, classify_epochs=0, objective="sigmoid")["bias"]


@pytest.mark.parametrize("objective", ["multi-positive", "hard-negative", "sigmoid"])
def test_the_other_objectives_train_too(train, objective):
    train("run", epochs=2, classify_epochs=0, objective=objective)
    found = lines(train.folder / "run")
    assert np.isfinite(found[-1]["val_contrastive"])
    assert runs.read_json(train.folder / "run" / "config.json")["training"]["objective"] == objective


def test_the_discriminator_has_a_learning_rate_of_its_own(train, monkeypatch):
    groups, run = [], training._Trainer.run

    def noted(self):
        groups.extend((len(group["params"]), group["lr"]) for group in self.optimizer.param_groups)
        run(self)

    monkeypatch.setattr(training._Trainer, "run", noted)
    train("run", epochs=1)
    (ours, rate), (theirs, other_rate) = groups
    assert (rate, other_rate) == (1e-2, 4e-3) and theirs == 4 and ours == 13
    # ours: the classifier's 4; mix and 4 of the speech head; 2 of the text head; scale and bias


def test_by_the_cosine_both_rates_fall_and_a_stopped_run_goes_on_with_them(train, monkeypatch):
    rates, step = [], training._Trainer._step

    def noted(self, *args):
        rates.append([group["lr"] for group in self.optimizer.param_groups])
        return step(self, *args)

    monkeypatch.setattr(training._Trainer, "_step", noted)
    train("whole", schedule="cosine")
    per_epoch = len(rates) // 5
    fall = [1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915]  # (1 + cos(pi e / 5)) / 2
    np.testing.assert_allclose(rates[::per_epoch], np.outer(fall, [1e-2, 4e-3]), rtol=1e-6)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_in_epoch(patch, 3)
        train("stopped", schedule="cosine")
    train("stopped", schedule="cosine")
    assert lines(train.folder / "stopped") == lines(train.folder / "whole")
    assert_equal(best(train.folder / "stopped"), best(train.folder / "whole"))


def test_mixed_clips_are_standardised_by_the_split_or_the_speaker(train, manifest, monkeypatch):
    """Against numpy, on the features of every clip. There is one corpus, so the corpus is the split."""
    monkeypatch.setattr(adaptation, "MIN_CLIPS", 1)
    seen, kept = [], {}
    backward, features = objective.Objective.backward, training.embedding.frozen_features

    def noted(self, batch, prompts, stage):
        seen.extend(zip(batch["utterance_id"], *batch["statistics"], strict=True))
        return backward(self, batch, prompts, stage)

    def noted_features(model, cuts, level, cache):
        found, owner = features(model, cuts, level, cache), {cut.id: cut.custom["utterance_id"] for cut in cuts}
        kept.update((owner[i], x) for i, x in zip(found.cut_ids, found.pooled.numpy().astype(float), strict=True))
        return found

    monkeypatch.setattr(objective.Objective, "backward", noted)
    monkeypatch.setattr(training.embedding, "frozen_features", noted_features)
    train("run", standardise="mixed", crop_s=8.0)
    speaker = manifest[manifest["split"] == "train"].set_index("utterance_id")["speaker"]
    groups = {"": speaker.index} | {name: speaker.index[speaker == name] for name in set(speaker)}
    expected = {name: np.stack([kept[clip] for clip in clips]) for name, clips in groups.items()}
    used = {"": 0, "own": 0}
    for clip, mean, std in seen:
        kind = "" if np.allclose(mean, expected[""].mean(0), atol=1e-4) else "own"
        pooled = expected["" if kind == "" else speaker[clip]]
        np.testing.assert_allclose(mean, pooled.mean(0), atol=1e-4)
        np.testing.assert_allclose(std, np.maximum(pooled.std(0), 1e-4), atol=1e-4)
        used[kind] += 1
    assert len(seen) == 5 * len(speaker) and 0.15 < used["own"] / len(seen) < 0.55  # one in three


def test_a_stopped_mixed_run_goes_on_as_if_it_had_not_been(train):
    train("whole", standardise="mixed")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_in_epoch(patch, 3)
        train("stopped", standardise="mixed")
    train("stopped", standardise="mixed")
    assert lines(train.folder / "stopped") == lines(train.folder / "whole")


@pytest.mark.parametrize("groups", [False, True])
def test_what_is_mixed_are_the_standardised_features(tiny_model, groups):
    generator, n = torch.Generator().manual_seed(0), 40
    pooled, style = torch.randn(n, 3, 32, generator=generator) * 3 + 1, torch.randint(-1, 5, (n,), generator=generator)
    mean, std = torch.randn(n, 3, 32, generator=generator), torch.rand(n, 3, 32, generator=generator) + 0.5
    batch = {"pooled": pooled, "style": style} | ({"statistics": (mean, std)} if groups else {})
    training.mix(batch, 0.4, np.random.default_rng(5))
    partner = torch.from_numpy(np.random.default_rng(5).permutation(n))
    share, other = batch["mixed"]
    assert torch.equal(other, style[partner]) and 0.5 <= float(share.min()) < 0.6 and float(share.max()) == 1
    assert bool((share[(style < 0) | (other < 0)] == 1).all()) and int((share < 1).sum()) >= n / 2
    standardised = (pooled - mean) / std if groups else pooled
    weight = share[:, None, None]
    expected = weight * standardised + (1 - weight) * standardised[partner]
    found = (batch["pooled"] - mean) / std if groups else batch["pooled"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_stopped_run_that_mixes_goes_on_as_if_it_had_not_been(train):
    settings = {
        "objective": "multi-positive",
        "mixup": 0.4,
        "standardise": "mixed",
        "batches": "corpus",
        "speeds": (0.9,),
    }
    train("whole", **settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        stop_in_epoch(patch, 3)
        train("stopped", **settings)
    train("stopped", **settings)
    assert lines(train.folder / "stopped") == lines(train.folder / "whole")
    train("plain", **settings | {"mixup": 0.0})
    assert lines(train.folder / "plain") != lines(train.folder / "whole")


def test_mixing_is_for_targets_that_can_be_mixed(train, monkeypatch):
    with pytest.raises(ConfigError, match="mixup is 0.4, for which objective"):
        CONFIG.but(mixup=0.4)
    with pytest.raises(ConfigError, match="mixup is 0.4, which is for features that stay"):
        CONFIG.but(mixup=0.4, objective="multi-positive", finetune="full")
    monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
    with pytest.raises(ConfigError, match="use one process"):
        train("run", objective="multi-positive", mixup=0.4)


def test_mixed_needs_features_that_stay_as_they_are():
    for name, choice in (("standardise", "mixed"), ("batches", "corpus"), ("speeds", (0.9,))):
        with pytest.raises(ConfigError, match=re.escape(f"{name} is {choice!r}, which is for features")):
            CONFIG.but(**{name: choice, "finetune": "full"})


# Resume -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_before_epoch(patch, epoch: int) -> None:
    run_epoch = training._Trainer._epoch

    def stopping(self):
        if self.progress.epoch == epoch:
            raise Stopped
        return run_epoch(self)

    patch.setattr(training._Trainer, "_epoch", stopping)


def stop_in_epoch(patch, epoch: int) -> None:
    """After a step of it: its weights are changed, its line is not written."""
    step = training._Trainer._step

    def stopping(self, *args):
        values = step(self, *args)
        if self.progress.epoch == epoch:
            raise Stopped
        return values

    patch.setattr(training._Trainer, "_step", stopping)


def stop_at_the_end_of_epoch(patch, epoch: int) -> None:
    """Its line and its best checkpoint are written, its state is not."""
    save = checkpoints.save_file

    def stopping(tensors, path):
        if f"resume-{epoch + 1}" in Path(path).name:
            Path(path).write_bytes(b"half a file")
            raise Stopped
        save(tensors, path)

    patch.setattr(checkpoints, "save_file", stopping)


def stop_before_epochs_state_counts(patch, epoch: int) -> None:
    """Its state is written, resume.json still names the one before."""
    write = runs.write_json

    def stopping(path, value):
        if Path(path).name == "resume.json" and value["epoch"] == epoch + 1:
            raise Stopped
        write(path, value)

    patch.setattr(runs, "write_json", stopping)


STOPS = [stop_before_epoch, stop_in_epoch, stop_at_the_end_of_epoch, stop_before_epochs_state_counts]


@pytest.mark.parametrize("finetune", ["frozen", "full"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(train, run, finetune):
    """Stopped in every stage and at every place of an epoch: the same losses and weights, to the last bit."""
    whole = run
    if finetune == "full":
        train("whole", finetune="full")
        whole = train.folder / "whole"
    stops = list(zip([*STOPS, stop_in_epoch], (1, 2, 3, 4, 0), strict=True))
    for stop, epoch in stops if finetune == "frozen" else stops[1:3]:
        name = f"{stop.__name__}-{epoch}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            stop(patch, epoch)
            train(name, finetune=finetune)
        assert not epoch or len(lines(train.folder / name)) == epoch + (stop in STOPS[2:])
        train(name, finetune=finetune)
        assert lines(train.folder / name) == lines(whole), name
        assert_equal(best(train.folder / name), best(whole))
        names = {path.name for path in (train.folder / name).glob("resume*")}
        assert names == {"resume.json", "resume-5.safetensors"}
        assert_equal(*(load_file(folder / "resume-5.safetensors") for folder in (train.folder / name, whole)))


def test_a_run_stopped_again_and_again(train, run):
    for epoch in (1, 2, 4):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
            stop_before_epoch(patch, epoch)
            train("torn")
    train("torn")
    assert lines(train.folder / "torn") == lines(run)
    assert_equal(best(train.folder / "torn"), best(run))


KILLED = """
import json, os, signal, sys
os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"
from esr_utils import training
from esr_utils.config import ConfigError, ModelConfig, TrainConfig
from esr_utils.manifests import load_corpora

root, folder, cache, model, config, threads = json.loads(sys.argv[1])
training.torch.set_num_threads(threads)
step = training._Trainer._step

def killed(self, *args):
    values = step(self, *args)
    if self.progress.step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return values

training._Trainer._step = killed
model, config = ModelConfig.from_dict(model), TrainConfig.from_dict(config)
training.fit(load_corpora("mini", root), folder, model, config, device="cpu", cache=training.Path(cache))
"""


def test_a_killed_process(train, run, data_root, model_config, cache, tmp_path):
    """SIGKILL in the midst of the third epoch; another process finishes the run."""
    settings = [
        str(data_root), str(tmp_path / "killed"), str(cache), model_config.to_dict(), CONFIG.to_dict(),
        torch.get_num_threads(),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(runs.PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(settings)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(lines(tmp_path / "killed")) == 2
    train("killed")
    assert lines(tmp_path / "killed") == lines(run)
    assert_equal(best(tmp_path / "killed"), best(run))


def test_a_finished_run_is_not_run_again_nor_its_clips_read(train):
    first = train("run")
    before = (train.folder / "run" / "metrics.jsonl").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(training, "_Trainer")
        again = train("run")
    assert (train.folder / "run" / "metrics.jsonl").read_bytes() == before
    assert_equal(first.state_dict(), again.state_dict())


# One seed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finetune", ["frozen", "full"])
def test_the_same_seed_gives_the_same_run_and_another_another(train, finetune):
    options = {"finetune": finetune, "epochs": 3, "classify_epochs": 1, "align_epochs": 1}
    train("first", **options)
    torch.manual_seed(123), np.random.seed(5)  # what went on before must not matter
    train("second", **options)
    train("other", **options, seed=1)
    first, second, other = (lines(train.folder / name) for name in ("first", "second", "other"))
    assert first == second
    assert_equal(best(train.folder / "first"), best(train.folder / "second"))
    assert all(a["train_classification"] != b["train_classification"] for a, b in zip(first, other, strict=True))


def test_validation_is_the_same_each_time_it_is_asked_for(train, monkeypatch):
    run_epoch, asked = training._Trainer._epoch, []

    def noted(self):
        line = run_epoch(self)
        torch.rand(7)
        asked.append((self.validate(line["stage"]), {k: v for k, v in line.items() if k.startswith("val_")}))
        return line

    monkeypatch.setattr(training._Trainer, "_epoch", noted)
    train("run")
    for again, line in asked:
        assert {f"val_{name}": value for name, value in again.items()} == line


# Another run in the same place ------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(train, model_config):
    train("run", epochs=1)
    before = (train.folder / "run" / "config.json").read_bytes()
    with pytest.raises(RunExists, match=r"training\.learning_rate: 0\.01 there, 0\.02 now"):
        train("run", epochs=1, learning_rate=0.02)
    with pytest.raises(RunExists, match=r"training\.epochs: 1 there, 2 now"):
        train("run", epochs=2)
    with pytest.raises(RunExists, match=r"model\.dim: 8 there, 6 now"):
        train("run", epochs=1, model=model_config.but(dim=6))
    assert (train.folder / "run" / "config.json").read_bytes() == before
    train("run", epochs=1)


def test_another_manifest_is_refused(train, manifest):
    train("run", epochs=1)
    relabelled = manifest.assign(style=manifest["style"].replace("calm", "bored"))
    with pytest.raises(RunExists, match="manifest"):
        train("run", relabelled, epochs=1)


# When it ends -----------------------------------------------------------------------------------------------


def test_max_steps_ends_a_run_within_an_epoch(train):
    train("run", max_steps=7)
    found = lines(train.folder / "run")
    assert [line["step"] for line in found] == [3, 6, 7]
    assert runs.read_json(train.folder / "run" / "resume.json")["finished"]


def test_max_steps_before_the_contrastive_loss_is_on_still_leaves_a_model(train):
    model = train("run", max_steps=2)
    assert len(lines(train.folder / "run")) == 1
    assert model.encode_text(["a calm voice"]).shape == (1, 8)


def test_patience_ends_a_run_that_no_longer_gets_better(train, monkeypatch):
    """With a patience of 2 it is over after the sixth epoch; a better one in between starts the count anew."""
    plan_validation(monkeypatch, [None, 3.0, 3.5, 2.0, 2.5, 2.0, 1.0])
    train("run", epochs=7, patience=2)
    assert len(lines(train.folder / "run")) == 6
    resume = runs.read_json(train.folder / "run" / "resume.json")
    assert (resume["best_epoch"], resume["best_loss"], resume["finished"]) == (4, 2.0, True)


def test_patience_does_not_count_the_stage_without_the_loss(train):
    train("run", classify_epochs=4, patience=1)
    assert len(lines(train.folder / "run")) == 5


# What is trained --------------------------------------------------------------------------------------------


def test_a_frozen_speech_backbone_is_not_changed_and_not_saved(train, model_config):
    model = train("run")
    untouched = StyleRetriever.build(model_config).speech
    assert weights.fingerprint(model.speech) == weights.fingerprint(untouched)
    assert not any(name.startswith(("speech.", "text.")) for name in best(train.folder / "run"))


def test_full_fine_tuning_changes_the_speech_backbone_and_not_the_text_backbone(train, model_config):
    model = train("run", finetune="full", epochs=3)
    untouched = StyleRetriever.build(model_config)
    assert weights.fingerprint(model.text) == weights.fingerprint(untouched.text)
    start, end = untouched.speech.state_dict(), model.speech.state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert {
        "encoder.conv1.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
        "encoder.layer_norm.bias",
    } <= moved


def test_full_fine_tuning_leaves_whispers_fixed_positions_alone(train, model_config):
    """They are sinusoids; trained, those within a crop would no longer fit those after it."""
    model = train("run", finetune="full", epochs=1)
    start = StyleRetriever.build(model_config).speech.encoder.embed_positions.weight
    assert torch.equal(model.speech.encoder.embed_positions.weight, start)


def test_no_step_sees_more_of_a_clip_than_the_crop(train, monkeypatch):
    longest = []
    step = training._Trainer._step

    def noted(self, batch, *args):
        longest.append(int(batch["n_samples"].max()))
        return step(self, batch, *args)

    monkeypatch.setattr(training._Trainer, "_step", noted)
    train("run", finetune="full", epochs=1, crop_s=1.5)
    assert max(longest) == 24_000


def test_the_standardisation_is_that_of_the_training_split(train, manifest, model_config):
    """Other validation and test clips change nothing of it."""
    first = train("first", epochs=1, classify_epochs=1)
    fewer = manifest[(manifest["split"] == "train") | (manifest["style"] == "calm")].reset_index(drop=True)
    second = train("second", fewer, epochs=1, classify_epochs=1)
    assert torch.equal(first.speech_head.mean, second.speech_head.mean)
    assert float(first.speech_head.mean.abs().max()) > 0.1


# Clips that cannot be used, and clips without a style -------------------------------------------------------


def spoil(manifest: pd.DataFrame, index: int) -> str:
    """Replaces a clip's audio by silence of the same length; gives its id."""
    row = manifest.loc[index]
    file = Path(row["root"]) / row["path"]
    info = soundfile.info(file)
    soundfile.write(file, np.zeros(info.frames), info.samplerate, format="OGG", subtype="OPUS")
    return row["utterance_id"]


@pytest.mark.parametrize("finetune", ["frozen", "full"])
def test_a_clip_that_cannot_be_used_is_listed_and_the_rest_goes_on(train, own_corpus, finetune):
    ids = [spoil(own_corpus, own_corpus.index[own_corpus["split"] == split][0]) for split in ("train", "val")]
    train("run", own_corpus, finetune=finetune, epochs=2)
    listed = pd.read_csv(train.folder / "run" / "skipped.csv")
    assert sorted(listed["utterance_id"]) == sorted(ids) and listed["reason"].str.contains("silent").all()
    found = lines(train.folder / "run")
    assert len(found) == 2 and found[-1]["step"] == 6  # 11 clips in batches of 5


@pytest.mark.parametrize(
    "finetune",
    [
        "frozen",
        "full",
    ],
)
def test_without_any_usable_training_clip_there_is_no_run(train, own_corpus, finetune):
    for index in own_corpus.index[own_corpus["split"] == "train"]:
        spoil(own_corpus, index)
    with pytest.raises(ValueError, match="no usable training clip.*12 refused"):
        train("run", own_corpus, finetune=finetune, epochs=1)


@pytest.fixture
def prompts_used(monkeypatch) -> dict[str, set[str]]:
    """Utterance -> the prompts it was trained or validated with."""
    used: dict[str, set[str]] = {}
    draw = training._Trainer._batches

    def noted(self, *args):
        for batch, prompts in draw(self, *args):
            for utterance, prompt in zip(batch["utterance_id"], prompts, strict=True):
                used.setdefault(utterance, set()).add(prompt)
            yield batch, prompts

    monkeypatch.setattr(training._Trainer, "_batches", noted)
    return used


def test_a_clip_is_described_by_prompts_of_its_style_and_without_one_by_its_caption(train, manifest, prompts_used):
    bank = PromptBank.load()
    unlabelled = manifest.index[manifest["split"] == "train"][[0, 5]]
    rows = manifest.copy()
    rows.loc[unlabelled, "style"] = ""
    rows.loc[unlabelled, "caption"] = ["A voice like gravel.", "She trails off, wondering."]
    train("run", rows)
    captions = dict(zip(rows.loc[unlabelled, "utterance_id"], rows.loc[unlabelled, "caption"], strict=True))
    assert set(prompts_used) == set(rows.loc[rows["split"] != "test", "utterance_id"])
    style = dict(zip(rows["utterance_id"], rows["style"], strict=True))
    for utterance, used in prompts_used.items():
        if utterance in captions:
            assert used == {captions[utterance]}
        else:
            assert used <= set(bank.all_prompts(style[utterance], "seen"))
    assert max(len(used) for used in prompts_used.values()) > 2  # they vary from epoch to epoch


def test_a_clip_with_neither_style_nor_caption_is_not_trained_on(train, manifest, prompts_used):
    rows = manifest.copy()
    rows.loc[rows.index[rows["split"] == "train"][0], "style"] = ""
    train("run", rows, epochs=2)
    assert not any("" in used for used in prompts_used.values())


def test_captions_alone_are_enough_to_train(train, manifest):
    """(audio, text) pairs without any style: the contrastive loss carries it."""
    rows = manifest.assign(style="", caption=manifest["text"] + " " + manifest["speaker"])
    model = train("run", rows, classify_epochs=0)
    found = lines(train.folder / "run")
    assert {line["train_classification"] for line in found} == {0.0}
    assert found[-1]["train_contrastive"] != found[0]["train_contrastive"]
    assert model.encode_text(["anything"]).shape == (1, 8)


def test_a_first_stage_that_would_train_nothing_is_refused(train, manifest):
    captioned = manifest.assign(style="", caption="A voice like gravel.")
    with pytest.raises(ConfigError, match="no training clip has a style, .* nothing: set classify_epochs to 0"):
        train("run", captioned)
    with pytest.raises(ConfigError, match="no training clip has a style, .* nothing$"):
        train("run", captioned, objective="classifier", classify_epochs=0)
    with pytest.raises(ConfigError, match="classification_weight is 0, .* nothing: set classify_epochs to 0"):
        train("run", classification_weight=0.0)
    assert not (train.folder / "run").exists()
    train("run", classification_weight=0.0, classify_epochs=0, epochs=1)


# Settings of the paper's comparisons -------------------------------------------------------------------------


def test_the_classifier_alone_is_trained_and_chosen_without_text(train, monkeypatch):
    def no_text(self, texts):
        raise AssertionError("the text backbone was run")

    monkeypatch.setattr(training.StyleRetriever, "text_vectors", no_text)
    found = changed(train, "baseline", objective="classifier")
    assert found["classifier"] and found["speech_head"] and not found["text_head"] and not found["discriminator"]
    told = lines(train.folder / "baseline")
    assert {line["stage"] for line in told} == {"classify"}
    best_epoch = runs.read_json(train.folder / "baseline" / "resume.json")["best_epoch"]
    assert best_epoch == min(told, key=lambda line: line["val_classification"])["epoch"]


def test_the_fixed_temperature_stays(train):
    train("run", fixed_temperature=True)
    assert [line["tau"] for line in lines(train.folder / "run")] == pytest.approx([0.07] * 5, rel=1e-6)


def test_without_augmentation_there_is_one_prompt_a_style(train, manifest, prompts_used):
    train("run", augment_prompts=False)
    assert set.union(*prompts_used.values()) == {f"Speech that is {style}." for style in set(manifest["style"])}


def test_held_out_styles_are_neither_trained_on_nor_validated_with(train, manifest, prompts_used):
    train("run", held_out_styles=("calm",))
    used = manifest[manifest["split"].isin(("train", "val")) & (manifest["style"] != "calm")]
    assert set(prompts_used) == set(used["utterance_id"])
    assert not any("calm" in prompt for prompts in prompts_used.values() for prompt in prompts)


def test_an_unknown_held_out_style_is_refused(train):
    with pytest.raises(ConfigError, match="held_out_styles: clam unknown; styles: angry, awe"):
        train("run", held_out_styles=("clam",))


def test_chunks_give_the_run_of_whole_batches(train, tiny_config):
    """Three epochs of a backbone that is trained; sums in another order, so not to the last bit."""
    options = {"finetune": "full", "epochs": 3, "classify_epochs": 1, "align_epochs": 1, "learning_rate": 1e-4}
    options["model"] = tiny_config  # without dropout, which draws otherwise for a chunk than for a batch
    train("whole", **options)
    train("chunks", **options, chunk_size=2)
    assert_near(lines(train.folder / "chunks"), lines(train.folder / "whole"))


def test_lower_layers_learn_more_slowly(train, monkeypatch):
    rates, run = {}, training._Trainer.run

    def noted(self):
        names = {id(p): name for name, p in self.objective.named_parameters()}
        rates.update({names[id(p)]: g["lr"] for g in self.optimizer.param_groups for p in g["params"]})
        run(self)

    monkeypatch.setattr(training._Trainer, "run", noted)
    train("run", finetune="full", epochs=1, layer_decay=0.5)
    encoder = "retriever.speech.encoder."
    assert rates["retriever.text_head.weight"] == rates["retriever.classifier.0.weight"] == 1e-2
    assert rates[encoder + "layers.1.fc1.weight"] == pytest.approx(0.5e-2)
    assert rates[encoder + "layers.0.fc1.weight"] == pytest.approx(0.25e-2)
    assert rates[encoder + "conv1.weight"] == pytest.approx(0.125e-2)
    assert rates["discriminator.0.weight"] == 4e-3


def test_bf16_where_asked_for_and_where_the_device_has_it(train, monkeypatch):
    schedule = {"finetune": "full", "epochs": 2, "classify_epochs": 1, "align_epochs": 0}
    monkeypatch.setattr(objective, "has_bf16", lambda device: True)
    train("run", **schedule, precision="bf16")
    monkeypatch.setattr(objective, "has_bf16", lambda device: False)
    with pytest.warns(UserWarning, match="this cpu can only imitate it, .*: matrix products are in fp32"):
        train("imitated", **schedule, precision="bf16")
    train("exact", **schedule)
    found, imitated, exact = (lines(train.folder / run) for run in ("run", "imitated", "exact"))
    assert imitated == exact
    assert found[-1]["train_contrastive"] != exact[-1]["train_contrastive"]
    assert found[-1]["train_contrastive"] == pytest.approx(exact[-1]["train_contrastive"], rel=0.2)


def test_another_bank_of_prompts_is_another_run(train, tmp_path):
    bank = json.loads(PROMPTS_PATH.read_text("utf-8"))
    bank["styles"]["angry"]["phrases"][0] = "thunderous"
    (tmp_path / "bank.json").write_text(json.dumps(bank))
    train("run", epochs=1)
    with pytest.raises(RunExists, match="prompt_bank"):
        train("run", epochs=1, prompt_bank=str(tmp_path / "bank.json"))
    train("other", epochs=1, prompt_bank=str(tmp_path / "bank.json"))
    bank["styles"]["angry"]["phrases"][0] = "stormy"
    (tmp_path / "bank.json").write_text(json.dumps(bank))
    with pytest.raises(RunExists, match="prompts_sha256"):
        train("other", epochs=1, prompt_bank=str(tmp_path / "bank.json"))


def test_one_corpus_in_two_readings_is_refused(train, manifest):
    rows = manifest.assign(corpus=["expresso", "expresso-paper"] * 16 + ["esd"])
    with pytest.raises(ConfigError, match="expresso in two readings"):
        train("run", rows)
    assert not (train.folder / "run").exists()


def test_the_papers_recipe_to_the_letter():
    """Kang & Roy 2025, section IV-B."""
    model, config = ModelConfig.paper(), TrainConfig.paper()
    assert (model.dim, model.temperature, model.classifier_hidden, config.discriminator_hidden) == (512, 0.07, 128, 128)
    assert (model.pooling, model.mix_layers, model.hidden, model.dropout) == ("mean", False, 0, 0.0)
    assert (model.speech_backbone, model.text_backbone, config.finetune) == ("emotion2vec", "roberta", "full")
    assert (config.batch_size, config.crop_s, config.epochs) == (32, 8.0, 110)
    assert (config.classify_epochs, config.align_epochs, config.objective) == (5, 5, "infonce")
    assert (config.learning_rate, config.discriminator_learning_rate, config.betas) == (5e-5, 2e-5, (0.9, 0.999))
    weights_of = (config.contrastive_weight, config.adversarial_weight, config.classification_weight)
    assert weights_of == (1.0, 0.1, 0.5) and config.augment_prompts and not config.fixed_temperature
    assert (config.precision, config.layer_decay, config.max_steps, config.patience) == ("bf16", 1.0, 0, 0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", -1), ("epochs", "3"), ("batch_size", 2.5), ("batch_size", 0), ("max_steps", -1),
        ("layer_decay", 2.0), ("layer_decay", 0.0), ("adversarial_weight", float("nan")), ("classify_epochs", -5),
        ("chunk_size", -1), ("betas", (0.9, 1.0)), ("precision", "fp16"), ("held_out_styles", "calm"), ("seed", -1),
        ("crop_s", True), ("schedule", "linear"), ("speeds", (0.1,)), ("speeds", 0.9), ("speeds", ("fast",)),
        ("speeds", (1,)), ("speeds", (0.9, 0.9)), ("train_on_val", "false"), ("recompute", 1),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused_by_name(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} is"):
        CONFIG.but(**{setting: value})


def test_further_settings_reach_the_config_that_has_them():
    model, config = with_settings("schedule=cosine+temperature=0.2+recompute=True+max_steps=7", ModelConfig(), CONFIG)
    assert model == ModelConfig(temperature=0.2)
    assert config == CONFIG.but(schedule="cosine", recompute=True, max_steps=7)
    assert with_settings("", model, config) == (model, config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("colour=red", "'colour=red' is not name=value of a known setting"), ("schedule", "'schedule' is not name="),
        ("schedule=linear", "schedule is 'linear'"), ("temperature=warm", "temperature is 'warm'"),
        ("max_steps=__import__('os')", "max_steps is"),
    ],
)  # fmt: skip
def test_further_settings_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        with_settings(settings, ModelConfig(), CONFIG)


def test_a_setting_refused_at_the_start_does_not_keep_the_corrected_run_out(train):
    with pytest.raises(ConfigError, match="clam"):
        train("run", held_out_styles=("clam",))
    with pytest.raises(ConfigError, match="crop_s is 40"):
        train("run", finetune="full", crop_s=40.0)
    train("run", epochs=1)
    with pytest.raises(RunExists, match="epochs: 1 there, 2 now"):
        train("run", epochs=2)


def test_a_folder_that_is_no_runs_is_left_as_it_is(train):
    train("run", epochs=1)
    before = (train.folder / "run" / "best" / "config.json").read_bytes()
    with pytest.raises(RunExists, match="not a run's config.json"):
        train("run/best", epochs=1)
    assert (train.folder / "run" / "best" / "config.json").read_bytes() == before


def test_two_at_once_in_one_folder_are_refused(train):
    with provenance.held(train.folder / "run"), pytest.raises(RunExists, match="another process trains"):
        train("run", epochs=1)
    train("run", epochs=1)


def test_an_older_run_lacks_newer_settings_and_is_still_itself(train):
    train("run", epochs=1)
    path = train.folder / "run" / "config.json"
    settings = runs.read_json(path)
    del settings["training"]["chunk_size"], settings["model"]["classifier_hidden"]
    runs.write_json(path, settings)
    before = lines(train.folder / "run")
    train("run", epochs=1)
    assert lines(train.folder / "run") == before


def test_a_device_that_is_not_there_is_refused_before_training(manifest, model_config, tmp_path):
    with pytest.raises(ValueError, match="device is 'gpu'"):
        fit(manifest, tmp_path / "run", model_config, CONFIG, device="gpu")
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_ends_the_run_without_a_checkpoint(train, manifest):
    rows = manifest[manifest["split"] != "val"].reset_index(drop=True)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train("run", rows, learning_rate=1e38)
    assert not (train.folder / "run" / "best").exists()


def test_a_bank_that_is_not_there_is_refused_by_name(train, tmp_path):
    with pytest.raises(ConfigError, match="prompt_bank: .*nothing.json"):
        train("run", prompt_bank=str(tmp_path / "nothing.json"))


def test_states_left_over_by_a_kill_are_deleted(train):
    train("run", epochs=1)
    left = train.folder / "run" / "resume-0.safetensors"
    left.write_bytes(b"left over")
    (train.folder / "run" / "resume.json").unlink()
    train("run", epochs=2)
    assert not left.exists()


def test_several_processes_take_the_corpora_as_they_are(train, manifest):
    with pytest.raises(ValueError, match="as load_corpora has it"):
        train("run", manifest.iloc[1:].reset_index(drop=True), processes=2)


def test_two_processes_train_the_run_of_one(train, tiny_config, monkeypatch):
    """Another process goes on with a run that was begun; it finds the package and as many threads as here."""
    options = {"finetune": "full", "epochs": 4, "classify_epochs": 1, "align_epochs": 1, "learning_rate": 1e-4}
    monkeypatch.setenv("PYTHONPATH", str(runs.PROJECT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    train("two", model=tiny_config, processes=2, **options)
    train("one", model=tiny_config, **options)
    assert_near(lines(train.folder / "two"), lines(train.folder / "one"))
    assert "processes" not in runs.read_json(train.folder / "two" / "config.json")["training"]


def test_processes_that_fail_are_told(train, monkeypatch):
    monkeypatch.setattr(training.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="by 2 processes ended with status 1"):
        train("run", processes=2, epochs=1)


def test_a_run_that_was_never_begun_cannot_go_on(tmp_path):
    with pytest.raises(weights.WeightsError, match="begin the run with notebook 03_train"):
        training.go_on(tmp_path / "nothing")
