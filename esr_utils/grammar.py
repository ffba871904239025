"""Two small grammars that write a sentence from attributes: gender, pitch, energy, tempo, style.

The words are in `data_manifests/captions.json`, which says how a template is written; those of the styles in the prompt
bank. `seen` is for training; `held_out` shares no template and no wording with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from esr_utils.prompts import PromptBank, Prompts, expect_keys, strings, unique_keys
from esr_utils.styles import STYLES
from esr_utils.wording import article, stems

GRAMMAR_PATH = Path(__file__).resolve().parents[1] / "data_manifests" / "captions.json"
LEVELS = ("low", "normal", "high")
ATTRIBUTES: dict[str, tuple[str, ...]] = {  # and the values each can have
    "gender": ("female", "male"),
    "pitch": LEVELS,
    "energy": LEVELS,
    "tempo": LEVELS,
    "style": STYLES,
}
UNNAMED = "unnamed"  # what stands for the gender where it is not named

_SLOTS = re.compile(r"\{([^{}]*)\}")
_OPTIONAL = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa])\(n\) (?=(\S+))")

Words = Mapping[str, Mapping[str, Mapping[str, tuple[str, ...]]]]  # attribute, value, form → wordings


@dataclass(frozen=True)
class Grammar:
    """Templates, and the wordings of each attribute's values by form.

    Attributes:
        words: {attribute: {value: {form: wordings}}}; of a style the one form is "".
        style_says: style → the measured attribute that it says itself, which a sentence with the style leaves out.

    A grammar that breaks a rule cannot be made. Raises:
        ValueError: names every problem: a template that lacks an attribute or names one twice, that has no slot of a
            known form, or an article written out before a slot; a value without wording.
    """

    name: Prompts
    templates: tuple[str, ...]
    words: Words
    style_says: Mapping[str, str]

    def __post_init__(self) -> None:
        problems = [problem for template in self.templates for problem in self._problems(template)]
        if problems:
            raise ValueError(f"{self.name}: " + "; ".join(problems))

    def _problems(self, template: str) -> Iterator[str]:
        slots = [slot for group in _SLOTS.findall(template) for slot in _slots(group)]
        if sorted(attribute for attribute, _ in slots) != sorted(ATTRIBUTES):
            yield f"{template!r} must have each of {', '.join(ATTRIBUTES)} once"
            return
        if re.search(r"\b[Aa]n? \{", template):
            yield f"{template!r} has an article written out: write a(n)"
        for attribute, form in slots:
            for value in (*ATTRIBUTES[attribute], *([UNNAMED] if attribute == "gender" else [])):
                if not self.words[attribute].get(value, {}).get(form):
                    yield f"{template!r} needs {attribute}.{form} for {value}"

    def named(self, attributes: Mapping[str, str]) -> dict[str, str]:
        """Of a clip's attributes ("" is unknown), those that a sentence of this grammar can name together."""
        known = {key: attributes[key] for key in ATTRIBUTES if attributes.get(key)}
        known.pop(self.style_says.get(known.get("style", ""), ""), None)
        return known

    def fitting(self, attributes: Mapping[str, str]) -> list[str]:
        """The templates that are whole when just these attributes are named."""
        return [template for template in self.templates if not _empty_outside(template, attributes)]

    def write(self, attributes: Mapping[str, str], rng: np.random.Generator) -> str:
        """A sentence that names all of these attributes and no other; template and wordings drawn uniformly.

        Raises:
            ValueError: nothing to name; an attribute or value that the grammar does not know.
        """
        if not attributes:
            raise ValueError("a sentence must name at least one attribute")
        for key, value in attributes.items():
            if value not in ATTRIBUTES.get(key, ()):
                raise ValueError(f"{key} is {value!r}; known are {ATTRIBUTES.get(key, tuple(ATTRIBUTES))}")
        templates = self.fitting(attributes)
        return self.fill(templates[rng.integers(len(templates))], attributes, rng)

    def fill(self, template: str, attributes: Mapping[str, str], rng: np.random.Generator) -> str:
        """One template with these attributes named."""

        def optional(chunk: re.Match) -> str:
            return "" if _empty_outside(chunk[1], attributes) else chunk[1]

        def slot(group: re.Match) -> str:
            return self._phrase(group[1], attributes, rng)

        text = _SLOTS.sub(slot, _OPTIONAL.sub(optional, template))
        text = _ARTICLE.sub(lambda found: found[1] + article(found[2])[1:] + " ", text)
        return text[0].upper() + text[1:]

    def _phrase(self, group: str, attributes: Mapping[str, str], rng: np.random.Generator) -> str:
        chosen = []
        slots = _slots(group)
        for attribute, form in slots:
            value = attributes.get(attribute) or (UNNAMED if attribute == "gender" else "")
            if value:
                wordings = self.words[attribute][value][form]
                chosen.append(wordings[rng.integers(len(wordings))])
        if slots[0][1] == "adv":
            chosen.sort(key=lambda phrase: " " in phrase)  # "softly and at a moderate pace"
        if "&" not in group or len(chosen) == 1:
            return ", ".join(chosen)
        comma = "," if any(" and " in phrase for phrase in chosen) else ""  # "harsh and hostile, and fast"
        return ", ".join(chosen[:-1]) + f"{comma} and {chosen[-1]}"


