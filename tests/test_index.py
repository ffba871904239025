"""Search: exact order, filters, diversity, pages, examples, the approximate index, and queries without an answer."""

from __future__ import annotations

import math
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import soundfile
import torch
from test_decoding import convert

from esr_utils import index as index_module
from esr_utils import index_snapshot, index_writing
from esr_utils.audio_folder import absolute_key
from esr_utils.embedding import Embeddings, embed
from esr_utils.index import Index, QueryError, build, model_id
from esr_utils.index_rows import Embedded, File, IndexUnusable, IndexWriteError
from esr_utils.manifests import load_corpora, to_cuts
from esr_utils.retriever import StyleRetriever

QUERY = "Someone whispering, half asleep"
DIM, N = 8, 60


def unit(n: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def file_of(key: str, rows: pd.DataFrame, vectors: np.ndarray) -> Embedded:
    return Embedded(File(key, Path(key), 1, 1, ""), rows, vectors)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Sixty moments of six files, with their fp16 vectors; 7, 8 and 30 are at the same place."""
    vectors = unit(N, 0)
    vectors[[8, 30]] = vectors[7]
    number = np.arange(N)
    return pd.DataFrame(
        {
            "file": [f"file {i // 10}'s \"\n.wav" for i in number],
            "start_s": number % 10 * 5.0,
            "end_s": number % 10 * 5.0 + 3,
            "channel": number % 2,
            "speaker": [None if i % 3 == 2 else f"speaker {i // 20}" for i in number],
            "Mood": number / N,
            "loud": number % 4 == 0,
            "vector": list(vectors.astype(np.float16)),
        }
    )


def fill(index: Index, rows: pd.DataFrame) -> Index:
    parts = rows.groupby("file", sort=False)
    index.add(file_of(key, part.drop(columns=["file", "vector"]), np.stack(part["vector"])) for key, part in parts)
    return index


@pytest.fixture(scope="module")
def index(_tiny_model, tmp_path_factory, rows) -> Index:
    """Of these moments. Do not change it; `own` is one that belongs to a test."""
    return fill(Index.create(tmp_path_factory.mktemp("index"), _tiny_model), rows)


@pytest.fixture
def own(tiny_model, tmp_path, rows) -> Index:
    return fill(Index.create(tmp_path / "index", tiny_model), rows)


def vector_of(model: StyleRetriever, *texts: str) -> np.ndarray:
    with torch.no_grad():
        mean = model.encode_text(list(texts)).mean(0).numpy()
    return mean / np.linalg.norm(mean)


def naive(rows: pd.DataFrame, query: np.ndarray) -> pd.DataFrame:
    """Every cosine by the definition, best first, with the share below; ties in their order."""
    scores = [sum(float(a) * float(b) for a, b in zip(v, query, strict=True)) for v in rows["vector"]]
    below = [sum(other < score - 1e-6 for other in scores) / len(scores) for score in scores]
    found = rows.drop(columns="vector").assign(score=scores, percentile=below)
    return found.iloc[np.argsort(-np.round(found["score"], 6), kind="stable")].reset_index(drop=True)


def check(hits: pd.DataFrame, expected: pd.DataFrame, first: int = 1) -> None:
    assert list(hits.columns[:3]) == ["rank", "score", "percentile"]
    assert hits["rank"].tolist() == list(range(first, first + len(expected)))
    np.testing.assert_allclose(hits["score"], expected["score"], atol=1e-6)
    np.testing.assert_allclose(hits["percentile"], expected["percentile"], atol=1e-12)
    names = [name for name in expected.columns if name not in ("score", "percentile")]
    pd.testing.assert_frame_equal(hits[names], expected[names].reset_index(drop=True), check_dtype=False)


# What is found ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, N, 1000])
def test_order_scores_and_shares_are_those_of_comparing_with_every_moment(index, rows, tiny_model, k):
    check(index.search(QUERY, k=k), naive(rows, vector_of(tiny_model, QUERY)).head(k))
    query = unit(1, 5)[0]
    check(index.search(3 * query, k=k), naive(rows, query).head(k))


def test_a_threshold_leaves_out_what_lies_below_it(index, rows, tiny_model):
    expected = naive(rows, vector_of(tiny_model, QUERY))
    limit = float(index.search(QUERY, k=N)["score"][6])
    check(index.search(QUERY, k=N, min_score=limit), expected.head(7))
    check(index.search(QUERY, k=3, min_score=limit), expected.head(3))
    nothing = index.search(QUERY, k=N, min_score=0.9999)
    assert nothing.empty and list(nothing.columns) == list(index.search(QUERY).columns)


def test_several_sentences_count_on_average(index, rows, tiny_model):
    texts = [QUERY, "A very angry voice.", "Speech that is calm."]
    check(index.search(texts, k=9), naive(rows, vector_of(tiny_model, *texts)).head(9))
    pd.testing.assert_frame_equal(index.search([QUERY]), index.search(QUERY))


def test_a_sentence_minus_a_sentence(index, rows, tiny_model):
    for weight in (0.5, 1.0):
        vector = vector_of(tiny_model, QUERY) - weight * vector_of(tiny_model, "Speech that is calm.")
        hits = index.search(QUERY, k=9, minus="Speech that is calm.", minus_weight=weight)
        check(hits, naive(rows, vector / np.linalg.norm(vector)).head(9))
    with pytest.raises(QueryError, match="are the same"):
        index.search(QUERY, minus=QUERY, minus_weight=1.0)
    with pytest.raises(QueryError, match="minus_weight is nan"):
        index.search(QUERY, minus="Speech that is calm.", minus_weight=float("nan"))


def test_pages_follow_each_other_also_through_ties(index, rows):
    query = np.array(rows["vector"][7], dtype=np.float32)
    query /= np.linalg.norm(query)
    pages = [index.search(query, k=2, offset=offset) for offset in range(0, N, 2)]
    check(pd.concat(pages, ignore_index=True), naive(rows, query))
    assert pages[0]["rank"].tolist() == [1, 2] and index.search(query, k=5, offset=N).empty
    assert pd.concat(pages[:2])["file"].tolist()[:3] == rows["file"][[7, 8, 30]].tolist()  # as they were added


@pytest.mark.parametrize("column", ["file", "speaker", "channel"])
def test_one_per_value_is_the_best_of_each(index, rows, column):
    query = unit(1, 6)[0]
    everything = naive(rows, query)
    kept = ~everything.duplicated(column) | everything[column].isna()
    check(index.search(query, k=N, one_per=column), everything[kept])
    check(index.search(query, k=2, offset=1, one_per=column), everything[kept].iloc[1:3], first=2)


@pytest.mark.parametrize(
    ("where", "keeps"),
    [
        ({"file": "file 1's \"\n.wav"}, lambda r: r["file"] == "file 1's \"\n.wav"),
        ({"speaker": ["speaker 0", "speaker 2", "nobody"]}, lambda r: r["speaker"].isin(["speaker 0", "speaker 2"])),
        ({"start_s": (10, 20)}, lambda r: r["start_s"].between(10, 20)),
        ({"start_s": (None, 20), "channel": 1}, lambda r: (r["start_s"] <= 20) & (r["channel"] == 1)),
        ({"Mood": (0.5, None), "loud": True}, lambda r: (r["Mood"] >= 0.5) & r["loud"]),
        ({"channel": [np.int64(0)]}, lambda r: r["channel"] == 0),
        ({"speaker": []}, lambda r: r["channel"] < 0),
        ({"speaker": "x' OR '1'='1"}, lambda r: r["channel"] < 0),
        ({"speaker": "speaker 0' --"}, lambda r: r["channel"] < 0),
        ({"speaker": 'a"b\n\\\0;'}, lambda r: r["channel"] < 0),
        ({}, lambda r: r["channel"] >= 0),
    ],
)
def test_filters_keep_what_meets_all_of_them(index, rows, where, keeps):
    query = unit(1, 7)[0]
    everything = naive(rows, query)
    kept = everything[keeps(everything)]
    check(index.search(query, k=N, where=where), kept)
    check(index.search(query, k=3, where=where, offset=1), kept.iloc[1:4], first=2)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"colour": "red"}, "there is no column 'colour'; this index has id, file"),
        ({"speaker = 'x' OR 1": 1}, "there is no column"),
        ({"vector": 1}, "there is no column 'vector'"),
        ({"written": 0}, "there is no column 'written'"),
        ({"mood": 1}, "there is no column 'mood'"),
        ({"speaker": 1}, "column 'speaker' is of type string; 1 is no value of it"),
        ({"start_s": "0 OR 1=1"}, "column 'start_s' is of type double; '0 OR 1=1' is no"),
        ({"start_s": math.nan}, "nan is no value"),
        ({"channel": True}, "True is no value"),
        ({"loud": 1}, "column 'loud' is of type bool"),
        ({"speaker": None}, "None is no value"),
        ({"speaker": ["a", 3]}, "3 is no value"),
        ({"start_s": (1, 2, 3)}, "a range is"),
        ({"start_s": (None, None)}, "a range is"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused(index, where, message):
    with pytest.raises(QueryError, match=message):
        index.search(QUERY, where=where)


@pytest.mark.parametrize("query", ["", "   ", "\n", [], ["a calm voice", " "], [3]])
def test_an_empty_query_is_refused(index, query):
    with pytest.raises(QueryError, match="empty"):
        index.search(query)
    with pytest.raises(QueryError, match="empty"):
        index.search(QUERY, minus=query)


def test_a_query_of_ten_thousand_words_is_refused(index):
    with pytest.raises(QueryError, match=r"59999 characters \(10000 words\) long; at most 2000"):
        index.search(" ".join(["words"] * 10_000))
    index.search("a" * 2000)


@pytest.mark.parametrize("query", [np.zeros(DIM), np.ones(DIM + 1), np.full(DIM, np.nan), np.ones((1, DIM))])
def test_a_vector_that_is_none_of_this_index_is_refused(index, query):
    with pytest.raises(QueryError, match="vector"):
        index.search(query)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": -1}, "k is -1"),
        ({"offset": -1}, "offset is -1"),
        ({"one_per": "colour"}, "there is no column 'colour'"),
    ],
)
def test_options_out_of_range_are_refused(index, options, message):
    with pytest.raises(QueryError, match=message):
        index.search(QUERY, **options)


def test_an_empty_index_has_no_hits(tiny_model):
    hits = Index.create("memory://", tiny_model).search(QUERY, one_per="file")
    assert hits.empty and list(hits.columns[:4]) == ["rank", "score", "percentile", "id"]


# The index and the table ------------------------------------------------------------------------------------


def test_a_search_sees_what_others_have_written_since(own, rows, tiny_model):
    query = unit(1, 8)[0]
    own.search(query)
    other = Index.open(own.uri, tiny_model)
    other.add([file_of("new", pd.DataFrame({"start_s": [0.0], "end_s": [1.0], "channel": [0]}), query[None])])
    assert own.search(query)["file"][0] == "new"
    other.delete_files(["new"])
    check(own.search(query, k=N), naive(rows, query))


def test_dead_rows_are_not_found(own, rows):
    """A writer was killed before it swept: two versions of a file are there."""
    query = unit(1, 8)[0]
    key = rows["file"][0]
    own.append([file_of(key, pd.DataFrame({"start_s": [1.0], "end_s": [2.0], "channel": [0]}), query[None])])
    hits = own.search(query, k=1000)
    assert len(hits) == N - 10 + 1 and hits["file"].tolist().count(key) == 1 and hits["score"][0] > 0.99
    assert len(own.search(query, k=1000, where={"file": key})) == 1 and own.stats()["moments"] == N - 9


def test_an_index_made_by_another_retriever_is_refused_with_both_names(own, tiny_model):
    Index.open(own.uri, tiny_model)
    tiny_model.text.release()
    Index.open(own.uri, tiny_model)  # the same, though its text side was let go
    assert tiny_model.text.model is None
    with torch.no_grad():
        tiny_model.text_head.weight[0, 0] += 1
    with pytest.raises(IndexUnusable) as error:
        Index.open(own.uri, tiny_model)
    assert own.about["model"] in str(error.value) and model_id(tiny_model) in str(error.value)


def test_without_a_model_vectors_alone_are_queries(index, rows):
    opened, query = Index.open(index.uri), unit(1, 9)[0]
    check(opened.search(query), naive(rows, query).head(10))
    with pytest.raises(QueryError, match="opened without a model"):
        opened.search(QUERY)
    with pytest.raises(QueryError, match="opened without a model"):
        opened.search_like(__file__)


def test_stats_say_what_is_in_it(own, rows, tiny_model):
    own.add([Embedded(File("empty", Path(), 1, 1, ""), pd.DataFrame(), np.zeros((0, DIM)), problem="unreadable")])
    stats = own.stats()
    assert stats["model"] == model_id(tiny_model) and (stats["dim"], stats["moments"]) == (DIM, N)
    assert (stats["files"], stats["files_with_problems"], stats["approximate"]) == (7, 1, False)
    assert stats["hours"] == pytest.approx(N * 3 / 3600) and stats["columns"]["Mood"] == "double"


# The approximate index --------------------------------------------------------------------------------------


@pytest.fixture
def large(tiny_model, tmp_path) -> tuple[Index, pd.DataFrame]:
    number = np.arange(2000)
    rows = pd.DataFrame({"file": [f"f{i % 20}" for i in number], "start_s": number * 1.0, "end_s": number + 1.0})
    rows = rows.assign(channel=number % 2, vector=list(unit(2000, 3).astype(np.float16)))
    return fill(Index.create(tmp_path / "index", tiny_model), rows), rows


def test_the_approximate_index_finds_nearly_what_the_exact_search_finds(large):
    index, _ = large
    with pytest.raises(QueryError, match="no approximate index"):
        index.recall()
    index.build_approximate()
    assert index.stats()["approximate"] and index.recall(k=10) > 0.9
    query = unit(1, 4)[0]
    for options in ({}, {"where": {"channel": 1, "start_s": (500, None)}}, {"one_per": "file"}, {"min_score": 0.8}):
        exact, found = (index.search(query, approximate=a, **options) for a in (False, True))
        shared = found.merge(exact, on="id")
        assert len(shared) >= 0.8 * len(exact) and len(found) <= 10
        np.testing.assert_allclose(shared["score_x"], shared["score_y"], atol=1e-3)
        np.testing.assert_allclose(shared["percentile_x"], shared["percentile_y"], atol=0.02)


def test_past_the_limit_the_approximate_index_answers_and_sees_what_is_new(large, monkeypatch):
    index, rows = large
    index.build_approximate()
    monkeypatch.setattr(index_module, "EXACT_LIMIT", 1000)
    monkeypatch.setattr(index_snapshot.Snapshot, "exact", None)  # is not asked
    query = unit(1, 4)[0]
    index.append([file_of("f0", pd.DataFrame({"start_s": [9.5], "end_s": [9.9], "channel": [0]}), query[None])])
    hits = index.search(query, k=200)  # what was f0 is dead, and not swept yet
    assert hits["start_s"][0] == 9.5 and hits["file"].tolist().count("f0") == 1


def test_past_the_limit_writing_makes_the_approximate_index_and_again_when_much_is_new(own, monkeypatch):
    def add(key: str, n: int) -> None:
        start = np.arange(n) * 1.0
        own.add([file_of(key, pd.DataFrame({"start_s": start, "end_s": start + 1, "channel": 0}), unit(n, n))])

    monkeypatch.setattr(index_module, "EXACT_LIMIT", 1000)
    made, build = [], Index.build_approximate
    monkeypatch.setattr(Index, "build_approximate", lambda index: made.append(index.table.count_rows()) or build(index))
    add("a", 900)
    assert not made and not own.stats()["approximate"]
    add("b", 300)
    assert len(made) == 1 and own.stats()["approximate"]
    add("c", 50)
    own.delete_files(["c"])
    assert len(made) == 1
    add("d", 200)
    assert len(made) == 2
    monkeypatch.setattr(index_writing, "_SMALL_FRAGMENTS", 0)  # each time files are joined, and what is new made known
    for i in range(12):
        add(f"e{i}", 5)
    assert len(made) == 3


def test_what_has_no_vectors_is_written_beside_an_approximate_index(large, monkeypatch):
    index, _ = large
    index.build_approximate()
    monkeypatch.setattr(index_writing, "_SMALL_FRAGMENTS", 0)
    index.add([file_of("silent", pd.DataFrame({"start_s": []}), unit(0, 0))])
    assert len(index.files()) == 21 and len(index.search(unit(1, 4)[0], approximate=True)) == 10


def test_an_approximate_index_that_cannot_be_made_is_said_and_all_is_written(own, monkeypatch):
    def full(index: Index) -> None:
        raise IndexWriteError("the disk is full")

    monkeypatch.setattr(index_module, "EXACT_LIMIT", 50)
    monkeypatch.setattr(Index, "build_approximate", full)
    with pytest.warns(UserWarning, match="all was written.*slower than they could be: the disk is full"):
        own.add([file_of("new", pd.DataFrame({"start_s": [0.0], "end_s": [1.0], "channel": [0]}), unit(1, 5))])
    assert "new" in own.files().index


@pytest.mark.parametrize("options", [{}, {"where": {"channel": 1}}, {"one_per": "file", "offset": 3}])
def test_hits_of_what_is_in_memory_are_those_read_for_a_first_query(large, options):
    index, _ = large
    index.build_approximate()
    query, reads = unit(1, 4)[0], []
    opened = Index.open(index.uri)
    nearest = opened.nearest
    opened.nearest = lambda *args: reads.append(args[3]) or nearest(*args)
    first, *others = (opened.search(query, approximate=True, **options) for _ in range(3))
    for found in others:
        pd.testing.assert_frame_equal(found, first)
    assert "id" in reads[0] and reads[-1] == ["vector"] and len(first) == 10


def test_the_approximate_index_is_read_into_memory_once_when_a_second_query_comes(large, monkeypatch):
    index, _ = large
    index.search(unit(1, 4)[0], approximate=True)  # with none there is nothing to read
    index.build_approximate()
    kind, names = type(index.table), []
    prewarm = kind.prewarm_index
    monkeypatch.setattr(kind, "prewarm_index", lambda table, name: names.append(name) or prewarm(table, name))
    for query, times in zip(unit(4, 4), (0, 1, 1, 1), strict=True):
        index.search(query, approximate=True)
        assert len(names) == times
    assert names[0] in {one.name for one in index.table.list_indices()}


def test_threads_that_search_one_index_read_in_it_one_after_another(large):
    """Else one would go to a newer version while another reads, whose rows are of the older one."""
    index, _ = large
    index.build_approximate()
    opened, query, steps, inside = Index.open(index.uri), unit(1, 4)[0], [], Event()
    nearest, reload = opened.nearest, opened.reload

    def slow(*args):
        inside.set()
        steps.append("reads")
        time.sleep(0.2)  # for the other to come in between
        found = nearest(*args)
        steps.append("has read")
        return found

    opened.nearest, opened.reload = slow, lambda: steps.append("goes on") or reload()
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(opened.search, query, approximate=True)
        inside.wait()
        index.append([file_of("new", pd.DataFrame({"start_s": [0.0], "end_s": [1.0], "channel": [0]}), query[None])])
        second = threads.submit(opened.search, query, approximate=True)
    assert steps == ["goes on", "goes on", "reads", "has read"] * 2
    assert "new" not in set(first.result()["file"]) and second.result()["file"][0] == "new"


def test_a_row_that_is_none_of_a_version_is_never_taken_for_another():
    kept = index_snapshot.Columns(
        pa.table({"_rowid": pa.array([7, 3, 5], pa.uint64()), "id": ["seven", "three", "five"]})
    )
    assert kept.of(np.array([5, 7], np.uint64))["id"].to_pylist() == ["five", "seven"]
    assert len(kept.of(np.array([], np.uint64))) == 0
    for row in (0, 4, 8):
        with pytest.raises(KeyError, match="none of this version"):
            kept.of(np.array([5, row], np.uint64))


def test_an_approximate_index_of_a_few_is_refused(index):
    with pytest.raises(QueryError, match="60 moments need no approximate index"):
        index.build_approximate()


# Examples, and manifests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clips(_tiny_model, manifest, tmp_path_factory) -> tuple[Index, pd.DataFrame]:
    """Twelve clips embedded in earnest, and their rows. Do not change it."""
    rows = manifest[manifest["split"] == "test"].head(12).reset_index(drop=True)
    folder = tmp_path_factory.mktemp("clips")
    found, skipped = build(_tiny_model, rows, folder / "index", cache=folder / "cache")
    assert skipped.empty
    return found, rows


def test_an_index_of_a_manifest_gives_its_rows_back(clips, tiny_model):
    index, rows = clips
    hits = index.search(QUERY, k=100)
    assert hits["id"].tolist() == hits["utterance_id"].tolist() and sorted(hits["id"]) == sorted(rows["utterance_id"])
    same = hits.set_index("utterance_id").loc[rows["utterance_id"]].reset_index()
    pd.testing.assert_frame_equal(same[rows.columns], rows, check_dtype=False)
    assert [cut.id for cut in to_cuts(hits)] == hits["id"].tolist()  # and can be heard
    direct = embed(tiny_model, to_cuts(rows), "normalised", None)
    scores = dict(zip(direct.utterance_ids, direct.vectors @ vector_of(tiny_model, QUERY), strict=True))
    np.testing.assert_allclose(hits["score"], [scores[name] for name in hits["id"]], atol=2e-3)


def test_an_index_is_built_from_embeddings_that_are_there(tiny_model, manifest):
    vectors = unit(len(manifest), 1)
    skipped = pd.DataFrame(columns=["utterance_id", "reason"])
    embeddings = Embeddings(list(manifest["utterance_id"]), vectors, np.zeros((len(manifest), 22)), skipped)
    index, _ = build(tiny_model, manifest, embeddings=embeddings)
    assert index.uri == "memory://"
    for i in (0, 7):
        assert index.search(vectors[i], k=1)["utterance_id"][0] == manifest["utterance_id"].iloc[i]


def test_an_example_of_the_index_finds_the_others(index, rows):
    example = index.search(np.array(rows["vector"][7], np.float32), k=3)["id"][0]
    query = np.array(rows["vector"][7], np.float32)
    expected = naive(rows.drop(7).reset_index(drop=True), query / np.linalg.norm(query))
    hits = index.search_like(example, k=5)
    assert example not in set(hits["id"]) and hits["rank"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(hits["score"], expected["score"].head(5), atol=1e-6)
    assert len(index.search_like(example, k=100)) == N - 1
    assert set(index.search_like(example, k=100, where={"channel": 1})["channel"]) == {1}
    for options, message in (
        ({"k": 0}, "k is 0"),
        ({"k": 1.5}, "k is 1.5"),
        ({"min_score": np.nan}, "min_score is no"),
    ):
        with pytest.raises(QueryError, match=message):
            index.search_like(example, **options)


@pytest.mark.parametrize("kind", ["opus", "wav", "flac", "m4a"])
def test_an_example_that_is_a_file(clips, tmp_path, kind):
    """A copy of a clip elsewhere: the clip itself is the best hit."""
    index, rows = clips
    original = Path(rows["root"][4]) / rows["path"][4]
    copy = tmp_path / f"example.{kind}"
    if kind == "opus":
        shutil.copy(original, copy)
    else:
        samples, rate = soundfile.read(original)
        soundfile.write(copy.with_suffix(".wav"), samples, rate)
        if kind != "wav":
            convert(copy.with_suffix(".wav"), copy)
    hits = index.search_like(copy, k=3)
    assert hits["utterance_id"][0] == rows["utterance_id"][4]
    assert hits["score"][0] == pytest.approx(1, abs=0.03 if kind == "m4a" else 2e-3) and len(hits) == 3
    pd.testing.assert_frame_equal(index.search_like(str(copy), k=3), hits)


def test_an_example_in_stereo_is_read_as_the_collection_is(clips, tmp_path):
    index, rows = clips
    samples, rate = soundfile.read(Path(rows["root"][4]) / rows["path"][4])
    soundfile.write(tmp_path / "right.wav", np.stack([0 * samples, samples], axis=1), rate)
    assert index.search_like(tmp_path / "right.wav", k=1)["utterance_id"][0] == rows["utterance_id"][4]


def test_an_example_that_is_a_file_of_the_index_is_not_among_its_hits(clips):
    index, rows = clips
    hits = index.search_like(Path(rows["root"][4]) / rows["path"][4], k=12)
    assert rows["utterance_id"][4] not in set(hits["utterance_id"]) and len(hits) == 11


def test_of_an_example_that_the_index_has_in_moments_none_is_among_its_hits(own, speech, tmp_path, monkeypatch):
    example = tmp_path / "50 % of it.wav"  # of another name in the index
    soundfile.write(example, speech[:48_000], 16_000)
    rows = pd.DataFrame({"start_s": [0.0, 1.5], "end_s": [1.5, 3.0], "channel": 0})
    own.add([file_of(absolute_key(example), rows, unit(2, 5))])
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(tmp_path)
    for name in (example, str(example), "~/50 % of it.wav", tmp_path / "link" / example.name):
        assert len(own.search_like(name, k=100)) == N and own.stats()["moments"] == N + 2


def test_an_example_that_is_not_there_is_refused(clips, tmp_path):
    for example in (tmp_path / "nothing.wav", "mini/no_such_clip", tmp_path, "x' OR '1'='1", "a\0b", "long" * 2000):
        with pytest.raises(QueryError, match="neither the id"):
            clips[0].search_like(example)


def test_an_example_that_cannot_be_used_is_refused_with_the_reason(clips, tmp_path):
    (tmp_path / "text.wav").write_text("no audio at all")
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "silent.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "short.wav", 0.1 * np.ones(100), 16_000)
    reasons = {"text": "no readable audio", "empty": "no readable audio", "silent": "silent", "short": "shortest"}
    for name, reason in reasons.items():
        with pytest.raises(QueryError, match=f"{name}.wav.*{reason}"):
            clips[0].search_like(tmp_path / f"{name}.wav")


def test_clips_that_cannot_be_used_are_named_and_not_found(tiny_model, own_corpus, tmp_path):
    rows = own_corpus[own_corpus["split"] == "test"].head(6)
    info = soundfile.info(tmp_path / "mini" / rows["path"].iloc[2])
    silent = rows["path"].iloc[2]
    soundfile.write(tmp_path / "mini" / silent, np.zeros(info.frames), info.samplerate, format="OGG", subtype="OPUS")
    rows = load_corpora("mini", tmp_path).set_index("utterance_id", drop=False).loc[rows["utterance_id"]]
    found, skipped = build(tiny_model, rows.reset_index(drop=True), cache=None)
    assert skipped["utterance_id"].tolist() == [rows["utterance_id"].iloc[2]] and "silent" in skipped["reason"][0]
    hits = found.search(QUERY, k=10)
    assert len(hits) == 5 and rows["utterance_id"].iloc[2] not in set(hits["utterance_id"])


def test_a_manifest_with_a_column_that_no_index_can_have_is_refused_before_it_is_embedded(manifest, monkeypatch):
    monkeypatch.setattr("esr_utils.embedding.embed", None)
    with pytest.raises(IndexUnusable, match="columns '_split', 'score' cannot be in an index"):
        build(None, manifest.assign(_split="test", score=1.0))
