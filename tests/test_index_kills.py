"""A process that is killed while it refreshes an index leaves nothing lost, doubled or torn."""

from __future__ import annotations

import os
import subprocess
import sys

from esr_utils import runs


def test_ten_kills():
    command = [sys.executable, runs.PROJECT / "benchmarks" / "index_kills.py", "10"]
    environment = os.environ | {"PYTHONPATH": str(runs.PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each followed by a rerun: 0 moments lost, 0 doubled" in done.stdout
    assert int(done.stdout.split()[2]) >= 1  # kills that met it at work
