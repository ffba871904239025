"""Manifests, one CSV row per utterance: read, write, validate, count, and turn into lhotse cuts.

The schema is in manifest_schema.py. A row's `path` is relative to its corpus folder, which is the folder that
holds `manifest.csv`. Columns the schema does not know are kept, as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from esr_utils.audio_files import LENGTH_TOLERANCE_S, AudioError, Folder, Header, check_audio
from esr_utils.corpora import CorpusError, corpus_folder, manifest_file, prepare, reading
from esr_utils.manifest_schema import (
    COLUMNS,
    NUMERIC,
    SPLITS,
    Found,
    ManifestError,
    Problem,
    located,
    table_problems,
    typed,
)
from esr_utils.text_tables import in_parts, read_table, write_table

if TYPE_CHECKING:  # lhotse brings torch; a corpus is made into a manifest without them, in 400 MB less
    from lhotse import CutSet, MonoCut, MultiCut, Recording


def validate(manifest: pd.DataFrame, root: str | Path, read_data: bool = False) -> pd.DataFrame:
    """Checks every row against the schema and its audio file; returns the manifest with typed columns.

    Each file's header is read once. `read_data` also decodes the audio, which finds NaN, silence and files
    cut short.

    Args:
        manifest: any index; columns as in SCHEMA, and any others.
        root: the corpus folder that `path` is relative to.
    Raises:
        ManifestError: with all the problems, in the order of the rows.
    """
    if not manifest.columns.is_unique:
        names = manifest.columns[manifest.columns.duplicated()].unique()
        problems = [Problem(None, "", str(name), "two columns have this name") for name in names]
        raise ManifestError(problems, str(root))
    manifest, found = typed(manifest)
    found += table_problems(manifest)
    if set(COLUMNS) <= set(manifest.columns):
        garbled = {position for position, column, _ in found if column in NUMERIC}
        found += _audio_problems(manifest, root, read_data, garbled)
    if found:
        raise ManifestError(located(manifest, found), str(root))
    return manifest


def _audio_problems(manifest: pd.DataFrame, root: str | Path, read_data: bool, garbled: set) -> Iterator[Found]:
    folder = Folder(root)
    for position, row in enumerate(manifest[["path", *NUMERIC]].itertuples(index=False)):
        if not row.path or position in garbled:
            continue  # reported already
        header, reasons = _matched(row, folder)
        if read_data and not reasons:
            channel = None if pd.isna(row.channel) else int(row.channel)
            try:
                check_audio(header, *_range_s(row, header.duration_s), channel)
            except AudioError as error:
                reasons = [("path", f"{row.path!r} {error}")]
        yield from ((position, column, reason) for column, reason in reasons)


def _matched(row: tuple, folder: Folder) -> tuple[Header | None, list[tuple[str, str]]]:
    """The header of a row's file, and what is wrong: (column, reason)."""
    try:
        header = folder.header(row.path)
    except AudioError as error:
        return None, [("path", f"{row.path!r} {error}")]
    return header, list(_misfits(row, header))


def _range_s(row: tuple, file_s: float) -> tuple[float, float]:
    return 0.0 if math.isnan(row.start_s) else row.start_s, file_s if math.isnan(row.end_s) else row.end_s


def _misfits(row: tuple, header: Header) -> Iterator[tuple[str, str]]:
    """Where the numbers of a row contradict its audio file: column, reason."""
    start_s, end_s = _range_s(row, header.duration_s)
    if not pd.isna(row.channel) and row.channel >= header.channels:
        yield "channel", f"{row.channel} is not in the file, which has {header.channels} (counted from 0)"
    if end_s > header.duration_s + LENGTH_TOLERANCE_S:
        yield "end_s", f"{end_s:g} is past the file's end, {header.duration_s:.3f} s"
    if math.isnan(row.end_s) and start_s >= end_s:
        yield "start_s", f"{start_s:g} is past the file's end, {header.duration_s:.3f} s"
    elif end_s <= start_s:
        yield "end_s", f"{end_s:g} is not after start_s {start_s:g}"
    elif abs(end_s - start_s - row.duration_s) > LENGTH_TOLERANCE_S:
        yield "duration_s", f"{row.duration_s:g} does not match the audio, {end_s - start_s:.3f} s"


def read_manifest(path: str | Path, *, check: bool = True) -> pd.DataFrame:
    """Reads and validates a manifest; its files are looked for in the folder that holds it.

    `check=False` reads the table as it is and looks at no audio file, to look into a manifest that was
    refused.

    Raises:
        FileNotFoundError: no such manifest.
        ManifestError: see `validate` and `read_table`.
    """
    table = read_table(path)
    return validate(table, Path(path).parent) if check else typed(table)[0]


def write_manifest(manifest: pd.DataFrame, path: str | Path) -> None:
    """Validates a manifest and writes it, whole or not at all. What is read back is what was written.

    The column `root`, which says where this machine keeps a corpus, is left out.

    Raises:
        ManifestError: nothing was written, and an older file is untouched.
    """
    write_table(validate(manifest, Path(path).parent).drop(columns="root", errors="ignore"), path)


