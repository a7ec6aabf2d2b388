"""The index of a checkpoint, in JSON: every tensor as a set of boxes, the place of each box in a file, and plain values.

A tensor is a whole tensor of the model under its global name (all layers of a pipeline stacked). A shard is one box of it, as one rank
saved it: its elements in row-major order, little-endian, without padding. The boxes of a tensor cover it and do not overlap.

A stranger may have written a checkpoint. Nothing in an index is executed, and all of it is checked before any other file is opened.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from w1train.checkpoints.format import legacy_index
from w1train.checkpoints.format.plain_values import decode, encode
from w1train.checkpoints.manifest import DamagedCheckpointError
from w1train.config.reading import parse_json, shorten
from w1train.runtime.files import replace_file
from w1train.runtime.names import is_plain_name, open_inside

INDEX = "shards.json"
MAXIMUM_BYTES = 1 << 28
"""The most bytes of an index: a shard takes some 60 bytes, so that this is about four million shards."""
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and sizes of a part of a tensor."""
_VISITS_PER_BOX = 64
"""The most visits of the search for overlapping boxes, per box. Layouts that are cut in two dimensions take fewer than four."""
_VERSION = 1
_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of a tensor, and the place of its bytes."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    archive_bytes: int | None = None
    """Length of the torch archive that holds the box, in checkpoints from before December 2026. None if the bytes are the elements."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    shards: tuple[Shard, ...]

    def num_bytes(self, shard: Shard) -> int:
        """Return the number of bytes of a box's elements."""
        return math.prod(shard.sizes) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """The content of a checkpoint's shards."""

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """Plain values beside the tensors, as JSON (plain_values.py)."""

    @classmethod
    def join(cls, parts: Iterable[ShardIndex]) -> ShardIndex:
        """Join the parts of all ranks."""
        joined, shards = cls(), dict[str, list[Shard]]()
        for part in parts:
            joined.values.update(part.values)
            for key, tensor in part.tensors.items():
                known = joined.tensors.setdefault(key, tensor)
                assert (known.dtype, known.sizes) == (tensor.dtype, tensor.sizes), f"ranks disagree on {key}"
                shards.setdefault(key, []).extend(tensor.shards)
        whole = {key: StoredTensor(tensor.dtype, tensor.sizes, tuple(shards[key])) for key, tensor in sorted(joined.tensors.items())}
        return cls(whole, joined.values)

    def as_json(self) -> dict[str, Any]:
        """Return the index as values that ``json.dumps`` accepts."""
        tensors = {
            key: {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "sizes": tensor.sizes,
                "shards": [[shard.file, shard.start, shard.offset, shard.sizes] for shard in tensor.shards],
            }
            for key, tensor in self.tensors.items()
        }
        return {"version": _VERSION, "values": self.values, "tensors": tensors}

    def write(self, directory: Path) -> None:
        """Write ``shards.json``. Raise OSError if the file cannot be written."""
        with replace_file(directory / INDEX) as file:
            file.write(json.dumps(self.as_json()).encode())

    @classmethod
    def from_json(cls, tree: Any) -> ShardIndex:
        """Check the parsed index of a checkpoint or of one rank's part, and return it.

        Raises:
            ValueError: the tree is not an index, a name is not that of a file in the directory, or a box is not inside its tensor.
        """
        if not isinstance(tree, dict) or tree.get("version") != _VERSION:
            raise ValueError(f"it is not an index of version {_VERSION}")
        tensors, values = tree.get("tensors"), tree.get("values")
        if not isinstance(tensors, dict) or not isinstance(values, dict):
            raise ValueError("it lacks tensors or values")
        decode(values)
        return cls({key: _tensor_from_json(key, tensor) for key, tensor in tensors.items()}, values)

    def require_whole(self) -> None:
        """Raise ValueError unless the boxes of each tensor cover it once. Elements that no box covers would have arbitrary values."""
        for key, tensor in self.tensors.items():
            boxes = [(shard.offset, shard.sizes) for shard in tensor.shards]
            num_elements = sum(math.prod(sizes) for _, sizes in boxes)
            if num_elements != math.prod(tensor.sizes) or not _Cover(boxes).is_disjoint:
                raise ValueError(f"the boxes of {shorten(key)} do not cover its sizes {shorten(list(tensor.sizes))} once")


