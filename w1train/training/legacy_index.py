"""The index of checkpoints from before December 2026: torch's ``.metadata``, a pickle, read without running anything that is in it.

A pickle names the functions that build its objects, so that reading somebody else's is to run their program. The unpickler here knows a
closed list of names, gives its own inert classes for them, and refuses every other name. Nothing else in the project unpickles a file.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from w1train.runtime.names import open_inside

METADATA = ".metadata"
_MAXIMUM_OBJECT = 64 << 20
"""Bytes of an object beside the tensors: step counts and parameter groups take a few kilobytes."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a torch archive is."""

    file: Any
    start: Any
    num_bytes: Any


Boxes = Mapping[tuple[int, ...], tuple[Sequence[int], Place]]
"""Sizes and place of each box of a tensor, by its offset."""


def read(content: bytes) -> tuple[dict[str, tuple[str, Sequence[int], Boxes]], list[Place]]:
    """Read torch's metadata.

    Returns:
        The name of the type, the sizes and the boxes of each tensor by key, unchecked; and the places of other objects.

    Raises:
        ValueError: the metadata names something that no checkpoint of this project has, or is damaged.
    """
    try:
        metadata = _Unpickler(io.BytesIO(content)).load()
        places = {(index.fqn, _as_tuple(index.offset)): _place(info) for index, info in metadata.storage_data.items()}
        tensors: dict[str, tuple[str, Sequence[int], Boxes]] = {}
        objects = []
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, _Tensor):
                boxes = {tuple(chunk.offsets): (tuple(chunk.sizes), places[key, tuple(chunk.offsets)]) for chunk in entry.chunks}
                tensors[str(key)] = (entry.properties.dtype.name, tuple(entry.size), boxes)
            else:
                objects.append(places[key, None])
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error
    except (ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, TypeError) as error:
        # What an unpickler meets in a damaged or invented stream.
        raise ValueError(f"it is not the metadata of a checkpoint ({type(error).__name__}: {error})") from error
    return tensors, objects


def read_object(directory: Path, place: Place) -> dict[str, Any]:
    """Read the one object that old checkpoints hold beside tensors.

    Raises:
        OSError: its file cannot be read.
        ValueError: it is no dict of plain values.
    """
    if type(place.start) is not int or type(place.num_bytes) is not int or not 0 <= place.num_bytes <= _MAXIMUM_OBJECT or place.start < 0:
        raise ValueError(f"an object is at {place.start!r:.40} and has {place.num_bytes!r:.40} bytes")
    with open_inside(directory, place.file) as file:
        file.seek(place.start)
        value = read_archive(file.read(place.num_bytes))
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        raise ValueError(f"an object in {place.file} is not what checkpoints hold")
    return value[0]


def read_archive(content: Any) -> Any:
    """Read an archive of ``torch.save`` that holds tensors and plain values.

    Args:
        content: bytes, or a file that is at the archive's start.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    try:
        return torch.load(io.BytesIO(content) if isinstance(content, bytes) else content, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError) as error:
        raise ValueError(str(error).strip().partition("\n")[0] or type(error).__name__) from error


class _Unpickler(pickle.Unpickler):
    """An unpickler that builds nothing but the stand-ins below."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name. Raises UnpicklingError for a name that is not on the list."""
        try:
            return _NAMES[f"{module}.{name}"]
        except KeyError:
            message = f"it names {module}.{name}, which no checkpoint needs and which may run a program"
            raise pickle.UnpicklingError(message) from None

    def persistent_load(self, identifier: Any) -> Any:
        """Refuse references to what is outside of the pickle."""
        raise pickle.UnpicklingError("it refers to objects outside of it")


class _Record:
    """Attributes without behaviour, in the place of one of torch's classes."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # of a class with slots
            state = {**(state[0] or {}), **(state[1] or {})}
        for name, value in state.items():
            object.__setattr__(self, str(name), value)


class _Index(_Record):
    fqn: Any
    offset: Any = None
    """An object has no offset, and its index does not store one."""


class _Metadata(_Record):
    state_dict_metadata: Any
    storage_data: Any


class _Tensor(_Record):
    properties: Any
    size: Any
    chunks: Any


class _Properties(_Record):
    dtype: Any

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0] if isinstance(state, tuple) else state["dtype"]
        if not isinstance(self.dtype, _Dtype):
            raise pickle.UnpicklingError("a tensor has no type")


@dataclass(frozen=True, slots=True)
class _Dtype:
    name: str


def _place(info: Any) -> Place:
    return Place(info.relative_path, info.offset, info.length)


def _as_tuple(offset: Any) -> tuple[int, ...] | None:
    return None if offset is None else tuple(offset)


def _ignored(*_arguments: Any) -> None:
    """Stand in for layouts and memory formats, which are always the plain ones."""


def _size(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (list, tuple)) or any(type(value) is not int for value in values):
        raise pickle.UnpicklingError("a size is not a list of whole numbers")
    return tuple(values)


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_NAMES: dict[str, Callable[..., Any] | _Dtype] = {
    f"{_METADATA_MODULE}.Metadata": _Metadata,
    f"{_METADATA_MODULE}.TensorStorageMetadata": _Tensor,
    f"{_METADATA_MODULE}.TensorProperties": _Properties,
    f"{_METADATA_MODULE}.BytesStorageMetadata": _Record,
    f"{_METADATA_MODULE}.ChunkStorageMetadata": _Record,
    f"{_METADATA_MODULE}.MetadataIndex": _Index,
    f"{_METADATA_MODULE}.StorageMeta": _Record,
    f"{_METADATA_MODULE}._MEM_FORMAT_ENCODING": _ignored,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _Record,
    "torch.serialization._get_layout": _ignored,
    "torch.Size": _size,
    **{
        f"torch.{name}": _Dtype(name)
        for name in ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    },
}
