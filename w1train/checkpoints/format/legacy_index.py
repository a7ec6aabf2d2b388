"""The reader of checkpoints from before December 2026: torch's ``.metadata``, which is a pickle, and torch's archives. It executes nothing.

A pickle names the functions that build its objects, so whoever unpickles a stranger's file runs the stranger's program. The unpickler here
knows a closed list of names, builds its own inert classes for them, and refuses every other name. Nothing else in the project unpickles a
file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from w1train.config.reading import shorten
from w1train.runtime.names import is_plain_name, open_inside
from w1train.runtime.pulse import moved
from w1train.runtime.transfers import PIECE_BYTES

METADATA = ".metadata"
LARGEST_METADATA = 32 << 20
"""The most bytes of the metadata: a shard takes some 260 bytes and 100 codes of the pickle, so that this and _MOST_CODES are each about
a hundred thousand shards."""
MOST_DIMENSIONS = 16
"""The most dimensions of a tensor; those of a model have four."""
_MOST_CODES = 10_000_000
"""The most codes of a pickle. Each takes some two microseconds, and at most some hundred bytes."""
_MOST_ATTRIBUTES = 16
"""The most attributes of a record; torch's have up to six."""
_LONGEST_INTEGER = 64
"""The most bits of an integer. A long integer takes time to print or to hash."""
_MOST_OBJECTS = 16
"""The most objects beside the tensors. The checkpoints of this project have one."""
_LARGEST_OBJECT = 1 << 20
"""The most bytes of an object that is not a tensor: step counts and parameter groups take a few kilobytes."""
_MOST_VALUES = 100_000
"""The most values, keys and characters of an object, counted as often as they are referred to."""
_LONGEST_MESSAGE = 200
_BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RecursionError, TypeError, struct.error)
"""The exceptions that an unpickler raises for a damaged or invented stream, other than ValueError."""


@dataclass(frozen=True, slots=True)
class Place:
    """The place of an archive: a file of the directory, and a range of its bytes."""

    file: str
    start: int
    num_bytes: int


Boxes = Mapping[tuple[int, ...], tuple[tuple[int, ...], Place]]
"""Sizes and place of each box of a tensor, by its offset."""


def read(content: bytes) -> tuple[dict[str, tuple[str, tuple[int, ...], Boxes]], list[Place]]:
    """Read torch's metadata.

    Returns:
        The name of the type, the sizes and the boxes of each tensor by key, and the places of objects that are not tensors.

    Raises:
        ValueError: the metadata are damaged, or name something that no checkpoint of this project has.
    """
    metadata = _unpickled(content, _NAMES)
    try:
        places = {(_key(index.fqn), _offset(index.offset)): _place(info) for index, info in metadata.storage_data.items()}
        tensors: dict[str, tuple[str, tuple[int, ...], Boxes]] = {}
        objects = []
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, _Tensor):
                boxes: Boxes = {_size(chunk.offsets): (_size(chunk.sizes), places[key, _size(chunk.offsets)]) for chunk in entry.chunks}
                if len(boxes) < len(entry.chunks):
                    raise ValueError(f"{shorten(key)} has two boxes in one place")
                tensors[_key(key)] = (entry.properties.dtype, _size(entry.size), boxes)
            else:
                objects.append(places[key, None])
            if len(objects) > _MOST_OBJECTS:
                raise ValueError(f"it has more than {_MOST_OBJECTS} objects beside tensors")
    except _BROKEN as error:
        raise ValueError(f"it is not the metadata of a checkpoint ({type(error).__name__})") from error
    return tensors, objects


def read_object(directory: Path, place: Place) -> dict[str, Any]:
    """Read an object of an old checkpoint that is not a tensor: nested plain values.

    Raises:
        OSError: its file cannot be read.
        ValueError: it is not a dict of plain values.
    """
    if place.num_bytes > _LARGEST_OBJECT:
        raise ValueError(f"an object has {place.num_bytes} bytes; a checkpoint needs at most {_LARGEST_OBJECT}")
    value = _unpickled(_entry(_archive(directory, place), "data.pkl"), {})
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict):
        raise ValueError(f"an object in {place.file} is not what checkpoints hold")
    _require_few(value)
    return value[0]


def _require_few(value: Any) -> None:
    """Raise ValueError for lists that refer to the same lists again and again, because a walk through them would take for ever."""
    left, num_values = [value], 0
    while left:
        item = left.pop()
        num_values += 2 * len(item) if isinstance(item, dict) else len(item) if isinstance(item, (str, list, tuple)) else 0
        if num_values > _MOST_VALUES:
            raise ValueError(f"an object has more than {_MOST_VALUES} values and characters")
        if isinstance(item, dict):
            left.extend((*item.keys(), *item.values()))
        elif isinstance(item, (list, tuple)):
            left.extend(item)


