"""The notebooks of the documentation: their cells compile, name what the interface has, and run."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from nbformat import NotebookNode

import w1train
from tests.notebooks import NOTEBOOKS, execute, read

LARGEST = 256 << 10
"""Bytes of a notebook with its outputs, for a repository that stays small."""


def cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def code(notebook: NotebookNode) -> ast.Module:
    return ast.parse("\n".join(cell.source for cell in cells(notebook)))


def unknown_names(tree: ast.Module) -> set[str]:
    """Return what the code asks of w1train, of a `run` and of a `model`, and what is not there, and arguments that do not exist."""
    unknown = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = _owner(node.value.id)
            unknown |= {f"{node.value.id}.{node.attr}"} if owner is not None and not hasattr(owner, node.attr) else set()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            function = getattr(_owner(node.func.value.id), node.func.attr, None)
            unknown |= {f"{node.func.attr}({keyword.arg}=)" for keyword in node.keywords if not _takes(function, keyword.arg)}
    return unknown


def _owner(name: str) -> object:
    return {"w1train": w1train, "run": w1train.Run, "model": w1train.TrainedModel}.get(name)


def _takes(function: object, keyword: str | None) -> bool:
    """Tell whether a function of the interface takes an argument. All other functions take any."""
    if function is None or not callable(function) or keyword is None:
        return True
    return keyword in inspect.signature(function).parameters


def test_there_is_a_notebook():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_names_what_exists(path):
    tree = code(read(path))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {"train", "load", "generate", "score", "curve"} <= names
    assert unknown_names(tree) == set()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_the_outputs_of_one_execution(path):
    notebook = read(path)
    executed = [cell.execution_count for cell in cells(notebook)]
    assert executed == list(range(1, len(executed) + 1))
    assert all(output.output_type != "error" for cell in cells(notebook) for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in cells(notebook) for output in cell.outputs)
    assert path.stat().st_size < LARGEST


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path: Path, tmp_path: Path):
    """In an empty directory. A cell that fails raises its error here."""
    notebook = execute(path, tmp_path)
    texts = [output.get("text", "") for cell in cells(notebook) for output in cell.outputs]
    assert not any(output.get("name") == "stderr" for cell in cells(notebook) for output in cell.outputs), texts


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("w1train.train('demo', {}, progress=True)", set()),
        ("w1train.fit('demo')", {"w1train.fit"}),
        ("model.generate('a', num_tokens=3)\nmodel.checkpoint.name", set()),
        ("model.genrate('a')", {"model.genrate"}),
        ("model.generate('a', tokens=3)", {"generate(tokens=)"}),
        ("run.curve('loss', knd='train')", {"curve(knd=)"}),
        ("plt.plot(x, anything=1)", set()),
    ],
)
def test_what_does_not_exist_is_found(text, unknown):
    assert unknown_names(ast.parse(text)) == unknown
