"""English words as prompts need them: the article that a phrase takes, and when two words are forms of one."""

from __future__ import annotations

import re

# "a" or "an" goes by sound, which in English is the first letter's, but for words that begin like these.
# A euphoric, one-off, ubiquitous, uniform, usual, utopian voice; but an uninterested, unimpressed, utter one.
_A_BEFORE_VOWEL = re.compile(r"eu|once\b|one\b|ubiq|uni(?!n|m|de)|us(?!h)|ut(?!t)", re.IGNORECASE)
_AN_BEFORE_CONSONANT = re.compile(r"hour|honest|hono|heir", re.IGNORECASE)  # the h is silent


def article(phrase: str) -> str:
    """The article that the phrase's first sound asks for. Words only: not digits or abbreviations."""
    if _AN_BEFORE_CONSONANT.match(phrase):
        return "an"
    return "an" if phrase[0].lower() in "aeiou" and not _A_BEFORE_VOWEL.match(phrase) else "a"


def render(template: str, phrase: str) -> str:
    """The template filled in: `{style}` is the phrase, `{a}` and `{A}` the article before it."""
    a = article(phrase)
    return template.format(style=phrase, a=a, A=a.capitalize())


# Words that say nothing of a style by themselves, so that two styles may both have them.
_FILLERS = {
    "a", "an", "and", "at", "by", "full", "in", "like", "of", "off", "on", "or", "out", "the", "to", "under",
    "up", "very", "well", "with",
}  # fmt: skip
_ENDINGS = (
    "ingly", "fully", "edly", "ness", "ment", "less", "able", "ful", "ing", "ous", "ity", "ate", "ion", "ive",
    "ed", "er", "en", "es", "ly", "al", "ic", "y", "e", "s",
)  # fmt: skip


def _stem(word: str) -> str:
    """A word without "un" and endings: "joyous" meets "joyful", "unhurried" "hurrying". Crude on purpose."""
    word, before = word.removeprefix("un") if len(word) > 6 else word, ""
    while word != before:  # to the last ending, or one form of a word would be cut further than another
        before = word
        ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) >= len(e) + 3), "")
        word = word.removesuffix(ending)
        word = word[:-1] if word[-1] == word[-2:-1] else word  # "jogging" → "jogg" → "jog"
        word = word[:-1] + "y" if word.endswith("i") else word  # "hurried" → "hurri" → "hurry"
    return word


def stems(phrase: str) -> set[str]:
    """Stems of the words of a phrase that carry its meaning."""
    return {_stem(word) for word in re.findall(r"[^\W\d_]+", phrase.casefold()) if word not in _FILLERS}
