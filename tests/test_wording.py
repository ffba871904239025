"""English words as prompts need them: articles by sound, words that are forms of one."""

from __future__ import annotations

import pytest

from esr_utils.wording import article, render, stems


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("angry", "an"),
        ("hushed", "a"),
        ("energetic and animated", "an"),
        ("under-the-breath", "an"),
        ("unemotional", "an"),
        ("uninterested", "an"),
        ("unimpressed", "an"),
        ("utter", "an"),
        ("yearning", "a"),
        # the sound, not the letter
        ("uniform", "a"),
        ("unique", "a"),
        ("usual", "a"),
        ("utopian", "a"),
        ("euphoric", "a"),
        ("one-off", "a"),
        ("onerous", "an"),
        ("honest", "an"),
        ("Honourable", "an"),
        ("hourly", "an"),
        ("hollow", "a"),
    ],
)
def test_article_goes_by_sound(phrase, expected):
    assert article(phrase) == expected


def test_render_puts_the_article_where_the_template_asks():
    assert render("{A} {style} voice.", "awed") == "An awed voice."
    assert render("In {a} {style} way.", "bored") == "In a bored way."


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("joyous", "joyfully"),
        ("unhurried", "hurrying"),
        ("emotionally", "unemotional"),
        ("jogging", "jog"),
        ("softly spoken", "Soft"),
        ("near-silent", "silently"),
    ],
)
def test_forms_of_one_word_share_a_stem(one, other):
    assert stems(one) & stems(other)


def test_small_words_have_no_stem_and_other_words_keep_apart():
    assert stems("of the, and very full 42") == set()
    assert len(stems("calm cold loud sad bad")) == 5
