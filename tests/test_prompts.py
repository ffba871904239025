"""The prompt bank: what it holds, draws and refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from esr_utils.prompts import PROMPTS_PATH, PromptBank
from esr_utils.styles import STYLES


@pytest.fixture(scope="module")
def bank() -> PromptBank:
    return PromptBank.load()


@pytest.fixture
def load_changed(tmp_path):
    """Loads a copy of the bank's file after `change` has edited its content in place."""

    def load(change) -> PromptBank:
        data = json.loads(PROMPTS_PATH.read_text(encoding="utf-8"))
        change(data)
        path = tmp_path / "prompts.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return PromptBank.load(path)

    return load


# --- the bank ---


def test_every_prompt_of_the_bank_has_the_right_article(bank):
    # By letter: right for this bank only as long as no phrase begins with a letter that sounds otherwise.
    for style in STYLES:
        for phrase in (bank.labels[style], *bank.phrases[style], *bank.held_out_phrases[style]):
            assert not re.match(r"(?i)eu|on|ub|uni(?!n)|us|ut|ho[nu]|heir", phrase), phrase
        for prompt in bank.all_prompts(style) + bank.all_prompts(style, "held_out"):
            assert not re.search(r"(?i)\ba [aeiou]|\ban [^aeiou]", prompt), prompt


def test_counts_are_the_papers(bank):
    assert set(bank.labels) == set(STYLES)
    assert len(bank.templates) == 11
    assert len(bank.held_out_templates) >= 4
    for style in STYLES:
        assert len(bank.phrases[style]) == 5, style
        assert len(bank.held_out_phrases[style]) == 3, style


def test_all_prompts_holds_each_combination_once(bank):
    for style in STYLES:
        seen, held_out = bank.all_prompts(style), bank.all_prompts(style, "held_out")
        assert len(seen) == len(set(seen)) == 11 * 6
        assert len(held_out) == len(set(held_out)) == 3 * len(bank.held_out_templates)


def test_prompts_are_clean_sentences(bank):
    for style in STYLES:
        for prompt in bank.all_prompts(style) + bank.all_prompts(style, "held_out"):
            assert re.fullmatch(r"[A-Z][\w' ,-]+\.", prompt), prompt
            assert "  " not in prompt


def test_no_prompt_belongs_to_two_styles(bank):
    prompts = [prompt for style in STYLES for prompt in bank.all_prompts(style) + bank.all_prompts(style, "held_out")]
    assert len(prompts) == len(set(prompts))


def test_no_two_styles_share_a_content_word_and_no_held_out_phrase_is_a_reworded_training_one(bank):
    assert bank.clashes().empty, bank.clashes().to_string()


def test_held_out_is_disjoint_from_seen_in_templates_and_in_phrases(bank):
    assert not set(bank.templates) & set(bank.held_out_templates)
    training = {word for style in STYLES for word in (bank.labels[style], *bank.phrases[style])}
    held_out = {word for style in STYLES for word in bank.held_out_phrases[style]}
    assert not training & held_out
    for style in STYLES:
        for prompt in bank.all_prompts(style, "held_out"):
            assert not any(re.search(rf"\b{re.escape(word)}\b", prompt) for word in training), prompt


def test_held_out_templates_are_worded_unlike_the_training_ones(bank):
    # Short words ("that", "is", "as") aside, at most one word of it occurs in the training ones.
    def words(template: str) -> set[str]:
        return {word for word in re.findall(r"[a-z]+", template.lower()) if len(word) > 4 and word != "style"}

    training = set().union(*map(words, bank.templates))
    for template in bank.held_out_templates:
        assert len(words(template) & training) <= 1, template


def test_table_shows_every_style_and_phrase(bank):
    table = bank.table().set_index("style")
    assert list(table.index) == list(STYLES)
    for style in STYLES:
        assert tuple(table.loc[style, "phrases"].split("; ")) == bank.phrases[style]
        assert tuple(table.loc[style, "held_out"].split("; ")) == bank.held_out_phrases[style]


# --- sampling ---


def test_sample_is_determined_by_its_generator(bank):
    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        return [bank.sample("whispered", rng) for _ in range(20)]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_sample_ignores_the_global_seed(bank):
    np.random.seed(0)
    first = bank.sample("sad", np.random.default_rng(5))
    np.random.seed(1)
    assert bank.sample("sad", np.random.default_rng(5)) == first


def test_sample_reaches_every_seen_prompt_and_no_other(bank):
    rng = np.random.default_rng(0)
    drawn = [bank.sample("awe", rng) for _ in range(3000)]
    assert set(drawn) == set(bank.all_prompts("awe"))
    # Uniform: 3000 / 66 = 45 each; 5 standard deviations of a binomial are 33.
    counts = [drawn.count(prompt) for prompt in set(drawn)]
    assert min(counts) > 12
    assert max(counts) < 79


def test_without_augmentation_there_is_one_prompt_and_nothing_is_drawn(bank):
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert bank.sample("whispered", rng, augment=False) == "Speech that is whispered."
    assert rng.bit_generator.state == before
    for style in STYLES:
        assert bank.sample(style, rng, augment=False) in bank.all_prompts(style)