class _Cover:
    """A search for two boxes of a tensor that share an element. If boxes are cut in a way in which no save cuts them, it gives up, and says
    that they share an element."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self._visits_left = _VISITS_PER_BOX * len(boxes)
        self.is_disjoint = self._are_disjoint(boxes)

    def _are_disjoint(self, boxes: Sequence[Box]) -> bool:
        """Walk along the first dimension. Wherever a box begins, the boxes that are present must be disjoint in the other dimensions."""
        self._visits_left -= len(boxes)
        if self._visits_left < 0:
            return False
        if len(boxes) < 2:
            return True
        if not boxes[0][0] or len(set(boxes)) < len(boxes):
            return False
        begins, ends = defaultdict[int, list[Box]](list), defaultdict[int, list[Box]](list)
        for box in boxes:
            begins[box[0][0]].append(box)
            ends[box[0][0] + box[1][0]].append(box)
        present: dict[Box, None] = {}
        for cut in sorted(begins.keys() | ends.keys()):
            for box in ends.get(cut, ()):
                del present[box]
            present |= dict.fromkeys(begins.get(cut, ()))
            if cut in begins and not self._are_disjoint([(offset[1:], sizes[1:]) for offset, sizes in present]):
                return False
        return True


def dtype_named(name: object) -> torch.dtype:
    """Return a dtype by its name. Raise ValueError if tensors of a checkpoint cannot have it."""
    if name not in _DTYPES:
        raise ValueError(f"{shorten(name)} is not one of the types {', '.join(_DTYPES)}")
    return getattr(torch, str(name))


def _tensor_from_json(key: str, tree: Any) -> StoredTensor:
    if not isinstance(tree, dict) or not isinstance(tree.get("shards"), list):
        raise ValueError(f"{shorten(key)} has no list of shards")
    sizes, shards = _sizes(key, tree.get("sizes")), []
    for shard in tree["shards"]:
        if not isinstance(shard, list) or len(shard) != 4:
            raise ValueError(f"a shard of {shorten(key)} is not [file, start, offset, sizes]")
        file, start, offset, box = shard
        shards.append(Shard(_sizes(key, offset), _sizes(key, box), file, *_sizes(key, [start])))
    return _checked(key, StoredTensor(dtype_named(tree.get("dtype")), sizes, tuple(shards)))


def _sizes(key: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, list) and len(value) > legacy_index.MOST_DIMENSIONS:
        raise ValueError(f"{shorten(key)} has {len(value)} dimensions; tensors of checkpoints have at most {legacy_index.MOST_DIMENSIONS}")
    if not isinstance(value, list) or any(type(size) is not int or not 0 <= size < 1 << 62 for size in value):
        raise ValueError(f"{shorten(key)} has {shorten(value)} where whole numbers were expected")
    return tuple(value)


def _checked(key: str, tensor: StoredTensor) -> StoredTensor:
    for shard in tensor.shards:
        if not is_plain_name(shard.file):
            raise ValueError(f"a shard of {shorten(key)} is in {shorten(shard.file)}, which is not the name of a file beside the index")
        if 0 in (*tensor.sizes, *shard.sizes):
            raise ValueError(f"{shorten(key)} has no elements")
        ends = [offset + size for offset, size in zip(shard.offset, shard.sizes, strict=False)]
        if not (len(shard.offset) == len(shard.sizes) == len(tensor.sizes) and all(map(int.__le__, ends, tensor.sizes))):
            box = f"offset {shorten(list(shard.offset))} and sizes {shorten(list(shard.sizes))}"
            raise ValueError(f"a shard of {shorten(key)} with {box} is not inside its tensor")
    return tensor


def read_index(directory: Path) -> ShardIndex:
    """Read the index of a complete checkpoint: ``shards.json``, or torch's ``.metadata`` of a checkpoint from before December 2026.

    Raises:
        DamagedCheckpointError: the index is missing, cannot be read, or contradicts itself.
    """
    name = INDEX if (directory / INDEX).exists() else legacy_index.METADATA
    if not (directory / name).exists():
        raise DamagedCheckpointError(directory, [f"{INDEX} is missing"])
    try:
        largest = MAXIMUM_BYTES if name == INDEX else legacy_index.LARGEST_METADATA
        with open_inside(directory, name) as file:
            content = file.read(largest + 1)
        if len(content) > largest:
            raise ValueError(f"it has more than {largest} bytes")
        index = ShardIndex.from_json(parse_json(content)) if name == INDEX else _from_metadata(directory, content)
        index.require_whole()
        return index
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedCheckpointError(directory, [f"{name} cannot be read: {error}"]) from error


def _from_metadata(directory: Path, content: bytes) -> ShardIndex:
    """Build the index of an old checkpoint."""
    tensors, objects = legacy_index.read(content)
    index = ShardIndex({key: _checked(key, _tensor_from_metadata(*tensor)) for key, tensor in tensors.items()})
    for place in objects:
        index.values.update(encode_values(legacy_index.read_object(directory, place)))
    return index


def _tensor_from_metadata(dtype: str, sizes: tuple[int, ...], boxes: legacy_index.Boxes) -> StoredTensor:
    shards = (Shard(offset, box, place.file, place.start, place.num_bytes) for offset, (box, place) in boxes.items())
    return StoredTensor(dtype_named(dtype), sizes, tuple(shards))


def encode_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of plain values as an index stores them (plain_values.py)."""
    if not all(isinstance(key, str) for key in values):
        raise TypeError("a checkpoint's values have texts as keys")
    return {key: encode(value) for key, value in values.items()}
