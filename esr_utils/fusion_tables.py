"""Tables 1 to 3 of FS-CLAP with the protocol that each row is of, which the paper's lack; what it cost; the leak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from esr_utils import paper, protocols, runs
from esr_utils.captioned import DIRECTIONS, KS, MAP_K
from esr_utils.embeddings_file import SYSTEMS, what_to_run
from esr_utils.fusion_evaluation import CaptionedSet, Row, level_of
from esr_utils.tables import Cell

MAP = f"map@{MAP_K}"
_COLUMNS = {f"r@{k}": f"R@{k}" for k in KS} | {MAP: f"mAP@{MAP_K}"}


def write_results(grid: Mapping[str, Sequence[Path]], rows: Sequence[Row], **about: str | int) -> None:
    """`results.json` in each run folder: flat keys of `captioned`, and what a protocol cost.

    Args:
        about: of the whole evaluation, such as split, grammar, k and seed.

    Raises:
        ValueError: a row's protocol is leaky.
    """
    for row in rows:
        protocols.refuse_leaky(row.protocol)
    for system, folders in grid.items():
        for i, folder in enumerate(folders):
            values: dict = dict(about) | {"level": level_of({system: [folder]})}
            for row in rows:
                if row.system == system:
                    values |= row.found[i].results(row.corpus, row.protocol)
                    values[f"{row.corpus}/{row.protocol}/fusions"] = row.fusions
                    values[f"{row.corpus}/{row.protocol}/seconds"] = row.seconds
            runs.write_json(folder / "results.json", values)


def caption(sets: Sequence[CaptionedSet], grid: Mapping[str, Sequence[Path]], split: str, grammar: str) -> str:
    """How the numbers of a table came about."""
    corpora = []
    for one in sets:
        right = one.captions.relevant.sum(1).mean()
        size = (
            f"{len(one.clips)} clips of {one.clips['speaker'].nunique()} speakers, {len(one.captions.texts)} captions"
        )
        corpora.append(
            f"{one.corpus}: {size}, each right for {right:.1f} clips, intervals over {one.scorer.bootstrap}s"
        )
    seeds = sorted({len(folders) for folders in grid.values()})
    mean = f"rows are means of {' or '.join(map(str, seeds))} seeds"
    if seeds == [1]:
        mean = "one seed, whose interval does not speak for another"
    return f"Attribute captions: {grammar} grammar; {split} split. {'; '.join(corpora)}; {mean}."


def recall_table(rows: Sequence[Row], columns: Sequence[tuple[str, str]] | None = None) -> pd.DataFrame:
    """The form of Tables 1 and 2: a row per corpus, system and protocol, and the paper's own, marked as the paper's.

    Args:
        columns: (direction, metric) each; by default Table 1's, R@1, 5, 10 audio to text, then text to audio.

    Raises:
        ValueError: a row's protocol is leaky.
    """
    columns = columns or [(direction, f"r@{k}") for direction in DIRECTIONS for k in KS]
    for row in rows:
        protocols.refuse_leaky(row.protocol)
    return _table(rows, columns)


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, str]]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(
        [(row.corpus, row.system, row.protocol) for row in rows], names=["corpus", "system", "protocol"]
    )
    names = [f"{direction} {_COLUMNS[metric]}" for direction, metric in columns]
    return pd.DataFrame([[row.cell(*column) for column in columns] for row in rows], index, names)


def table_one(rows: Sequence[Row]) -> pd.DataFrame:
    """Table 1: Recall@k, both ways; the systems that live elsewhere say what to run where their file is not there."""
    return _with_others(recall_table(rows), rows, 1)


def table_two(rows: Sequence[Row]) -> pd.DataFrame:
    """Table 2: mAP@10, both ways."""
    return _with_others(recall_table(rows, [(direction, MAP) for direction in DIRECTIONS]), rows, 2)


def table_three(rows: Sequence[Row], ablations: Sequence[str]) -> pd.DataFrame:
    """Table 3: mAP@10 and R@1 of the systems that are the full model without a part.

    Args:
        ablations: their labels (`fusion_systems.TABLE_THREE`).
    """
    columns = [(direction, metric) for direction in DIRECTIONS for metric in (MAP, "r@1")]
    return _with_others(recall_table([row for row in rows if row.system in ablations], columns), (), 3)


def _with_others(table: pd.DataFrame, rows: Sequence[Row], number: int) -> pd.DataFrame:
    """Below a table's own rows: those of systems without their file, and the paper's on the same corpora."""
    corpora = list(dict.fromkeys(table.index.get_level_values("corpus")))
    there = {row.system for row in rows}
    missing = [
        (corpus, name, what_to_run(name)) for corpus in corpora for name in SYSTEMS if rows and name not in there
    ]
    parts = [table]
    if missing:
        index = pd.MultiIndex.from_tuples(missing, names=table.index.names)
        parts.append(pd.DataFrame("", index, table.columns))
    published = paper.fsclap_table(number)
    parts.append(published[published.index.get_level_values("corpus").isin(corpora)])
    return pd.concat(parts).sort_index(level="corpus", sort_remaining=False, kind="stable")


def differences(
    rows: Sequence[Row], tests: Sequence[CaptionedSet], system: str, protocol: str = "bi-encoder"
) -> pd.DataFrame:
    """Each row minus that of one system and protocol, on the same queries and replicates (`CaptionScorer.difference`).

    Columns corpus, system, protocol, direction, metric, difference (n.s.: its interval holds 0), p.

    Raises:
        ValueError: there is no such row, or a row's protocol is leaky.
    """
    scorers = {test.corpus: test.scorer for test in tests}
    reference = {row.corpus: row for row in rows if (row.system, row.protocol) == (system, protocol)}
    if not reference:
        raise ValueError(f"no row of system {system!r} by protocol {protocol!r} to compare with")
    parts = []
    for row in rows:
        protocols.refuse_leaky(row.protocol)
        if row is (other := reference[row.corpus]):
            continue
        part = scorers[row.corpus].difference(row.found, other.found)
        bounds = zip(part.pop("difference"), part.pop("low"), part.pop("high"), strict=True)
        part.insert(2, "difference", [Cell(v, (low, high), difference=True, digits=3) for v, low, high in bounds])
        parts.append(part.assign(corpus=row.corpus, system=row.system, protocol=row.protocol))
    if not parts:
        return pd.DataFrame(columns=["corpus", "system", "protocol", "direction", "metric", "difference", "p"])
    table = pd.concat(parts, ignore_index=True)
    return table[["corpus", "system", "protocol", "direction", "metric", "difference", "p"]]


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """`differences` as a row per corpus, system and protocol, a column per direction and metric."""
    named = table.assign(column=table["direction"] + " " + table["metric"].map(_COLUMNS))
    index = ["corpus", "system", "protocol"]
    order = list(dict.fromkeys(named["column"]))
    rows = named[index].drop_duplicates().apply(tuple, axis=1)
    return (
        named.pivot(index=index, columns="column", values="difference").loc[list(rows), order].rename_axis(columns=None)
    )


def cost_table(rows: Sequence[Row]) -> pd.DataFrame:
    """What each row cost: fused pairs, seconds; of a rerank the ceiling; and the modality gap."""
    index = pd.MultiIndex.from_tuples(
        [(row.corpus, row.system, row.protocol) for row in rows], names=["corpus", "system", "protocol"]
    )
    columns = {
        "fusions": [row.fusions for row in rows],
        "seconds": [round(row.seconds, 1) for row in rows],
        **{f"{d} ceiling": ["" if not row.ceiling else Cell(row.ceiling[d]) for row in rows] for d in DIRECTIONS},
        "modality gap": ["" if row.gap is None else Cell(row.gap) for row in rows],
    }
    return pd.DataFrame(columns, index)


def leak_table(rows: Sequence[Row]) -> pd.DataFrame:
    """What `matched` would have claimed, beside the honest protocols of the same systems. Not a result."""
    leaky = {row.system for row in rows if row.protocol in protocols.LEAKY}
    shown = [row for row in rows if row.system in leaky]
    table = _table(shown, [(direction, metric) for direction in DIRECTIONS for metric in ("r@1", MAP)])
    table.insert(0, "leaky", ["LEAKY: diagnosis only" if row.protocol in protocols.LEAKY else "" for row in shown])
    return table
