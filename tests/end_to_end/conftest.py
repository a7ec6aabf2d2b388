"""Data made once, and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import run_distributed
from tests.end_to_end.runs import TinyRun, make_data, output_to


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, tokenizer, datasets and recipe."""
    directory = tmp_path_factory.mktemp("tiny-data")

    def make(rank: int, world_size: int) -> None:
        with output_to(directory / "log"):
            make_data(directory)

    # In a process of its own: the tokenizer's threads would make forking from this one unsafe.
    run_distributed(make, 1, process_group=False)
    return directory


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> TinyRun:
    """A run that has not begun."""
    return TinyRun(tiny_data, tmp_path / "runs")
