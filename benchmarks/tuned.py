"""The released retriever with its speech backbone tuned afterwards, for `recipes`: is it worth more than frozen?

First the heads on frozen features, as released, then all together at small rates: features are bent less than if they
were tuned under heads that know nothing yet (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution"). Features stay standardised by the statistics of the untuned backbone.
"""

from __future__ import annotations

from pathlib import Path

import adaptation as benchmark
import numpy as np
from adaptation import LeftOut
from safetensors.torch import load_file

from esr_utils import checkpoints, embedding, manifests, provenance, runs, training
from esr_utils.config import ModelConfig, TrainConfig
from esr_utils.frame_cache import CACHE
from esr_utils.retriever import StyleRetriever

# The top layer learns at 0.8 of the heads' rate, the one below at 0.64, and so on.
AFTERWARDS = {
    "finetune": "full", "epochs": 2, "classify_epochs": 0, "learning_rate": 5e-5, "layer_decay": 0.8,
    "precision": "bf16", "mixup": 0.0, "speeds": (), "standardise": "training", "batches": "any",
}  # fmt: skip


class Trainer(training._Trainer):
    """Begins where a run on frozen features has ended, which says nothing of the backbone that it left as it was."""

    def __init__(self, begun: Path, *args) -> None:
        super().__init__(*args)
        self.objective.retriever.load_state_dict(load_file(begun / "best" / "model.safetensors"), strict=False)


def left_out(corpus: str, seed: int, folder: Path, model_config: ModelConfig, config: TrainConfig) -> LeftOut:
    """As the benchmark `adaptation`'s; `config` is the recipe of the heads."""
    name, others = f"without-{corpus}-{seed}", benchmark.without(corpus)
    training.fit(others, benchmark.FOLDER / name, model_config, config.but(seed=seed))
    folder, afterwards = folder / name, config.but(seed=seed, **AFTERWARDS)
    provenance.begin(others, folder, model_config, afterwards)
    if not checkpoints.finished(folder):
        Trainer(benchmark.FOLDER / name, others, folder, model_config, afterwards, "cpu", CACHE).run()
    model = StyleRetriever.load(folder / "best")
    clips, _ = benchmark.heard(corpus, model_config.speech_backbone, config.level)
    clips = clips.iloc[benchmark.trained_on(clips, others)].reset_index(drop=True)
    kept = folder / "left_out.npy"
    if not kept.is_file():
        features = embedding.frozen_features(model, manifests.to_cuts(clips), config.level)
        places = [features.cut_ids.index(name) for name in clips["utterance_id"]]
        with runs.atomic_path(kept) as temporary, temporary.open("wb") as file:
            np.save(file, features.pooled[places].half().numpy())
    return LeftOut(model, clips, np.load(kept))
