"""The loss of a batch and its gradients: by hand, by chunks, by two processes, and against the published step."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel, WavLMModel

from esr_utils import losses, runs, weights
from esr_utils.config import ModelConfig, TrainConfig
from esr_utils.objective import Objective
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES

CONFIG = TrainConfig(contrastive_weight=3.0, adversarial_weight=0.1, classification_weight=0.25, discriminator_hidden=8)
PROMPTS = ["an angry voice", "a calm voice", "whispered", "speech", "a happy voice", "a sad voice", "it is fast"]


def objective(model: StyleRetriever, **changes) -> Objective:
    torch.manual_seed(0)
    return Objective(model, CONFIG.but(**changes), Accelerator(cpu=True))


def pooled_batch(n: int = 7) -> dict:
    generator = torch.Generator().manual_seed(1)
    style = torch.tensor([0, 3, 21, -1, 12, 0, 9])[:n]
    return {"pooled": torch.randn(n, 3, 32, generator=generator), "style": style}


def waveform_batch(n: int = 7) -> dict:
    generator = torch.Generator().manual_seed(2)
    n_samples = torch.tensor([16_000, 9_000, 400, 12_345, 7_000, 15_999, 8_000])[:n]
    waveform = 0.1 * torch.randn(n, 16_000, generator=generator)
    waveform *= torch.arange(16_000) < n_samples[:, None]
    return {"waveform": waveform, "n_samples": n_samples, "style": pooled_batch(n)["style"]}


def gradients(of: Objective, batch: dict, stage: str = "adversarial") -> dict[str, torch.Tensor]:
    of.zero_grad()
    values = of.backward(batch, PROMPTS[: len(batch["style"])], stage)
    found = {name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None}
    return found | {f"loss {name}": torch.tensor(value) for name, value in values.items()}


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5) -> None:
    """Largest difference relative to the gradient's largest entry."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-4)  # some are 0 but for rounding: attention's key bias
        assert float((found[name] - value).abs().max()) <= tolerance * scale, name


# The loss ---------------------------------------------------------------------------------------------------


def test_the_total_weighs_each_term(tiny_model):
    of, batch = objective(tiny_model).eval(), pooled_batch(4)
    speech, text = tiny_model.speech_vectors(batch), tiny_model.text_vectors(PROMPTS[:4])
    terms = of.terms(speech, text, batch["style"], "adversarial")
    assert set(terms) == {"classification", "contrastive", "adversarial"}
    expected = 0.25 * terms["classification"] + 3 * terms["contrastive"] + terms["adversarial"]
    torch.testing.assert_close(of.total(terms), expected)
    logits = F.normalize(speech, dim=1) @ F.normalize(text, dim=1).T / 0.07
    torch.testing.assert_close(terms["contrastive"], losses.info_nce(logits), atol=1e-4, rtol=1e-4)


def test_in_the_total_the_encoders_receive_minus_a_tenth_of_the_discriminators_gradient(tiny_model):
    """Passed back twice through the reversal it would be -1.1 times."""
    of, batch = objective(tiny_model, contrastive_weight=0.0, classification_weight=0.0).eval(), pooled_batch(4)
    speech, text = tiny_model.speech_vectors(batch), tiny_model.text_vectors(PROMPTS[:4])
    plain = -F.logsigmoid(of.discriminator(speech)).mean() - F.logsigmoid(-of.discriminator(text)).mean()
    names = ["retriever.speech_head.projection.4.weight", "retriever.speech_head.mix", "retriever.text_head.weight"]
    theirs = [f"discriminator.{name}" for name, _ in of.discriminator.named_parameters()]
    parameters = dict(of.named_parameters())
    expected = torch.autograd.grad(plain, [parameters[name] for name in names + theirs])
    found = gradients(of, batch)
    for name, reference in zip(names + theirs, expected, strict=True):
        torch.testing.assert_close(found[name], (1.0 if name in theirs else -0.1) * reference)
        assert float(reference.abs().max()) > 1e-4


@pytest.mark.parametrize("fixed", [False, True])
def test_a_fixed_temperature_has_no_gradient(tiny_model, fixed):
    found = gradients(objective(tiny_model, fixed_temperature=fixed), pooled_batch())
    assert ("retriever.log_scale" in found) == (not fixed)


def test_the_gradients_are_those_of_one_plain_backward_pass(tiny_model):
    of, batch = objective(tiny_model).eval(), pooled_batch()
    found = gradients(of, batch)
    of.zero_grad()
    speech, text = tiny_model.speech_vectors(batch), tiny_model.text_vectors(PROMPTS)
    of.total(of.terms(speech, text, batch["style"], "adversarial")).backward()
    for name, parameter in of.named_parameters():
        assert (parameter.grad is None) == (name not in found)
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-7, rtol=1e-5)


