"""Data made once, and runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import TinyRun, launch, make_data, output_to
from w1train.config.compose import load_config


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, tokenizer, datasets and recipe."""
    directory = tmp_path_factory.mktemp("tiny-data")

    def make(rank: int) -> int:
        with output_to(directory / "log"):
            make_data(directory)
        return 0

    # In a process of its own: the tokenizer's threads would make forking from this one unsafe.
    assert launch(1, make) == [0], (directory / "log").read_text()
    load_config(["recipe=tiny"], [str(directory / "recipes")])  # composed here for all ranks
    return directory


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> TinyRun:
    """A run that has not begun."""
    return TinyRun(tiny_data, tmp_path / "runs")


@pytest.fixture(scope="session")
def undisturbed(tiny_data, tmp_path_factory):
    """(world size, precision) -> the run that nothing happens to; each is made once."""
    runs: dict[tuple[int, str], TinyRun] = {}

    def get(world_size: int, precision: str) -> TinyRun:
        key = world_size, precision
        if key not in runs:
            run = TinyRun(tiny_data, tmp_path_factory.mktemp(f"undisturbed-{world_size}-{precision}"))
            run.train(f"training.precision={precision}", world_size=world_size).require(0)
            runs[key] = run
        return runs[key]

    return get
