"""A kill at any instant costs at most the shard being written: the program that kills writers finds nothing wrong."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def test_killed_writers_leave_no_wrong_row_lose_none_and_leave_nothing_behind(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "losses")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kill_the_cache.py"), "--kills", "10", "--folder", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "nothing was wrong"
    moments = re.search(r"killed at (\d+) moments", done.stdout)
    assert moments is not None
    assert int(moments[1]) > 40  # around fsync, link and unlink of six commits and of merging
