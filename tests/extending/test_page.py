"""docs/extending.md itself: what each section says that it touches, and that its code keeps the rules of the project."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests import prose
from tests.extending.examples import PAGE, REPOSITORY, apply, examples

FILES = {
    "A noise process": 2,
    "An objective": 2,
    "A rule of sampling": 2,
    "A kernel of sampling": 2,
    "An optimizer": 2,
    "An attention backend": 2,
    "A record sink": 2,
    "A model family": 1,
}
each_example = pytest.mark.parametrize("example", [pytest.param(example, id=title) for title, example in examples().items()])


def test_the_number_of_files_that_each_example_touches():
    """The new file and its registration; never another."""
    assert {title: example.num_files for title, example in examples().items()} == FILES
    assert {title: example.stated_files for title, example in examples().items()} == FILES
    rows = re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \| (\d+) \|", PAGE.read_text(), re.MULTILINE)
    assert [(title[0].upper() + title[1:], int(number)) for title, _, number in rows] == list(FILES.items())
    assert [anchor for *_, anchor, _ in rows] == [title.lower().replace(" ", "-") for title in FILES]


@each_example
def test_new_files_are_new_and_changed_files_are_there(example):
    assert not [path for path in example.new_files if (REPOSITORY / path).exists()]
    for path, diff in example.changes.items():
        assert apply(diff, (REPOSITORY / path).read_text()) != (REPOSITORY / path).read_text()


def test_the_files_keep_the_rules_of_the_project(tmp_path):
    """Format, imports and prose, as `make lint` and the tests of the project check them in files that exist."""
    paths = []
    for example in examples().values():
        changed = {path: apply(diff, (REPOSITORY / path).read_text()) for path, diff in example.changes.items()}
        for path, text in {**example.new_files, **changed}.items():
            paths.append(tmp_path / path)
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            paths[-1].write_text(text)
    assert not [problem for path in paths for problem in prose.problems(path)]
    settings = ["--config", str(REPOSITORY / "pyproject.toml"), "--config", "lint.isort.known-first-party = ['w1train']"]
    for command in (["check"], ["format", "--check"]):
        arguments = [sys.executable, "-m", "ruff", *command, "--no-cache", *settings, *map(str, paths)]
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("diff", "message"),
    [("@@\n-gone\n+new\n", "0 times"), ("@@\n twice\n+new\n", "2 times")],
)
def test_a_change_that_does_not_fit_is_an_error(diff, message):
    with pytest.raises(AssertionError, match=message):
        apply(diff, "once\ntwice\ntwice\n")
    assert apply("@@\n once\n-twice\n twice\n+new\n", "once\ntwice\ntwice\n") == "once\ntwice\nnew\n"
