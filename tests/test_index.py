"""Search: exact order, threshold, examples, and queries that cannot be answered."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from esr_utils.embedding import Embeddings, embed
from esr_utils.index import QueryError, SearchIndex
from esr_utils.manifests import load_corpora, to_cuts

QUERY = "Someone whispering, half asleep"


@pytest.fixture
def random_index(tiny_model, manifest) -> SearchIndex:
    """All clips of "mini" at random places on the sphere, two of them at the same."""
    vectors = np.random.default_rng(0).standard_normal((len(manifest), 8)).astype("float32")
    vectors[5] = vectors[9]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    logits = np.zeros((len(manifest), 22), dtype="float32")
    skipped = pd.DataFrame(columns=["utterance_id", "reason"])
    embeddings = Embeddings(list(manifest["utterance_id"]), vectors, logits, skipped)
    return SearchIndex.build(tiny_model, manifest, embeddings=embeddings)


@pytest.fixture
def index(tiny_model, own_corpus, tmp_path) -> SearchIndex:
    """Twelve clips embedded in earnest."""
    rows = own_corpus[own_corpus["split"] == "test"].head(12)
    return SearchIndex.build(tiny_model, rows, level="normalised", cache=tmp_path / "cache")


def naive(index: SearchIndex, query: np.ndarray) -> list[tuple[str, float]]:
    """Every cosine by the definition, sorted."""
    found = []
    for utterance, vector in zip(index.clips["utterance_id"], index.vectors, strict=True):
        dot = sum(float(a) * float(b) for a, b in zip(vector, query, strict=True))
        found.append((utterance, dot / math.sqrt(sum(float(a) ** 2 for a in vector))))
    return sorted(found, key=lambda pair: -pair[1])


def query_vector(index: SearchIndex, text: str = QUERY) -> np.ndarray:
    with torch.no_grad():
        return index.model.encode_text([text])[0].numpy()


# Sentences --------------------------------------------------------------------------------------------------


def test_order_and_scores_are_those_of_comparing_with_every_clip(random_index):
    expected = naive(random_index, query_vector(random_index))
    hits = random_index.search(QUERY, k=len(expected))
    np.testing.assert_allclose(hits["score"], [score for _, score in expected], atol=1e-6)
    ties = {random_index.clips["utterance_id"][i] for i in (5, 9)}
    ours = [utterance if utterance not in ties else "tie" for utterance in hits["utterance_id"]]
    assert ours == [utterance if utterance not in ties else "tie" for utterance, _ in expected]
    assert hits["rank"].tolist() == list(range(1, len(expected) + 1))


def test_the_first_k_are_the_first_of_all(random_index):
    everything = random_index.search(QUERY, k=33)
    pd.testing.assert_frame_equal(random_index.search(QUERY, k=7), everything.head(7))
    assert len(random_index.search(QUERY)) == 10


def test_more_than_there_are_gives_all(random_index):
    assert len(random_index.search(QUERY, k=1000)) == 33


def test_hits_carry_their_manifest_row(random_index, manifest):
    hits = random_index.search(QUERY, k=5)
    assert list(hits.columns[:2]) == ["rank", "score"]
    rows = manifest.set_index("utterance_id", drop=False).loc[hits["utterance_id"]].reset_index(drop=True)
    pd.testing.assert_frame_equal(hits.drop(columns=["rank", "score"]), rows)


def test_a_threshold_leaves_out_what_lies_below_it(random_index):
    everything = random_index.search(QUERY, k=33)
    limit = float(everything["score"][6])
    kept = random_index.search(QUERY, k=33, min_score=limit)
    assert len(kept) == 7 and kept["score"].min() >= limit
    assert len(random_index.search(QUERY, k=3, min_score=limit)) == 3
    nothing = random_index.search(QUERY, k=33, min_score=0.9999)
    assert nothing.empty and list(nothing.columns) == list(everything.columns)


def test_several_sentences_count_on_average(random_index):
    texts = [QUERY, "A very angry voice.", "Speech that is calm."]
    mean = np.mean([query_vector(random_index, text) for text in texts], axis=0)
    hits = random_index.search(texts, k=33).set_index("utterance_id")["score"]
    for utterance, score in naive(random_index, mean):
        assert hits[utterance] == pytest.approx(score, abs=1e-6)
    pd.testing.assert_frame_equal(random_index.search([QUERY]), random_index.search(QUERY))


@pytest.mark.parametrize("query", ["", "   ", "\n", [], ["a calm voice", " "]])
def test_an_empty_query_is_refused(random_index, query):
    with pytest.raises(QueryError, match="empty"):
        random_index.search(query)


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_1_is_refused(random_index, k):
    with pytest.raises(QueryError, match=f"k is {k}"):
        random_index.search(QUERY, k=k)


# Examples ---------------------------------------------------------------------------------------------------


def test_an_example_of_the_collection_finds_the_others(random_index):
    example = random_index.clips["utterance_id"][9]
    expected = [pair for pair in naive(random_index, random_index.vectors[9]) if pair[0] != example]
    hits = random_index.search_like(example, k=5)
    assert hits["utterance_id"].tolist() == [utterance for utterance, _ in expected[:5]]
    assert hits["utterance_id"][0] == random_index.clips["utterance_id"][5]  # the one at the same place
    assert hits["rank"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(hits["score"], [score for _, score in expected[:5]], atol=1e-6)
    assert len(random_index.search_like(example, k=100)) == 32
    assert random_index.search_like(example, k=100, min_score=0.5)["score"].min() >= 0.5


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_1_is_refused_for_an_example_too(random_index, k):
    with pytest.raises(QueryError, match=f"k is {k}"):
        random_index.search_like(random_index.clips["utterance_id"][0], k=k)


@pytest.mark.parametrize("kind", ["opus", "wav", "flac"])
def test_an_example_that_is_a_file(index, tmp_path, kind):
    """A copy of a clip elsewhere: the clip itself is the best hit."""
    original = Path(index.clips["root"][4]) / index.clips["path"][4]
    copy = tmp_path / f"example.{kind}"
    if kind == "opus":
        shutil.copy(original, copy)
    else:
        samples, rate = soundfile.read(original)
        soundfile.write(copy, samples, rate)
    hits = index.search_like(copy, k=3)
    assert hits["utterance_id"][0] == index.clips["utterance_id"][4]
    assert hits["score"][0] == pytest.approx(1, abs=2e-4) and len(hits) == 3
    pd.testing.assert_frame_equal(index.search_like(str(copy), k=3), hits)


def test_an_example_in_stereo_is_read_as_the_collection_is(index, tmp_path):
    samples, rate = soundfile.read(Path(index.clips["root"][4]) / index.clips["path"][4])
    soundfile.write(tmp_path / "right.wav", np.stack([0 * samples, samples], axis=1), rate)
    hits = index.search_like(tmp_path / "right.wav", k=1)
    assert hits["utterance_id"][0] == index.clips["utterance_id"][4]


def test_an_example_that_is_a_file_of_the_collection_is_not_among_its_hits(index):
    hits = index.search_like(Path(index.clips["root"][4]) / index.clips["path"][4], k=12)
    assert index.clips["utterance_id"][4] not in set(hits["utterance_id"])


def test_an_example_that_is_not_there_is_refused(index, tmp_path):
    for example in (tmp_path / "nothing.wav", "mini/no_such_clip", tmp_path):
        with pytest.raises(QueryError, match="neither an utterance_id"):
            index.search_like(example)


def test_an_example_that_cannot_be_used_is_refused_with_the_reason(index, tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "short.wav", 0.1 * np.ones(100), 16_000)
    reasons = {
        "text": "no readable audio",
        "empty": "no readable audio",
        "silent": "silent",
        "short": "shortest",
    }
    for name, reason in reasons.items():
        with pytest.raises(QueryError, match=f"{name}.wav.*{reason}"):
            index.search_like(tmp_path / f"{name}.wav")


# Building ---------------------------------------------------------------------------------------------------


def test_the_index_holds_the_embeddings_of_the_clips(index, own_corpus):
    rows = own_corpus[own_corpus["split"] == "test"].head(12)
    direct = embed(index.model, to_cuts(rows), "normalised", None)
    assert index.clips["utterance_id"].tolist() == direct.utterance_ids == rows["utterance_id"].tolist()
    assert float((index.vectors * direct.vectors).sum(1).min()) >= 0.9999


def test_clips_that_cannot_be_used_are_named_and_not_found(tiny_model, own_corpus, tmp_path):
    rows = own_corpus[own_corpus["split"] == "test"].head(6)
    info = soundfile.info(tmp_path / "mini" / rows["path"].iloc[2])
    silent = rows["path"].iloc[2]
    soundfile.write(tmp_path / "mini" / silent, np.zeros(info.frames), info.samplerate, format="OGG", subtype="OPUS")
    rows = load_corpora("mini", tmp_path).set_index("utterance_id", drop=False).loc[rows["utterance_id"]]
    found = SearchIndex.build(tiny_model, rows.reset_index(drop=True), cache=None)
    assert found.skipped["utterance_id"].tolist() == [rows["utterance_id"].iloc[2]]
    assert "silent" in found.skipped["reason"][0]
    hits = found.search(QUERY, k=10)
    assert len(hits) == 5 and rows["utterance_id"].iloc[2] not in set(hits["utterance_id"])
