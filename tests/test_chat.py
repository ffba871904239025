"""Language models behind a server that may be slow, busy or broken, and on this machine; and the key, never written."""

from __future__ import annotations

import json
import logging
import socket
import time
import traceback
from datetime import UTC, datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
import torch
from chat_server import ChatServer, broken_off, completion, endless, raw, say, slow, status, trickle
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from esr_utils import chat, generation, weights
from esr_utils.chat import ChatError, Endpoint, LocalModel, retry_after_s

HELLO = [{"role": "user", "content": "One speaking style is called 'sad'."}]
KEY = "sk-test-7hIsIsNoRealKey0123456789"


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server
        server.shutdown()


def endpoint(server: ChatServer, **options) -> Endpoint:
    options = {"timeout_s": 5.0, "tries": 3, "first_wait_s": 0.001, "max_wait_s": 1.0} | options
    return Endpoint(server.url, "tiny", **options)


# --- a server that works ---


def test_request_and_reply(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.steps = [say("“fine”")]
    reply = endpoint(server).reply(HELLO)
    assert reply == chat.Reply("“fine”", "", "tiny-2024")
    assert server.asked == [{"model": "tiny", "messages": HELLO}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(("variable", "value"), [("", KEY), ("OPENAI_API_KEY", ""), ("UNSET_KEY", KEY)])
def test_without_a_key_none_is_sent(server, monkeypatch, variable, value):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    monkeypatch.delenv("UNSET_KEY", raising=False)
    endpoint(server, key_variable=variable).reply(HELLO)
    assert "Authorization" not in server.headers[0]


def test_what_stays_on_this_machine_goes_through_no_proxy(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    assert endpoint(server).reply(HELLO).text


def test_a_reply_without_text_or_cut_off_says_so(server):
    server.steps = [say(None, "content_filter"), say('{"phra', "length")]
    model = endpoint(server)
    assert model.reply(HELLO) == chat.Reply("", "content_filter", "tiny-2024")
    assert model.reply(HELLO) == chat.Reply('{"phra', "length", "tiny-2024")


def test_half_a_surrogate_pair_becomes_a_question_mark(server):
    server.steps = [say("sad \ud83d")]
    assert endpoint(server).reply(HELLO).text == "sad ?"


# --- a server that is busy, slow or broken ---


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (status(500, "out of memory"), "status 500: out of memory"),
        (status(503), "status 503"),
        (status(408), "status 408"),
        (status(429, "slow down"), "status 429: slow down"),
        (status(429, "slow down", Retry_After="0.01"), "status 429: slow down"),
        (status(429, "slow down", Retry_After="Wed, 21 Oct 2015 07:28:00 GMT"), "status 429: slow down"),
        (status(429, "slow down", Retry_After="soon"), "status 429: slow down"),
        (broken_off, r"connection broke off \(RemoteProtocolError\)"),
        (raw(b"<html>Bad gateway</html>"), "no whole chat completion: '<html>Bad gateway</html>'"),
        (raw(b'{"choices": []}'), "no whole chat completion"),
        (raw(b'{"choices": ["sad"]}'), "no whole chat completion"),
        (raw(b"[" * 100_000), "no whole chat completion"),
        (raw(completion("sad")[:-10]), "no whole chat completion"),
    ],
)
def test_what_may_pass_is_tried_again_and_named_when_it_does_not(server, step, reason):
    server.steps = [step, step]
    assert "tearful" in endpoint(server).reply(HELLO).text
    assert len(server.asked) == 3
    server.steps = [step] * 3
    with pytest.raises(ChatError, match=rf"127.0.0.1:\d+: .*{reason}.*, after 3 tries"):
        endpoint(server).reply(HELLO)
    assert len(server.asked) == 6


@pytest.mark.parametrize("step", [slow(3.0), trickle])
def test_a_slow_answer_is_given_up_in_time(server, step):
    server.steps = [step, step]
    begin = time.monotonic()
    with pytest.raises(ChatError, match="answer within 0.1 s, after 2 tries"):
        endpoint(server, timeout_s=0.1, tries=2).reply(HELLO)
    assert time.monotonic() - begin < 1.5
    assert "tearful" in endpoint(server, timeout_s=5).reply(HELLO).text


def test_an_endless_answer_is_not_kept_in_memory(server):
    server.steps = [endless]
    with pytest.raises(ChatError, match="sends more than 1048576 bytes"):
        endpoint(server).reply(HELLO)


def test_waits_double_and_have_some_chance_in_them(server):
    server.steps = [status(500)] * 4
    endpoint(server, tries=5, first_wait_s=0.05).reply(HELLO)
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    for wait, least in zip(waits, (0.05, 0.1, 0.2, 0.4), strict=True):  # plus up to 0.05 at random, plus the request
        assert least <= wait < least + 1
    server.steps = [status(500)] * 4
    begin = time.monotonic()
    endpoint(server, tries=5, first_wait_s=0.5, max_wait_s=0.06).reply(HELLO)
    assert time.monotonic() - begin < 3


def test_the_server_says_how_long_to_wait(server):
    # Its word counts, not first_wait_s: the one is longer than the other, then shorter.
    server.steps = [status(429, Retry_After="0.3")]
    endpoint(server).reply(HELLO)
    assert server.times[1] - server.times[0] >= 0.3
    server.steps = [status(503, Retry_After="0")]
    endpoint(server, first_wait_s=30.0, max_wait_s=60.0).reply(HELLO)
    assert server.times[3] - server.times[2] < 10
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)  # whole seconds: 0 to 1 s ahead
    server.steps = [status(429, Retry_After=soon)]
    endpoint(server, first_wait_s=30.0, max_wait_s=60.0).reply(HELLO)
    assert server.times[5] - server.times[4] < 10


