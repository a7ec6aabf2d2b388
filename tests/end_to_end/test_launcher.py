"""`w1train train --nproc 2`, with ranks that really train, from another directory than the repository."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.end_to_end.test_resume import require_equal
from tests.test_project import REPOSITORY


@pytest.mark.slow  # each rank imports torch and megatron-core; tests/test_cli.py and tests/test_local_ranks.py test the parts
def test_a_run_of_the_launcher_is_the_run_of_torchrun(tiny_run, undisturbed):
    words = ["train", "--nproc", "2", "--config-dir", "recipes", "recipe=tiny", f"runs_dir={tiny_run.runs_dir}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for options in (["--max-steps", "5"], []):
        command = [sys.executable, "-P", "-m", "w1train", *words, *options]
        result = subprocess.run(command, cwd=tiny_run.data, env=environment, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr
    require_equal(tiny_run, undisturbed(2, "fp32"))
    logs = sorted((tiny_run.path / "logs").glob("train_*/rank_00001.log"))
    assert [log.read_text() for log in logs] == ["", ""]
