"""Several processes for one training, as accelerate's launcher starts them; they end with whoever started them.

A process that is killed with SIGKILL cannot take those that it started with it. They would go on unseen, and keep the
run folder locked; so each looks to it itself that its parent is still there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

_LOOK_S = 1.0  # seconds from one look at the parent to the next


def launch(module: str, arguments: list[str], processes: int, cpu: bool) -> int:
    """Runs `python -m module *arguments` in several processes that share their work, and waits for them.

    Args:
        cpu: whether they leave GPUs alone.

    Returns:
        0, or another number if one of them has failed.
    """
    command = [sys.executable, "-m", __name__, "--standalone", f"--nproc_per_node={processes}", "-m", module]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if cpu else {})
    launcher = subprocess.Popen([*command, *arguments], env=environment)
    try:
        return launcher.wait()
    finally:  # interrupted: the launcher takes its workers with it, if it is asked to end and not killed
        launcher.terminate()
        launcher.wait()


def end_with_parent() -> None:
    """From now on this process ends, as by SIGTERM, when the one that started it is gone."""
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":  # torchrun, which does not end with its parent either
    from torch.distributed.run import main

    end_with_parent()
    main()
