"""Flat results to tables for people: "0.50 [0.41, 0.58]" is a value with its 95 % interval."""

from __future__ import annotations

import pandas as pd

_COLUMNS = ("r@1", "r@5", "r@10", "r@20", "map@10", "accuracy", "uar")
_SYSTEMS = {"zero_shot": "seen", "zero_shot_held_out": "held_out"}  # one row with the trials of the same prompts


def headline(results: dict) -> pd.DataFrame:
    """Trials and zero-shot classification: a row per corpus and prompt set or control (keys: see `evaluation`)."""
    systems: dict[tuple[str, str], dict] = {}
    for key in results:
        if key.count("/") < 2:
            continue  # of a whole corpus, or of the whole file
        corpus, *middle, name = key.split("/")
        system = "/".join(middle).removeprefix("control/")
        if name in _COLUMNS and "=" not in system and "collection" not in system:
            systems.setdefault((corpus, _SYSTEMS.get(system, system)), {})[name] = with_interval(results, key)
    return _table(systems, ["corpus", "prompts or control"], _COLUMNS)


def collection(results: dict) -> pd.DataFrame:
    """Retrieval over every clip of the split, where many are right: precision among the first 10, and mAP."""
    systems: dict[tuple[str, str], dict] = {}
    for key in results:
        if "/collection/" in key:
            corpus, prompts, _, name = key.split("/")
            systems.setdefault((corpus, prompts), {})[name] = with_interval(results, key)
    return _table(systems, ["corpus", "prompts"], ("p@10", "map"))


def groups(results: dict) -> pd.DataFrame:
    """The trials by a property of the clip to be found, such as `gender=female`."""
    systems: dict[tuple[str, str, str], dict] = {}
    for key in results:
        if "=" in key:
            corpus, prompts, group, name = key.split("/")
            systems.setdefault((corpus, group, prompts), {})[name] = with_interval(results, key)
    return _table(systems, ["corpus", "clips", "prompts"], _COLUMNS)


def protocol(results: dict) -> pd.DataFrame:
    """What stands behind each corpus's numbers: clips, candidates a trial, and what the intervals resample."""
    names = ("n_clips", "n_skipped", "n_candidates", "bootstrap")
    corpora = [key.rsplit("/", 1)[0] for key in results if key.endswith("/n_clips")]
    table = pd.DataFrame([{name: results[f"{corpus}/{name}"] for name in names} for corpus in corpora], index=corpora)
    return table.assign(split=results["split"], level=results["level"], seed=results["seed"])


def with_interval(results: dict, key: str) -> str:
    """ "0.50 [0.41, 0.58]", or "0.50" where there is no interval."""
    interval = results.get(f"{key}_ci95")
    return f"{results[key]:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _table(rows: dict[tuple, dict], names: list[str], columns: tuple[str, ...]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=names) if rows else None
    table = pd.DataFrame(list(rows.values()), index=index)
    return table[[column for column in columns if column in table]].fillna("")
