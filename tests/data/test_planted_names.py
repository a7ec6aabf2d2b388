"""Links, FIFOs and second names that somebody has put where a dataset or the copy of one will be written."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.test_planted_names import PLANTS, link, victim
from w1train.data import remote
from w1train.data.writer import DatasetWriter, partial_paths
from w1train.runtime.files import UnsafeFileError

__all__ = ["victim"]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_writer_of_tokens_changes_no_other_file(plant, tmp_path, victim, tokenizer):
    for_tokens, for_index, _ = partial_paths(tmp_path / "train")
    plant(victim, for_tokens)
    with pytest.raises(UnsafeFileError, match=r"train\.bin\.partial"):
        DatasetWriter(tmp_path / "train", tokenizer)
    for_tokens.unlink()
    plant(victim, for_index)
    with DatasetWriter(tmp_path / "train", tokenizer) as writer:
        writer.add_documents(np.array([20, 21, 22]), np.array([3]), 2)
        writer.finalize()
    assert not (tmp_path / "train.idx").is_symlink()


@pytest.mark.parametrize("plant", PLANTS)
def test_a_writer_that_goes_on_refuses_what_has_replaced_its_index(plant, tmp_path, victim, tokenizer):
    with DatasetWriter(tmp_path / "train", tokenizer) as writer:
        writer.add_documents(np.array([20, 21, 22]), np.array([3]), 2)
        progress = writer.progress()
        writer.keep()
    index = partial_paths(tmp_path / "train")[1]
    index.unlink()
    plant(victim, index)
    with pytest.raises(UnsafeFileError, match=r"train\.idx\.partial"):
        DatasetWriter(tmp_path / "train", tokenizer, resume=progress)


def test_a_copy_from_object_storage_replaces_links(tmp_path, victim):
    source, cache = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    for suffix in (".bin", ".idx"):
        (source / f"train{suffix}").write_bytes(b"content")
    local = Path(remote.localize(f"file://{source}/train", str(cache)))
    (local.parent / "train.bin.version").unlink()
    link(victim, local.parent / "train.bin.version")
    link(victim, local.parent / f"train.bin.{socket.gethostname()}.partial")
    remote.localize(f"file://{source}/train", str(cache))
    assert local.with_suffix(".bin").read_bytes() == b"content"
    assert not (local.parent / "train.bin.version").is_symlink()
