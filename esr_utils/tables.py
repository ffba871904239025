"""Results to tables for people, and tables to files: "0.50 [0.41, 0.58]" is a value with its 95 % interval."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from esr_utils.runs import atomic_path

_COLUMNS = ("r@1", "r@5", "r@10", "r@20", "map@10", "accuracy", "uar")
_SYSTEMS = {"zero_shot": "seen", "zero_shot_held_out": "held_out"}  # one row with the trials of the same prompts


@dataclass(frozen=True)
class Cell:
    """A value and its 95 % interval: one cell in a table for people, three columns in a CSV.

    A difference carries its sign, and "n.s." where its interval holds 0: nothing is claimed then.
    """

    value: float
    interval: tuple[float, float] | None = None
    difference: bool = False
    digits: int = 2

    @property
    def settled(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        form = f"{{:{'+' * self.difference}.{self.digits}f}}"
        value, *bounds = (form.format(round(n, self.digits) + 0.0) for n in (self.value, *(self.interval or ())))
        shown = f"{value} [{', '.join(bounds)}]" if bounds else value
        return shown + " n.s." * (self.difference and bool(bounds) and not self.settled)

    __repr__ = __str__  # what pandas shows


def cell(results: dict, key: str) -> Cell:
    """A value of flat results, with its interval where it has one."""
    interval = results.get(f"{key}_ci95")
    return Cell(results[key], tuple(interval) if interval else None)


def headline(results: dict) -> pd.DataFrame:
    """Trials and classification: a row per corpus and system or control (keys: see `evaluation`)."""
    systems: dict[tuple[str, str], dict] = {}
    for key in results:
        if key.count("/") < 2:
            continue  # of a whole corpus, or of the whole file
        corpus, *middle, name = key.split("/")
        system = "/".join(middle).removeprefix("control/")
        if name in _COLUMNS and "=" not in system and "collection" not in system:
            systems.setdefault((corpus, _SYSTEMS.get(system, system)), {})[name] = cell(results, key)
    return _table(systems, ["corpus", "ranked by"], _COLUMNS)


def collection(results: dict) -> pd.DataFrame:
    """Retrieval over every clip of the split, where many are right: precision among the first 10, and mAP."""
    systems: dict[tuple[str, str], dict] = {}
    for key in results:
        if "/collection/" in key:
            corpus, system, _, name = key.split("/")
            systems.setdefault((corpus, system), {})[name] = cell(results, key)
    return _table(systems, ["corpus", "ranked by"], ("p@10", "map"))


def groups(results: dict) -> pd.DataFrame:
    """The trials by a property of the clip to be found, such as `gender=female`, and how many clips have it."""
    systems: dict[tuple[str, str, str], dict] = {}
    for key in results:
        if "=" in key:
            corpus, system, group, name = key.split("/")
            value = results[key] if name == "clips" else cell(results, key)
            systems.setdefault((corpus, group, system), {})[name] = value
    return _table(systems, ["corpus", "group", "ranked by"], ("clips", *_COLUMNS))


def protocol(results: dict) -> pd.DataFrame:
    """What stands behind each corpus's numbers: clips, candidates a trial, and what the intervals resample."""
    names = ("n_clips", "n_skipped", "n_candidates", "bootstrap")
    corpora = [key.rsplit("/", 1)[0] for key in results if key.endswith("/n_clips")]
    table = pd.DataFrame([{name: results[f"{corpus}/{name}"] for name in names} for corpus in corpora], index=corpora)
    return table.assign(split=results["split"], level=results["level"], seed=results["seed"]).rename_axis("corpus")


def _table(rows: dict[tuple, dict], names: list[str], columns: tuple[str, ...]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=names) if rows else None
    table = pd.DataFrame(list(rows.values()), index=index)
    return table[[column for column in columns if column in table]].fillna("")


# Files ------------------------------------------------------------------------------------------------------