def read_tensor(directory: Path, place: Place, dtype: torch.dtype, sizes: Sequence[int]) -> Tensor:
    """Read a tensor from an archive of its own, whose one entry of data holds its elements in row-major order.

    The archive and the tensor are in memory together.

    Raises:
        OSError: its file cannot be read.
        ValueError: the archive is damaged, or has another number of bytes than the tensor.
    """
    archive = _archive(directory, place)
    entry = _found(archive, "data/0")
    num_bytes = math.prod(sizes) * dtype.itemsize
    if entry.file_size != num_bytes:
        raise ValueError(f"its archive has {entry.file_size} bytes, expected {num_bytes}")
    target = torch.empty(tuple(sizes), dtype=dtype)
    elements = memoryview(target.view(-1).view(torch.uint8).numpy())
    with _damage_refused(), archive.open(entry) as file:
        for start in range(0, num_bytes, PIECE_BYTES):
            piece = elements[start : start + PIECE_BYTES]
            piece[:] = file.read(len(piece))
            moved()
    return target


def _archive(directory: Path, place: Place) -> zipfile.ZipFile:
    with open_inside(directory, place.file) as file:
        file.seek(place.start)
        content: BinaryIO = io.BytesIO(file.read(place.num_bytes))
    try:
        return zipfile.ZipFile(content)
    except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
        raise ValueError(f"it is not an archive of torch ({type(error).__name__})") from error


def _entry(archive: zipfile.ZipFile, name: str) -> bytes:
    entry = _found(archive, name)
    with _damage_refused():
        return archive.read(entry)


def _found(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """Return the one file of a name. Compressed files are refused, because they may grow without bound. torch does not compress."""
    found = [entry for entry in archive.infolist() if entry.filename.partition("/")[2] == name]
    if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED or found[0].file_size != found[0].compress_size:
        raise ValueError(f"its archive does not have one {name} that is not compressed")
    return found[0]


@contextmanager
def _damage_refused() -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"its archive is damaged ({type(error).__name__})") from error


def _unpickled(content: bytes, names: Mapping[str, Callable[..., Any]]) -> Any:
    try:
        return _Unpickler(io.BytesIO(content), names).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)[:_LONGEST_MESSAGE]) from error
    except _BROKEN as error:
        raise ValueError(f"it is not a pickle of plain values ({type(error).__name__})") from error


class _Unpickler(pickle._Unpickler):
    """An unpickler that builds only plain values and the stand-ins below. It extends Python's implementation in Python, because the one in
    C allocates memory for any number that a stream has as an index of its memo."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]]
    """The function that is called for each code of a stream."""

    def __init__(self, file: BinaryIO, names: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(file)
        self._names = names
        self.num_codes = 0

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name. Raise UnpicklingError for a name that is not on the list."""
        if (known := self._names.get(f"{module}.{name}")) is None:
            message = f"it names {shorten(f'{module}.{name}')}, which no checkpoint needs and which may run a program"
            raise pickle.UnpicklingError(message)
        return known


def _load_build(unpickler: Any) -> None:
    """Give a record its attributes. Other objects are refused: by the attributes of a class, a stream could change how the next checkpoint
    is read."""
    state = unpickler.stack.pop()
    record = unpickler.stack[-1]
    if not isinstance(record, _Record):
        raise pickle.UnpicklingError("it gives attributes to an object that has no attributes")
    record.__setstate__(state)


def _load_item(unpickler: Any) -> None:
    _require_keys(unpickler.stack[-2:-1])
    pickle._Unpickler.dispatch[pickle.SETITEM[0]](unpickler)


def _load_items(unpickler: Any) -> None:
    _require_keys(unpickler.stack[::2])
    pickle._Unpickler.dispatch[pickle.SETITEMS[0]](unpickler)


def _require_keys(keys: Sequence[Any]) -> None:
    """Refuse tuples as keys: if a tuple refers to the same tuple twice at each level, its hash takes a time that grows like two to the
    power of its depth."""
    if any(type(key) not in (str, int, _Index) for key in keys):
        raise pickle.UnpicklingError("a key is neither a text nor a whole number")


