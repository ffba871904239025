"""The prompt bank written by a language model: what is asked, refused and kept, and what is never written."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
from dataclasses import replace

import nbformat
import pandas as pd
import pytest
from chat_server import BANK, ChatServer, broken_off, completion, good_answer, raw, say, slow, status
from papermill import execute_notebook
from test_chat import KEY, endpoint, trained, untrained  # noqa: F401 (fixtures)

from esr_utils import generation, runs
from esr_utils.chat import ChatError, LocalModel
from esr_utils.generation import GenerationError, check_phrases, check_templates, generate
from esr_utils.prompts import FIXED_TEMPLATE, PROMPTS_PATH, PromptBank
from esr_utils.styles import STYLES

FIXED = [(style, "seen", BANK.labels[style]) for style in STYLES]
FIXED += [(style, "held_out", phrase) for style in STYLES for phrase in BANK.held_out_phrases[style]]


@pytest.fixture
def server():
    with ChatServer() as server:
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def _done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    with ChatServer() as server:
        generate(endpoint(server), folder)
        server.shutdown()
    return folder


@pytest.fixture
def done(_done, tmp_path):
    """A copy of a folder with a whole bank and its answers."""
    return shutil.copytree(_done, tmp_path / "done")


@pytest.fixture(autouse=True)
def shipped_bank_is_left_alone():
    before = PROMPTS_PATH.read_bytes(), PROMPTS_PATH.stat().st_mtime_ns
    yield
    assert (PROMPTS_PATH.read_bytes(), PROMPTS_PATH.stat().st_mtime_ns) == before


def phrases(*words: str) -> str:
    return json.dumps({"phrases": words})


def angry(**changed: str) -> str:
    """The good answer for angry, with some phrases (first=…, last=…) changed."""
    words = list(BANK.phrases["angry"])
    words[0], words[-1] = changed.get("first", words[0]), changed.get("last", words[-1])
    return phrases(*words)


def answers(folder) -> dict[str, dict]:
    return {path.name.split("-")[0]: runs.read_json(path) for path in (folder / "answers").iterdir()}


# --- a whole bank ---


def test_the_bank_is_what_the_model_wrote_with_our_labels_and_held_out_set(server, tmp_path):
    bank = generate(endpoint(server), tmp_path)
    assert bank.sha256 == BANK.sha256  # the server answers with our own phrases and templates
    assert len(server.asked) == 23
    loaded = PromptBank.load(tmp_path / "prompts.json")
    assert loaded == bank and loaded.about == bank.about and bank.clashes().empty
    today = answers(tmp_path)["sad"]["date"][:10]
    assert "tiny" in bank.about[0] and f"127.0.0.1:{server.server_port}" in bank.about[0] and today in bank.about[0]
    assert BANK.sha256 in bank.about[1]


def test_each_answer_is_kept_with_model_date_prompt_and_reply(server, tmp_path):
    server.steps = [say("no"), say(phrases("one"))]
    generate(endpoint(server), tmp_path)
    kept = answers(tmp_path)
    assert set(kept) == {*STYLES, "templates"}
    sad, first = kept["sad"], kept["angry"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", sad["date"])
    assert (sad["model"], sad["answered_by"]) == ("tiny", "tiny-2024")
    assert sad["endpoint"] == f"127.0.0.1:{server.server_port}"
    assert sad["reply"] == phrases(*BANK.phrases["sad"])
    assert [sad["messages"]] == [
        body["messages"] for body in server.asked if "called 'sad'" in body["messages"][0]["content"]
    ]
    # all that was said before the answer that was accepted
    assert [message["role"] for message in first["messages"]] == ["user", "assistant", "user", "assistant", "user"]
    assert first["messages"] == server.asked[2]["messages"]


def test_a_question_names_the_label_and_all_words_that_are_taken(server, tmp_path):
    generate(endpoint(server), tmp_path)
    bored = server.questions[STYLES.index("bored")]
    assert "called 'bored'" in bored and "Write 5" in bored
    for taken in ("mind-numbed", "wrathful and irate", "whispered", "furious", "mesmerised"):
        assert taken in bored  # held out, a label, and accepted before
    assert "serene" not in bored and "hushed" not in bored  # of styles that come after it
    assert "Write 10 more" in server.questions[-1] and FIXED_TEMPLATE in server.questions[-1]
    assert not any(template in server.questions[-1] for template in BANK.held_out_templates)


def test_the_questions_ask_for_exactly_what_is_checked():
    for question, name, count in (
        (generation.phrase_question("sad", ["calm"]), "phrases", 5),
        (generation.template_question(), "templates", 10),
    ):
        form = question.rsplit("comment: ", 1)[1]
        assert json.loads(form) == {name: ["..."] * count}


# --- what is refused, and asked again ---


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Sure! Here you are: furious, enraged", "it is not JSON: Expecting value"),
        ("", "it is not JSON"),
        (f"```json\n{angry()}\n```", "it is not JSON"),
        (angry()[:-12], "it is not JSON"),
        ("[" * 100_000, "it is not JSON: maximum recursion depth"),
        ('["furious"]', "the answer: .* must be an object with the keys phrases"),
        ('{"words": []}', "the answer: 'phrases' is missing, 'words' is unknown"),
        ('{"phrases": [], "note": "five of them"}', "'note' is unknown"),
        ('{"phrases": [], "phrases": ["furious"]}', "'phrases' is given twice"),
        ('{"phrases": "furious"}', "phrases: 'furious' must be a list of strings"),
        ('{"phrases": ["furious", 1, "a", "b", "c"]}', "must be a list of strings"),
        (phrases(*BANK.phrases["angry"][:4]), "'phrases' holds 4 and must hold 5"),
        (phrases(*BANK.phrases["angry"], "livid"), "'phrases' holds 6 and must hold 5"),
        (angry(first="Furious"), "'Furious' is not 1 to 6 lower-case words"),
        (angry(first=" furious"), "' furious' is not 1 to 6 lower-case words"),
        (angry(first=""), "'' is not 1 to 6 lower-case words"),
        (angry(first="{style}"), "is not 1 to 6 lower-case words"),
        (angry(first="hot\nheaded"), "is not 1 to 6 lower-case words"),
        (angry(first="seven words are too many for this"), "is not 1 to 6 lower-case words"),
        (angry(first="\ud83d"), "is not 1 to 6 lower-case words"),
        # given twice, to two styles, or held out
        (angry(first="out-raged", last="out raged"), "style 'angry': phrase 'out raged' is given twice"),
        (angry(first="angry"), "style 'angry': phrase 'angry' is given twice"),
        (angry(first="fearful"), "phrase 'fearful' is given to both 'fearful' and 'angry'"),
        (angry(first="mad"), "phrase 'mad' is also a training phrase"),
        (angry(first="weeping"), "phrase 'weeping' is given to both 'sad' and 'angry'"),
        # the same word in another form
        (angry(first="madly loud"), "'madly loud' shares the word 'mad' with 'mad', which is taken by 'angry'"),
        (angry(last="frustratedly cross"), "'frustratedly cross' shares the word .* with 'frustrated'"),
        (angry(first="sobbing and wept", last="strongly worded"), "'strongly worded' .* by 'projected'"),
    ],
)
def test_a_bad_answer_is_refused(reply, reason):
    with pytest.raises(ValueError, match=reason):
        check_phrases(reply, "angry", FIXED)


def test_a_refused_answer_goes_back_with_the_reason(server, tmp_path):
    bad = [None, "no " * 5000, '["furious"]', angry(first="weeping")]
    server.steps = [say(reply) for reply in bad]
    bank = generate(endpoint(server), tmp_path)
    assert bank.phrases["angry"] == BANK.phrases["angry"] and len(server.asked) == 23 + 4
    question, *rest = server.asked[4]["messages"]
    assert question == server.asked[0]["messages"][0]
    assert [message["role"] for message in rest] == ["assistant", "user"] * 4
    said, told = ([message["content"] for message in rest[i::2]] for i in (0, 1))
    assert said == ["(nothing)", ("no " * 5000)[:2000], *bad[2:]]
    reasons = ("not JSON", "not JSON", "must be an object", "given to both 'sad' and 'angry'")
    for text, reason in zip(told, reasons, strict=True):
        assert text.startswith("That cannot be used: ") and reason in text


def test_a_phrase_of_a_style_accepted_before_is_refused(server, tmp_path):
    words = list(BANK.phrases["frustrated"])
    steps = [say(good_answer(f"style is called '{BANK.labels[style]}'")) for style in STYLES]
    i = STYLES.index("frustrated")
    server.steps = [*steps[:i], say(phrases("furious", *words[1:])), say(phrases("enragedly slow", *words[1:]))]
    bank = generate(endpoint(server), tmp_path)
    assert bank.phrases["frustrated"] == BANK.phrases["frustrated"] and len(server.asked) == 25
    told = [message["content"] for message in server.asked[i + 2]["messages"]]
    assert "phrase 'furious' is given to both 'angry' and 'frustrated'" in told[2]
    assert "'enragedly slow' shares the word 'enrag' with 'enraged', which is taken by 'angry'" in told[4]


def test_an_answer_that_was_cut_off_goes_back_though_it_reads_well(server, tmp_path):
    server.steps = [say(angry(first="livid"), "length")]
    assert "livid" not in generate(endpoint(server), tmp_path).phrases["angry"]
    assert "was cut off before its end (length)" in server.asked[1]["messages"][2]["content"]


def test_tries_are_limited_and_the_last_reason_is_given(server, tmp_path):
    server.steps = [say("no"), say("no"), say(angry(first="mad"))]
    with pytest.raises(GenerationError, match="angry: tiny gave no usable answer in 3 tries.*held-out phrase 'mad'"):
        generate(endpoint(server), tmp_path, tries=3)
    assert len(server.asked) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("The speaker's mood.", r"must hold the placeholder \{style\} once"),
        ("{style} is what is {style}.", r"must hold the placeholder \{style\} once"),
        ("A {style} voice.", "writes the article out"),
        ("{a} rather {style} voice.", r"must have \{a\} or \{A\} right before"),
        ("Speech by {speaker} that is {style}.", r"unknown placeholder \{speaker\}"),
        ("Speech by {style.__class__}.", r"must hold the placeholder \{style\} once"),
        ("{style:>99999999} words.", "has a placeholder with a format in it"),
        ("{style!r} words.", "has a placeholder with a format in it"),
        ("Speech that is {style", "is malformed"),
        ("speech that is {style}", "a training template is given twice"),
        ("a tone that is {style}.", "is not one plain sentence"),
        ("{style} tones.", "is not one plain sentence"),
        ("{A} {style} tone", "is not one plain sentence"),
        ('{A} {style} tone: "stop".', "is not one plain sentence"),
        ("{A} {style} tone.\nIgnore the rest.", "is not one plain sentence"),
        (f"{{A}} {{style}} tone{', or so it seems' * 20}.", "is not one plain sentence"),
        ("{{A}} {style} tone.", "must have {a} or {A} right before"),
        ("The {{tone}} is {style}.", "is not one plain sentence"),
        # a style named, held-out templates
        ("An angry, {style} tone.", "names a style: angr"),
        ("{A} {style} tone, near-silent.", "names a style: .*sil"),
        ("A mad and {style} tone.", "names a style: mad"),
        (BANK.held_out_templates[0], "is also a training template"),
        ("find a clip that comes across as {style}", "is also a training template"),
        ("Find a clip that really comes across as {style}.", "is too like one kept for testing"),
        ("{A} {style} sort of a sound.", "is too like one kept for testing: sort, sound"),
    ],
)
def test_a_bad_template_is_refused(template, reason):
    reply = json.dumps({"templates": [template, *BANK.templates[2:]]})
    with pytest.raises(ValueError, match=reason):
        check_templates(reply, BANK)


def test_good_answers_are_accepted():
    assert check_templates(json.dumps({"templates": BANK.templates[1:]}), BANK) == BANK.templates
    entries = list(FIXED)
    for style in STYLES:
        assert check_phrases(phrases(*BANK.phrases[style]), style, entries) == BANK.phrases[style]
        entries += [(style, "seen", phrase) for phrase in BANK.phrases[style]]


def test_every_held_out_phrase_and_template_is_refused_wherever_it_is_put():
    for owner in STYLES:
        for held_out in BANK.held_out_phrases[owner]:
            for style, phrase in (("angry", held_out), (owner, held_out.replace("-", " ")), (owner, f"{held_out} now")):
                with pytest.raises(ValueError, match="also a training phrase|is given to both|shares the word"):
                    check_phrases(phrases(phrase, *BANK.phrases[style][1:]), style, FIXED)
            named = [f"{held_out.capitalize()}, {{style}}.", *BANK.templates[2:]]
            with pytest.raises(ValueError, match="names a style"):
                check_templates(json.dumps({"templates": named}), BANK)
    for template in BANK.held_out_templates:
        for changed in (template, template.replace("{A}", "Rather {a}").replace("{style}", "{style} now")):
            with pytest.raises(ValueError, match="held-out template|too like"):
                check_templates(json.dumps({"templates": [changed, *BANK.templates[2:]]}), BANK)


def test_every_problem_of_an_answer_is_named_at_once():
    with pytest.raises(ValueError) as refusal:
        check_phrases(phrases("madly so", "weepy", "furious", "enraged", "sadly"), "angry", FIXED)
    for name in ("'madly so'", "'weepy'", "'sadly'"):
        assert name in str(refusal.value)
    assert "'furious'" not in str(refusal.value)


# --- what is kept ---


def test_a_run_that_is_done_asks_nothing_and_changes_nothing(server, done):
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.rglob("*.json")}
    assert generate(endpoint(server), done).sha256 == BANK.sha256
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in done.rglob("*.json")} == files
    assert len(files) == 24 and not server.asked


def test_a_run_stopped_by_an_error_asks_only_for_what_is_missing(server, tmp_path):
    good = [lambda handler, answer: handler.answer(completion(answer))] * 7
    server.steps = [*good, status(401)]
    with pytest.raises(ChatError, match="status 401"):
        generate(endpoint(server), tmp_path)
    assert set(answers(tmp_path)) == set(STYLES[:7]) and not (tmp_path / "prompts.json").exists()
    server.asked.clear()
    generate(endpoint(server), tmp_path)
    assert [style for style in STYLES if f"called '{BANK.labels[style]}'" in " ".join(server.questions)] == list(
        STYLES[7:]
    )
    assert len(server.asked) == 23 - 7


@pytest.fixture
def ctrl_c():
    """Ctrl-C as Python has it; tests that run behind a shell's & are started with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_loses_nothing_that_was_accepted(server, tmp_path, ctrl_c):
    def interrupt(handler, answer):
        os.kill(os.getpid(), signal.SIGINT)
        slow(0.3)(handler, answer)

    good = [lambda handler, answer: handler.answer(completion(answer))] * 3
    server.steps = [*good, interrupt]
    with pytest.raises(KeyboardInterrupt):
        generate(endpoint(server), tmp_path)
    assert set(answers(tmp_path)) == set(STYLES[:3])
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]  # half-written files
    server.asked.clear()
    assert generate(endpoint(server), tmp_path).sha256 == BANK.sha256
    assert len(server.asked) == 20


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "[]",
        '{"reply": 3, "date": "2026-01-01"}',
        json.dumps({"reply": angry(), "model": "tiny"}),  # no date
        json.dumps({"reply": angry(first="mad"), "date": "2026-01-01"}),  # held out
    ],
)
def test_a_kept_answer_is_checked_like_a_new_one(server, done, damage):
    (done / "prompts.json").unlink()
    (kept,) = (done / "answers").glob("angry-*.json")
    kept.write_text(damage)
    assert generate(endpoint(server), done).sha256 == BANK.sha256
    assert len(server.asked) == 1 and runs.read_json(kept)["reply"] == angry()


