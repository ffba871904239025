"""Training on captions: the loss against a slow obvious version, and runs that go on where they were."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from esr_utils import (
    captions,
    fusion_systems,
    fusion_training,
    losses,
    matching,
    provenance,
    retriever,
    runs,
    training,
    weights,
)
from esr_utils.config import ConfigError, FusionConfig, FusionTrainConfig
from esr_utils.embedding import frozen_frames, padded_frames
from esr_utils.fusion import FusionRetriever
from esr_utils.fusion_objective import FusionObjective
from esr_utils.manifests import to_cuts
from esr_utils.text import Tokens

CONFIG = FusionTrainConfig(
    epochs=3,
    warmup_epochs=1,
    batch_size=5,
    accumulation_steps=1,
    learning_rate=3e-3,
    objective="hard-negative",
    mask_false_negatives=True,
    regulariser_weight=0.5,
    matching_weight=1.0,
    mined_negatives=2,
    level="recorded",
    seed=0,
)

pytestmark = pytest.mark.usefixtures("read_once")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def captioned(manifest, cache) -> captions.Captioned:
    return captions.of_manifest(manifest, per_clip=3, cache=cache)


@pytest.fixture(scope="module")
def model_config(tiny_text, tiny_whisper) -> FusionConfig:
    """With dropout, so that a resumed run must also draw the same masks."""
    return FusionConfig(speech_backbone=tiny_whisper, text_backbone=tiny_text, dim=16, heads=2, dropout=0.2)


@pytest.fixture
def train(manifest, captioned, model_config, cache, tmp_path):
    def run(name: str, model: FusionConfig = model_config, told: captions.Captioned = captioned, **changes):
        return fusion_training.fit(manifest, told, tmp_path / name, model, CONFIG.but(**changes), "cpu", cache)

    run.folder = tmp_path
    return run


def lines(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in runs.read_metrics(folder)]


# The loss ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pairs(manifest, captioned, model_config, cache):
    """A model without dropout, and a batch of six clips with a caption each."""
    torch.manual_seed(0)
    model = FusionRetriever.build(model_config.but(dropout=0.0))
    rows = manifest[manifest["split"] == "train"].head(6)
    kept = frozen_frames(model, to_cuts(rows), "recorded", cache)
    told = captioned.table.drop_duplicates("utterance_id").set_index("utterance_id").loc[rows["utterance_id"]]
    relevant = torch.zeros(6, 6, dtype=torch.bool)
    relevant[[0, 3], [3, 0]] = True  # two clips that each other's captions are true of
    return model, padded_frames(kept.frames) | {"relevant": relevant}, told["caption"].tolist()


def one(tokens: Tokens, i: int) -> Tokens:
    return Tokens(tokens.values[i : i + 1], tokens.mask[i : i + 1])


@pytest.mark.parametrize("ways", [("bi-encoder", "masked"), ("masked",)])
def test_the_terms_are_those_of_an_obvious_loop(pairs, ways):
    model, batch, texts = pairs
    terms = FusionObjective(model, CONFIG.but(bi_encoder="bi-encoder" in ways)).terms(batch, texts, seed=7)
    speech, text = model.speech_tokens(batch), model.text_tokens(texts)
    contrastive, regulariser = [], []
    for way in ways:
        a = torch.stack([model.alone(one(speech, i), "speech", way)[0] for i in range(6)])
        t = torch.stack([model.alone(one(text, i), "text", way)[0] for i in range(6)])
        logits = F.normalize(a, dim=1) @ F.normalize(t, dim=1).T * model.logit_scale
        contrastive.append(losses.hard_negative(logits, 0.15, "fs-clap", batch["relevant"]))
        regulariser += [losses.mean_over_norm(a) + losses.mean_over_norm(t)]
    torch.testing.assert_close(terms["contrastive"], sum(contrastive) / len(ways), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(terms["regulariser"], sum(regulariser) / len(ways))
    generator = torch.Generator().manual_seed(7)
    wrong_text = matching.mine_negatives(logits, batch["relevant"], 2, generator)
    wrong_speech = matching.mine_negatives(logits.T, batch["relevant"].T, 2, generator)
    found = []
    for i in range(6):
        for candidates in (
            [(i, i), *((i, int(j)) for j in wrong_text[i])],
            [(i, i), *((int(j), i) for j in wrong_speech[i])],
        ):
            scores = [model.pair_score(one(speech, a), one(text, t))[0] * model.logit_scale for a, t in candidates]
            found.append(-torch.stack(scores).log_softmax(0)[0])
    torch.testing.assert_close(terms["matching"], torch.stack(found).mean(), rtol=1e-4, atol=1e-4)
    assert not {0, 3} & {int(j) for j in wrong_text[[0, 3]].flatten()}  # right for each other: no negatives


def test_a_step_fuses_a_few_pairs_for_each_clip_and_never_all(pairs, monkeypatch):
    model, batch, texts = pairs
    fused, pair = [], model.pair

    def counted(speech, text):
        fused.append(len(speech.mask))
        return pair(speech, text)

    monkeypatch.setattr(model, "pair", counted)
    FusionObjective(model, CONFIG.but(mined_negatives=1)).backward(batch, texts, "contrastive")
    assert sum(fused) == 3 * 6 < 6 * 6


def test_every_trained_parameter_receives_a_gradient(pairs):
    model, batch, texts = pairs
    model.speech.requires_grad_(False)
    objective = FusionObjective(model, CONFIG.but(learn_gamma=True))
    objective.backward(batch, texts, "contrastive")
    without = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_without_fusion_there_is_one_way_and_no_matching(pairs, model_config):
    _, batch, texts = pairs
    model = FusionRetriever.build(model_config.but(fusion=False, dropout=0.0))
    terms = FusionObjective(model, CONFIG.but(objective="infonce")).terms(batch, texts, 0)
    assert set(terms) == {"contrastive", "regulariser"}
    logits = losses.similarity(model.speech_vectors(batch), model.text_vectors(texts)) * model.logit_scale
    torch.testing.assert_close(terms["contrastive"], losses.info_nce(logits, batch["relevant"]))


def test_a_teacher_gives_targets_and_is_left_as_it_is(pairs, model_config):
    model, batch, texts = pairs
    torch.manual_seed(5)
    teacher = FusionRetriever.build(model_config)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    objective = FusionObjective(model, CONFIG, teacher)
    terms = objective.terms(batch, texts, 0)
    expected = []
    for way in ("bi-encoder", "masked"):
        sides = [
            losses.similarity(
                one.alone(one.speech_tokens(batch), "speech", way), one.alone(one.text_tokens(texts), "text", way)
            )
            for one in (model, teacher.eval())
        ]
        logits = sides[0] * model.logit_scale
        expected.append(losses.self_distillation(logits, sides[1], relevant=batch["relevant"]))
    torch.testing.assert_close(terms["contrastive"], sum(expected) / 2)
    objective.backward(batch, texts, "contrastive")
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradients_of_batches_that_make_one_step_add_up(pairs):
    model, batch, texts = pairs
    config = CONFIG.but(matching_weight=0.0, accumulation_steps=2)
    FusionObjective(model, config).backward(batch, texts, "contrastive")
    FusionObjective(model, config).backward(batch, texts, "contrastive")
    twice = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    FusionObjective(model, config.but(accumulation_steps=1)).backward(batch, texts, "contrastive")
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(twice[name], p.grad, rtol=1e-4, atol=1e-6)


# The schedule -----------------------------------------------------------------------------------------------


def test_the_rate_rises_over_the_first_epoch_and_falls_by_a_cosine():
    config = CONFIG.but(epochs=3, warmup_epochs=1)
    rates = [config.rate(step, 2) for step in range(6)]
    # warm-up 1/2, 2/2; then (1 + cos(pi s/4))/2 for s = 0, 1, 2, 3
    assert rates == pytest.approx([0.5, 1.0, 1.0, (1 + 2**-0.5) / 2, 0.5, (1 - 2**-0.5) / 2])


def test_steps_of_two_batches(train):
    train("one", epochs=2)
    train("two", epochs=2, accumulation_steps=2)
    # 12 clips in batches of 5 are three batches an epoch; of two batches a step, the third is a step by itself
    assert [line["step"] for line in lines(train.folder / "one")] == [3, 6]
    assert [line["step"] for line in lines(train.folder / "two")] == [2, 4]


def test_a_batch_of_which_nothing_can_be_used_does_not_lose_the_step(train, monkeypatch):
    load = fusion_training.embedding.FrozenClips.load

    def without_the_second(self, plan):
        for number, batch in enumerate(load(self, plan)):
            yield batch | {"utterance_id": []} if number == 1 and len(plan) > 1 else batch

    monkeypatch.setattr(fusion_training.embedding.FrozenClips, "load", without_the_second)
    train("run", epochs=2, accumulation_steps=2)
    assert [line["step"] for line in lines(train.folder / "run")] == [2, 4]


def test_a_teacher_that_is_not_there_or_reads_other_frames(train, model_config):
    with pytest.raises(weights.WeightsError, match="holds no retriever"):
        train("run", teacher="nobody")
    train("teacher", model=model_config.but(frames_per_token=2, fusion=False), epochs=1)
    with pytest.raises(ConfigError, match="its frames_per_token is 2, the run's 4"):
        train("other", teacher=str(train.folder / "teacher"))


def test_a_run_on_captions_is_not_gone_on_with_as_one_on_styles(train):
    train("run", epochs=1)
    with pytest.raises(weights.WeightsError, match="is a run on captions: go on with it by notebook 08"):
        training.go_on(train.folder / "run")


def test_the_papers_recipe():
    config = FusionTrainConfig.paper()
    assert (config.epochs, config.batch_size, config.accumulation_steps, config.warmup_epochs) == (10, 96, 2, 1)
    assert (config.learning_rate, config.backbone_learning_rate, config.weight_decay) == (1e-4, 4e-5, 0.01)
    assert (config.objective, config.regulariser_weight) == ("hard-negative", 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "triplet"}, "objective is 'triplet'; it must be one of infonce, hard-negative"),
        ({"mined_negatives": 0}, "mined_negatives is 0"),
        ({"accumulation_steps": 0}, "accumulation_steps is 0"),
    ],
)
def test_settings_that_cannot_be_used(changes, message):
    with pytest.raises(ConfigError, match=message):
        CONFIG.but(**changes)


# Runs -------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_its_folder_can_be_read_back(train):
    model = train("run", epochs=8)
    found = lines(train.folder / "run")
    assert found[-1]["train_contrastive"] < found[0]["train_contrastive"] - 0.2
    assert {"val_contrastive", "val_matching", "val_regulariser", "tau"} <= set(found[0])
    assert isinstance(retriever.load(train.folder / "run" / "best"), FusionRetriever)
    settings = runs.read_json(train.folder / "run" / "config.json")
    assert settings["kind"] == "fusion" and "prompts_sha256" not in settings
    assert FusionTrainConfig.from_dict(settings["training"]) == CONFIG.but(epochs=8)
    assert model.speech_head.mean.abs().sum() > 0  # the standardisation was fitted


def test_the_same_seed_gives_the_same_losses_and_another_others(train):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        train(name, seed=seed, epochs=2)
    assert lines(train.folder / "one") == lines(train.folder / "two") != lines(train.folder / "other")


def test_a_run_that_was_stopped_goes_on_to_the_same_end(train, monkeypatch):
    train("whole")
    step, taken = fusion_training._Trainer._step, []

    def stopping(self, *given):
        taken.append(given)
        if len(taken) == 5:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(fusion_training._Trainer, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    assert len(lines(train.folder / "stopped")) == 1
    train("stopped")
    assert lines(train.folder / "stopped") == lines(train.folder / "whole")
    states = [load_file(train.folder / name / "best" / "model.safetensors") for name in ("stopped", "whole")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_held_out_and_test_captions_are_not_trained_on(train, captioned, monkeypatch):
    seen, backward = set(), FusionObjective.backward

    def noted(self, batch, texts, stage):
        seen.update(texts)
        return backward(self, batch, texts, stage)

    monkeypatch.setattr(FusionObjective, "backward", noted)
    train("run", epochs=4)
    table = captioned.table.merge(captioned.clips[["utterance_id", "split"]])
    allowed = set(table.loc[(table["split"] == "train") & (table["grammar"] == "seen"), "caption"])
    assert len(seen) > 12 and seen <= allowed  # more than one caption of a clip


def test_what_is_true_of_another_clip_is_relevant_in_the_batch(train, captioned, monkeypatch):
    noted = []
    monkeypatch.setattr(
        FusionObjective, "evaluate", lambda self, batch, texts, stage: noted.append((batch, texts)) or {}
    )
    train("run", epochs=1)
    known = captioned.clips.set_index("utterance_id")
    table = captioned.table.set_index(["utterance_id", "caption"])
    for batch, texts in noted:
        for j, text in enumerate(texts):
            said = table.loc[(batch["utterance_id"][j], text)]
            said = said.iloc[0] if isinstance(said, pd.DataFrame) else said
            named = {a: said[a] for a in ("gender", "pitch", "energy", "tempo", "style") if said[a]}
            for i, clip in enumerate(batch["utterance_id"]):
                agrees = all(known.loc[clip, a] == value for a, value in named.items())
                assert bool(batch["relevant"][i, j]) == agrees or text in texts[:j] + texts[j + 1 :]


def test_other_captions_are_another_run(train, captioned, manifest, cache):
    train("run", epochs=1)
    others = captions.of_manifest(manifest, per_clip=3, seed=1, cache=cache)
    with pytest.raises(provenance.RunExists, match="captions_sha256: other than now"):
        train("run", told=others, epochs=1)
    with pytest.raises(provenance.RunExists, match="training.objective: 'hard-negative' there, 'infonce' now"):
        train("run", epochs=1, objective="infonce")


def test_a_corpus_without_captions_is_refused(train, captioned):
    nothing = captions.Captioned(captioned.table.head(0), captioned.clips, captioned.thresholds, captioned.left_out)
    with pytest.raises(ValueError, match="no usable training clip: 15 refused"):
        train("run", told=nothing, epochs=1)


def test_the_whole_speech_backbone_can_be_trained(train, model_config, manifest, tmp_path):
    before = FusionRetriever.build(model_config).speech.state_dict()
    model = train("run", epochs=1, finetune="full", backbone_learning_rate=1e-3)
    after = model.speech.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert runs.read_json(train.folder / "run" / "best" / "config.json")["speech_backbone_tuned"]
    kept = frozen_frames(model, to_cuts(manifest.head(2)), "recorded", tmp_path / "none")
    assert len(kept.frames) == 2 and not (tmp_path / "none").exists()


# Systems ----------------------------------------------------------------------------------------------------


def test_all_systems_are_trained_by_one_function_and_only_once(
    manifest, captioned, model_config, cache, tmp_path, monkeypatch
):
    systems = ("RA-CLAP", "MGA-CLAP", "FS-CLAP")
    given = (
        manifest,
        captioned,
        tmp_path / "grid",
        model_config,
        CONFIG.but(epochs=1),
        (0,),
        systems,
        "",
        "cpu",
        cache,
    )
    found = fusion_systems.train_all(*given)
    assert list(found) == list(systems) and all((f / "best" / "config.json").is_file() for (f,) in found.values())
    (taught,) = found["RA-CLAP"]
    teacher = fusion_systems.folder_of(tmp_path / "grid", "CLAP", 0)  # not asked for, but needed
    named = runs.read_json(taught / "config.json")["training"]["teacher"]
    assert not Path(named).is_absolute() and (taught / named).resolve() == teacher.resolve()
    model = FusionRetriever.load(found["MGA-CLAP"][0] / "best")
    assert model.fusion.codebook is not None and model.fusion.blocks is None
    monkeypatch.setattr(fusion_training, "fit", None)
    assert fusion_systems.train_all(*given) == found
    moved = (tmp_path / "grid").rename(tmp_path / "moved")
    assert list(fusion_systems.train_all(*given[:2], moved, *given[3:])) == list(systems)


def test_rows_of_table_three_differ_by_the_named_part_only():
    base = {name: (FusionConfig().but(**s.model), FusionTrainConfig().but(**s.training)) for name, s in SYSTEMS}
    full_model, full_training = base["FS-CLAP"]
    assert full_model.fusion and full_model.separation and full_training.objective == "hard-negative"
    for name, parts in (("CLAP", ""), ("FU", "FU"), ("SE", "SE"), ("HN", "HN"), ("FU-SE", "FU SE")):
        model, training = base[name]
        assert (model.fusion, model.separation) == ("FU" in parts, "SE" in parts)
        assert (training.objective == "hard-negative") == ("HN" in parts)
        assert model.but(fusion=True, separation=True) == full_model
    alone, unpooled = base["FS-CLAP-M"], base["FS-CLAP-M unpooled"]
    assert alone[0] == full_model and unpooled == (alone[0].but(frames_per_token=1), alone[1])
    assert set(fusion_systems.DEFAULT_SYSTEMS) == set(base) - {"FS-CLAP-M unpooled"}


SYSTEMS = fusion_systems.SYSTEMS.items()


@pytest.mark.parametrize(
    ("systems", "seeds", "message"), [(("BERT",), (0,), "no system BERT; there are CLAP"), (("CLAP",), (), "no seed")]
)
def test_a_grid_that_cannot_be_trained(systems, seeds, message, manifest, captioned, model_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        fusion_systems.train_all(manifest, captioned, tmp_path, model_config, CONFIG, seeds, systems)
