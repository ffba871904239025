"""The prompt bank written anew by a language model (ESR, section IV-A.2, where GPT-4o wrote templates and phrases).

Asked for are 5 phrases for each of the 22 labels, and the templates. Labels and everything held out stay those of
`data_manifests/prompts.json`, and nothing that resembles the held-out part is accepted. An answer is strict JSON; one
that breaks a rule goes back to the model with the reason. Accepted answers are kept in the run folder, so a run that
was stopped asks only for what is missing:

    runs/<name>/answers/<subject>-<hash>.json    model, endpoint, date, messages, reply; found by model + question
               /prompts.json                     the bank, laid out as data_manifests/prompts.json
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from esr_utils import prompts, runs
from esr_utils.chat import Endpoint, LocalModel
from esr_utils.prompts import Entry, PromptBank
from esr_utils.styles import STYLES
from esr_utils.wording import render, stems

PHRASES, TEMPLATES = 5, 11  # the paper's counts; one template is prompts.FIXED_TEMPLATE
_PHRASE = re.compile(r"[^\W\d_]+([ '-][^\W\d_]+){0,5}")
_SENTENCE = re.compile(r"[A-Z][\w' ,-]{,100}\.")
_PLACEHOLDER = re.compile(r"\{\w+\}")


class GenerationError(RuntimeError):
    """A language model that gives no usable answer; the message has the last reason."""


def generate(model: Endpoint | LocalModel, folder: str | Path, tries: int = 5) -> PromptBank:
    """A bank whose phrases and training templates are the model's, saved as `<folder>/prompts.json`.

    Args:
        folder: where answers are kept; the same folder and model ask only for what is missing.
        tries: answers to one question; each after the first is told what was wrong with those before.

    Raises:
        GenerationError: no usable answer to a question. What was accepted is kept.
        ChatError: the model cannot be asked (see `chat`). What was accepted is kept.
        FileExistsError: the folder holds a bank that came from other answers.
    """
    ours, folder = PromptBank.load(), Path(folder)
    entries: list[Entry] = [(style, "seen", ours.labels[style]) for style in STYLES]
    entries += [(style, "held_out", phrase) for style in STYLES for phrase in ours.held_out_phrases[style]]
    phrases, dates = {}, set()
    with tqdm(total=len(STYLES) + 1, desc="prompts", unit="answer") as progress:
        for style in STYLES:
            question = phrase_question(ours.labels[style], [phrase for *_, phrase in entries])
            check = partial(check_phrases, style=style, entries=list(entries))
            phrases[style], date = _ask(model, style, question, check, folder, tries)
            entries += [(style, "seen", phrase) for phrase in phrases[style]]
            dates.add(date[:10])
            progress.update()
        check = partial(check_templates, ours=ours)
        templates, date = _ask(model, "templates", template_question(), check, folder, tries)
        progress.update()
    days = ", ".join(sorted(dates | {date[:10]}))
    about = (
        f"Phrases and training templates by {model.model} ({model.where}) on {days}: the answers are in answers/.",
        f"Labels and all that is held out: data_manifests/prompts.json, version {ours.version}, sha256 {ours.sha256}.",
        "The questions named the held-out phrases among those to keep clear of. esr_utils.generation wrote this file.",
    )
    bank = PromptBank(1, ours.labels, phrases, ours.held_out_phrases, templates, ours.held_out_templates, about)
    bank.save(folder / "prompts.json")
    return bank


def _ask(model, subject: str, question: str, check: Callable, folder: Path, tries: int) -> tuple[tuple[str, ...], str]:
    """What `check` makes of an answer, and the answer's date: an earlier one of this folder, or a new one."""
    key = runs.text_sha256(json.dumps([model.model, question]))[:16]
    file = folder / "answers" / f"{subject}-{key}.json"
    try:
        kept = runs.read_json(file)
        return check(kept["reply"]), kept["date"]
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        pass  # not there, damaged, or from before a rule changed
    if (folder / "prompts.json").exists():  # before anything is spent on a bank that could not be saved
        raise FileExistsError(f"{folder} holds a bank that came from other answers: choose another")
    messages, reason = [{"role": "user", "content": question}], ""
    for _ in range(tries):
        reply = model.reply(messages)
        try:
            if reply.cut:
                raise ValueError(f"it was cut off before its end ({reply.cut}); answer with the JSON object alone")
            value = check(reply.text)
        except ValueError as error:
            reason = str(error)
            messages += [
                {"role": "assistant", "content": reply.text[:2000] or "(nothing)"},
                {"role": "user", "content": f"That cannot be used: {reason}. Answer again with one whole JSON object."},
            ]
            continue
        kept = {
            "model": model.model, "answered_by": reply.answered_by, "endpoint": model.where,
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "messages": messages, "reply": reply.text,
        }  # fmt: skip
        runs.write_json(file, kept)
        return value, kept["date"]
    raise GenerationError(f"{subject}: {model.model} gave no usable answer in {tries} tries. Last reason: {reason}")


