"""A check that a checkpoint can hold the model of its configuration, made before memory is taken for the model."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from w1train.checkpoints.manifest import DamagedCheckpointError, read_manifest
from w1train.config.errors import UserError
from w1train.config.schema import ModelConfig
from w1train.model.flops import num_parameters
from w1train.runtime.names import open_inside

_FEWEST_BYTES = 2
"""The fewest bytes of a stored parameter: bfloat16 is the smallest type in which weights are saved."""
_MOST_BYTES_PER_DATA = 8
"""The most bytes of tensors for each byte of data."""
_BLOCK_BYTES = 512
"""The bytes of a block of st_blocks, whatever the file system's own blocks are."""


def require_stored(checkpoint: Path, model: ModelConfig) -> None:
    """Compare the data in the files of a checkpoint's manifest with the number of parameters that a configuration asks for.

    The configuration and the manifest may claim anything: a model of 10^13 parameters would be built before the first tensor is found to
    be missing. The bytes that the files occupy on the disk are facts. Their lengths are only claims, because a sparse file of any length
    occupies nothing.

    Raises:
        DamagedCheckpointError: the manifest is missing or damaged.
        UserError: the files are too small.
    """
    expected, found = num_parameters(model), _num_data_bytes([checkpoint / name for name in read_manifest(checkpoint)["files"]])
    if found < _FEWEST_BYTES * expected:
        raise UserError(
            f"{checkpoint} has {found:,} bytes of data, too few for the {expected:,} parameters of the model that config.yaml describes"
        )


def require_data(checkpoint: Path, num_bytes: int) -> None:
    """Compare the data in the files of a checkpoint's manifest with the bytes of the tensors of its index, which are read and written next:
    a sparse file of a hundred gigabytes takes nothing on the disk, and would take as much of memory and of the disk then.

    Files of moments that are zero may be sparse, after a copy that makes holes: the weights and their masters are a quarter at least.

    Raises:
        CheckpointError: the manifest is damaged, or the files are too small.
    """
    found = _num_data_bytes([checkpoint / name for name in read_manifest(checkpoint)["files"]])
    if found * _MOST_BYTES_PER_DATA < num_bytes:
        raise DamagedCheckpointError(checkpoint, [f"its files have {found:,} bytes of data, too few for tensors of {num_bytes:,} bytes"])


def _num_data_bytes(paths: list[Path]) -> int:
    """Return the bytes that regular files hold, without holes and links. A file that has several names counts once."""
    num_bytes, counted = 0, set()
    for path in paths:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue  # verify_checkpoint says which file is missing
        if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in counted:
            counted.add((status.st_dev, status.st_ino))
            is_full = status.st_blocks * _BLOCK_BYTES >= status.st_size
            num_bytes += status.st_size if is_full else _size_without_holes(path)
    return num_bytes


def _size_without_holes(path: Path) -> int:
    """Return the bytes of a file without its holes, by asking for its extents. Fewer blocks than the size do not mean holes: a file may be
    compressed, stored in its directory entry because it is tiny, or (ZFS) not yet written out."""
    num_bytes = end = 0
    with open_inside(path.parent, path.name) as file:
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # there is no data after ``end``
                    return num_bytes
                raise
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            num_bytes += end - start
