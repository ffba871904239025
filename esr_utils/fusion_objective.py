"""FS-CLAP's loss of a batch of clips and captions, and its gradient.

Every clip of the batch meets every caption by vectors that are made without the other. Fused are only some pairs: each
clip with its own caption and with m wrong ones, each caption with m wrong clips, which are drawn where the vectors
mistake them most (ALBEF, Li et al. 2021): (1 + 2 m) B pairs of B^2. A loss that fused each clip with its own caption
alone could be solved by seeing which caption is in it, and is not offered (`protocols`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esr_utils import losses, matching
from esr_utils.config import FusionTrainConfig
from esr_utils.fusion import FusionRetriever, Way, half_precision, pick
from esr_utils.objective import Values, in_bf16
from esr_utils.text import Tokens


def ways(model: FusionRetriever, config: FusionTrainConfig) -> tuple[Way, ...]:
    """How the vectors are made, of one modality alone, that the contrastive loss is on."""
    if not model.config.fusion:
        return ("bi-encoder",)
    return ("bi-encoder", "masked") if config.bi_encoder else ("masked",)


class FusionObjective(nn.Module):
    """The retriever and the loss on it.

    Args:
        teacher: a trained retriever, left as it is, whose similarities are targets too; None without.
    """

    def __init__(
        self, retriever: FusionRetriever, config: FusionTrainConfig, teacher: FusionRetriever | None = None
    ) -> None:
        super().__init__()
        self.retriever, self.config = retriever, config
        self._bf16 = in_bf16(config.precision, retriever.device)
        self._teacher = [teacher.eval()] if teacher else []  # in a list: no part of this module

    def terms(self, batch: dict, captions: list[str], seed: int) -> dict[str, Tensor]:
        """The loss terms of a batch.

        Args:
            batch: what `FusionRetriever.speech_tokens` takes, and `relevant` (B, B) bool: clip i, caption j is true of
                it.
            captions: one a clip.
            seed: mined negatives are drawn from it.
        """
        model, config = self.retriever, self.config
        relevant = batch["relevant"].to(model.device) if config.mask_false_negatives else None
        speech, text = model.speech_tokens(batch), model.text_tokens(captions)
        contrastive, regulariser = [], []
        for way in ways(model, config):
            pair = model.alone(speech, "speech", way).float(), model.alone(text, "text", way).float()
            logits = losses.similarity(*pair) * model.logit_scale
            contrastive.append(self._contrastive(logits, relevant, batch, captions, way))
            regulariser.append(sum(map(losses.mean_over_norm, pair)))
        terms = {"contrastive": torch.stack(contrastive).mean(), "regulariser": torch.stack(regulariser).mean()}
        if model.config.fusion and config.matching_weight:
            terms["matching"] = self._matching(speech, text, logits, relevant, seed)
        return terms

    def _contrastive(
        self, logits: Tensor, relevant: Tensor | None, batch: dict, captions: list[str], way: Way
    ) -> Tensor:
        if self._teacher:
            return losses.self_distillation(logits, self._taught(batch, captions, way), relevant=relevant)
        if self.config.objective == "infonce":
            return losses.info_nce(logits, relevant)
        gamma = self.retriever.gamma if self.config.learn_gamma else self.retriever.config.gamma
        return losses.hard_negative(logits, gamma, losses.HARD_NEGATIVES[self.config.objective], relevant)

    @torch.no_grad()
    def _taught(self, batch: dict, captions: list[str], way: Way) -> Tensor:
        """(B, B) similarities of the teacher."""
        (teacher,) = self._teacher
        speech = teacher.alone(teacher.speech_tokens(batch), "speech", way)
        return losses.similarity(speech.float(), teacher.alone(teacher.text_tokens(captions), "text", way).float())

    def _matching(self, speech: Tokens, text: Tokens, logits: Tensor, relevant: Tensor | None, seed: int) -> Tensor:
        """Cross-entropy of each fused pair against mined ones, the mean of both directions."""
        model, m, own = self.retriever, self.config.mined_negatives, torch.arange(len(logits), device=logits.device)
        generator = torch.Generator(logits.device).manual_seed(seed)
        wrong_text = matching.mine_negatives(logits.detach(), relevant, m, generator)
        other = None if relevant is None else relevant.T
        wrong_speech = matching.mine_negatives(logits.detach().T, other, m, generator)
        repeated = own.repeat_interleave(m)
        of_speech = torch.cat([own, repeated, wrong_speech.clamp(min=0).flatten()])
        of_text = torch.cat([own, wrong_text.clamp(min=0).flatten(), repeated])
        fused = self._fused(speech, text, of_speech, of_text) * model.logit_scale
        right, to_text, to_speech = fused.split([len(own), len(repeated), len(repeated)])
        sides = ((to_text, wrong_text), (to_speech, wrong_speech))
        return sum(
            matching.pair_matching(torch.cat([right[:, None], scores.view(-1, m)], dim=1), wrong)
            for scores, wrong in sides
        ) / len(sides)

    def _fused(self, speech: Tokens, text: Tokens, of_speech: Tensor, of_text: Tensor) -> Tensor:
        """(P,) scores of pairs, fused beside others of like length, so that little is padded."""
        order = speech.mask.sum(1)[of_speech].argsort(stable=True)
        parts = order.split(max(1, len(order) // 4))
        scores = [self.retriever.pair_score(pick(speech, of_speech[p]), pick(text, of_text[p])).float() for p in parts]
        return torch.cat(scores)[order.argsort()]

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """FS-CLAP Eq. (3), and the matching of fused pairs, which it does not have."""
        weights = {
            "contrastive": 1.0,
            "regulariser": self.config.regulariser_weight,
            "matching": self.config.matching_weight,
        }
        return sum(weights[name] * term for name, term in terms.items())

    @torch.no_grad()
    def evaluate(self, batch: dict, captions: list[str], stage: str) -> Values:
        """The terms of a batch; negatives are mined the same way every time."""
        return self._values(self._in_precision(batch, captions, 0), batch)

    def backward(self, batch: dict, captions: list[str], stage: str) -> Values:
        """As `evaluate`, and adds this batch's share of a step's gradient of `total` to every trained parameter."""
        seed = int(torch.randint(2**62, ()))  # from torch's state, which follows from the epoch
        terms = self._in_precision(batch, captions, seed)
        (self.total(terms) / self.config.accumulation_steps).backward()
        return self._values(terms, batch)

    def _in_precision(self, batch: dict, captions: list[str], seed: int) -> dict[str, Tensor]:
        with half_precision(self.retriever.device, self._bf16):
            return self.terms(batch, captions, seed)

    def _values(self, terms: dict[str, Tensor], batch: dict) -> Values:
        return {name: (float(term.detach()), len(batch["relevant"])) for name, term in terms.items()}
