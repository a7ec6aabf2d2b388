"""benchmarks/h100.sh keeps to its budget, goes on after a failure, and hands its arguments to every part."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benchmarks import correctness
from w1train.diagnosis.kernel_checks import Check, run_check

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "h100.sh"

# Stands for Python: says what it was asked, and fails or hangs in one part.
STUB = """#!/usr/bin/env bash
echo "python $*"
[[ "$*" != *"$FAILING"* ]] || exit 3
"""


@pytest.fixture
def run(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def call(*arguments, failing="nothing", budget="300", **more):
        environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(stub), "BUDGET": budget, "FAILING": failing, **more}
        done = subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, (tmp_path / "out" / "h100.log").read_text()

    return call


def test_every_part_gets_the_arguments(run):
    status, shown, log = run("--device", "cpu", "--tiny")
    assert status == 0
    assert shown == log
    lines = [line for line in log.splitlines() if line.startswith("python -m")]
    assert [line.split()[2] for line in lines] == ["benchmarks.correctness", "benchmarks.attention", "benchmarks.step"]
    assert all(line.endswith("--device cpu --tiny") for line in lines)


def test_a_part_that_fails_does_not_stop_the_others(run):
    status, _, log = run(failing="benchmarks.correctness")
    assert status == 1
    assert "correctness: status 3" in log
    assert "step: status 0" in log


def test_nothing_begins_without_time(run):
    status, _, log = run(budget="5")
    assert status == 1
    assert "python -m" not in log
    assert "step: not run" in log


def test_pieces_that_are_not_there(run, tmp_path):
    status, _, log = run(PARTS=str(tmp_path))
    assert status == 1
    assert "cannot unpack" in log


def test_correctness_dry_run(tmp_path, capsys):
    assert correctness.main(["--device=cpu", "--tiny", "--report", f"--output={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "12 of 53 checks ran on cpu; 0 are wrong" in shown
    assert "Triton's kernels need a GPU" in next(tmp_path.glob("*-correctness.md")).read_text()


def test_a_wrong_kernel_is_seen():
    wrong = Check("kernel", "case", {"output": 1e-3, "gradient 1": 2e-2})
    assert wrong.row()[1] == "WRONG"
    assert not wrong.passed
    assert Check("kernel", "case", {"output": 1e-3}).row()[1] == "right"
    assert not Check("kernel", "case", {"output": float("nan")}).passed
    raising = Check("kernel", "case")
    run_check(raising, lambda: 1 / 0)
    assert raising.row()[1] == "WRONG"
    assert "ZeroDivisionError" in raising.row()[0]
    assert Check("kernel", "case", reason="no GPU").row()[1] == "not run"
