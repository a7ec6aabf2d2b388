"""A tokenizer and two datasets in a directory, and the configuration of a run that reads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.made_data import VOCAB_SIZE, make_data
from tests.tiny import tiny_config
from w1train.config.schema import Config


@pytest.fixture(scope="session")
def made_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    make_data(directory)
    return directory


@pytest.fixture
def directory(made_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data, which is the working directory."""
    shutil.copytree(made_data, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def config(directory: Path) -> Config:
    data = {"train": "train", "validation": "validation", "tokenizer": "tokenizer.json"}
    return tiny_config(data=data, model={"vocab_size": VOCAB_SIZE})
