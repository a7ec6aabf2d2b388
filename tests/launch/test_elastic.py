"""launch.elastic: torchrun's agent, which does not start ranks again after a final status."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A rank that writes down each of its starts, and ends with the status that it is given.
RANK = """\
import os, sys
open(sys.argv[1], "a").write(os.environ["RANK"])
sys.exit(int(sys.argv[2]))
"""


_SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((75, 75, 1), (130, 130, 1), (1, 1, 2))]


@pytest.mark.parametrize(("status", "expected", "num_starts"), [(2, 2, 1), *_SLOW])
def test_only_what_may_succeed_is_started_again(tmp_path, status, expected, num_starts):
    script, starts = tmp_path / "rank.py", tmp_path / "starts"
    script.write_text(RANK)
    options = ["--standalone", "--nproc-per-node", "1", "--max-restarts", "1", "--monitor-interval", "0.05"]
    command = [sys.executable, "-m", "launch.elastic", *options, str(script), str(starts), str(status)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == expected, result.stderr
    assert starts.read_text() == "0" * num_starts
    assert "Traceback" not in result.stderr
