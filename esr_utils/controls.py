"""What simple cues give on the same trials as the models."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from esr_utils import acoustics, scoring, trials
from esr_utils.manifests import to_cuts


def simple_cues(manifest: pd.DataFrame, corpus: str, split: str = "test", seed: int = 0, n_trials: int = 1000) -> dict:
    """What simple cues give on the same trials: how far a corpus gives its styles away without any listening.

    A logistic regression, trained on the corpus's own train split, ranks clips by its log-probability of the style,
    from loudness as recorded; from pitch, energy and tempo; or from the words alone (TF-IDF). And chance.

    Returns keys `<corpus>/control/<name>/…` for results; without a train split, chance only.
    """
    clips = manifest[(manifest["corpus"] == corpus) & (manifest["style"] != "")]
    test = clips[clips["split"] == split]
    train = clips[(clips["split"] == "train") & clips["style"].isin(test["style"].unique())]
    measured = acoustics.measure(to_cuts(pd.concat([train, test])))
    usable = measured.index.intersection(test["utterance_id"]).sort_values()
    test = test.set_index("utterance_id").loc[usable].reset_index()
    train = train[train["utterance_id"].isin(measured.index)]
    drawn = trials.build_trials(test, corpus, split, n_trials=n_trials, seed=seed)
    scorer = scoring.Scorer(test, drawn, seed)
    sizes = np.array(list(drawn.candidates_by_style.values()))
    found = {f"{corpus}/control/chance/r@{k}": float(np.minimum(1, k / sizes).mean()) for k in trials.KS}
    found[f"{corpus}/control/chance/accuracy"] = 1 / len(scorer.styles)
    if set(scorer.styles) - set(train["style"]):
        return found
    for name, columns in (("loudness", acoustics.LOUDNESS), ("prosody", acoustics.PROSODY), ("text", None)):
        classifier = LogisticRegression(max_iter=2000, class_weight="balanced")
        if columns:
            pipe = make_pipeline(StandardScaler(), classifier)
            sides = [measured.loc[side["utterance_id"], list(columns)].to_numpy() for side in (train, test)]
        else:
            pipe = make_pipeline(TfidfVectorizer(token_pattern=r"\S+"), classifier)
            sides = [side["text"].where(side["text"] != "", "-").to_numpy() for side in (train, test)]
        pipe.fit(sides[0], train["style"])
        scores = pipe.predict_log_proba(sides[1])[:, [list(pipe.classes_).index(s) for s in scorer.styles]]
        values = scorer.retrieval(scores)[0] | scorer.classification(scores)[0]
        found |= {f"{corpus}/control/{name}/{key}": value for key, value in values.items() if "/" not in key}
    return found