def export(table: pd.DataFrame, stem: str | Path, caption: str = "") -> list[Path]:
    """Writes a table as `<stem>.csv`, `.md` and `.tex`, and returns the three paths.

    The CSV holds plain numbers: a `Cell` is `<column>`, `<column> low` and `<column> high`. Markdown and LaTeX hold
    what a reader sees. The LaTeX is a `table` with booktabs rules and needs `\\usepackage{booktabs,graphicx}`; whatever
    LaTeX would take for a command is escaped. The index becomes columns where it has a name.
    """
    stem = Path(stem)
    flat = table.reset_index() if any(table.index.names) else table
    numbers, text = _numbers(flat), flat.map(_shown)
    markdown = text.map(lambda shown: shown.replace("|", "\\|"))
    markdown.columns = [_joined(column).replace("|", "\\|") for column in text.columns]
    sides = [":--" if text.iloc[:, i].map(_is_text).any() else "--:" for i in range(text.shape[1])]
    lines = [markdown.columns, sides, *markdown.itertuples(index=False)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    contents = {
        "csv": numbers.to_csv(index=False),
        "md": (f"{caption}\n\n" if caption else "") + body + "\n",
        "tex": _latex_table(text, caption),
    }
    written = []
    for suffix, content in contents.items():
        written.append(stem.with_name(f"{stem.name}.{suffix}"))
        with atomic_path(written[-1]) as temporary:
            temporary.write_text(content, encoding="utf-8")
    return written


def _joined(column: object) -> str:
    """A column of two levels by one name: ("esd", "R@1") is "esd R@1"."""
    return " ".join(str(part) for part in column if part) if isinstance(column, tuple) else str(column)


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    found = {}
    for i, column in enumerate(table.columns):
        name, values = _joined(column), table.iloc[:, i]
        cells = values.map(lambda value: isinstance(value, Cell))
        found[name] = values.where(~cells, values.map(lambda value: getattr(value, "value", value)))
        if any(value.interval for value in values[cells]):
            for side, bound in enumerate(("low", "high")):
                found[f"{name} {bound}"] = [_bound(value, side) for value in values]
    return pd.DataFrame(found)


def _bound(value: object, side: int) -> object:
    return value.interval[side] if isinstance(value, Cell) and value.interval else ""


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else str(Cell(value))
    return str(value)


def _is_text(shown: str) -> bool:
    return shown[:1].isalpha()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "−": r"$-$", "–": "--", "±": r"$\pm$", "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$",
    "τ": r"$\tau$", "λ": r"$\lambda$", "Δ": r"$\Delta$", "·": r"$\cdot$", "[": "{[}", "]": "{]}",
}  # fmt: skip


def _latex(text: str) -> str:
    """Escaped; a bracket in braces, since one that opens a row would be taken for the option of the `\\\\` before."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text)  # a minus, not a hyphen
    return "".join(_LATEX.get(character, character) for character in text)


def _latex_table(text: pd.DataFrame, caption: str) -> str:
    """Own code, not pandas: its writer leaves the names of index levels unescaped and asks for multirow."""
    sides = "".join("l" if text.iloc[:, i].map(_is_text).any() else "r" for i in range(text.shape[1]))
    head = [" & ".join(_latex(_joined(column)) for column in text.columns) + r" \\"]
    if isinstance(text.columns, pd.MultiIndex):
        head = _two_level_head(text.columns)
    rows = [" & ".join(map(_latex, row)) + r" \\" for row in text.itertuples(index=False)]
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table}[t]",
        r"\centering",
        *([rf"\caption{{{_latex(caption)}}}"] if caption else []),
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{sides}}}",
        r"\toprule",
        *head,
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _two_level_head(columns: pd.MultiIndex) -> list[str]:
    """Columns that share an upper name under one heading, with a rule below it."""
    spans: list[list] = []  # upper name, first column, last column (from 1)
    for i, (upper, lower) in enumerate(columns, start=1):
        if spans and lower and spans[-1][0] == upper:
            spans[-1][2] = i
        else:
            spans.append([upper if lower else "", i, i])
    above = [rf"\multicolumn{{{last - first + 1}}}{{c}}{{{_latex(str(name))}}}" for name, first, last in spans]
    rules = [rf"\cmidrule(lr){{{first}-{last}}}" for name, first, last in spans if name]
    below = [_latex(str(lower or upper)) for upper, lower in columns]
    return [" & ".join(above) + r" \\", " ".join(rules), " & ".join(below) + r" \\"]