def build_manifest(rows: Iterable[dict], left_out: dict[str, str]) -> pd.DataFrame:
    """A manifest from dicts that may lack columns. `left_out` maps each file not taken to the reason.

    Both may fill while the rows are read, which need not all be in memory as dicts.

    Returns:
        The manifest; `.attrs["left_out"]` counts the reasons, `.attrs["left_out_files"]` names the files.
    Raises:
        ManifestError: cells that should be numbers and are not.
    """
    parts, extra = [], {}
    for part in in_parts(rows):
        table = pd.DataFrame(part)
        extra |= dict.fromkeys(column for column in table.columns if column not in COLUMNS)
        table, found = typed(table.reindex(columns=[*COLUMNS, *extra]))
        if found:
            raise ManifestError(located(table, found), "rows")
        parts.append(table)
    manifest = pd.concat(parts, ignore_index=True) if parts else typed(pd.DataFrame(columns=list(COLUMNS)))[0]
    manifest[list(extra)] = manifest[list(extra)].fillna("")
    reasons = pd.Series(left_out, dtype=object).value_counts()
    manifest.attrs = {
        "left_out": {str(k): int(n) for k, n in reasons.items()},
        "left_out_files": dict(left_out),
    }
    return manifest


def with_root(manifest: pd.DataFrame, root: str | Path) -> pd.DataFrame:
    """Adds the column `root`, the absolute corpus folder, so that several corpora can share a table."""
    return manifest.assign(root=str(Path(root).resolve()))


def load_corpora(names: str | Sequence[str], data_root: str | Path | None = None) -> pd.DataFrame:
    """The manifests of several corpora, one after the other, with the column `root` (see `with_root`).

    Args:
        names: "ravdess+emodb", or a list. "demo" comes with the project; any other corpus is the folder
            `<data_root>/<name>`, read from its manifest.csv if it has one, else from its original layout. A variant
            ("expresso-paper") reads its corpus's folder and has a manifest of its own there.
        data_root: the folder of the corpora; `$ESR_DATA` if None.
    Returns:
        `.attrs["left_out"]` is {corpus: {reason: count}}.
    Raises:
        CorpusError: no such corpus or folder; the message says what to do.
        ManifestError: a manifest that cannot be used.
    """
    names = [name.strip() for name in (names.split("+") if isinstance(names, str) else names)]
    if not names or not all(names) or len(set(names)) < len(names):
        raise CorpusError(f"corpora are {names!r}; they must be names, each once, as in 'ravdess+emodb'")
    loaded = []
    for name in names:
        folder = corpus_folder(name, data_root)
        ready = folder / manifest_file(name)
        manifest = read_manifest(ready) if ready.is_file() else validate(prepare(name, folder), folder)
        loaded.append(with_root(manifest, folder))
    together = pd.concat(loaded, ignore_index=True) if len(loaded) > 1 else loaded[0]
    extra = [column for column in together.columns if column not in COLUMNS]
    together[extra] = together[extra].fillna("")
    if together["utterance_id"].duplicated().any():
        raise CorpusError(f"two of {'+'.join(names)} share an utterance_id: do two folders hold the same corpus?")
    together.attrs = {"left_out": {n: m.attrs.get("left_out", {}) for n, m in zip(names, loaded, strict=True)}}
    return together


def left_out(manifest: pd.DataFrame) -> pd.DataFrame:
    """What the corpora of `load_corpora`'s table leave out: corpus, reason and count, the most frequent first.

    Of a corpus that was read from its own manifest nothing is known.
    """
    counts = manifest.attrs["left_out"].items()
    rows = [(corpus, reason, count) for corpus, reasons in counts for reason, count in reasons.items()]
    return pd.DataFrame(rows, columns=["corpus", "reason", "count"])


def write_missing(manifest: pd.DataFrame) -> list[Path]:
    """Writes the manifest of each corpus of `load_corpora`'s table into its folder, where there is none.

    Returns:
        The files written: `manifest.csv`, and for a variant `manifest_<name>.csv` beside it.
    """
    written = []
    for (root, name), part in manifest.groupby(["root", manifest["corpus"].map(manifest_file)], sort=False):
        path = Path(root) / name
        if not path.exists():
            write_manifest(part.reset_index(drop=True), path)
            written.append(path)
    return written


def statistics(manifest: pd.DataFrame) -> pd.DataFrame:
    """Hours, clips and speakers of each corpus x split x style that occurs; the style may be ""."""
    manifest = manifest.assign(split=pd.Categorical(manifest["split"], SPLITS, ordered=True))
    groups = manifest.groupby(["corpus", "split", "style"], observed=True)
    table = groups.agg(hours=("duration_s", "sum"), clips=("utterance_id", "size"), speakers=("speaker", _count_named))
    table = table.reset_index().astype({"split": "str"})
    return table.assign(hours=table["hours"] / 3600)


