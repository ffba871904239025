"""Runs a notebook as papermill does, for the tests of notebooks."""

import atexit
import json
import os

from papermill import execute_notebook
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import Engine, papermill_engines

from esr_utils import runs


class OneKernel(Engine):
    """Notebooks one after another in one kernel, emptied in between: to start one takes longer than most notebooks."""

    first: PapermillNotebookClient | None = None

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        if cls.first is None:
            cls.first = PapermillNotebookClient(nb_man, kernel_name=kernel_name)
            cls.first.create_kernel_manager()
            cls.first.start_new_kernel()
            cls.first.start_new_kernel_client()
            atexit.register(cls.first._cleanup_kernel)
        client = PapermillNotebookClient(nb_man, km=cls.first.km, kernel_name=kernel_name)
        client.kc = cls.first.kc
        client.wait_for_reply(client.kc.execute(f"%reset -f\nimport os\nos.chdir({os.getcwd()!r})\ndel os"))
        client.execute()


papermill_engines.register("one-kernel", OneKernel)


def execute(name, folder, cwd=runs.PROJECT, **parameters):
    """Runs a notebook and returns the text of all its outputs."""
    path, out = runs.PROJECT / "notebooks" / f"{name}.ipynb", folder / f"{name}.ipynb"
    done = execute_notebook(path, out, parameters, engine_name="one-kernel", cwd=str(cwd), progress_bar=False)
    return json.dumps([cell.get("outputs", []) for cell in done.cells])


def exported(folder, *stems, kinds=("csv", "md", "tex")) -> bool:
    """Whether each table or figure was written, in every kind, and holds something."""
    return all((folder / f"{stem}.{kind}").stat().st_size for stem in stems for kind in kinds)
