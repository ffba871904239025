"""FS-CLAP's loss of a batch of clips and captions, and its gradient.

In the batch every clip meets every caption by their vectors, each made without the other. Fused are only pairs: each
clip with its own caption and with a few wrong ones, each caption with a few wrong clips, which are drawn where the
vectors mistake them most. B of B^2 pairs, and 2 m B more. A loss that fused each clip with its own caption alone would
be solved by seeing which caption is in it (`protocols`).
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from esr_utils import losses, matching
from esr_utils.config import FusionTrainConfig
from esr_utils.fusion import FusionRetriever, Tokens
from esr_utils.objective import Values, has_bf16


class FusionObjective(nn.Module):
    """The retriever and the loss on it.

    Args:
        teacher: a trained retriever, which is not trained here; None without distillation.
    """

    def __init__(
        self,
        retriever: FusionRetriever,
        config: FusionTrainConfig,
        accelerator: Accelerator,
        teacher: FusionRetriever | None = None,
    ) -> None:
        super().__init__()
        self.retriever, self.config, self.accelerator = retriever, config, accelerator
        self._teacher = [teacher.eval().requires_grad_(False)] if teacher else []  # a list: no part of this module

    def terms(self, batch: dict, captions: list[str], generator: torch.Generator) -> dict[str, Tensor]:
        """The loss terms of a batch; `total` weighs them.

        Args:
            batch: what `FusionRetriever.speech_tokens` takes, with `relevant` (B, B) bool: caption j is true of clip i.
            captions: (B,) one a clip.
            generator: what mined negatives are drawn from; of the model's device.
        """
        model, config = self.retriever, self.config
        relevant = batch["relevant"].to(model.device) if config.mask_false_negatives else None
        speech, text = model.speech_tokens(batch), model.text_tokens(captions)
        contrastive, regulariser, distillation = [], [], []
        for way in ways(model):
            of_speech, of_text = model.alone(speech, "speech", way), model.alone(text, "text", way)
            similarity = losses.similarity(of_speech, of_text)
            logits = similarity * model.logit_scale
            contrastive.append(self._contrastive(logits, relevant))
            regulariser.append(losses.mean_over_norm(of_speech) + losses.mean_over_norm(of_text))
            if self._teacher:
                distillation.append(losses.self_distillation(logits, self._taught(batch, captions, way)))
        terms = {"contrastive": torch.stack(contrastive).mean(), "regulariser": torch.stack(regulariser).mean()}
        if self._teacher:
            terms["distillation"] = torch.stack(distillation).mean()
        if model.config.fusion and config.matching_weight:
            terms["matching"] = self._matching(speech, text, logits, relevant, generator)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum: Eq. (3), and what it does not have."""
        config = self.config
        weights = {
            "contrastive": 1.0,
            "regulariser": config.regulariser_weight,
            "distillation": config.distillation_weight,
            "matching": config.matching_weight,
        }
        return sum(weights[name] * term for name, term in terms.items())

    @torch.no_grad()
    def evaluate(self, batch: dict, captions: list[str], stage: str) -> Values:
        """The terms of a batch; negatives are mined the same way every time."""
        return self._values(self._terms_in_precision(batch, captions, seed=0))

    def backward(self, batch: dict, captions: list[str], stage: str) -> Values:
        """As `evaluate`, and adds the gradient of `total` over the batches of a step to every trained parameter."""
        seed = int(torch.randint(2**62, ()))  # of torch's state, which follows from the epoch
        terms = self._terms_in_precision(batch, captions, seed)
        (self.total(terms) / self.config.accumulation_steps).backward()
        return self._values(terms)
