"""funasr's classes without the rest of funasr, and in silence."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from types import ModuleType


@contextmanager
def quiet() -> Iterator[None]:
    """What funasr writes to the terminal goes nowhere."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def funasr_modules(*names: str) -> Iterator[list[ModuleType]]:
    """The modules `funasr.<name>`, within the context.

    `import funasr` imports every model it has, which takes ten seconds and writes to the terminal. If nobody has done
    so yet, an empty package stands for it while these are imported and used, and nothing is left of that.

    Raises:
        ImportError: funasr, or what it needs, is not installed.
    """
    loaded = any(name.split(".")[0] == "funasr" for name in sys.modules)
    if not loaded:
        if (spec := find_spec("funasr")) is None:
            raise ImportError("funasr is not installed")
        package = ModuleType("funasr")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["funasr"] = package
    try:
        with quiet():
            modules = [importlib.import_module(f"funasr.{name}") for name in names]
        yield modules
    finally:
        if not loaded:
            for name in [name for name in sys.modules if name.split(".")[0] == "funasr"]:
                del sys.modules[name]