# --- refusals ---


def test_unknown_style_or_set_is_refused(bank):
    with pytest.raises(ValueError, match="unknown style 'shouty'.*angry, awe"):
        bank.sample("shouty", np.random.default_rng(0))
    with pytest.raises(ValueError, match="unknown style ''"):
        bank.all_prompts("", "held_out")
    with pytest.raises(ValueError, match="'unseen'.*'seen' or 'held_out'"):
        bank.all_prompts("sad", "unseen")


def _set(*keys_and_value):
    """A change of one item deep in the file."""
    *keys, last, value = keys_and_value

    def change(data):
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["styles"].pop("sleepy"), "styles: 'sleepy' is missing"),
        (lambda d: d["styles"].update(shouty=d["styles"]["sad"]), "styles: 'shouty' is unknown"),
        (lambda d: d["styles"]["sad"].pop("held_out"), "style sad: 'held_out' is missing"),
        (_set("styles", "sad", "phrases", []), "phrases: style 'sad' has none"),
        (_set("styles", "sad", "phrases", "tearful"), "sad: 'tearful' must be a list of strings"),
        (_set("styles", "sad", "phrases", 0, " tearful"), "style 'sad': ' tearful' is not a phrase"),
        # clashes: "furious" is angry's
        (
            _set("styles", "sad", "phrases", 0, "furious"),
            "phrase 'furious' is given to both 'angry' and 'sad'",
        ),
        (_set("styles", "sad", "phrases", 0, "Fed up"), "phrase .* is given to both 'frustrated' and 'sad'"),
        (
            _set("styles", "sad", "held_out", 0, "furious"),
            "phrase 'furious' is given to both 'angry' and 'sad'",
        ),
        (_set("styles", "sad", "label", "furious"), "phrase 'furious' is given to both 'angry' and 'sad'"),
        (
            _set("styles", "sad", "held_out", 0, "tearful"),
            "'sad': held-out phrase 'tearful' is also a training phrase",
        ),
        (
            _set("styles", "sad", "held_out", 0, "sad"),
            "'sad': held-out phrase 'sad' is also a training phrase",
        ),
        (_set("styles", "sad", "phrases", 0, "tearful"), "'sad': phrase 'tearful' is given twice"),
        # templates
        (
            _set("templates", "seen", 1, "A voice."),
            r"training template 'A voice.' must hold .* \{style\} once",
        ),
        (_set("templates", "held_out", 0, "{A} clip."), r"held-out template .* must hold .* \{style\} once"),
        (_set("templates", "seen", 1, "{style} is {style}."), r"must hold the placeholder \{style\} once"),
        (_set("templates", "seen", 1, "A {style} voice."), "writes the article out"),
        (_set("templates", "seen", 1, "{a} rather {style} voice."), r"must have \{a\} or \{A\} right before"),
        (_set("templates", "seen", 1, "{style} {mood}"), r"unknown placeholder \{mood\}"),
        (_set("templates", "seen", 1, "{style"), "is malformed"),
        (_set("templates", "seen", 1, "{style:>9} words."), "has a placeholder with a format in it"),
        (_set("templates", "seen", 1, "{style!r} words."), "has a placeholder with a format in it"),
        (_set("about", "words"), "about: 'words' must be a list of strings"),
        (_set("templates", "seen", 0, "Talk that is {style}."), "'Speech that is {style}.' is missing"),
        (_set("templates", "held_out", 0, "speech that is {style}"), "is also a training template"),
        (_set("templates", "seen", 1, "Speech that is {style}."), "a training template is given twice"),
        (_set("templates", "held_out", []), "there is no held-out template"),
        (_set("version", "new"), "version is 'new'"),
        (lambda d: d.pop("version"), "'version' is missing"),
    ],
)
def test_a_bank_that_breaks_a_rule_is_refused_by_name(load_changed, change, message):
    with pytest.raises(ValueError, match=message) as refusal:
        load_changed(change)
    assert "prompts.json" in str(refusal.value)


def test_every_problem_is_named_at_once(load_changed):
    def change(data):
        data["styles"]["sad"]["phrases"][0] = "furious"
        data["styles"]["calm"]["held_out"][0] = "relaxed"
        data["templates"]["seen"][1] = "A voice."

    with pytest.raises(ValueError) as refusal:
        load_changed(change)
    for name in ("'furious'", "'relaxed'", "'A voice.'"):
        assert name in str(refusal.value)


def test_a_style_given_twice_in_the_file_is_refused(tmp_path):
    # json would keep the second and say nothing
    path = tmp_path / "prompts.json"
    path.write_text(PROMPTS_PATH.read_text(encoding="utf-8").replace('"awe": {', '"angry": {', 1), encoding="utf-8")
    with pytest.raises(ValueError, match="'angry' is given twice"):
        PromptBank.load(path)


