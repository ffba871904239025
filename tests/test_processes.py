"""Processes that end with who started them, however that one ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from esr_utils import processes, runs

STARTS_TWO = "import sys; from esr_utils.processes import launch; sys.exit(launch('worker', ['a b'], 2, cpu=True))"
WORKER = """
import os, pathlib, sys, time
from esr_utils.processes import end_with_parent
end_with_parent()
assert sys.argv[1:] == ["a b"] and os.environ["WORLD_SIZE"] == "2" and os.environ["ACCELERATE_USE_CPU"] == "true"
pathlib.Path("rank" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(%s)
"""


@pytest.fixture
def started(tmp_path):
    """From how long its workers work, a process that waits for two of them; none of the three is left in the end."""
    found = []

    def start(seconds: float) -> subprocess.Popen:
        (tmp_path / "worker.py").write_text(WORKER % seconds)
        environment = os.environ | {"PYTHONPATH": f"{runs.PROJECT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"}
        found.append(subprocess.Popen([sys.executable, "-c", STARTS_TWO], env=environment, cwd=tmp_path))
        return found[0]

    yield start
    left = [*psutil.Process(found[0].pid).children(recursive=True), found[0]] if found[0].poll() is None else []
    pids = [int(path.read_text()) for path in tmp_path.glob("rank*")]
    for process in [*left, *(psutil.Process(pid) for pid in pids if psutil.pid_exists(pid))]:
        process.kill()


def workers(folder, seconds: float = 60.0) -> list[psutil.Process]:
    """The two, once they are there."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        there = [(folder / f"rank{i}") for i in range(2) if (folder / f"rank{i}").is_file()]
        if len(there) == 2 and all(path.read_text() for path in there):
            return [psutil.Process(int(path.read_text())) for path in there]
        time.sleep(0.1)
    raise AssertionError("the workers did not start")


def test_the_work_of_two_is_waited_for(started, tmp_path):
    assert started(0.0).wait(60) == 0
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0", "rank1"}


@pytest.mark.parametrize("killed", ["who waits", "the launcher"])
def test_workers_end_with_whoever_started_them(killed, started, tmp_path):
    waiting = started(300.0)
    two = workers(tmp_path)
    (launcher,) = {one.parent() for one in two}
    assert launcher.parent().pid == waiting.pid
    os.kill(waiting.pid if killed == "who waits" else launcher.pid, signal.SIGKILL)
    assert waiting.wait(30) != 0
    _, left = psutil.wait_procs([*two, launcher], timeout=15 * processes._LOOK_S)
    assert not left
