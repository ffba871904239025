"""What adapting an index to what it holds brings, and where it harms: each corpus left out of the training in turn.

    python benchmarks/adaptation.py      with $ESR_DATA = <folder with ravdess, emodb, nemo>

Trained on the other two and the demo corpus, seeds 0-2; tested on the left-out one's training and validation speakers,
none of whom was heard, and its styles that the others have: its test split takes no part in what is chosen here.
Prints Markdown, and keeps runs in runs/adaptation/. Interrupted, it goes on where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from esr_utils import adaptation, embedding, evaluation, intervals, manifests, runs, scoring, tables, training, trials
from esr_utils.adaptation import Statistics
from esr_utils.config import Level, ModelConfig, TrainConfig
from esr_utils.retriever import StyleRetriever
from esr_utils.styles import STYLES

SEEDS = (0, 1, 2)
CORPORA = ("ravdess", "emodb", "nemo")
FOLDER = runs.RUNS / "adaptation"
WAYS = ("training", "corpus", "speaker")  # whose statistics
METRICS = ("r@1", "r@10", "accuracy")
SIZES = (10, 20, 30, 50)
DRAWS = 5  # of clips, of each size, voice and seed


@dataclass
class LeftOut:
    """A corpus and a retriever that has not met it.

    Attributes:
        clips: sorted by utterance_id, those of styles that were trained on.
        pooled: (N, L, P) fp16, as an index keeps them.
    """

    model: StyleRetriever
    clips: pd.DataFrame
    pooled: np.ndarray

    def scores(self, rows: np.ndarray, statistics: Statistics) -> np.ndarray:
        """(len(rows), S), to the seen prompts of each style."""
        queries = evaluation.style_queries(self.model, self.styles, "seen")
        return adaptation.vectors(self.model, self.pooled[rows], statistics) @ queries.T

    @property
    def styles(self) -> list[str]:
        return sorted(set(self.clips["style"]))

    @property
    def truth(self) -> np.ndarray:
        return self.clips["style"].map(self.styles.index).to_numpy()

    def own(self, rows: np.ndarray) -> Statistics:
        """The statistics of some rows, however few."""
        return adaptation.gather([(["all"] * len(rows), self.pooled[rows])])["all"]

    def shrunk(self, rows: np.ndarray) -> Statistics:
        """The statistics of some rows and the prior."""
        return adaptation.shrunk(self.own(rows), adaptation.of_training(self.model))

    def rule(self, rows: np.ndarray) -> Statistics:
        """By what an index standardises rows that are a group."""
        few = self.effective_styles(rows) < adaptation.FEW_STYLES
        return adaptation.of_training(self.model) if few else self.shrunk(rows)

    def effective_styles(self, rows: np.ndarray) -> float:
        """How many styles some clips seem to have, which is what an index goes by."""
        every = evaluation.style_queries(self.model, list(STYLES), "seen")
        return adaptation.effective_styles(adaptation.style_counts(self.model, self.pooled[rows], every))

    def adapted(self, way: str) -> np.ndarray:
        """(N, S), every clip as in an index that adapts so."""
        groups = {"training": [""] * len(self.clips), "corpus": self.clips["corpus"], "speaker": self.clips["speaker"]}
        groups, found = np.asarray(groups[way]), np.zeros((len(self.clips), len(self.styles)), np.float32)
        for group in np.unique(groups):
            rows = np.flatnonzero(groups == group)
            by = adaptation.of_training(self.model) if way == "training" else self.rule(rows)
            found[rows] = self.scores(rows, by)
        return found


def left_out(corpus: str, seed: int, folder: Path, model_config: ModelConfig, config: TrainConfig) -> LeftOut:
    """A retriever of a recipe, trained on the others, or that which is in the folder already."""
    others = without(corpus)
    model = training.fit(others, folder / f"without-{corpus}-{seed}", model_config, config.but(seed=seed))
    clips, pooled = heard(corpus, model_config.speech_backbone, config.level)
    rows = trained_on(clips, others)
    return LeftOut(model, clips.iloc[rows].reset_index(drop=True), pooled[rows])


def without(corpus: str) -> pd.DataFrame:
    """The clips of the others, and of the demo corpus."""
    return manifests.load_corpora([*(name for name in CORPORA if name != corpus), "demo"])


def trained_on(clips: pd.DataFrame, others: pd.DataFrame) -> np.ndarray:
    """Rows of clips whose style the others have."""
    return np.flatnonzero(clips["style"].isin(others.loc[others["corpus"] != "demo", "style"]))  # demo: by rule


@cache
def heard(corpus: str, speech_backbone: str, level: Level) -> tuple[pd.DataFrame, np.ndarray]:
    """A corpus's clips but those of its test split, and their pooled features (N, L, P) fp16."""
    clips = manifests.load_corpora(corpus)
    clips = clips[clips["split"] != "test"].sort_values("utterance_id").assign(split="left out")
    backbone = StyleRetriever.build(ModelConfig.released().but(speech_backbone=speech_backbone))
    features = embedding.frozen_features(backbone, manifests.to_cuts(clips), level)
    clips = clips.set_index("utterance_id", drop=False).loc[features.cut_ids].reset_index(drop=True)
    return clips, features.pooled.half().numpy()


