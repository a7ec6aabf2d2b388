"""The notebooks of docs/notebooks, and their execution.

python -m tests.notebooks    # execute all of them, and write their outputs
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPOSITORY / "docs/notebooks").glob("*.ipynb"))
_MOST_SECONDS = 3600
"""Seconds that a cell may take; a minute on two idle cores."""


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: Path, directory: Path) -> NotebookNode:
    """Return the notebook with the outputs of an execution in a directory, by a Python that imports this checkout."""
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    notebook = read(path)
    resources = {"metadata": {"path": str(directory)}}
    client = NotebookClient(notebook, timeout=_MOST_SECONDS, startup_timeout=_MOST_SECONDS, resources=resources, record_timing=False)
    client.execute()
    # The version of Python says nothing to a reader, and would differ in each execution.
    notebook.metadata.pop("language_info", None)
    return notebook


if __name__ == "__main__":
    for each in NOTEBOOKS:
        with tempfile.TemporaryDirectory() as empty:
            executed = execute(each, Path(empty))
        nbformat.write(executed, each)
        print(each)
