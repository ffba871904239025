"""The command that is killed while it makes an index or brings it up to date leaves nothing lost, doubled or torn."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from esr_utils import runs


def test_two_kills(tiny_run):
    command = [sys.executable, runs.PROJECT / "benchmarks" / "index_kills.py", "2", tiny_run]
    environment = os.environ | {"PYTHONPATH": str(runs.PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "each followed by a rerun: 0 moments lost, 0 doubled; 0 gone" in done.stdout
    assert int(re.match(r"(\d+) kills of esr index", done.stdout)[1]) == 2