def measured(found: list[LeftOut], way: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """R@1, R@10 and accuracy of a corpus, means over the seeds, and their bootstrap replicates (speakers, then their
    utterances, and the seeds: `intervals.seed_weights`)."""
    clips, of_seeds = found[0].clips, []
    corpus = clips.at[0, "corpus"]  # each draws for itself: the same for all that is compared, and for no other corpus
    scorer = scoring.Scorer(clips, trials.build_trials(clips, corpus, "left out"), CORPORA.index(corpus))
    for one in found:
        scores = one.adapted(way)
        trial_values, trial_replicates, _ = scorer.retrieval(scores)
        class_values, class_replicates = scorer.classification(scores)
        of_seeds.append((trial_values | class_values, trial_replicates | class_replicates))
    mean = {name: float(np.mean([values[name] for values, _ in of_seeds])) for name in METRICS}
    drawn = {name: np.stack([replicates[name] for _, replicates in of_seeds]) for name in METRICS}
    return mean, {name: np.einsum("rs,sr->r", intervals.seed_weights(*one.shape), one) for name, one in drawn.items()}


def gained(before: float, after: float, replicates_before: np.ndarray, replicates_after: np.ndarray) -> tables.Cell:
    """A paired difference with its interval."""
    bounds = intervals.interval(replicates_after - replicates_before, after - before, (-1.0, 1.0))
    return tables.Cell(after - before, tuple(bounds), difference=True)


def compared(found: list[LeftOut]) -> pd.DataFrame:
    """A row for each way, of a corpus: values, and differences from no adaptation."""
    rows, by_training = [], measured(found, "training")
    for way in WAYS:
        mean, drawn = by_training if way == "training" else measured(found, way)
        row: dict = {"corpus": found[0].clips.at[0, "corpus"], "statistics of the": way}
        row |= {name: tables.Cell(mean[name], tuple(intervals.interval(drawn[name], mean[name]))) for name in mean}
        for name in ("r@10", "accuracy") if way != "training" else ():
            row[f"{name} gained"] = gained(by_training[0][name], mean[name], by_training[1][name], drawn[name])
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def accuracies(one: LeftOut, rows: np.ndarray) -> dict[str, float]:
    """Zero-shot accuracy on some clips as a group, by the training's statistics, by theirs alone, and as an index."""
    by_training = adaptation.of_training(one.model)
    ways = {"training's": by_training, "their own": one.own(rows), "with the prior": one.shrunk(rows),
            "as an index does": one.rule(rows)}  # fmt: skip
    return {name: float((one.scores(rows, by).argmax(1) == one.truth[rows]).mean()) for name, by in ways.items()}


def of_few(found: list[LeftOut]) -> list[dict]:
    """n clips of one voice, drawn at random: what so small a group gains."""
    rows = []
    for n in SIZES:
        drawn = []
        for seed, one in enumerate(found):
            rng = np.random.default_rng([n, seed])
            voices = [np.flatnonzero(one.clips["speaker"] == speaker) for speaker in one.clips["speaker"].unique()]
            drawn += [
                accuracies(one, rng.choice(voice, n, replace=False))
                for voice in voices if len(voice) >= n for _ in range(DRAWS)
            ]  # fmt: skip
        about = {"corpus": found[0].clips.at[0, "corpus"], "clips": n, "draws": len(drawn)}
        rows.append(about | pd.DataFrame(drawn).mean().map("{:.2f}".format).to_dict())
    return rows


def of_one_style(found: list[LeftOut], share: float, n: int = 100) -> list[dict]:
    """n clips of which a share is of one style, each style in turn; share 0: drawn from all clips."""
    drawn = []
    for seed, one in enumerate(found):
        rng = np.random.default_rng([seed, n])
        for style in range(len(one.styles)):
            same, others = np.flatnonzero(one.truth == style), np.flatnonzero(one.truth != style)
            size = min(n, int(len(same) / share)) if share else n
            if size < adaptation.MIN_CLIPS:
                continue
            kept = round(share * size)
            draw = np.concatenate([rng.choice(same, kept, False), rng.choice(others, size - kept, False)])
            if not share:
                draw = rng.choice(len(one.clips), n, replace=False)
            drawn.append(accuracies(one, draw) | {"styles": one.effective_styles(draw)})
    table = pd.DataFrame(drawn)
    styles = table.pop("styles")
    return [
        {"corpus": found[0].clips.at[0, "corpus"],
         "clips": f"{share:.0%} of one style" if share else "drawn from all", "draws": len(drawn)}
        | table.mean().map("{:.2f}".format).to_dict()
        | {"styles they seem to have (10, 50, 90 %)": ", ".join(map("{:.1f}".format, styles.quantile([0.1, 0.5, 0.9]))),
           "warned of": f"{(styles < adaptation.FEW_STYLES).mean():.2f}"}
    ]  # fmt: skip


def show(title: str, table: pd.DataFrame) -> None:
    print(f"\n### {title}\n\n{table.to_markdown(index=False)}", flush=True)


if __name__ == "__main__":
    recipe = FOLDER, ModelConfig.released(), TrainConfig.released()
    found = {corpus: [left_out(corpus, seed, *recipe) for seed in SEEDS] for corpus in CORPORA}
    show("By whose statistics, each corpus left out of the training", pd.concat(map(compared, found.values())))
    few = [row for of_seeds in found.values() for row in of_few(of_seeds)]
    show("Accuracy on few clips of one voice", pd.DataFrame(few))
    harm = [row for of_seeds in found.values() for share in (0, 0.7, 0.9, 1) for row in of_one_style(of_seeds, share)]
    show("Accuracy where one style prevails, and how often that is noticed", pd.DataFrame(harm))
