"""The names of ``import w1train``: one list for Python, for type checkers and for editors."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import w1train

REPOSITORY = Path(__file__).resolve().parent.parent


def test_every_name_is_there():
    for name in w1train.__all__:
        assert getattr(w1train, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonesuch'"):
        w1train.nonesuch  # noqa: B018


def test_type_checkers_see_the_names_that_python_sees():
    tree = ast.parse((REPOSITORY / "w1train/__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {alias.asname: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == w1train._MODULES


def test_no_module_takes_the_place_of_a_function():
    """``import w1train.train`` would set w1train.train to the module, and w1train.train(...) would be refused."""
    modules = {path.stem for path in (REPOSITORY / "w1train").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert modules & set(w1train.__all__) == set()


def test_everything_has_a_docstring():
    for name in w1train.__all__:
        value = getattr(w1train, name)
        members = [value, *(member for key, member in vars(value).items() if key[0] != "_")] if inspect.isclass(value) else [value]
        for member in members:
            is_code = inspect.isfunction(member) or isinstance(member, property | type)
            assert not is_code or member.__doc__, f"{name}: {member}"


USER_CODE = """
from pathlib import Path
import w1train

run = w1train.train("demo", {"training.seed": 1}, progress=False)
steps, losses = run.curve("loss")
first: float = float(losses[0])
model: w1train.TrainedModel = w1train.load(run.path, "average")
text: str = model.generate("a").text
texts: list[str] = [sample.text for sample in model.generate(["a", "b"], num_tokens=3)]
bits: float = model.score("a").bits_per_byte
all_bits: list[float] = [score.bits_per_byte for score in model.score(["a"])]
number: int = w1train.open_dataset(Path("x")).num_tokens
wrong: int = model.generate("a").text
w1train.load(run, steps=3)
"""


@pytest.mark.slow
def test_code_of_users_is_checked_by_mypy(tmp_path):
    (tmp_path / "code.py").write_text(USER_CODE)
    command = [sys.executable, "-m", "mypy", "--config-file", str(REPOSITORY / "pyproject.toml"), "--strict", str(tmp_path / "code.py")]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", timeout=600, check=False)
    errors = [line.partition("error: ")[2] for line in process.stdout.splitlines() if ": error: " in line]
    assert [error[:39] for error in errors] == ["Incompatible types in assignment (expre", 'Unexpected keyword argument "steps" for'], (
        process.stdout
    )
