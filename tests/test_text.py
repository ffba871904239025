"""Text backbones: pooling without padding, eval mode that stays, each text run once, where weights lie."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import T5ForConditionalGeneration

from esr_utils import weights
from esr_utils.text import TextBackbone, load_text_backbone, pool_tokens

TEXTS = [
    "Angry.",
    "Speech that is calm.",
    "Someone is speaking in a whispered voice, half asleep, very slowly, and with long pauses in between.",
]


@pytest.fixture(scope="module")
def tiny_mean(tiny_text, tmp_path_factory) -> str:
    """The tiny BERT as a sentence-transformers folder that says "mean"."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mean"
    shutil.copytree(tiny_text, folder)
    (folder / "1_Pooling").mkdir()
    stated = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    return str(folder)


KINDS = ("bert", "roberta", "t5", "flan-t5")


@pytest.fixture(scope="module")
def tiny_texts(tmp_path_factory) -> dict[str, str]:
    """A folder for each kind of the paper's text backbones."""
    root = tmp_path_factory.mktemp("texts")
    return {kind: tiny_models.write_text(root / kind, kind, TEXTS) for kind in KINDS}


@pytest.fixture(scope="module")
def minilm() -> TextBackbone:
    return load_text_backbone("minilm")


@pytest.fixture
def rows_run(monkeypatch):
    """Counts the texts that a backbone's model runs: `rows_run(backbone)` gives the list of counts."""

    def count(backbone: TextBackbone) -> list[int]:
        seen, forward = [], backbone.model.forward

        def noted(*args, **kwargs):
            seen.append(len(kwargs["input_ids"]))
            return forward(*args, **kwargs)

        monkeypatch.setattr(backbone.model, "forward", noted)
        return seen

    return count


# Pooling ----------------------------------------------------------------------------------------------------


