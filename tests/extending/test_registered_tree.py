"""A copy of the program with all examples of docs/extending.md: existing tests pass there, and what the page says to type works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.extending.examples import REPOSITORY, apply, examples
from tests.test_project import tracked_files

TESTS_OF_TABLES = (
    "tests/test_registered_names.py",
    "tests/attention/test_choice.py",
    "tests/conversion/test_config_values.py",
    "tests/diffusion/test_process.py",
    "tests/engine/test_optimizers.py",
    "tests/records/test_watch.py",
    "tests/sampling/test_denoise.py",
)
"""The tests that read a table in which an example is registered."""
SETTINGS = (
    "diffusion.objective=quadratic",
    "diffusion.loss=generalized",
    "sampling.remasking=margin",
    "attention.backend=rows",
    "optimizer.name=adabelief",
)
"""What the page says to type."""
TWO_STEPS = ("schedule.stages.warmup.tokens=256", "schedule.stages.stable.tokens=256", "sampling.interval=2")
RUN = f'''\
"""A run with every example."""

import json



def test_a_run_of_two_steps(tiny_run):
    tiny_run.train(*{TWO_STEPS!r}, *{SETTINGS!r}).require(0)
    best = json.loads((tiny_run.path / "best_loss.json").read_text())
    assert best["step"] in (1, 2) and best["loss"] > 0
    assert tiny_run.samples()
'''

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the program, write the new files of all sections, and apply all changes. Nothing else changes."""
    root = tmp_path_factory.mktemp("registered")
    for path in tracked_files():
        copy = root / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    for example in examples().values():
        for name, text in example.new_files.items():
            (root / name).write_text(text)
        for name, diff in example.changes.items():
            (root / name).write_text(apply(diff, (root / name).read_text()))
    return root


def run_in(tree: Path, *words: str) -> str:
    """Run Python in the tree, and return what it prints. A status that is not 0 fails the test."""
    variables = os.environ | {"PYTHONPATH": str(tree)}
    result = subprocess.run([sys.executable, *words], cwd=tree, env=variables, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_tests_of_the_tables_pass(tree):
    run_in(tree, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not gpu and not slow", *TESTS_OF_TABLES)


def test_the_command_line_takes_every_name(tree):
    shown = run_in(tree, "-m", "w1train.pretrain", "recipe=demo", *SETTINGS, "--cfg", "job")
    for setting in SETTINGS:
        assert f"{setting.rpartition('.')[2].replace('=', ': ')}\n" in shown


def test_a_run_uses_all_examples(tree):
    (tree / "tests/end_to_end/test_run_of_examples.py").write_text(RUN)
    run_in(tree, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/end_to_end/test_run_of_examples.py")