def test_another_model_is_asked_itself_and_does_not_touch_the_bank_that_is_there(server, done):
    before = (done / "prompts.json").read_bytes()
    other = endpoint(server)
    other.model = "other"
    with pytest.raises(FileExistsError, match="holds a bank that came from other answers"):
        generate(other, done)
    assert not server.asked  # nothing is spent on a bank that could not be saved
    (done / "prompts.json").unlink()
    generate(other, done)
    assert len(server.asked) == 23 and len(list((done / "answers").iterdir())) == 46
    assert (done / "prompts.json").read_bytes() != before


def test_a_bank_with_other_words_is_never_overwritten(server, done):
    (done / "prompts.json").unlink()
    replace(BANK, phrases={**BANK.phrases, "angry": ("livid",)}).save(done / "prompts.json")
    before = (done / "prompts.json").read_bytes()
    with pytest.raises(FileExistsError, match="holds another bank, and runs may refer to it"):
        generate(endpoint(server), done)
    assert (done / "prompts.json").read_bytes() == before and not server.asked


def test_no_file_holds_the_key(server, tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.steps = [
        status(500, KEY), status(429, KEY, Retry_After="0"), raw(KEY.encode()), broken_off,
        say(KEY), say(angry(first=KEY)), say(angry(), KEY),
        raw(completion(angry()).replace(b"tiny-2024", KEY.encode())),
    ]  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        generate(endpoint(server, tries=6), tmp_path)
    assert not server.steps and all(header["Authorization"] == f"Bearer {KEY}" for header in server.headers)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 24 and "[key]" in json.dumps(answers(tmp_path)["angry"])
    out, err = capfd.readouterr()
    for text in [caplog.text, out, err, *(path.read_text() for path in files), *map(str, files)]:
        assert KEY not in text and "7hIsIsNoReal" not in text
    assert not out and caplog.text


# --- a model on this machine ---


def test_a_random_local_model_is_given_up_with_the_last_reason(untrained, tmp_path):  # noqa: F811
    model = LocalModel(untrained, max_new_tokens=8)
    with pytest.raises(GenerationError, match=r"angry: .* gave no usable answer in 2 tries.*cut off.*\(length\)"):
        generate(model, tmp_path, tries=2)
    assert not list(tmp_path.iterdir())


def test_a_local_model_gets_as_far_as_its_answers_are_good(trained, tmp_path):  # noqa: F811
    """It was trained to answer for angry, and gives the same answer for awe."""
    with pytest.raises(GenerationError, match="awe: .*in 2 tries.*phrase 'furious' is given to both 'angry' and 'awe'"):
        generate(LocalModel(trained), tmp_path, tries=2)
    kept = answers(tmp_path)
    assert set(kept) == {"angry"} and kept["angry"]["endpoint"] == "this machine"
    assert json.loads(kept["angry"]["reply"])["phrases"] == list(BANK.phrases["angry"])


# --- the notebook ---


def test_the_notebook_shows_the_generated_bank_and_holds_no_key(server, tmp_path, monkeypatch):
    """Its first cells, as far as the clashes: the rest shows whatever bank there is."""
    monkeypatch.setenv("MY_KEY", KEY)
    server.steps = [say(angry(first="livid")), status(429, KEY, Retry_After="0")]
    notebook = nbformat.read(runs.PROJECT / "notebooks" / "02_prompt_generation.ipynb", as_version=4)
    ends = next(i for i, cell in enumerate(notebook.cells) if "bank.clashes()" in cell.source)
    notebook.cells = notebook.cells[: ends + 1]
    nbformat.write(notebook, tmp_path / "short.ipynb")
    parameters = {"generate": True, "endpoint": server.url, "model": "tiny", "key_variable": "MY_KEY"}
    parameters["run"] = str(tmp_path / "run")
    done = execute_notebook(tmp_path / "short.ipynb", tmp_path / "done.ipynb", parameters, progress_bar=False)
    shown = json.dumps([cell.get("outputs", []) for cell in done.cells])
    assert "Phrases and training templates by tiny" in shown and "'0 clashes'" in shown
    differences = pd.read_csv(tmp_path / "run" / "differences.csv", keep_default_na=False).set_index("of")
    assert differences.loc["angry", ["here", "there"]].to_list() == ["livid", "furious"]
    assert PromptBank.load(tmp_path / "run" / "prompts.json").phrases["angry"][0] == "livid"
    assert all(header["Authorization"] == f"Bearer {KEY}" for header in server.headers)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
