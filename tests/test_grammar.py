"""The grammars: every sentence reads as English should, and nothing of the held-out one is trained on."""

from __future__ import annotations

import json
import re
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from esr_utils import grammar
from esr_utils.grammar import ATTRIBUTES, GRAMMAR_PATH, load_grammars, wordings
from esr_utils.wording import article, stems

FULL = {"gender": "female", "pitch": "low", "energy": "high", "tempo": "normal", "style": "angry"}
SUBSETS = [dict(part) for n in range(1, 6) for part in combinations(FULL.items(), n)]


class First:
    """A generator that always draws the same of its choices."""

    def __init__(self, which: int) -> None:
        self.which = which

    def integers(self, high: int) -> int:
        return self.which % high


def every_sentence(name: str):
    """Each template with each subset of attributes, and with every value, in the first wordings."""
    one = load_grammars()[name]
    values = [dict(zip(ATTRIBUTES, chosen, strict=True)) for chosen in product(*(v[:3] for v in ATTRIBUTES.values()))]
    values += [FULL | {"style": style} for style in ATTRIBUTES["style"]]
    for attributes in (*SUBSETS, *values):
        for template, which in product(one.fitting(attributes), range(6)):
            yield attributes, one.fill(template, attributes, First(which))


@pytest.mark.parametrize("name", ["seen", "held_out"])
def test_sentences_are_well_formed(name: str) -> None:
    sentences = {text for _, text in every_sentence(name)}
    assert len(sentences) > 500
    for text in sentences:
        assert re.fullmatch(r"[A-Z][^{}\[\]()&]*[a-z]\.", text), text
        assert not re.search(r"  | ,|,,|,\.|;|\b(and|in|with|is|sounding) (and|,|\.)|\b(\w+) \2\b", text), text
        for given, word in re.findall(r"\b([Aa]n?) (\S+)", text):
            assert given.lower() == article(word), text
        assert "they" not in text and not re.search(r"\b(are|talk|say|have)\b(?! )", text), text


def test_a_sentence_names_what_it_is_told_and_nothing_else() -> None:
    """The wordings of each value are in a sentence exactly when the value is named."""
    for name, one in load_grammars().items():
        for attributes, text in every_sentence(name):
            for key, value in FULL.items():
                if attributes.get(key, value) != value:
                    continue
                forms = {w for group in one.words[key][value].values() for w in group}
                said = any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)", text, re.IGNORECASE) for w in forms)
                assert said == (key in attributes), (attributes, key, text)


def test_by_hand() -> None:
    seen, held_out = load_grammars()["seen"], load_grammars()["held_out"]
    first = First(0)
    assert seen.fill(seen.templates[0], FULL, first) == (
        "A woman talks loudly and at a moderate pace in an angry, low-pitched voice."
    )
    assert seen.fill(seen.templates[0], {"tempo": "low"}, first) == "A person talks slowly."
    assert seen.fill(seen.templates[7], {"gender": "male", "energy": "low", "tempo": "high"}, first) == (
        "Fast speech from a man whose voice is quiet."
    )
    assert seen.fill(seen.templates[3], {"style": "angry", "pitch": "low"}, First(3)) == (
        "Listen for a speaker's voice that is harsh and hostile, and deep."
    )
    assert held_out.fill(held_out.templates[3], FULL, first) == (
        "Look for mad, bass utterances by a lady, delivered powerfully and at a steady tempo."
    )


def test_the_held_out_grammar_shares_nothing() -> None:
    seen, held_out = load_grammars()["seen"], load_grammars()["held_out"]
    assert not set(seen.templates) & set(held_out.templates)
    assert not wordings(seen) & wordings(held_out)
    words = [{stem for w in wordings(one) for stem in stems(w.replace("'s", ""))} for one in (seen, held_out)]
    assert not words[0] & words[1]
    sentences = [{text for _, text in every_sentence(name)} for name in ("seen", "held_out")]
    assert not sentences[0] & sentences[1]


def test_a_style_that_says_an_attribute_leaves_it_out() -> None:
    seen = load_grammars()["seen"]
    assert seen.named(FULL | {"style": "fast"}) == {k: v for k, v in FULL.items() if k != "tempo"} | {"style": "fast"}
    assert seen.named({"gender": "", "tempo": "low", "style": ""}) == {"tempo": "low"}
    assert "energy" not in seen.named(FULL | {"style": "whispered"})


def test_what_cannot_be_said_is_refused() -> None:
    seen, rng = load_grammars()["seen"], np.random.default_rng(0)
    with pytest.raises(ValueError, match="at least one attribute"):
        seen.write({}, rng)
    with pytest.raises(ValueError, match="pitch is 'shrill'; known are"):
        seen.write({"pitch": "shrill"}, rng)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["seen"]["templates"].append("A voice."), "'A voice.' must have each of gender, pitch"),
        (
            lambda d: d["seen"]["templates"].append(d["seen"]["templates"][0].replace("a(n) {style", "a {style")),
            "article written out",
        ),
        (lambda d: d["seen"]["words"]["pitch"]["low"].pop("is"), "needs pitch.is for low"),
        (
            lambda d: d["held_out"]["words"]["pitch"]["low"]["adj"].append("deep"),
            "seen and held_out share 'deep'",
        ),
        (lambda d: d["held_out"]["words"]["tempo"]["high"]["adv"].append("in a quick way"), "share 'quick'"),
        (lambda d: d.pop("style_says"), "style_says"),
    ],
)
def test_a_grammar_that_breaks_a_rule_is_refused(tmp_path: Path, change, words: str) -> None:
    data = json.loads(GRAMMAR_PATH.read_text(encoding="utf-8"))
    change(data)
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        grammar.load_grammars(file)
