"""Attribute captions: sentences about a clip's gender, pitch, energy, tempo and style, as TextrolSpeech has them.

What they say is measured (`esr_utils.attributes`), a grammar (`esr_utils.grammar`) puts it into words. So any labelled
corpus is a captioned one.

A captions table has the columns utterance_id, caption, the attributes that the sentence names (gender, pitch, energy,
tempo, style; "" where it does not) and grammar: `seen`, `held_out`, or `free` for a corpus's own captions.
`text_tables.write_table` and `read_table` write and read it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from esr_utils import weights
from esr_utils.attributes import CACHE, Thresholds, clip_attributes, left_out_table
from esr_utils.grammar import ATTRIBUTES, Grammar, load_grammars

COLUMNS = ("utterance_id", "caption", *ATTRIBUTES, "grammar")
OMITTED = 0.25  # of each attribute, in a training sentence: people seldom name them all
_HAN = "[\u3400-\u9fff]"
_TRIES = 20  # draws for each sentence that is to differ from the clip's others


def attribute_captions(
    manifest: pd.DataFrame,
    *,
    thresholds: Thresholds | None = None,
    per_clip: int = 8,
    per_test_clip: int = 1,
    seed: int = 0,
    cache: Path | None = CACHE,
) -> tuple[pd.DataFrame, Thresholds, pd.DataFrame]:
    """Measures the clips of a manifest and writes captions for them; `clip_attributes` gives what they are about.

    Train clips get `per_clip` sentences of the seen grammar, each of which leaves every attribute out with a
    probability of OMITTED. Val and test clips get `per_test_clip` sentences of each grammar, which name all that is
    known of the clip, but for a measured attribute that its style says already. A clip's sentences are distinct, and
    depend on the seed, the grammar and its utterance_id alone.

    Args:
        manifest: with the column `root` (`manifests.load_corpora`).
        thresholds: None fits them on the manifest's train split.
        cache: where measures are kept; None keeps nothing.
    Returns:
        The captions table; the thresholds; and what is left out: columns utterance_id, attribute (`caption` where a
        clip has none), reason.
    Raises:
        ValueError: see `clip_attributes`.
    """
    clips, thresholds, left_out = clip_attributes(manifest, thresholds, cache)
    grammars, rows, mute = load_grammars(), [], []
    for clip in clips.to_dict("records"):
        train = clip["split"] == "train"
        for name in ("seen",) if train else ("seen", "held_out"):
            written = _sentences(grammars[name], clip, per_clip if train else per_test_clip, train, seed)
            rows += [
                (clip["utterance_id"], text, *(named.get(a, "") for a in ATTRIBUTES), name) for text, named in written
            ]
        if not grammars["seen"].named(clip):
            mute.append((clip["utterance_id"], "caption", "none of its attributes is known"))
    table = pd.DataFrame(rows, columns=list(COLUMNS), dtype="str")
    return table, thresholds, pd.concat([left_out, left_out_table(mute)], ignore_index=True)


def _sentences(
    grammar: Grammar, clip: Mapping[str, str], count: int, omit: bool, seed: int
) -> Iterator[tuple[str, dict[str, str]]]:
    """Up to `count` distinct sentences about a clip, and the attributes each names."""
    known = grammar.named(clip)
    if not known:
        return
    key = hashlib.blake2b(f"{seed} {grammar.name} {clip['utterance_id']}".encode(), digest_size=8).digest()
    rng, written = np.random.default_rng(int.from_bytes(key, "little")), set()
    for _ in range(count * _TRIES):
        if len(written) == count:
            return
        named = {key: value for key, value in known.items() if not omit or rng.random() >= OMITTED} or known
        text = grammar.write(named, rng)
        if text not in written:
            written.add(text)
            yield text, named


def free_captions(manifest: pd.DataFrame) -> pd.DataFrame:
    """The captions table of a corpus's own captions, which name no attribute; clips without a caption are not in it."""
    told = manifest[manifest["caption"] != ""]
    table = pd.DataFrame({"utterance_id": told["utterance_id"], "caption": told["caption"]}).reset_index(drop=True)
    return table.assign(**dict.fromkeys(ATTRIBUTES, ""), grammar="free")[list(COLUMNS)]


@dataclass(frozen=True)
class Captioned:
    """The captions of a manifest's clips, and what is known of the clips: what a training or evaluation takes.

    Attributes:
        table: a captions table.
        clips: of `clip_attributes`, which says which captions are right for a clip (`relevance`).
        thresholds: of the measured attributes; None where no corpus has attribute captions.
        left_out: columns utterance_id, attribute, reason.
    """

    table: pd.DataFrame
    clips: pd.DataFrame
    thresholds: Thresholds | None
    left_out: pd.DataFrame