def test_masked_mean_by_hand():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]], [[1.0, 1.0], [2.0, 2.0], [6.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    torch.testing.assert_close(pool_tokens(tokens, mask, "mean"), torch.tensor([[2.0, 4.0], [3.0, 1.0]]))
    torch.testing.assert_close(pool_tokens(tokens, mask, "cls"), torch.tensor([[1.0, 2.0], [1.0, 1.0]]))


def test_bert_is_read_at_its_first_token_unless_the_folder_says_mean(tiny_text, tiny_mean, minilm):
    first, mean = load_text_backbone(tiny_text), load_text_backbone(tiny_mean)
    assert (first.pooling, mean.pooling, minilm.pooling) == ("cls", "mean", "mean")
    tokens, mask = first.tokens(TEXTS)
    assert mask.sum(1).tolist() == sorted(mask.sum(1).tolist()) and not bool(mask[0].all())
    torch.testing.assert_close(first.embed(TEXTS), tokens[:, 0], atol=1e-5, rtol=1e-5)
    by_hand = torch.stack([tokens[i, : int(mask[i].sum())].mean(0) for i in range(3)])
    torch.testing.assert_close(mean.embed(TEXTS), by_hand, atol=1e-5, rtol=1e-5)


def test_a_folder_may_say_cls(tiny_mean, tmp_path):
    shutil.copytree(tiny_mean, tmp_path / "cls")
    stated = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "cls" / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    assert load_text_backbone(str(tmp_path / "cls")).pooling == "cls"


@pytest.mark.parametrize("which", ["tiny_text", "tiny_mean", "minilm", *KINDS])
def test_a_vector_does_not_depend_on_the_batch(which, request, tiny_texts):
    """Two objects, so that the second cannot answer from memory."""
    name = tiny_texts.get(which) or ("minilm" if which == "minilm" else request.getfixturevalue(which))
    together = load_text_backbone(name).embed(TEXTS)
    single = load_text_backbone(name)
    for text, vector in zip(TEXTS, together, strict=True):
        alone = single.embed([text])[0]
        assert alone.shape == (single.dim,)
        torch.testing.assert_close(alone, vector, atol=1e-5, rtol=1e-4)
    assert float(F.cosine_similarity(together[0], together[2], dim=0)) < 0.99


# The paper's four -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_read_as_in_the_paper(kind, tiny_texts):
    """[CLS] of BERT and RoBERTa, the mean over the tokens of T5's encoder (ESR section III-B)."""
    backbone = load_text_backbone(tiny_texts[kind])
    assert backbone.pooling == ("cls" if "bert" in kind else "mean")
    assert type(backbone.model).__name__ == {"bert": "BertModel", "roberta": "RobertaModel"}.get(kind, "T5EncoderModel")
    for text in TEXTS:
        ids = torch.tensor([backbone.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = backbone.model(input_ids=ids).last_hidden_state[0]
        expected = hidden[0] if "bert" in kind else hidden.mean(0)
        torch.testing.assert_close(backbone.embed([text])[0], expected, atol=1e-5, rtol=1e-4)


def test_t5_is_the_encoder_of_the_whole_model(tiny_texts):
    backbone = load_text_backbone(tiny_texts["t5"])
    with weights.quiet_transformers():
        whole = T5ForConditionalGeneration.from_pretrained(tiny_texts["t5"]).eval()
    encoded = backbone.tokenizer(TEXTS[1], return_tensors="pt")
    with torch.no_grad():
        expected = whole.get_encoder()(input_ids=encoded["input_ids"]).last_hidden_state
    torch.testing.assert_close(backbone.tokens([TEXTS[1]])[0], expected, atol=1e-5, rtol=1e-4)
    assert not any("decoder" in name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_are_full_precision_whatever_autocast_says(kind, tiny_texts):
    """They are kept: they must not depend on where they were first asked for."""
    expected = load_text_backbone(tiny_texts[kind]).embed(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        found = load_text_backbone(tiny_texts[kind]).embed(TEXTS)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_stays_in_eval_mode_and_cuts_what_is_too_long(kind, tiny_texts):
    backbone = load_text_backbone(tiny_texts[kind]).train()
    first, _ = backbone.tokens(TEXTS)
    assert torch.equal(first, backbone.tokens(TEXTS)[0])
    assert backbone.max_tokens == 512
    found = backbone.embed(["calm. " * 2000, "calm. " * 3000])
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"), [("roberta", "roberta"), ("flan-t5", "flan-t5"), ("google-t5/t5-base", "t5")]
)
def test_they_load_by_name(name, kind, tiny_texts, tmp_path, monkeypatch):
    hub_id = weights.HUB[name][0] if name in weights.HUB else name
    shutil.copytree(tiny_texts[kind], tmp_path / hub_id)
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    assert torch.equal(load_text_backbone(name).embed(TEXTS), load_text_backbone(tiny_texts[kind]).embed(TEXTS))


# Frozen -----------------------------------------------------------------------------------------------------


def test_eval_mode_stays_whatever_the_owner_does(tiny_text):
    """The tiny model drops half of everything in train mode, so a vector would not repeat."""
    owner = nn.ModuleDict({"text": load_text_backbone(tiny_text), "other": nn.Dropout()})
    owner.train()
    backbone = owner["text"]
    assert owner["other"].training and not any(module.training for module in backbone.modules())
    first, _ = backbone.tokens(TEXTS)
    second, _ = backbone.tokens(TEXTS)
    assert torch.equal(first, second)
    backbone.model.train()  # what the owner would have done: then it does not repeat
    assert not torch.equal(first, backbone.tokens(TEXTS)[0])


def test_nothing_of_it_is_trained(tiny_text):
    backbone = load_text_backbone(tiny_text)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone.embed(TEXTS).requires_grad


def test_each_distinct_text_is_run_once(tiny_text, rows_run):
    backbone = load_text_backbone(tiny_text)
    seen = rows_run(backbone)
    first = backbone.embed([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert sum(seen) == 2
    again = backbone.embed([TEXTS[1], TEXTS[0], TEXTS[2], TEXTS[2]])
    assert sum(seen) == 3
    torch.testing.assert_close(first[[1, 0]], again[:2], atol=0, rtol=0)
    torch.testing.assert_close(again[2], again[3], atol=0, rtol=0)
    assert torch.equal(first[0], first[2])


def test_rows_are_in_the_order_asked_for_over_many_batches(tiny_text, rows_run):
    backbone, texts = load_text_backbone(tiny_text), [f"{'very ' * (i % 7)}calm {i}" for i in range(300)]
    seen = rows_run(backbone)
    together = backbone.embed(texts)
    assert len(seen) > 1 and sum(seen) == 300  # it did take several batches
    for i in (0, 6, 150, 299):
        alone, mask = backbone.tokens([texts[i]])
        torch.testing.assert_close(together[i], pool_tokens(alone, mask, "cls")[0], atol=1e-5, rtol=1e-4)


def test_texts_past_the_models_limit_are_cut(tiny_text):
    backbone = load_text_backbone(tiny_text)
    found = backbone.embed(["calm " * 2000, "calm " * 3000])
    assert bool(torch.isfinite(found).all())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_texts_past_the_models_limit_are_cut_where_the_tokenizer_states_none(tiny_text, tmp_path):
    shutil.copytree(tiny_text, tmp_path / "bert")
    file = tmp_path / "bert" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    found = load_text_backbone(str(tmp_path / "bert")).embed(["calm " * 2000])
    assert bool(torch.isfinite(found).all())


def test_minilm_knows_that_angry_is_nearer_to_furious_than_to_calm(minilm):
    """In a sentence: of the bare words, the model itself puts "angry" nearer to "calm" (0.55 > 0.45)."""
    words = ("angry", "furious", "calm")
    angry, furious, calm = F.normalize(minilm.embed([f"The speaker sounds {w}." for w in words]), dim=-1)
    assert minilm.dim == 384
    assert float(angry @ furious) > float(angry @ calm) + 0.05


def test_minilm_is_what_sentence_transformers_makes_of_it(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    with weights.quiet_transformers():
        theirs = sentence_transformers.SentenceTransformer(str(weights.find("minilm")), device="cpu")
    expected = theirs.encode(TEXTS, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    torch.testing.assert_close(F.normalize(minilm.embed(TEXTS), dim=-1), expected, atol=1e-5, rtol=0)


# Where weights are found ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["someone/no-such-model", "nosuch", "not a name!"])
def test_a_missing_model_says_what_to_put_where(name, monkeypatch):
    monkeypatch.delenv("ESR_MODELS", raising=False)
    with pytest.raises(weights.WeightsError) as caught:
        load_text_backbone(name)
    message = str(caught.value)
    assert repr(name) in message and f"$ESR_MODELS/{name}" in message
    assert "model.safetensors" in message and "tokenizer" in message and "minilm" in message


def test_a_hub_id_is_looked_for_in_esr_models(tiny_text, tmp_path, monkeypatch):
    shutil.copytree(tiny_text, tmp_path / "someone" / "small-bert")
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    found = load_text_backbone("someone/small-bert").embed(TEXTS)
    torch.testing.assert_close(found, load_text_backbone(tiny_text).embed(TEXTS))
    with pytest.raises(weights.WeightsError):
        load_text_backbone("someone/other-bert")


def test_esr_models_comes_before_the_package(tiny_text, tmp_path, monkeypatch):
    monkeypatch.setenv("ESR_MODELS", str(tmp_path))
    assert load_text_backbone("minilm").dim == 384  # nothing there yet: the package's
    shutil.copytree(tiny_text, tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2")
    assert load_text_backbone("minilm").dim == 16


def test_a_folder_comes_first(tiny_text, tmp_path, monkeypatch):
    shutil.copytree(tiny_text, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert weights.find("mine") == (tmp_path / "mine").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.find("~/mine") == (tmp_path / "mine").resolve()


@pytest.fixture
def damaged(tiny_text, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_text, tmp_path / "damaged"))


@pytest.mark.parametrize("content", ["", "{}", "no json"])
def test_a_damaged_config_is_refused(damaged, content):
    (damaged / "config.json").write_text(content)
    with pytest.raises(weights.WeightsError, match="config.json"):
        load_text_backbone(str(damaged))


def test_a_weights_file_that_is_cut_short_is_refused(damaged):
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(weights.WeightsError):
        load_text_backbone(str(damaged))


def test_a_weights_file_that_lacks_a_tensor_is_refused(damaged):
    state = load_file(damaged / "model.safetensors")
    del state["encoder.layer.0.output.dense.weight"]
    save_file(state, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(weights.WeightsError):
        load_text_backbone(str(damaged))


def test_a_folder_without_a_tokenizer_is_refused(damaged):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(weights.WeightsError):
        load_text_backbone(str(damaged))


def test_released_weights_leave_their_vectors_and_come_back_for_a_new_text(tiny_text):
    backbone, whole = load_text_backbone(tiny_text), load_text_backbone(tiny_text)
    kept = backbone.embed(TEXTS[:1])
    backbone.release()
    assert not list(backbone.parameters()) and backbone.sha256 == whole.sha256 == weights.fingerprint(whole)
    assert torch.equal(backbone.embed(TEXTS[:1]), kept) and backbone.model is None
    torch.testing.assert_close(backbone.embed(TEXTS), whole.embed(TEXTS))  # the others are new
    assert not backbone.model.training and not any(p.requires_grad for p in backbone.parameters())


def test_vectors_follow_where_the_released_backbone_is_sent(tiny_text):
    backbone = load_text_backbone(tiny_text)
    backbone.embed(TEXTS)
    backbone.release()
    assert backbone.to("meta").embed(TEXTS).device.type == "meta"


def test_batches_are_the_same_in_every_process(tiny_text, monkeypatch):
    """A set of strings has another order in each process; batched in it, vectors would round otherwise each time."""
    backbone, run = load_text_backbone(tiny_text), []
    tokens = backbone.tokens
    monkeypatch.setattr(backbone, "tokens", lambda texts: run.append(texts) or tokens(texts))
    texts = [f"voice {i:03d}" for i in range(300)] + [f"speech {i}" for i in range(10)]
    backbone.embed(texts[::-1])
    assert sum(run, []) == sorted(texts, key=lambda text: (len(text), text))


# Sequences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_are_the_last_hidden_states_without_padding(kind, tiny_texts):
    backbone = load_text_backbone(tiny_texts[kind])
    found = backbone.sequences(TEXTS)
    assert found.values.dtype == torch.float32 and not bool(found.values[~found.mask].any())
    for i, text in enumerate(TEXTS):
        hidden, mask = backbone.tokens([text])
        assert bool(mask.all()) and int(found.mask[i].sum()) == mask.shape[1]
        torch.testing.assert_close(found.values[i, found.mask[i]], hidden[0], atol=2e-3, rtol=2e-3)  # kept as fp16


def test_an_empty_text_has_its_special_tokens(tiny_text):
    assert load_text_backbone(tiny_text).sequences(["", TEXTS[1]]).mask.sum(1).tolist()[0] == 2  # [CLS], [SEP]


def test_each_distinct_sequence_is_run_once(tiny_text, rows_run):
    backbone = load_text_backbone(tiny_text)
    seen = rows_run(backbone)
    first = backbone.sequences([TEXTS[0], TEXTS[1], TEXTS[0]])
    assert sum(seen) == 2 and torch.equal(first.values[0], first.values[2])
    again = backbone.sequences([TEXTS[1], TEXTS[2]])
    assert sum(seen) == 3
    assert torch.equal(again.values[0, again.mask[0]], first.values[1, first.mask[1]])


@pytest.mark.parametrize("kind", ["vectors", "sequences"])
def test_what_is_kept_stays_below_its_limit(kind, tiny_text, rows_run, monkeypatch):
    """Captions by the hundred thousand come by once and would fill the memory: the oldest go."""
    backbone = load_text_backbone(tiny_text)
    seen, texts = rows_run(backbone), [f"voice {i}" for i in range(20)]
    ask, store = {
        "vectors": (backbone.embed, backbone._vectors),
        "sequences": (lambda t: backbone.sequences(t).values, backbone._sequences),
    }[kind]
    whole = ask(texts)
    size = store.n_bytes // 20
    assert len(store.tensors) == 20 and store.n_bytes == sum(one.nbytes for one in store.tensors.values())
    monkeypatch.setattr("esr_utils.text._KEPT_BYTES", 8 * size + size // 2)
    torch.testing.assert_close(ask([*texts, "a new one"])[:20, :2], whole[:, :2])  # all, though not all are kept
    assert len(store.tensors) <= 8 and store.n_bytes <= 8.5 * size
    before = sum(seen)
    ask(["a new one"])
    assert sum(seen) == before
    ask(texts[:1])
    assert sum(seen) == before + 1
