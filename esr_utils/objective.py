"""One training step's loss and gradients: a batch in, named loss terms out, and a gradient on every trained parameter.

The contrastive loss couples all clips of a batch, but only through their vectors. So the vectors come first, by chunks
and by processes; the loss is taken on all of them; then each chunk is run again and given the gradient of its own
vectors (cached contrastive gradients: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup"). The gradients are those of one big batch in one process, whatever the chunk size and the number of
processes.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from esr_utils import losses
from esr_utils.config import Precision, TrainConfig
from esr_utils.retriever import StyleRetriever

Values = dict[str, tuple[float, int]]  # term -> its mean, and over how many clips


class Mean:
    """Mean over batches of named values, each weighted by the clips that it is of; 0 where there are none."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = defaultdict(float)
        self.clips: dict[str, int] = defaultdict(int)

    def add(self, values: Values) -> None:
        for name, (value, clips) in values.items():
            self.sums[name] += value * clips
            self.clips[name] += clips

    def means(self) -> dict[str, float]:
        return {name: total / max(1, self.clips[name]) for name, total in self.sums.items()}


class Objective(nn.Module):
    """The retriever with the discriminator, which exists only for training, and the loss on both."""

    def __init__(self, retriever: StyleRetriever, config: TrainConfig, accelerator: Accelerator) -> None:
        """
        Args:
            accelerator: where it runs, and with how many processes; `config.precision` is seen to here.
        """
        super().__init__()
        self.retriever, self.config, self.accelerator = retriever, config, accelerator
        self.discriminator = losses.two_layer(retriever.config.dim, config.discriminator_hidden, 1)
        self._bf16 = in_bf16(config.precision, retriever.device)

    def terms(
        self, speech: Tensor, text: Tensor | None, style: Tensor, stage: str, mixed: losses.Mixed | None = None
    ) -> dict[str, Tensor]:
        """The loss terms of a stage.

        Args:
            speech, text: (B, d) pairs, not normalised; text is None in the stage `classify`.
            style: (B,) int64 labels, -1 without one.
            mixed: where the clips' features are mixed.
        """
        terms = {"classification": losses.classification(self.retriever.classifier, speech, style, mixed)}
        if stage != "classify":
            scale = self.retriever.logit_scale
            logits = losses.similarity(speech, text) * (scale.detach() if self.config.fixed_temperature else scale)
            terms["contrastive"] = losses.contrastive(self.config.objective, logits, style, self.retriever.bias, mixed)
        if stage == "adversarial":
            terms["adversarial"] = losses.modality(self.discriminator, speech, text, self.config.adversarial_weight)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """ESR Eq. (5); the adversarial term carries its weight inside the gradient reversal (`losses.modality`)."""
        weights = {
            "classification": self.config.classification_weight,
            "contrastive": self.config.contrastive_weight,
            "adversarial": 1.0,
        }
        return sum(weights[name] * term for name, term in terms.items())

    @torch.no_grad()
    def evaluate(self, batch: dict, prompts: list[str], stage: str) -> Values:
        """The terms of a batch, of which each process holds a share."""
        speech = torch.cat([self._speech(chunk) for chunk in _chunks(batch, self.config.chunk_size)])
        text = None if stage == "classify" else self._text(prompts)
        return _values(*self._terms(speech, text, batch["style"], stage))

    def backward(self, batch: dict, prompts: list[str], stage: str) -> Values:
        """As `evaluate`, and adds the gradient of `total` to every trained parameter, the same in each process.

        Args:
            batch: this process's share of the batch; may be empty where another's is not. With `mixed`, a
                `losses.Mixed`, its features are mixed already.
            prompts: one a clip.

        Returns:
            The terms; none, and no gradient, where no process has a clip.
        """
        chunks, states, vectors = _chunks(batch, self.config.chunk_size), [], []
        for i, chunk in enumerate(chunks):
            states.append(self._random_state())
            with torch.set_grad_enabled(i == len(chunks) - 1):  # the last is kept
                vectors.append(self._speech(chunk))
        afterwards = self._random_state()
        speech = torch.cat([part.detach() for part in vectors]).requires_grad_()
        text = None if stage == "classify" else self._text(prompts)
        text_leaf = None if text is None else text.detach().requires_grad_()
        terms, style = self._terms(speech, text_leaf, batch["style"], stage, batch.get("mixed"))
        if not terms:
            return {}
        self.total(terms).backward()
        if text is not None and text.requires_grad:
            text.backward(text_leaf.grad * self.accelerator.num_processes)  # see _average
        # The last chunk first: its graph is there already, and is gone when the others need the memory.
        gradients = (speech.grad * self.accelerator.num_processes).split([len(part) for part in vectors])
        for i in reversed(range(len(chunks))):
            if not vectors[i].requires_grad and len(vectors[i]):
                self._restore(states[i])
                vectors[i] = self._speech(chunks[i])
            if vectors[i].requires_grad:
                vectors[i].backward(gradients[i])
            vectors[i] = vectors[i].detach()
        self._restore(afterwards)
        self._average()
        return _values(terms, style)

    def _speech(self, batch: dict) -> Tensor:
        if not len(batch["style"]):
            return torch.zeros(0, self.retriever.config.dim, device=self.retriever.device)
        with torch.autocast(self.retriever.device.type, torch.bfloat16, enabled=self._bf16):
            return self.retriever.speech_vectors(batch).float()

    def _text(self, prompts: list[str]) -> Tensor:
        if not prompts:
            return torch.zeros(0, self.retriever.config.dim, device=self.retriever.device)
        return self.retriever.text_vectors(prompts)

    def _terms(
        self, speech: Tensor, text: Tensor | None, style: Tensor, stage: str, mixed: losses.Mixed | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms over all processes' clips, and their styles: of the others', only the values are known."""
        speech, style = self._gathered(speech), self._gathered(style.to(speech.device))
        text = None if text is None else self._gathered(text)
        mixed = losses.Mixed(*(one.to(speech.device) for one in mixed)) if mixed else None  # in one process alone
        return (self.terms(speech, text, style, stage, mixed) if len(style) else {}), style

    def _gathered(self, rows: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return rows
        sizes = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padding = rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])
        everyone = self.accelerator.gather(torch.cat([rows.detach(), padding])).split(max(sizes))
        parts = [part[:size] for part, size in zip(everyone, sizes, strict=True)] if max(sizes) else [rows]
        if max(sizes):
            parts[self.accelerator.process_index] = rows  # ours, with its way back
        return torch.cat(parts)

    def _average(self) -> None:
        """Averages the gradients over the processes.

        Each process has the whole gradient of what reads all vectors (classifier, discriminator, temperature), and the
        share of its own clips, times the number of processes, of what makes them; so the mean is right for both.
        """
        if self.accelerator.num_processes == 1:
            return
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        given = torch.tensor([float(p.grad is not None) for p in trained], device=self.retriever.device)
        used = [p for p, n in zip(trained, self.accelerator.reduce(given, "sum").tolist(), strict=True) if n]
        for bucket in _buckets(used):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket])
            mean = self.accelerator.reduce(flat, "mean").split([p.numel() for p in bucket])
            for parameter, gradient in zip(bucket, mean, strict=True):
                parameter.grad = gradient.view_as(parameter).clone()

    def _random_state(self) -> tuple:
        """What dropout and masking draw from, so that a chunk run again draws the same."""
        device = self.retriever.device
        state = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()
        return torch.get_rng_state(), np.random.get_state(), state

    def _restore(self, state: tuple) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        if state[2] is not None:
            torch.get_device_module(self.retriever.device).set_rng_state(state[2])


def in_bf16(precision: Precision, device: torch.device) -> bool:
    """Whether matrix products are in bf16; warns where that is asked for and cannot be had."""
    wanted = {"auto": device.type == "cuda", "fp32": False, "bf16": True}[precision]
    if precision == "bf16" and not has_bf16(device):
        warnings.warn(
            f"precision is bf16, and this {device.type} can only imitate it, at a tenth of the speed: "
            "matrix products are in fp32",
            stacklevel=3,
        )
    return wanted and has_bf16(device)


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 itself. A CPU needs AVX-512; torch has no public name for that question."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _chunks(batch: dict, size: int) -> list[dict]:
    """A batch as batches of at most `size` clips (0: as it is), each cut to its longest clip."""
    count = len(batch["style"])
    if not size or count <= size:
        return [batch]
    chunks = []
    for start in range(0, count, size):
        chunk = {key: batch[key][start : start + size] for key in ("pooled", "waveform", "n_samples") if key in batch}
        chunk["style"] = batch["style"][start : start + size]
        if "statistics" in batch:
            chunk["statistics"] = tuple(one[start : start + size] for one in batch["statistics"])
        if "waveform" in chunk:
            chunk["waveform"] = chunk["waveform"][:, : int(chunk["n_samples"].max())]
        chunks.append(chunk)
    return chunks


def _buckets(parameters: list[nn.Parameter], size: int = 2**23) -> Iterator[list[nn.Parameter]]:
    """Parameters in groups of about `size` numbers, which travel together."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= size:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def _values(terms: dict[str, Tensor], style: Tensor) -> Values:
    labelled = int((style != losses.NO_STYLE).sum())
    clips = {name: labelled if name == "classification" else len(style) for name in terms}
    return {name: (float(term.detach()), clips[name]) for name, term in terms.items()}