def _load_integer(unpickler: Any) -> None:
    pickle._Unpickler.dispatch[pickle.LONG1[0]](unpickler)
    if unpickler.stack[-1].bit_length() > _LONGEST_INTEGER:
        raise pickle.UnpicklingError(f"it has an integer of more than {_LONGEST_INTEGER} bits")


def _counted(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """Count the code: an empty list is one byte of a stream, and takes a hundred in memory."""

    def load_counted(unpickler: Any) -> None:
        unpickler.num_codes += 1
        if unpickler.num_codes > _MOST_CODES:
            raise pickle.UnpicklingError(f"it has more than {_MOST_CODES} codes")
        load(unpickler)

    return load_counted


def _refuse(_unpickler: Any) -> None:
    raise pickle.UnpicklingError("it has a code that no checkpoint has")


_CODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.NEWOBJ, pickle.REDUCE),
    *(pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.BINFLOAT),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
)
"""The codes that checkpoints have, beside those of _OWN. Others make sets, whose members are hashed, or take memory for any number that a
stream has."""
_OWN = {pickle.BUILD: _load_build, pickle.SETITEM: _load_item, pickle.SETITEMS: _load_items, pickle.LONG1: _load_integer}
_Unpickler.dispatch = {
    **dict.fromkeys(range(256), _refuse),
    **{code[0]: _counted(pickle._Unpickler.dispatch[code[0]]) for code in _CODES},
    **{code[0]: _counted(load) for code, load in _OWN.items()},
}


class _Record:
    """A stand-in for one of torch's classes: attributes without behaviour."""

    def __setstate__(self, state: Any) -> None:
        if type(state) is not dict or len(state) > _MOST_ATTRIBUTES or any(type(name) is not str for name in state):
            raise pickle.UnpicklingError("a record has other attributes than those of checkpoints")
        self.__dict__.update(state)


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
    dtype: str

    def __setstate__(self, state: Any) -> None:
        dtype = state[0] if isinstance(state, tuple) else state["dtype"]
        if not isinstance(dtype, type) or not issubclass(dtype, _Dtype):
            raise pickle.UnpicklingError("a tensor has no type")
        self.dtype = dtype.__name__


class _Dtype:
    """A stand-in for a type of elements. Its name is the name of the class, which a stream cannot change."""


class _Ignored:
    """A stand-in for a layout or a memory format, which old checkpoints have only in its plain form."""

    def __new__(cls, *_arguments: Any) -> _Ignored:
        return object.__new__(cls)


class _Size(tuple[int, ...]):
    """A stand-in for torch.Size: a tuple of whole numbers."""

    def __new__(cls, values: Any) -> _Size:
        return super().__new__(cls, _size(values))


def _place(info: Any) -> Place:
    if not is_plain_name(info.relative_path):
        raise ValueError(f"a shard is in {shorten(info.relative_path)}, which is not the name of a file beside the index")
    start, num_bytes = _size([info.offset, info.length])
    return Place(info.relative_path, start, num_bytes)


def _offset(value: Any) -> tuple[int, ...] | None:
    return None if value is None else _size(value)


def _key(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a key is not a text")
    return value


def _size(values: Any) -> tuple[int, ...]:
    if isinstance(values, (list, tuple)) and len(values) > MOST_DIMENSIONS:
        raise ValueError(f"a tensor has {len(values)} dimensions; those of checkpoints have at most {MOST_DIMENSIONS}")
    if not isinstance(values, (list, tuple)) or any(type(value) is not int or not 0 <= value < 1 << 62 for value in values):
        raise ValueError("a size is not a list of whole numbers")
    return tuple(values)


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_DTYPES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
_NAMES: dict[str, Callable[..., Any]] = {
    f"{_METADATA_MODULE}.Metadata": _Metadata,
    f"{_METADATA_MODULE}.TensorStorageMetadata": _Tensor,
    f"{_METADATA_MODULE}.TensorProperties": _Properties,
    f"{_METADATA_MODULE}.BytesStorageMetadata": _Record,
    f"{_METADATA_MODULE}.ChunkStorageMetadata": _Record,
    f"{_METADATA_MODULE}.MetadataIndex": _Index,
    f"{_METADATA_MODULE}.StorageMeta": _Record,
    f"{_METADATA_MODULE}._MEM_FORMAT_ENCODING": _Ignored,
    "torch.distributed.checkpoint.filesystem._StorageInfo": _Record,
    "torch.serialization._get_layout": _Ignored,
    "torch.Size": _Size,
    **{f"torch.{name}": type(name, (_Dtype,), {"__slots__": ()}) for name in _DTYPES},
}