@pytest.mark.parametrize("as_date", [False, True])
def test_too_long_a_wait_ends_it_at_once(server, as_date):
    then = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.steps = [status(429, "quota", Retry_After=then if as_date else "30")]
    with pytest.raises(ChatError, match=r"status 429\) and asks to wait (2\d|30) s: run it again then"):
        endpoint(server).reply(HELLO)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("120", 120.0),
        (" 0.5 ", 0.5),
        ("0", 0.0),
        ("-1", None),
        ("nan", None),
        ("1e9", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ],
)
def test_retry_after(header, seconds):
    found = retry_after_s(header)
    assert found == seconds


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000"])
def test_retry_after_as_a_date(zone):
    date = (datetime.now(UTC) + timedelta(seconds=100)).strftime(f"%a, %d %b %Y %H:%M:%S {zone}")
    assert retry_after_s(date) == pytest.approx(99, abs=1)
    elsewhere = (datetime.now(UTC) + timedelta(seconds=100)).astimezone(timezone(timedelta(hours=-7)))
    assert retry_after_s(elsewhere.strftime("%a, %d %b %Y %H:%M:%S %z")) == pytest.approx(99, abs=1)


# --- refusals ---


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (401, r"refuses \(status 401\): the key in \$OPENAI_API_KEY; set the variable"),
        (403, r"refuses \(status 403\): the key in \$OPENAI_API_KEY, for 'tiny'"),
        (404, r"refuses \(status 404\): model 'tiny', or the path: base_url mostly ends in /v1"),
        (400, r"refuses \(status 400\): what the server said"),
        (307, r"refuses \(status 307\): what the server said"),
    ],
)
def test_refusals_are_not_tried_again(server, code, message):
    server.steps = [status(code, "what the\n server  said", Location="http://127.0.0.1:9/v1")]
    with pytest.raises(ChatError, match=message):
        endpoint(server).reply(HELLO)
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_named(server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with pytest.raises(ChatError, match=f"127.0.0.1:{port} cannot be reached .*refused.*is the address right"):
        Endpoint(f"http://127.0.0.1:{port}/v1", "tiny", first_wait_s=30).reply(HELLO)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.example.org/v1",
        "ftp://example.org/v1",
        "http:///v1",
        f"https://user:{KEY}@example.org/v1",
        f"https://example.org/v1?key={KEY}",
        f"https://example.org/v1#{KEY}",
        "https://exa\x00mple.org/v1",
    ],
)
def test_an_address_that_cannot_be_used_is_refused_and_not_shown(url):
    with pytest.raises(ChatError, match="base_url must be http") as refusal:
        Endpoint(url, "tiny")
    assert KEY not in str(refusal.value)


def test_a_key_in_place_of_its_variables_name_is_refused_and_not_shown():
    with pytest.raises(ChatError, match="name of an environment variable, not a key") as refusal:
        Endpoint("https://example.org/v1", "tiny", key_variable=KEY)
    assert KEY not in str(refusal.value)


def test_a_key_is_never_sent_unencrypted_to_another_machine(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ChatError, match=r"\$OPENAI_API_KEY would go to gpu.invalid:8000 in the clear: use https"):
        Endpoint("http://gpu.invalid:8000/v1", "tiny").reply(HELLO)
    with pytest.raises(ChatError, match="cannot be reached"):  # without a key it may be tried
        Endpoint("http://gpu.invalid:8000/v1", "tiny", key_variable="").reply(HELLO)


# --- the key ---


def _shown(error: BaseException) -> str:
    """The error with all that led to it, also what `from None` hides."""
    text, seen = "", error
    while seen is not None:
        text += "".join(traceback.format_exception(seen, chain=False)) + repr(seen)
        seen = seen.__cause__ or seen.__context__
    return text


