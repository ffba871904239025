"""The bank of prompts that describe the 22 styles, and the rules that it keeps.

Kang & Roy (ASRU 2025), section IV-A.2: 11 templates and, for each style, its label and 5 phrases to put in them. Our
words are our own, in `data_manifests/prompts.json`, and include a held-out set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from string import Formatter
from typing import Literal

import numpy as np
import pandas as pd

from esr_utils import runs
from esr_utils.styles import STYLES
from esr_utils.wording import render, stems

Prompts = Literal["seen", "held_out"]
Entry = tuple[str, Prompts, str]  # style, set, and a label or phrase of it

PROMPTS_PATH = Path(__file__).resolve().parents[1] / "data_manifests" / "prompts.json"

# The paper's prompt when prompts are not augmented (section V-C), with the label alone.
FIXED_TEMPLATE = "Speech that is {style}."


def _same(text: str) -> str:
    """The text by which two phrases or templates are one: without case, hyphens, spaces and full stops."""
    return " ".join(re.split(r"[\s\-.]+", text.casefold())).strip()


@dataclass(frozen=True)
class PromptBank:
    """Prompts for the 22 styles: a template with a style's label or a phrase of its own in it (ESR, IV-A.2).

    `seen` prompts are what training draws from: every training template with the label and the phrases.
    `held_out` prompts are the held-out templates with the held-out phrases only: neither is ever trained on.

    A bank that breaks a rule cannot be made. Raises:
        ValueError: names every problem, by style and phrase: a style that is missing, unknown or empty; a
            phrase given to two styles or twice; a held-out phrase or template equal to a training one; a
            template without its placeholder or with its article written out.
    """

    version: int
    labels: dict[str, str]
    phrases: dict[str, tuple[str, ...]]
    held_out_phrases: dict[str, tuple[str, ...]]
    templates: tuple[str, ...]
    held_out_templates: tuple[str, ...]
    about: tuple[str, ...] = field(default=(), compare=False)  # lines for the reader of the file; no rule, no prompt

    def __post_init__(self) -> None:
        problems = self._style_problems() or phrase_problems(self._entries())
        if problems := problems + template_problems(self.templates, self.held_out_templates):
            raise ValueError("prompt bank: " + "; ".join(problems))

    @classmethod
    def load(cls, path: str | Path = PROMPTS_PATH) -> PromptBank:
        """Reads and checks a bank laid out as `data_manifests/prompts.json`.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not JSON; a key missing, unknown or given twice; or a rule broken (see the class).
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
            expect_keys("the file", data, {"version", "about", "templates", "styles"})
            if not isinstance(data["version"], int) or data["version"] < 1:
                raise ValueError(f"version is {data['version']!r}; it must be a whole number from 1")
            expect_keys("templates", data["templates"], {"seen", "held_out"})
            expect_keys("styles", data["styles"], set(STYLES))
            for style, entry in data["styles"].items():
                expect_keys(f"style {style}", entry, {"label", "phrases", "held_out"})
            styles, templates = data["styles"], data["templates"]
            return cls(
                version=data["version"],
                labels={style: entry["label"] for style, entry in styles.items()},
                phrases={style: strings(style, entry["phrases"]) for style, entry in styles.items()},
                held_out_phrases={style: strings(style, entry["held_out"]) for style, entry in styles.items()},
                templates=strings("templates", templates["seen"]),
                held_out_templates=strings("templates", templates["held_out"]),
                about=strings("about", data["about"]),
            )
        except ValueError as error:  # a JSONDecodeError is one
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Writes the bank so that `load` reads it again; a file that already holds these words is left as it is.

        Raises:
            FileExistsError: the file holds another bank, or is the project's own: runs may refer to it.
            ValueError: the file is there and is no bank.
        """
        path = Path(path)
        if path.resolve() == PROMPTS_PATH.resolve():
            raise FileExistsError(f"{path} is the project's own bank, which is never written: choose another file")
        if path.exists():
            if PromptBank.load(path) != self:
                raise FileExistsError(
                    f"{path} holds another bank, and runs may refer to it: choose another folder, or delete that file"
                )
            return
        runs.write_json(path, {"version": self.version, "about": list(self.about), **self._words()})

    @property
    def sha256(self) -> str:
        """Hex sha256 of all templates, labels and phrases in their order: equal where all prompts are."""
        return runs.text_sha256(json.dumps(self._words(), ensure_ascii=False, separators=(",", ":")))

    def sample(self, style: str, rng: np.random.Generator, augment: bool = True) -> str:
        """One training prompt: a template and one of label and phrases, each drawn uniformly.

        With `augment=False` it is the paper's ablation (V-C), "Speech that is <label>.": nothing is drawn.

        Raises:
            ValueError: unknown style.
        """
        words = self._seen_words(style)
        if not augment:
            return render(FIXED_TEMPLATE, words[0])
        return render(self.templates[rng.integers(len(self.templates))], words[rng.integers(len(words))])

    def all_prompts(self, style: str, prompts: Prompts = "seen") -> list[str]:
        """Every combination once, template by template: 11 × 6 `seen` ones, or 5 × 3 `held_out` ones.

        Raises:
            ValueError: unknown style or set of prompts.
        """
        if prompts == "seen":
            templates, words = self.templates, self._seen_words(style)
        elif prompts == "held_out":
            self._check_style(style)
            templates, words = self.held_out_templates, self.held_out_phrases[style]
        else:
            raise ValueError(f"prompts is {prompts!r}; it must be 'seen' or 'held_out'")
        return [render(template, word) for template in templates for word in words]

    def table(self) -> pd.DataFrame:
        """One row per style: its label, phrases and held-out phrases."""
        return pd.DataFrame(
            {
                "style": STYLES,
                "label": [self.labels[style] for style in STYLES],
                "phrases": ["; ".join(self.phrases[style]) for style in STYLES],
                "held_out": ["; ".join(self.held_out_phrases[style]) for style in STYLES],
            }
        )

    def clashes(self) -> pd.DataFrame:
        """Pairs of phrases that share a content word where they had better not: empty for a good bank.

        Equal phrases are refused outright; this shows the looser case, by word stem ("softly spoken", "soft
        and sad" blur two styles), and leaves the verdict to the reader. One row per pair and stem: `kind` is
        "two styles", or "held out" where a held-out phrase shares a word with a training one of its style.
        """
        return phrase_clashes(self._entries())

    def differences(self, other: PromptBank) -> pd.DataFrame:
        """What training prompts this bank and another one share: a row per style, and one for the templates.

        Columns: of (style or "templates"), both, here (in this bank only), there (in the other one only).
        """
        pairs = [(style, self.phrases[style], other.phrases[style]) for style in STYLES]
        rows = [
            (
                of,
                [w for w in ours if w in theirs],
                [w for w in ours if w not in theirs],
                [w for w in theirs if w not in ours],
            )
            for of, ours, theirs in [*pairs, ("templates", self.templates, other.templates)]
        ]
        return pd.DataFrame(
            [(of, *map("; ".join, parts)) for of, *parts in rows], columns=["of", "both", "here", "there"]
        )

    def _words(self) -> dict[str, dict]:
        """All that decides the prompts, in the file's layout."""
        return {
            "templates": {"seen": list(self.templates), "held_out": list(self.held_out_templates)},
            "styles": {
                style: {
                    "label": self.labels[style],
                    "phrases": list(self.phrases[style]),
                    "held_out": list(self.held_out_phrases[style]),
                }
                for style in STYLES
            },
        }

    def _check_style(self, style: str) -> None:
        if style not in self.labels:
            raise ValueError(f"unknown style {style!r}; the styles are {', '.join(STYLES)}")

    def _seen_words(self, style: str) -> tuple[str, ...]:
        self._check_style(style)
        return (self.labels[style], *self.phrases[style])

    def _entries(self) -> list[Entry]:
        """Everything that can fill a template."""
        return [(style, "seen", word) for style in STYLES for word in self._seen_words(style)] + [
            (style, "held_out", word) for style in STYLES for word in self.held_out_phrases[style]
        ]

    def _style_problems(self) -> list[str]:
        problems = []
        for name in ("labels", "phrases", "held_out_phrases"):
            given = getattr(self, name)
            problems += [f"{name}: style {style!r} is missing" for style in STYLES if style not in given]
            problems += [f"{name}: unknown style {style!r}" for style in given if style not in STYLES]
            problems += [f"{name}: style {style!r} has none" for style in given if not given[style]]
        return problems


def phrase_problems(entries: Iterable[Entry]) -> list[str]:
    """Why phrases cannot be in one bank: no phrase at all, given to two styles or twice, or held out and trained on."""
    problems, first = [], {}
    for style, kind, phrase in entries:
        if not isinstance(phrase, str) or not phrase.strip() or phrase != phrase.strip():
            problems.append(f"style {style!r}: {phrase!r} is not a phrase")
            continue
        other_style, other_kind = first.get(_same(phrase), (None, None))
        if other_style is None:
            first[_same(phrase)] = (style, kind)
        elif other_style != style:
            problems.append(f"phrase {phrase!r} is given to both {other_style!r} and {style!r}")
        elif other_kind != kind:
            problems.append(f"style {style!r}: held-out phrase {phrase!r} is also a training phrase")
        else:
            problems.append(f"style {style!r}: phrase {phrase!r} is given twice")
    return problems


def phrase_clashes(entries: Iterable[Entry]) -> pd.DataFrame:
    """`PromptBank.clashes` of any phrases."""
    rows = []
    words = [(*entry, stems(entry[-1])) for entry in entries]
    for (style, kind, phrase, its), (other_style, other_kind, other, others) in combinations(words, 2):
        if style == other_style and kind == other_kind:
            continue  # phrases of one style may share a word
        clash = "held out" if style == other_style else "two styles"
        rows += [(clash, stem, style, phrase, other_style, other) for stem in sorted(its & others)]
    return pd.DataFrame(rows, columns=["kind", "stem", "style", "phrase", "other_style", "other_phrase"])


def template_problems(training: Sequence[str], held_out: Sequence[str]) -> list[str]:
    """Why templates cannot be in one bank: a placeholder amiss, the fixed one missing, one given twice or to both."""
    problems = [] if FIXED_TEMPLATE in training else [f"the template {FIXED_TEMPLATE!r} is missing"]
    if not held_out:
        problems.append("there is no held-out template")
    seen: dict[str, str] = {}
    for kind, templates in (("training", training), ("held-out", held_out)):
        for template in templates:
            if reason := _template_problem(template):
                problems.append(f"{kind} template {template!r} {reason}")
            if (earlier := seen.setdefault(_same(template), kind)) != kind:
                problems.append(f"held-out template {template!r} is also a {earlier} template")
        if len({_same(template) for template in templates}) < len(templates):
            problems.append(f"a {kind} template is given twice")
    return problems


def _template_problem(template: str) -> str:
    """Why a template cannot be used, or nothing."""
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:  # an unbalanced brace
        return f"is malformed ({error})"
    fields = [name for name, _, _ in parts]
    if fields.count("style") != 1:
        return "must hold the placeholder {style} once"
    if unknown := set(fields) - {"style", "a", "A"}:
        return f"has an unknown placeholder {{{sorted(unknown)[0]}}}"
    if any(form or conversion for _, form, conversion in parts):
        return "has a placeholder with a format in it"
    if re.search(r"\{a\}(?! \{style\})", template, re.IGNORECASE):
        return "must have {a} or {A} right before {style}"
    if re.search(r"\ban? \{style\}", template, re.IGNORECASE):
        return "writes the article out: use {a} {style}, which becomes 'a' or 'an'"
    return ""


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Left alone, json keeps the last of two equal keys: a style pasted twice would overwrite the first."""
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"{', '.join(map(repr, twice))} is given twice")
    return dict(pairs)


def expect_keys(where: str, given: object, expected: set[str]) -> None:
    """Raises ValueError, naming `where`, unless `given` is an object with just these keys."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: {given!r} must be an object with the keys {', '.join(sorted(expected))}")
    wrong = [f"{key!r} is missing" for key in sorted(expected - set(given))]
    wrong += [f"{key!r} is unknown" for key in sorted(set(given) - expected)]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)}")


def strings(where: str, given: object) -> tuple[str, ...]:
    """The list as a tuple; ValueError, naming `where`, for anything else: a lone string would become its letters."""
    if not isinstance(given, list) or not all(isinstance(item, str) for item in given):
        raise ValueError(f"{where}: {given!r} must be a list of strings")
    return tuple(given)
