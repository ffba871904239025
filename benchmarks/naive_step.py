"""The rival of benchmarks/training_step.py: one training step as the published ESR code takes it, restated plainly.

Written from a description of that code's behaviour, and left as it is from here on. What is naive in it is faithful:

- clips are padded with zeros to the longest of the batch, and neither the encoder nor the pooling is told;
- the frozen text backbone runs in every step, in train mode, over prompts padded to the longest;
- the discriminator's loss is back-propagated through the gradient reversal and the whole speech encoder once at weight
  1 with the graph retained, and again inside the total loss at weight lambda_adv;
- autocast names cuda, so that on a CPU everything is fp32; tau is a constant.

The backbones are transformers' own models called in transformers' own way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

TAU = 0.07
CONTRASTIVE, ADVERSARIAL, CLASSIFICATION = 1.0, 0.1, 0.5  # lambda
LEARNING_RATE, DISCRIMINATOR_LEARNING_RATE = 5e-5, 2e-5


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


def _two_layer(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class NaiveStep:
    """The model, its two optimisers, and `step`.

    Args:
        speech: a transformers WavLMModel; all of it is trained.
        text: a transformers RobertaModel, frozen but in train mode; its first token stands for the prompt.
        tokenizer: of the text model.
    """

    def __init__(self, speech: nn.Module, text: nn.Module, tokenizer, n_styles: int, dim: int = 512, hidden: int = 128):
        self.speech, self.text, self.tokenizer = speech.train(), text.train().requires_grad_(False), tokenizer
        self.speech_projection = nn.Linear(speech.config.hidden_size, dim)
        self.text_projection = nn.Linear(text.config.hidden_size, dim)
        self.classifier = _two_layer(dim, hidden, n_styles)
        self.discriminator = _two_layer(dim, hidden, 1)
        trained = [self.speech, self.speech_projection, self.text_projection, self.classifier]
        self.optimizer = torch.optim.AdamW([p for m in trained for p in m.parameters()], lr=LEARNING_RATE)
        self.discriminator_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=DISCRIMINATOR_LEARNING_RATE
        )

    def backward(self, clips: list[Tensor], prompts: list[str], style: Tensor) -> dict[str, float]:
        """Loss terms of a batch; leaves the gradients on the parameters.

        Args:
            clips: waveforms (S,) float32 at 16 kHz, at most 8 s each.
            prompts: one a clip.
            style: (B,) int64 labels.
        """
        with torch.autocast("cuda", torch.bfloat16, enabled=torch.cuda.is_available()):
            waveform = pad_sequence(clips, batch_first=True)
            speech = self.speech_projection(self.speech(waveform).last_hidden_state.mean(dim=1))
            tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
            text = self.text_projection(self.text(**tokens).last_hidden_state[:, 0])
            logits = F.normalize(speech, dim=-1) @ F.normalize(text, dim=-1).T / TAU
            target = torch.arange(len(clips))
            contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
            classification = F.cross_entropy(self.classifier(speech), style)
            on_speech = self.discriminator(_ReverseGradient.apply(speech))
            on_text = self.discriminator(_ReverseGradient.apply(text))
            adversarial = F.binary_cross_entropy_with_logits(
                on_speech, torch.ones_like(on_speech)
            ) + F.binary_cross_entropy_with_logits(on_text, torch.zeros_like(on_text))
            total = CONTRASTIVE * contrastive + ADVERSARIAL * adversarial + CLASSIFICATION * classification
        adversarial.backward(retain_graph=True)
        total.backward()
        terms = {"contrastive": contrastive, "classification": classification, "adversarial": adversarial}
        return {name: term.item() for name, term in terms.items()}

    def step(self, clips: list[Tensor], prompts: list[str], style: Tensor) -> dict[str, float]:
        """`backward`, then both optimisers."""
        self.optimizer.zero_grad()
        self.discriminator_optimizer.zero_grad()
        terms = self.backward(clips, prompts, style)
        self.discriminator_optimizer.step()
        self.optimizer.step()
        return terms
