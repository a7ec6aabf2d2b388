"""What a checkpoint holds is measured, and not what its files claim."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile.commands import run_config, write_checkpoint
from w1train.checkpoints import stored_size
from w1train.checkpoints.stored_size import require_stored
from w1train.config.errors import UserError
from w1train.config.serialization import config_to_yaml
from w1train.model.flops import num_parameters

CONFIG = run_config()
NUM_BYTES = 2 * num_parameters(CONFIG.model)
ENTRY = {"size": NUM_BYTES, "sha256": 64 * "0"}


def checkpoint_of(directory: Path, *names: str) -> Path:
    """A checkpoint whose manifest names these files, which are not there yet."""
    return write_checkpoint(directory, 4, config_to_yaml(CONFIG), files=dict.fromkeys(names, ENTRY))


def test_a_file_that_holds_the_model(tmp_path):
    checkpoint = checkpoint_of(tmp_path, "weights", "lost")
    (checkpoint / "weights").write_bytes(b"x" * NUM_BYTES)
    require_stored(checkpoint, CONFIG.model)


@pytest.mark.parametrize("fault", ["sparse", "not in the manifest", "a link", "one file of many names"])
def test_what_is_no_data_does_not_count(tmp_path, fault):
    checkpoint = checkpoint_of(tmp_path, *(f"weights_{i}" for i in range(8)))
    if fault == "sparse":
        with (checkpoint / "weights_0").open("wb") as file:
            file.truncate(1 << 40)
            os.pwrite(file.fileno(), b"x" * (NUM_BYTES // 4), 1 << 30)
    elif fault == "not in the manifest":
        (checkpoint / "other").write_bytes(b"x" * NUM_BYTES)
    elif fault == "a link":
        (tmp_path / "other").write_bytes(b"x" * NUM_BYTES)
        (checkpoint / "weights_0").symlink_to(tmp_path / "other")
    else:
        (checkpoint / "weights_0").write_bytes(b"x" * (NUM_BYTES // 4))
        for i in range(1, 8):
            os.link(checkpoint / "weights_0", checkpoint / f"weights_{i}")
    with pytest.raises(UserError, match="too few for the"):
        require_stored(checkpoint, CONFIG.model)


def test_compressed_files_have_all_their_data(tmp_path, monkeypatch):
    checkpoint = checkpoint_of(tmp_path, "weights")
    (checkpoint / "weights").write_bytes(b"x" * NUM_BYTES)
    # As if each block held a gigabyte less than it does: no file system here compresses.
    monkeypatch.setattr(stored_size, "_BLOCK_BYTES", 0)
    require_stored(checkpoint, CONFIG.model)