def phrase_question(label: str, taken: list[str]) -> str:
    """What is asked for one style; `taken` are labels and phrases whose words the answer must not have."""
    return (
        f"I describe how speech sounds. One speaking style is called {label!r}. Write {PHRASES} other English words "
        "or short phrases for this style, each with the same meaning and worded differently: adjectives in lower case, "
        "of 1 to 6 words, that fit both 'a ... voice' and 'the speech is ...'. None may have a word, or another form "
        f"of a word, that is in this list: {'; '.join(taken)}.\n\n{_form('phrases', PHRASES)}"
    )


def template_question() -> str:
    """What is asked for the templates."""
    return (
        f"I describe how speech sounds, with sentences that have a gap for the speaking style. One is "
        f"{prompts.FIXED_TEMPLATE!r}. Write {TEMPLATES - 1} more in English, each worded differently, that name no "
        "style themselves. Each begins with a capital, ends with a full stop, has at most 15 words, and has {style} "
        "once, where an adjective fits. An article right before it is written {a}, or {A} at the start of the "
        f"sentence, as in '{{A}} {{style}} voice.'.\n\n{_form('templates', TEMPLATES - 1)}"
    )


def _form(name: str, count: int) -> str:
    """How to answer."""
    blank = json.dumps({name: ["..."] * count})
    return f"Answer with one JSON object of this form and nothing else, no code fence, no comment: {blank}"


def _read(text: str, name: str, count: int) -> tuple[str, ...]:
    """The strict JSON {name: [count strings]}."""
    try:
        data = json.loads(text, object_pairs_hook=prompts.unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from None
    prompts.expect_keys("the answer", data, {name})
    given = prompts.strings(name, data[name])
    if len(given) != count:
        raise ValueError(f"{name!r} holds {len(given)} and must hold {count}")
    return given


def check_phrases(text: str, style: str, entries: list[Entry]) -> tuple[str, ...]:
    """The phrases of an answer; `entries` are labels, held-out phrases, and phrases accepted for other styles.

    Raises:
        ValueError: with all that is wrong: not the JSON asked for, no phrase of 1 to 6 lower-case words, one given
            twice or taken, or a content word shared with another style or with what is held out.
    """
    given = _read(text, "phrases", PHRASES)
    problems = [f"{p!r} is not 1 to 6 lower-case words" for p in given if p != p.lower() or not _PHRASE.fullmatch(p)]
    together = entries + [(style, "seen", phrase) for phrase in given]
    problems = problems or prompts.phrase_problems(together)
    clashes = [] if problems else prompts.phrase_clashes(together).itertuples(index=False)
    for _, stem, *pair in clashes:
        (a_style, a), (b_style, b) = sorted((pair[:2], pair[2:]), key=lambda side: side[1] not in given)
        problems.append(f"{a!r} shares the word {stem!r} with {b!r}, which is taken by {b_style!r}")
    if problems:
        raise ValueError("; ".join(problems))
    return given


def check_templates(text: str, ours: PromptBank) -> tuple[str, ...]:
    """The fixed template and those of an answer.

    Raises:
        ValueError: with all that is wrong: not the JSON asked for, a rule of `prompts.template_problems` or of the
            sentence's form broken, a word of a style, or two content words of one held-out template.
    """
    templates = (prompts.FIXED_TEMPLATE, *_read(text, "templates", TEMPLATES - 1))
    problems = prompts.template_problems(templates, ours.held_out_templates)
    style_words = set().union(*(stems(w) for s in STYLES for w in (ours.labels[s], *ours.held_out_phrases[s])))
    for template in [] if problems else templates:
        if not _SENTENCE.fullmatch(render(template, "calm")):
            problems.append(f"{template!r} is not one plain sentence with a capital and a full stop")
        if named := stems(_PLACEHOLDER.sub(" ", template)) & style_words:
            problems.append(f"{template!r} names a style: {', '.join(sorted(named))}")
        for held_out in ours.held_out_templates:
            if len(shared := _content(template) & _content(held_out)) > 1:
                problems.append(f"{template!r} is too like one kept for testing: {', '.join(sorted(shared))}")
    if problems:
        raise ValueError("; ".join(problems))
    return templates


def _content(template: str) -> set[str]:
    """Stems of a template's words of four letters and more, placeholders aside."""
    return stems(" ".join(re.findall(r"[^\W\d_]{4,}", _PLACEHOLDER.sub(" ", template))))