def test_a_file_that_is_not_json_is_refused_by_name(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text('{"version": 1,', encoding="utf-8")
    with pytest.raises(ValueError, match="prompts.json"):
        PromptBank.load(path)


def test_a_bank_built_by_hand_is_checked_too(bank):
    with pytest.raises(ValueError, match="labels: style 'awe' is missing"):
        replace(bank, labels={style: word for style, word in bank.labels.items() if style != "awe"})
    with pytest.raises(ValueError, match="'furious' is given to both"):
        replace(bank, phrases={**bank.phrases, "sad": ("furious",)})


# --- clashes ---


@pytest.mark.parametrize(
    ("style", "field", "phrase", "kind", "other"),
    [
        ("calm", "phrases", "unhurried", "two styles", "hurried"),
        ("laughing", "held_out_phrases", "joyously loud", "two styles", "joyful"),
        ("sad", "held_out_phrases", "in floods of tears", "held out", "tearful"),
        ("sad", "held_out_phrases", "saddened", "held out", "sad"),
    ],
)
def test_clashes_show_phrases_that_share_a_content_word(bank, style, field, phrase, kind, other):
    changed = replace(bank, **{field: {**getattr(bank, field), style: (*getattr(bank, field)[style], phrase)}})
    clashes = changed.clashes()
    row = clashes[(clashes["kind"] == kind) & (clashes[["phrase", "other_phrase"]] == phrase).any(axis=1)]
    assert other in set(row["phrase"]) | set(row["other_phrase"])


def test_clashes_ignore_small_words_and_words_shared_within_training_of_one_style(bank):
    assert any("and" in phrase.split() for phrase in bank.phrases["sad"])
    changed = replace(bank, phrases={**bank.phrases, "sad": (*bank.phrases["sad"], "tearful and low")})
    assert changed.clashes().empty


# --- writing ---


def test_a_saved_bank_is_read_again_with_its_about(bank, tmp_path):
    other = replace(bank, version=3, about=("Écrit à la main.",), held_out_templates=bank.held_out_templates[:2])
    other.save(tmp_path / "new" / "prompts.json")
    read = PromptBank.load(tmp_path / "new" / "prompts.json")
    assert read == other and read.about == ("Écrit à la main.",) and read.sha256 == other.sha256
    assert set(read.held_out_templates) == set(bank.held_out_templates[:2])
    shipped = json.loads(PROMPTS_PATH.read_text(encoding="utf-8"))
    bank.save(tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text(encoding="utf-8")) == shipped


def test_a_bank_is_never_overwritten_by_another(bank, tmp_path):
    path = tmp_path / "prompts.json"
    bank.save(path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    replace(bank, about=("the same words",)).save(path)
    with pytest.raises(FileExistsError, match="prompts.json holds another bank, and runs may refer to it"):
        replace(bank, templates=bank.templates[:-1]).save(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    path.write_text("notes")
    with pytest.raises(ValueError, match="prompts.json"):
        bank.save(path)
    assert path.read_text() == "notes"


def test_the_projects_own_bank_is_never_written(bank, tmp_path):
    before = PROMPTS_PATH.read_bytes(), PROMPTS_PATH.stat().st_mtime_ns
    (tmp_path / "link.json").symlink_to(PROMPTS_PATH)
    for path in (PROMPTS_PATH, tmp_path / "link.json"):
        with pytest.raises(FileExistsError, match="the project's own bank, which is never written"):
            bank.save(path)
    assert (PROMPTS_PATH.read_bytes(), PROMPTS_PATH.stat().st_mtime_ns) == before


def test_the_hash_of_a_bank_is_that_of_its_prompts(bank):
    assert re.fullmatch(r"[0-9a-f]{64}", bank.sha256)
    assert replace(bank, about=("else",), version=9).sha256 == bank.sha256
    backwards = dict(reversed(bank.labels.items()))
    assert replace(bank, labels=backwards).sha256 == bank.sha256
    changed = (
        replace(bank, templates=bank.templates[::-1]),  # drawn by place, so the order counts
        replace(bank, held_out_templates=bank.held_out_templates[1:]),
        replace(bank, labels={**bank.labels, "awe": "awing"}),
        replace(bank, phrases={**bank.phrases, "sad": bank.phrases["sad"][:4]}),
        replace(bank, held_out_phrases={**bank.held_out_phrases, "sad": ("weeping",)}),
    )
    assert len({bank.sha256, *(other.sha256 for other in changed)}) == 6


def test_differences_of_two_banks(bank):
    other = replace(
        bank,
        phrases={**bank.phrases, "sad": ("tearful", "low-spirited")},
        templates=(*bank.templates[:-1], "Hear this: {style}."),
    )
    table = other.differences(bank).set_index("of")
    assert list(table.index) == [*STYLES, "templates"]
    assert table.loc["sad"].to_list() == [
        "tearful",
        "low-spirited",
        "sorrowful; mournful; melancholy and gloomy; heartbroken",
    ]
    assert table.loc["templates", ["here", "there"]].to_list() == ["Hear this: {style}.", bank.templates[-1]]
    assert (table.drop(index=["sad", "templates"])[["here", "there"]] == "").all().all()
    assert table.loc["calm", "both"] == "; ".join(bank.phrases["calm"])
