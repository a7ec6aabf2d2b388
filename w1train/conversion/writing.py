"""Writing of safetensors files tensor by tensor. The sizes of all tensors come first in a file, and they are known before the tensors are
read, so only one tensor has to be in memory at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from w1train.conversion.sources import DTYPES, INDEX_FILE, SINGLE_FILE
from w1train.runtime.files import replace_file, write_text

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(directory: Path, entries: Sequence[Entry], tensors: Iterator[tuple[str, Tensor]], max_shard_bytes: int) -> list[str]:
    """Write shards of at most ``max_shard_bytes`` (a larger tensor has a shard of its own) and, if there are several, their index.

    Args:
        tensors: the name and the tensor of each entry, in the order of ``entries``.

    Returns:
        The names of the files.
    """
    shards = deal(entries, max_shard_bytes)
    width = len(shards)
    names = [SINGLE_FILE] if width == 1 else [f"model-{number:05d}-of-{width:05d}.safetensors" for number in range(1, width + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard, tensors)
    assert next(tensors, None) is None, "more tensors than entries"
    if width > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.num_bytes for entry in entries)
        write_text(directory / INDEX_FILE, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
    return names


def deal(entries: Sequence[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Divide entries into shards, in their order."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def write_file(path: Path, entries: Sequence[Entry], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Write one file: eight bytes with the header's length, the header (JSON, padded to a multiple of eight), and the tensors one after
    another."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.num_bytes
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replace_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            name, tensor = next(tensors)
            assert (name, tuple(tensor.shape), tensor.dtype) == (entry.name, entry.shape, entry.dtype), f"{name} is not {entry}"
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