def test_mixed_clips_reach_both_losses_whatever_the_chunks(tiny_model):
    batch = pooled_batch()
    batch["mixed"] = losses.Mixed(torch.tensor([0.6, 0.9, 0.5, 1.0, 1.0, 0.8, 0.7]), batch["style"].roll(1))
    of = objective(tiny_model, objective="multi-positive").eval()
    whole = gradients(of, batch, "align")
    assert_same(
        gradients(objective(tiny_model, objective="multi-positive", chunk_size=3).eval(), batch, "align"), whole
    )
    speech, text = tiny_model.speech_vectors(batch), tiny_model.text_vectors(PROMPTS)
    logits = losses.similarity(speech, text) * tiny_model.logit_scale
    expected = {
        "contrastive": losses.multi_positive(logits, batch["style"], batch["mixed"]),
        "classification": losses.classification(tiny_model.classifier, speech, batch["style"], batch["mixed"]),
    }
    for name, value in expected.items():
        assert float(whole[f"loss {name}"][0]) == pytest.approx(float(value.detach()), abs=1e-6)
    plain = gradients(of, pooled_batch(), "align")
    assert all(abs(float((plain[f"loss {name}"] - whole[f"loss {name}"])[0])) > 1e-3 for name in expected)


# Chunks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["classify", "align", "adversarial"])
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_chunks_change_nothing(tiny_model, chunk_size, stage):
    """Cached contrastive gradients: those of the one big batch."""
    tiny_model.speech.set_trainable(True)
    whole = gradients(objective(tiny_model), waveform_batch(), stage)
    assert_same(gradients(objective(tiny_model, chunk_size=chunk_size), waveform_batch(), stage), whole)
    assert any(name.startswith("retriever.speech.") for name in whole)


def test_a_thousand_and_twenty_four_clips_in_chunks_of_thirty_two(tiny_model):
    generator = torch.Generator().manual_seed(3)
    batch = {
        "pooled": torch.randn(1024, 3, 32, generator=generator),
        "style": torch.randint(-1, 22, (1024,), generator=generator),
    }
    prompts = [PROMPTS[i % 7] for i in range(1024)]
    found = []
    for size in (0, 32):
        of = objective(tiny_model, chunk_size=size)
        of.zero_grad()
        of.backward(batch, prompts, "adversarial")
        found.append({name: p.grad.clone() for name, p in of.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0])


def test_validation_goes_by_chunks_too(tiny_model):
    sizes = []
    tiny_model.speech_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    found = objective(tiny_model, chunk_size=3).evaluate(waveform_batch(), PROMPTS, "adversarial")
    assert sizes == [3, 3, 1]
    whole = objective(tiny_model).evaluate(waveform_batch(), PROMPTS, "adversarial")
    assert {k: v[0] for k, v in found.items()} == pytest.approx({k: v[0] for k, v in whole.items()}, rel=1e-5)
    assert {k: v[1] for k, v in found.items()} == {"classification": 6, "contrastive": 7, "adversarial": 7}


def test_without_any_clip_there_is_neither_a_term_nor_a_gradient(tiny_model):
    of = objective(tiny_model)
    assert of.backward({"pooled": torch.zeros(0, 3, 32), "style": torch.zeros(0, dtype=torch.int64)}, [], "align") == {}
    assert all(parameter.grad is None for parameter in of.parameters())


def test_dropout_draws_the_same_when_a_chunk_is_run_again(tiny_config):
    """Each chunk's vectors before the loss and in the backward pass must be one and the same."""
    model = StyleRetriever.build(tiny_config.but(dropout=0.5)).train()
    of, seen = objective(model, chunk_size=3).train(), []
    model.speech_head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    before = torch.get_rng_state()
    gradients(of, pooled_batch())
    after = torch.get_rng_state()
    assert len(seen) == 5  # three chunks, and all but the last again
    assert torch.equal(seen[3], seen[1]) and torch.equal(seen[4], seen[0])
    torch.set_rng_state(before)
    [model.speech_head(pooled_batch()["pooled"][i : i + 3]) for i in (0, 3, 6)]
    assert torch.equal(torch.get_rng_state(), after)  # what comes next draws on as if nothing had been run twice