# Table I of the ESR paper: styles; hours of train, val, test. Its Expresso row is what the published code makes of the
# corpus ("expresso-paper").
PAPER_TABLE_ONE = {
    "iemocap": (9, 12.4, 0.0, 0.0),
    "esd": (5, 11.4, 0.8, 1.3),
    "expresso": (19, 36.9, 0.6, 0.6),
    "Total": (22, 60.7, 1.4, 1.9),
}


def table_one(manifest: pd.DataFrame) -> pd.DataFrame:
    """The form of the ESR paper's Table I: a row per corpus, then "Total".

    `styles` counts the styles that occur; `train`, `val` and `test` are hours. A corpus of the paper is followed by
    the paper's own row, named "<corpus> (paper)"; with any of them there is a "Total (paper)" too.
    """
    together = manifest.assign(corpus="Total")
    rows = pd.concat([manifest, together] if len(manifest) else [together])
    groups = rows.groupby("corpus", sort=False)
    hours = groups.apply(lambda part: part.groupby("split")["duration_s"].sum().reindex(SPLITS, fill_value=0.0) / 3600)
    return _beside_the_paper(pd.concat([groups["style"].agg(_count_named).rename("styles"), hours], axis=1))


def _beside_the_paper(table: pd.DataFrame) -> pd.DataFrame:
    names = [reading(name)[0] for name in table.index]
    if not set(names[:-1]) & set(PAPER_TABLE_ONE):
        return table
    rows: dict[str, tuple] = {}
    for name, row in zip(names, table.itertuples(), strict=True):
        rows[row.Index] = tuple(row[1:])
        if name in PAPER_TABLE_ONE:
            rows[f"{name} (paper)"] = PAPER_TABLE_ONE[name]
    return pd.DataFrame.from_dict(rows, orient="index", columns=table.columns).rename_axis(table.index.name)


def _count_named(names: pd.Series) -> int:
    return names[names != ""].nunique()


def to_cuts(manifest: pd.DataFrame, root: str | Path | None = None) -> CutSet:
    """One lhotse cut per row: id is the utterance_id, start and duration are seconds, `custom` has the rest.

    Only headers are read here, each file's once. A cut reads only its own range, through libsndfile, which
    knows WAV, FLAC, Ogg Vorbis, Opus and MP3. `cut.load_audio()` is (channels, samples) at the file's own
    rate: a row with a `channel`, or of a mono file, is a MonoCut; else a MultiCut of all channels, for the
    caller to average.

    Args:
        root: the corpus folder; None takes each row's from the column `root` (see `load_corpora`).
    Raises:
        ManifestError: audio files that cannot be read, or ranges and channels that are not in them.
        ValueError: neither `root` nor a column `root`.
    """
    if root is None and "root" not in manifest:
        raise ValueError("to_cuts needs the corpus folder: pass root=, or load the manifest with load_corpora")
    own = ["utterance_id", "path", "corpus", *NUMERIC]
    from lhotse import CutSet

    custom = manifest.drop(columns=["path", *NUMERIC, "root"], errors="ignore").to_dict("records")
    roots = manifest["root"] if root is None else [root] * len(manifest)
    folders = {folder: Folder(folder) for folder in set(roots)}
    recordings: dict[str, Recording] = {}
    cuts, found = [], []
    rows = manifest[own].itertuples(index=False)
    for position, (row, folder, rest) in enumerate(zip(rows, roots, custom, strict=True)):
        header, reasons = _matched(row, folders[folder])
        found += [(position, column, reason) for column, reason in reasons]
        if not reasons:
            recording = recordings.setdefault(header.path, _recording(row, header))
            cuts.append(_cut(row, recording, rest))
    if found:
        raise ManifestError(located(manifest, found), str(root or "corpora"))
    return CutSet.from_cuts(cuts)


def _recording(row: tuple, header: Header) -> Recording:
    from lhotse import Recording
    from lhotse.audio import AudioSource

    channels = list(range(header.channels))
    source = AudioSource(type="file", channels=channels, source=header.path)
    identity = f"{row.corpus}/{row.path}"
    return Recording(identity, [source], header.sample_rate, header.frames, header.duration_s, channels)


def _cut(row: tuple, recording: Recording, custom: dict) -> MonoCut | MultiCut:
    from lhotse import MonoCut, MultiCut

    start_s, end_s = _range_s(row, recording.duration)
    # whole samples, none past the end: lhotse refuses a cut that comes up short
    rate = recording.sampling_rate
    first, last = round(start_s * rate), min(round(end_s * rate), recording.num_samples)
    channels = recording.channel_ids if pd.isna(row.channel) else [int(row.channel)]
    kind, channel = (MonoCut, channels[0]) if len(channels) == 1 else (MultiCut, channels)
    return kind(row.utterance_id, first / rate, (last - first) / rate, channel, recording=recording, custom=custom)