def of_manifest(
    manifest: pd.DataFrame,
    per_clip: int = 8,
    per_test_clip: int = 1,
    seed: int = 0,
    cache: Path | None = CACHE,
    thresholds: Thresholds | None = None,
) -> Captioned:
    """A corpus's own captions where it has any, else attribute captions; arguments of `attribute_captions`."""
    own = manifest["corpus"].isin(manifest.loc[manifest["caption"] != "", "corpus"])
    free, labelled = manifest[own], manifest[~own]
    tables = [free_captions(free)]
    clips = [free[["utterance_id", "split", "caption"]].assign(**dict.fromkeys(ATTRIBUTES, ""))]
    left_out = left_out_table([(name, "caption", "none") for name in free.loc[free["caption"] == "", "utterance_id"]])
    if len(labelled):
        written, thresholds, unknown = attribute_captions(
            labelled, thresholds=thresholds, per_clip=per_clip, per_test_clip=per_test_clip, seed=seed, cache=cache
        )
        tables.append(written)
        clips.append(clip_attributes(labelled, thresholds, cache)[0])
        left_out = pd.concat([left_out, unknown], ignore_index=True)
    return Captioned(pd.concat(tables, ignore_index=True), pd.concat(clips, ignore_index=True), thresholds, left_out)


def check_language(captions: pd.DataFrame, text_backbone: str) -> None:
    """Refuses captions in Mandarin for a text backbone that `weights` has a name for: all of those know English alone.

    Raises:
        ValueError: says what to give instead.
    """
    english = {*weights.PACKAGED, *weights.HUB, *(hub_id for hub_id, _ in weights.HUB.values())}
    english |= {packaged.hub_id for packaged in weights.PACKAGED.values()}
    if text_backbone in english and captions["caption"].str.contains(_HAN).any():
        advice = "give the folder of a multilingual text backbone"
        raise ValueError(f"captions are Mandarin, of which {text_backbone!r} knows nothing: {advice}")


# --- which clips a caption is right for


def relevance(captions: pd.DataFrame, clips: pd.DataFrame) -> NDArray[np.bool_]:
    """Which clips each caption is right for, (n_captions, n_clips).

    A caption that names attributes is right for every clip that agrees on all of those it names, whatever the clip's
    others are; with all five named, that is the whole attribute tuple. A clip of which a named attribute is not known
    does not agree. Besides, clips that share a caption's text are right for it: this is the whole rule for a corpus's
    own captions, which name no attribute.

    Args:
        captions: a captions table.
        clips: columns utterance_id, the attributes (`clip_attributes`) if any caption names one, and perhaps caption.
    """
    agree = np.ones((len(captions), len(clips)), dtype=bool)
    names_any = np.zeros(len(captions), dtype=bool)
    for attribute in ATTRIBUTES:
        told = captions[attribute].to_numpy(dtype=object) if attribute in captions else np.full(len(captions), "")
        named = told != ""
        if not named.any():
            continue
        codes = pd.factorize(np.concatenate([told, clips[attribute].to_numpy(dtype=object)]))[0]
        agree &= ~named[:, None] | (codes[: len(told), None] == codes[None, len(told) :])
        names_any |= named
    agree &= names_any[:, None]
    return agree | _same_text(captions, clips)


def _same_text(captions: pd.DataFrame, clips: pd.DataFrame) -> NDArray[np.bool_]:
    """Which clips have a caption with this one's text, (n_captions, n_clips)."""
    place = pd.Series(range(len(clips)), index=clips["utterance_id"])
    texts = [captions[["utterance_id", "caption"]]]
    if "caption" in clips:
        texts.append(clips.loc[clips["caption"] != "", ["utterance_id", "caption"]])
    owned = pd.concat(texts, ignore_index=True)
    codes = pd.factorize(owned["caption"])[0]
    columns = owned["utterance_id"].map(place)
    here = columns.notna().to_numpy()
    ones = np.ones(here.sum(), dtype=np.int32)
    shape = (codes.max(initial=-1) + 1, len(clips))
    owners = csr_array((ones, (codes[here], columns[here].astype(int))), shape=shape)
    return owners[codes[: len(captions)]].toarray() > 0


# --- describing

_WORD = re.compile(_HAN + r"|[^\W\d_]+(?:['’-][^\W\d_]+)*")  # a Han character counts as a word


def describe(captions: pd.DataFrame, manifest: pd.DataFrame) -> pd.DataFrame:
    """A row per corpus: clips, hours, captions, distinct ones, words a caption (mean), vocabulary (distinct words)."""
    corpus_of = manifest.set_index("utterance_id")["corpus"]
    rows = {}
    for corpus, part in captions.groupby(captions["utterance_id"].map(corpus_of), sort=False):
        clips = manifest[manifest["corpus"] == corpus]
        words = Counter(word for caption in part["caption"] for word in _WORD.findall(caption.lower()))
        rows[corpus] = {
            "clips": len(clips),
            "hours": clips["duration_s"].sum() / 3600,
            "captions": len(part),
            "distinct captions": part["caption"].nunique(),
            "words a caption": words.total() / len(part),
            "vocabulary": len(words),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("corpus")


def attribute_counts(table: pd.DataFrame) -> pd.DataFrame:
    """How often each value of each attribute occurs, the most frequent first; rows attribute and value.

    Args:
        table: a manifest, a captions table or what `clip_attributes` gives.
    """
    columns = [column for column in (*ATTRIBUTES, "age", "tone") if column in table]
    counts = {column: table.loc[table[column] != "", column].value_counts() for column in columns}
    rows = [(column, value, count) for column, found in counts.items() for value, count in found.items()]
    return pd.DataFrame(rows, columns=["attribute", "value", "count"])