@cache
def _slots(group: str) -> list[tuple[str, str]]:
    """What a pair of braces holds: "style, pitch.adj" → (style, ""), (pitch, adj)."""
    parts = (slot.strip().partition(".") for slot in re.split("[,&]", group))
    return [(attribute, form) for attribute, _, form in parts]


def _empty_outside(template: str, attributes: Mapping[str, str]) -> bool:
    """Whether a slot that may not be left out has nothing to say."""
    return not all(any(attributes.get(key) for key in group) for group in _needed(template))


@cache
def _needed(template: str) -> list[list[str]]:
    """The attributes of each pair of braces outside [ ]. The gender's never lacks words."""
    groups = [[key for key, _ in _slots(group)] for group in _SLOTS.findall(_OPTIONAL.sub("", template))]
    return [group for group in groups if "gender" not in group]


@cache  # checking the wordings takes a tenth of a second
def load_grammars(path: str | Path = GRAMMAR_PATH) -> dict[str, Grammar]:
    """The grammars `seen` and `held_out`, with the styles' wordings from the prompt bank.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON; a key missing, unknown or given twice; a rule broken (see `Grammar`); or a template or
            wording that both grammars have, or whose words do.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
        expect_keys("the file", data, {"version", "about", "style_says", "seen", "held_out"})
        bank, grammars = PromptBank.load(), {}
        for name in ("seen", "held_out"):
            expect_keys(name, data[name], {"templates", "words"})
            words = {
                attribute: {value: {form: strings(f"{name} {attribute} {value} {form}", wordings)
                                    for form, wordings in forms.items()} for value, forms in values.items()}
                for attribute, values in data[name]["words"].items()
            }  # fmt: skip
            words["style"] = {style: {"": _of_style(bank, style, name)} for style in STYLES}
            templates = strings(f"{name} templates", data[name]["templates"])
            grammars[name] = Grammar(name, templates, words, data["style_says"])
        if shared := _shared(grammars["seen"], grammars["held_out"]):
            raise ValueError("seen and held_out share " + ", ".join(map(repr, shared)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return grammars


def _of_style(bank: PromptBank, style: str, name: str) -> tuple[str, ...]:
    return bank.held_out_phrases[style] if name == "held_out" else (bank.labels[style], *bank.phrases[style])


def wordings(grammar: Grammar) -> set[str]:
    """Every wording of every attribute."""
    values = (value for attribute in grammar.words.values() for value in attribute.values())
    return {wording for forms in values for group in forms.values() for wording in group}


def _shared(seen: Grammar, held_out: Grammar) -> list[str]:
    """Templates, wordings, and stems of the wordings' words, that both have."""
    words = [{stem for w in wordings(one) for stem in stems(w.replace("'s", ""))} for one in (seen, held_out)]
    return sorted(set(seen.templates) & set(held_out.templates) | words[0] & words[1])
