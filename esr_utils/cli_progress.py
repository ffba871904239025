"""While the `esr` command is at work: its progress, its end at Ctrl-C, and the silence of libraries."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Bar:
    """Progress on stderr, where that is a terminal; and an end at Ctrl-C, also where a library has swallowed that."""

    def __init__(self, shown: bool) -> None:
        self.shown = shown

    def __enter__(self) -> Callable[[int, int, float], None]:
        self.started, self.interrupted = time.monotonic(), False
        self.before = signal.signal(signal.SIGINT, self.interrupt)
        self.bar = tqdm(unit="file", miniters=0, disable=not self.shown)
        return self.show

    def interrupt(self, *_: object) -> None:
        self.interrupted = True
        raise KeyboardInterrupt

    def show(self, done: int, total: int, seconds: float) -> None:
        if self.interrupted:  # silero-vad catches whatever comes while it loads
            raise KeyboardInterrupt
        speed = seconds / max(time.monotonic() - self.started, 1e-3)
        self.bar.total = total
        self.bar.set_postfix_str(f"{seconds / 3600:.2f} h heard, {speed:.0f} x real time", refresh=False)
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)
        self.bar.close()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What libraries in C write to stderr, as libmpg123 does of every damaged file, goes nowhere; Python's own comes.

    For a process whose stderr belongs to it alone; where sys.stderr is not that, nothing is changed.
    """
    stderr = sys.stderr
    if stderr is None or stderr is not sys.__stderr__:
        yield
        return
    stderr.flush()
    with open(os.devnull, "wb") as nowhere, open(os.dup(2), "w", 1, stderr.encoding, "backslashreplace") as sys.stderr:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(sys.stderr.fileno(), 2)
            sys.stderr = stderr
