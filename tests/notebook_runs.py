"""Runs a notebook as papermill does, for the tests of notebooks."""

import json

from papermill import execute_notebook

from esr_utils import runs


def execute(name, folder, cwd=runs.PROJECT, **parameters):
    """Runs a notebook and returns the text of all its outputs."""
    path = runs.PROJECT / "notebooks" / f"{name}.ipynb"
    done = execute_notebook(path, folder / f"{name}.ipynb", parameters, cwd=str(cwd), progress_bar=False)
    return json.dumps([cell.get("outputs", []) for cell in done.cells])


def exported(folder, *stems, kinds=("csv", "md", "tex")) -> bool:
    """Whether each table or figure was written, in every kind, and holds something."""
    return all((folder / f"{stem}.{kind}").stat().st_size for stem in stems for kind in kinds)
