"""Scripts started by their path, from any directory: python data_tools/tokenize.py does what python -m data_tools.tokenize does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_project import REPOSITORY, python_files

ALONE = "launch/needed_packages.py"
"""It imports nothing of w1train, and images run it by its path."""
START = """from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}UP")

"""


def is_script(path: Path) -> bool:
    return '__name__ == "__main__"' in path.read_text(encoding="utf-8")


SCRIPTS = sorted(
    str(path.relative_to(REPOSITORY)) for path in python_files("data_tools", "w1train", "launch", "benchmarks") if is_script(path)
)


def help_of(script: str, directory: Path) -> str:
    """Start a script by its path, in a directory and without PYTHONPATH, and return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = os.path.relpath(REPOSITORY / script, directory)
    ended = subprocess.run([sys.executable, path, "--help"], cwd=directory, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_first_mends_the_place_of_imports(script):
    text = (REPOSITORY / script).read_text(encoding="utf-8")
    assert script == ALONE or START.replace("UP", "/.." * len(Path(script).parts)) in text


@pytest.mark.parametrize("script", ["data_tools/tokenize.py", pytest.param("benchmarks/compare.py", marks=pytest.mark.slow)])
def test_scripts_run_by_their_path(script, tmp_path):
    """data_tools has a tokenize.py and an inspect.py, as Python has, and benchmarks is not installed."""
    assert "usage: " in help_of(script, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != ALONE])
def test_every_script_runs_by_its_path(script, tmp_path):
    for directory in (tmp_path, (REPOSITORY / script).parent):
        assert "usage: " in help_of(script, directory) or "python -m" in help_of(script, directory)
    assert list(tmp_path.iterdir()) == []
