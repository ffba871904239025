"""One fine-tuning step against the published code's (naive_step.py), in turns: python benchmarks/training_step.py

Both train a WavLM of Base+ size with random weights, beside a frozen RoBERTa of base size, on the same 8 clips (RAVDESS
under $ESR_DATA if it is there, else the demo corpus; at most 8 s each), in the stage with all three losses. Ours is
timed in fp32, and in bf16 where the CPU has that, with 4 clips in the encoder at a time. Peak memory is that of a
process of its own for each, loading included; a batch of 32 is more than the published step can do in 24 GB. Let
nothing else run: with a busy core torch's threads wait for each other, and a step takes ten times as long.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from naive_step import NaiveStep
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, RobertaConfig, RobertaModel, RobertaTokenizerFast, WavLMConfig, WavLMModel

from esr_utils import batches, manifests
from esr_utils.config import ModelConfig, TrainConfig
from esr_utils.objective import Objective, has_bf16
from esr_utils.prompts import PromptBank
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES
from esr_utils.training import parameter_groups

ROUNDS = 5
STEPS = 3  # of a memory measurement: the peak still grows in the second
KINDS = ("fp32", "bf16") if has_bf16(torch.device("cpu")) else ("fp32",)
OURS = {kind: {"precision": kind, "chunk_size": 4} for kind in KINDS}  # two chunks of 4 clips


def write_models(folder: Path) -> None:
    """WavLM Base+ and RoBERTa base in size and layout, with random weights and a small tokenizer."""
    torch.manual_seed(0)
    WavLMModel(WavLMConfig()).save_pretrained(folder / "wavlm")
    RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)).save_pretrained(
        folder / "roberta"
    )
    bank, tokenizer = PromptBank.load(), ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator([p for s in STYLES for p in bank.all_prompts(s)], 2000, special_tokens=special)
    tokenizer.save_model(str(folder / "roberta"))
    files = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
    fast = RobertaTokenizerFast(**{key: str(folder / "roberta" / name) for key, name in files.items()})
    fast.save_pretrained(folder / "roberta")


def clips(size: int) -> tuple[list[torch.Tensor], list[str], torch.Tensor]:
    """Waveforms, a prompt each, and style labels."""
    corpus = "ravdess" if os.environ.get("ESR_DATA") else "demo"
    rows = manifests.load_corpora(corpus).query("split == 'train'").sample(size, random_state=0)
    cuts = [cut.truncate(duration=min(cut.duration, 8.0)) for cut in manifests.to_cuts(rows)]
    batch = batches.load_batch(cuts, "recorded")
    waveforms = [w[:n].clone() for w, n in zip(batch["waveform"], batch["n_samples"].tolist(), strict=True)]
    bank = PromptBank.load()
    prompts = [bank.all_prompts(STYLES[style])[i] for i, style in enumerate(batch["style"].tolist())]
    return waveforms, prompts, batch["style"]


def naive(folder: Path, size: int) -> Callable[[], object]:
    waveforms, prompts, style = clips(size)
    torch.manual_seed(0)
    text = RobertaModel.from_pretrained(folder / "roberta", add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "roberta")
    rival = NaiveStep(WavLMModel.from_pretrained(folder / "wavlm"), text, tokenizer, len(STYLES))
    return lambda: rival.step(waveforms, prompts, style)


def ours(folder: Path, size: int, kind: str) -> Callable[[], object]:
    waveforms, prompts, style = clips(size)
    names = {"speech_backbone": str(folder / "wavlm"), "text_backbone": str(folder / "roberta")}
    torch.manual_seed(0)
    model, config = StyleRetriever.build(ModelConfig.paper().but(**names)), TrainConfig.paper().but(**OURS[kind])
    model.speech.set_trainable(True)
    bank = PromptBank.load()
    model.text.embed([p for s in STYLES for p in bank.all_prompts(s)])  # once a run, as training does
    model.text.release()
    objective = Objective(model, config, Accelerator(cpu=True)).train()
    optimizer = torch.optim.AdamW(parameter_groups(objective), betas=config.betas, fused=True)
    batch = {
        "waveform": torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True),
        "n_samples": torch.tensor([len(waveform) for waveform in waveforms]),
        "style": style,
    }

    def step() -> None:
        objective.backward(batch, prompts, "adversarial")
        optimizer.step()
        optimizer.zero_grad()

    return step


def time_all(folder: Path) -> None:
    steps = {"naive": naive(folder, 8)} | {kind: ours(folder, 8, kind) for kind in KINDS}
    seconds = sum(len(waveform) for waveform in clips(8)[0]) / 16_000
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(1 + ROUNDS):  # the first round is not counted
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"a step of 8 clips, {seconds:.0f} s of audio, median of {ROUNDS} in turns ({torch.get_num_threads()} threads)"
    )
    print(f"  published, fp32: {median['naive']:.1f} s ({min(times['naive']):.1f}-{max(times['naive']):.1f})")
    if "bf16" not in KINDS:
        print("  bf16: not timed, this CPU does not have it")
    for kind in KINDS:
        spread = f"{min(times[kind]):.1f}-{max(times[kind]):.1f}"
        print(
            f"  ours, {kind}: {median[kind]:.1f} s ({spread}), ratio {median['naive'] / median[kind]:.2f}", flush=True
        )


def peak_memory() -> float:
    """GiB of this process (Linux); getrusage would begin at the parent's."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def measure(name: str, folder: Path, size: int, peaks: dict[str, float]) -> None:
    """A few steps in a process of its own, so that its peak memory is its own."""
    step = naive(folder, size) if name == "published" else ours(folder, size, name)
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
    seconds = time.perf_counter() - started
    peaks[f"{name}, {size}"] = peak = peak_memory()
    ratio = f", {peak / peaks['published, 8']:.2f} of the published" if name != "published" and size == 8 else ""
    print(f"  {name}, {size} clips: peak memory {peak:.2f} GiB{ratio}; {seconds:.1f} s a step", flush=True)


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() as temporary, multiprocessing.Manager() as manager:
        write_models(Path(temporary))
        time_all(Path(temporary))
        print(f"each in a process of its own, {STEPS} steps:", flush=True)
        peaks = manager.dict()
        for name, size in (("published", 8), *((kind, 8) for kind in KINDS), (KINDS[-1], 32)):
            arguments = (name, Path(temporary), size, peaks)
            process = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(f"{name}, {size} clips: the process ended with {process.exitcode}")
