"""launch.elastic: torchrun's agent, which does not start ranks again after a final status."""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import subprocess
import sys
import time

import pytest

from launch.elastic import PASSED_ON

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


@pytest.mark.parametrize("name", PASSED_ON)
def test_torchrun_has_the_lines_that_are_left_out(name):
    assert f'"{PASSED_ON[name]}' in inspect.getsource(importlib.import_module(name))


@pytest.mark.slow
def test_after_ctrl_c_only_the_ranks_speak(tmp_path):
    """The ranks are in sessions of their own, and torchrun passes the signal on to them."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, signal, sys, threading\n"
        "signal.signal(signal.SIGINT, lambda *_: os._exit(130))\n"
        "open(f'ready_{os.environ[\"RANK\"]}', 'w').close()\n"
        "threading.Event().wait(600)\n"
    )
    options = ["--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.05", "--signals-to-handle", "SIGTERM,SIGINT"]
    command = [sys.executable, "-m", "launch.elastic", *options, str(script)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True) as process:
        deadline = time.monotonic() + 240
        while not all((tmp_path / f"ready_{rank}").exists() for rank in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=240)[1] == ""
    assert process.returncode == 1, "launch/torchrun.sh knows of the signal, and ends with 130"