def test_chunks_need_less_memory(tiny_model):
    """What is kept for the backward pass at any one time."""

    def kept(chunk_size: int) -> int:
        now, most = [0], [0]

        def pack(tensor):
            now[0] += tensor.numel()
            most[0] = max(most[0], now[0])
            return Held(tensor, now)

        tiny_model.speech.set_trainable(True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
            gradients(objective(tiny_model, chunk_size=chunk_size), waveform_batch())
        return most[0]

    assert kept(1) < 0.5 * kept(0)


class Held:
    def __init__(self, tensor: torch.Tensor, count: list[int]) -> None:
        self.tensor, self.count = tensor, count

    def __del__(self) -> None:
        self.count[0] -= self.tensor.numel()


# Processes --------------------------------------------------------------------------------------------------


SHARE = """
import json, os, sys
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from esr_utils.config import ModelConfig, TrainConfig
from esr_utils.objective import Objective
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES

model, config, prompts, chunk_size, folder = json.loads(sys.argv[1])
torch.manual_seed(3)
model = StyleRetriever.build(ModelConfig.from_dict(model)).eval()
model.speech.set_trainable(True)
torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
objective = Objective(model, TrainConfig.from_dict(config).but(chunk_size=chunk_size), accelerator)
from safetensors.torch import load_file
batch = load_file(folder + "/batch.safetensors")
mine = slice(accelerator.process_index, None, accelerator.num_processes)
for stage, clips in (("classify", 7), ("align", 7), ("adversarial", 7), ("adversarial", 1)):
    objective.zero_grad()
    share = {key: value[:clips][mine] for key, value in batch.items()}
    values = objective.backward(share, prompts[:clips][mine], stage)
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    found |= {f"loss {name}": torch.tensor(value) for name, value in values.items()}
    save_file(found, f"{folder}/{stage}-{clips}-{accelerator.process_index}.safetensors")
accelerator.end_training()
"""


def launch(code: str, argument: object, folder, processes: int = 2) -> None:
    """So many processes that talk by gloo, started as `accelerate launch --multi_gpu` starts them, by torchrun."""
    script = folder / "share.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(runs.PROJECT), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    command += [str(script), json.dumps(argument)]
    done = subprocess.run(
        command, env=environment | {"ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_have_the_loss_and_the_gradients_of_one(tiny_model, tiny_config, tmp_path):
    """Shares of 4 and 3 clips, in chunks, and of 1 and none."""
    save_file(waveform_batch(), tmp_path / "batch.safetensors")
    launch(SHARE, [tiny_config.to_dict(), CONFIG.to_dict(), PROMPTS, 2, str(tmp_path)], tmp_path)
    tiny_model.speech.set_trainable(True)
    for stage, clips in (("classify", 7), ("align", 7), ("adversarial", 7), ("adversarial", 1)):
        whole = gradients(objective(tiny_model), waveform_batch(clips), stage)
        for process in (0, 1):
            found = load_file(tmp_path / f"{stage}-{clips}-{process}.safetensors")
            assert_same(found, whole)


# The published step -----------------------------------------------------------------------------------------


def naive_step(speech: str, text: str):
    """benchmarks/naive_step.py on the models of two folders, without their dropout."""
    file = runs.PROJECT / "benchmarks" / "naive_step.py"
    spec = importlib.util.spec_from_file_location("naive_step", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with weights.quiet_transformers():
        wavlm = WavLMModel.from_pretrained(speech, apply_spec_augment=False, layerdrop=0.0)
        bert = BertModel.from_pretrained(text, add_pooling_layer=False)
        rival = module.NaiveStep(wavlm, bert, AutoTokenizer.from_pretrained(text), len(STYLES), dim=8, hidden=8)
    rival.speech.eval(), rival.text.eval()
    return rival


def test_the_published_step_on_unpadded_clips_has_the_same_loss_and_gradients(tiny_speech, tiny_text):
    """With tau fixed and the encoders receiving the reversed gradient at 1.1; there the discriminator does so too."""
    rival = naive_step(tiny_speech("wavlm"), tiny_text)
    config = ModelConfig.paper().but(speech_backbone=tiny_speech("wavlm"), text_backbone=tiny_text, dim=8)
    model = StyleRetriever.build(config.but(classifier_hidden=8)).eval()
    model.speech.set_trainable(True)
    of = Objective(
        model, TrainConfig.paper().but(adversarial_weight=1.1, fixed_temperature=True, discriminator_hidden=8,
        precision="fp32"), Accelerator(cpu=True),
    )  # fmt: skip
    pairs = {
        "classifier": (rival.classifier, model.classifier),
        "discriminator": (rival.discriminator, of.discriminator),
        "speech projection": (rival.speech_projection, model.speech_head.projection[-1]),
        "text projection": (rival.text_projection, model.text_head),
        "backbone": (rival.speech, model.speech.model),
    }
    for name, (theirs, ours) in pairs.items():
        if name != "backbone":
            ours.load_state_dict(theirs.state_dict())
    clips = list(0.1 * torch.randn(4, 9_000, generator=torch.Generator().manual_seed(4)))
    prompts, style = PROMPTS[:4], torch.tensor([0, 3, 21, 12])
    expected = rival.backward(clips, prompts, style)
    batch = {"waveform": torch.stack(clips), "n_samples": torch.full((4,), 9_000), "style": style}
    found = of.backward(batch, prompts, "adversarial")
    assert {name: value for name, (value, _) in found.items()} == pytest.approx(expected, rel=1e-5)
    for name, (theirs, ours) in pairs.items():
        factor = 1.1 if name == "discriminator" else 1.0
        expected_of = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
        found_of = {k: factor * p.grad for k, p in ours.named_parameters() if p.grad is not None}
        assert expected_of
        assert_same(found_of, expected_of, tolerance=1e-3 if name == "backbone" else 1e-4)