@pytest.mark.parametrize(
    "step",
    [
        status(401, f"wrong key: {KEY}"),
        status(400, f"wrong key: {KEY}"),
        status(500, f"wrong key: {KEY}"),
        status(429, KEY, Retry_After="9999"),
        raw(f"who sent {KEY}?".encode()),
        broken_off,
        slow(0.4),
    ],
)
def test_no_error_and_no_log_shows_the_key(server, monkeypatch, caplog, capfd, step):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server.steps = [step] * 2
    with caplog.at_level(logging.DEBUG), pytest.raises(ChatError) as refusal:
        endpoint(server, tries=2, timeout_s=0.2).reply(HELLO)
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert caplog.text  # the HTTP library does log
    for text in (_shown(refusal.value), caplog.text, *capfd.readouterr()):
        assert KEY not in text and "7hIsIsNoReal" not in text


@pytest.mark.parametrize("key", [f"{KEY}\nX-Other: 1", f"{KEY}é", f"{KEY}\x00"[:-1] + "\x01"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ChatError, match=r"\$OPENAI_API_KEY holds what no key has") as refusal:
        endpoint(server).reply(HELLO)
    assert KEY not in _shown(refusal.value) and not server.asked


def test_a_key_that_the_server_sends_back_is_taken_out(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.steps = [say(f"your key is {KEY}", KEY), say("EMPTY words")]
    assert endpoint(server).reply(HELLO) == chat.Reply("your key is [key]", "[key]", "tiny-2024")
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")  # a dummy, as local servers are given: an ordinary word
    assert endpoint(server).reply(HELLO).text == "EMPTY words"


# --- a model on this machine ---

ANGRY = json.dumps({"phrases": ["furious", "enraged", "harsh and hostile", "snarling", "outraged"]})


def _language_model(folder, answer: str = "", positions: int = 4096) -> str:
    """A folder with a GPT-2 of one layer over bytes: random, or trained for a second to answer one thing."""
    pieces = [" " * (i > 0) + word for i, word in enumerate(answer.split())]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in ["assistant:", *pieces]])
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    if answer:
        model.transformer.wpe.weight.requires_grad_(False).zero_()  # a question may be of any length
        ids = tokenizer.convert_tokens_to_ids(["assistant:", *pieces, "<eos>"])
        ids = torch.tensor([ids] * 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(80):
            logits = model(torch.cat([torch.randint(256, (4, 100)), ids], 1)).logits[:, 100:-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        assert loss < 0.1
    with weights.quiet_transformers():
        model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    return _language_model(tmp_path_factory.mktemp("lm"), ANGRY)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    return _language_model(tmp_path_factory.mktemp("lm"))


def test_a_local_model_answers_the_same_each_time_and_quietly(trained, capfd):
    model = LocalModel(trained)
    question = [{"role": "user", "content": generation.phrase_question("angry", ["calm", "sad"])}]
    assert model.reply(question) == model.reply(question) == chat.Reply(ANGRY, "", trained)
    assert model.where == "this machine" and model.model == trained
    assert capfd.readouterr() == ("", "")


def test_a_local_model_that_reaches_its_limit_is_cut_off(trained, untrained):
    assert LocalModel(trained, max_new_tokens=4).reply(HELLO).cut == "length"
    reply = LocalModel(untrained, max_new_tokens=8).reply(HELLO)
    assert reply.cut == "length" and reply.text


def test_the_chat_template_of_a_local_model_is_used(trained):
    model = LocalModel(trained)
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    model._tokenizer.chat_template = turns + "assistant:{{ enable_thinking }}assistant:"
    tokens = model._tokens([*HELLO, {"role": "assistant", "content": "no"}])["input_ids"][0]
    expected = f"<user>{HELLO[0]['content']}<assistant>noassistant:Falseassistant:"
    assert model._tokenizer.decode(tokens) == expected
    assert model.reply(HELLO).text == ANGRY


def test_a_question_that_does_not_fit_a_local_model_is_refused(tmp_path):
    model = LocalModel(_language_model(tmp_path, positions=64))
    with pytest.raises(ChatError, match="no room for a question of 6. tokens"):
        model.reply([{"role": "user", "content": "x" * 60}])
    assert model.reply([{"role": "user", "content": "x" * 51}]).cut == "length"  # 4 positions are left


def test_a_local_model_that_is_missing_or_none_is_refused(tmp_path, tiny_text):
    with pytest.raises(ChatError, match="model is empty"):
        LocalModel("")
    with pytest.raises(weights.WeightsError, match="no weights for 'nobody/no-model'"):
        LocalModel("nobody/no-model")
    with pytest.raises(weights.WeightsError, match="holds no weights"):
        LocalModel(str(tmp_path))
    with pytest.raises(weights.WeightsError, match="lacks weights"):  # an encoder has no head for words
        LocalModel(tiny_text)
