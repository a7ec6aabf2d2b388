"""Sources of stored weights, of which boxes can be read: a Hugging Face directory, or a checkpoint of w1train.

Only requested boxes are read: a rank copies its slices, one after another, directly into its parameters.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.manifest import DamagedCheckpointError
from w1train.config.errors import UserError, listing
from w1train.config.reading import read_json_object, shorten
from w1train.runtime.files import errors_named

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SUFFIX = ".safetensors"
LARGEST_HEADER = 16 << 20
"""Most bytes of a safetensors file's header; published headers are below a megabyte."""
_SIZE_BYTES = 8
_MOST_TENSORS = 500_000
"""Most tensors of a checkpoint, counted by layer. The largest published models have about 50,000."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names in safetensors of the dtypes from which weights are imported."""
_MERGED = re.compile(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
"""The name of a tensor [E, out, in] that has the matrices of all experts of a layer, as VeOmni writes it."""
_STORED_EXPERTS = re.compile(r"(decoder\.layers\.\d+\.mlp\.experts)\.(.*)")
_STORED_EXPERT = re.compile(r"(decoder\.layers\.\d+\.mlp\.experts)\.(\d+)\.(.*)")


class TensorSource(Protocol):
    """Stored tensors by name."""

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """Return the box of a tensor that has a slice (start and stop) for each dimension, on the CPU and in the stored dtype."""


class SafetensorsDirectory:
    """The *.safetensors files of a Hugging Face directory. A tensor with the matrices of all experts is listed as a tensor for each
    expert."""

    def __init__(self, directory: Path) -> None:
        """Open every file. The files are memory-mapped, and only headers are read.

        Raises:
            UserError: there are no such files; a shard is missing, damaged or outside of the directory; the index does not fit the
                files; or a dtype cannot be imported.
        """
        self._files: dict[str, Any] = {}
        self._merged: dict[str, tuple[str, int]] = {}
        """The stored tensor of each expert's matrix that has no tensor of its own, and the expert's number."""
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        index = _read_index(directory)
        names = sorted(set(index.values())) if index is not None else _files_without_index(directory)
        for name in names:
            _require_inside(directory, name)
        if missing := [name for name in names if not (directory / name).is_file()]:
            raise UserError(f"{directory} lacks {listing(missing)}, of the {len(names)} files that {INDEX_FILE} names: download it again")
        for name in names:
            self._open(directory / name)
        if index is not None and (lost := sorted(index.keys() - self._files.keys())):
            raise UserError(f"{directory}: {INDEX_FILE} names tensors that are in no file: {listing(lost)}")

    def _open(self, path: Path) -> None:
        safetensors = _import_safetensors()
        _require_small_header(path)
        try:
            file = safetensors.safe_open(path, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or incomplete ({error}): download it again") from error
        for name in file.keys():  # noqa: SIM118 - not a dictionary
            if name in self._files:
                raise UserError(f"{path} has {name}, which another file of {path.parent} has too; keep one set of weights there")
            part = file.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise UserError(f"{path}: {name} is of type {part.get_dtype()}; weights can be imported from {listing(DTYPES)}")
            self._files[name] = file
            self._list(path, name, tuple(part.get_shape()), DTYPES[part.get_dtype()])

    def _list(self, path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        merged = _MERGED.fullmatch(name)
        if merged is None or len(shape) != 3:
            self.tensors[name], self.dtypes[name] = shape, dtype
            return
        if len(self.tensors) + shape[0] > _MOST_TENSORS:
            raise UserError(f"{path}: {shorten(name)} has {shape[0]} experts, or there are more than {_MOST_TENSORS} matrices")
        for expert in range(shape[0]):
            own = f"{merged.group(1)}.{expert}.{merged.group(2)}.weight"
            if own in self.tensors:
                raise UserError(f"{path}: {shorten(own)} is there twice, alone and in {shorten(name)}; keep one set of weights there")
            self._merged[own], self.tensors[own], self.dtypes[own] = (name, expert), shape[1:], dtype

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """Return a box of a tensor (see TensorSource).

        Raises:
            UserError: the file has changed since it was opened.
        """
        try:
            if name in self._merged:
                stored, expert = self._merged[name]
                return self._files[stored].get_slice(stored)[(slice(expert, expert + 1), *box)][0]
            return self._files[name].get_slice(name)[box]
        except _import_safetensors().SafetensorError as error:
            raise UserError(f"{name} cannot be read: {error}") from error


def _import_safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise UserError("reading Hugging Face weights needs the package safetensors: pip install 'w1train[hf]'") from error
    return safetensors


def _read_index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_FILE
    if not path.is_file():
        return None
    try:
        names = read_json_object(path, "index of safetensors files").get("weight_map")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{path} is no index of safetensors files: its weight_map is {shorten(names)}")
    if not names:
        raise UserError(f"{path} is no index of safetensors files: its weight_map is empty")
    return names


def _require_inside(directory: Path, name: str) -> None:
    """Check a file's name before the file is opened, because somebody else has written the index that gives it.

    It must be the plain name of a safetensors file (other formats hold code), and the file must not be a link to another directory.
    In the cache of huggingface_hub, ``snapshots/COMMIT/NAME`` is a link to ``blobs/HASH`` of the same model; these links are followed.
    """
    if not name.endswith(SUFFIX) or name != Path(name).name or not name.isprintable():
        raise UserError(f"{directory}: {shorten(name)} is not the plain name of a {SUFFIX} file; no other files are read")
    if find_inside(directory, name) is None:
        target = os.path.realpath(directory / name)
        raise UserError(f"{directory / name} is a link to {target}, outside of its directory; copy the file there")


def find_inside(directory: Path, name: str) -> Path | None:
    """Follow the links of a file of a directory. Links in the cache of huggingface_hub lead to its ``blobs``. Return None if a link leads
    to another place.

    A link that leads to itself is returned as its own target (``Path.resolve`` would raise RuntimeError), which is not a regular file.
    """
    place, target = Path(os.path.realpath(directory)), Path(os.path.realpath(directory / name))
    blobs = place.parent.parent / "blobs" if place.parent.name == "snapshots" else place
    return target if target.parent in (place, blobs) else None


def _require_small_header(path: Path) -> None:
    """Check the size of the header: the library reads headers of up to 100 MB, and needs many times as much memory for them."""
    with path.open("rb") as file, errors_named(path):
        size = int.from_bytes(file.read(_SIZE_BYTES), "little")
    if size > LARGEST_HEADER:
        raise UserError(f"{path} is damaged: it says that its header has {size} bytes; at most {LARGEST_HEADER} are read")


def _files_without_index(directory: Path) -> list[str]:
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    names = sorted(path.name for path in directory.glob(f"*{SUFFIX}"))
    if not names:
        others = listing(sorted(path.name for path in directory.glob("*.bin")))
        instead = f"; it has {others}: save the model again with safe_serialization=True" if others else ""
        raise UserError(f"{directory} has no *.safetensors{instead}")
    return names


class CheckpointDirectory:
    """The model of a w1train checkpoint, layer by layer and expert by expert. megatron-core stores a parameter of all layers as one tensor,
    unless the layers differ. A matrix of all experts of a layer is one tensor: [E, 2, I, h], or [E, h, I]."""

    _STACKED = "decoder.layers."

    def __init__(self, directory: Path) -> None:
        """Read the index; the caller has verified the files.

        Raises:
            CheckpointError: the index cannot be read, or a tensor has a dtype that weights do not have.
        """
        self._shards = Shards(directory)
        self.tensors: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, stored in self._shards.tensors.items():
            if not key.startswith("optimizer."):
                if stored.dtype not in DTYPES.values():
                    problem = f"{shorten(key)} is of type {stored.dtype}; weights are of {listing(DTYPES.values())}"
                    raise DamagedCheckpointError(directory, [problem])
                self._list(key, stored.sizes, stored.dtype)

    def _list(self, key: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
        experts = _STORED_EXPERTS.fullmatch(key)
        is_stacked = experts is None and re.fullmatch(r"decoder\.layers\.\D.*", key) is not None
        if experts is None and not is_stacked:
            self.tensors[key], self.dtypes[key] = size, dtype
            return
        if not size or len(self.tensors) + size[0] > _MOST_TENSORS or (experts is not None and len(size) < 3):
            what = f"{shorten(key)} of sizes {list(size)} is not cut into layers, or there are more than {_MOST_TENSORS} tensors"
            raise DamagedCheckpointError(self._shards.path, [what])
        before, after = (self._STACKED, key.removeprefix(self._STACKED)) if experts is None else (f"{experts.group(1)}.", experts.group(2))
        matrix = size[1:] if experts is None else (math.prod(size[1:-1]), size[-1])
        for number in range(size[0]):
            name = f"{before}{number}.{after}"
            self.tensors[name], self.dtypes[name] = matrix, dtype

    def read(self, name: str, box: tuple[slice, ...]) -> Tensor:
        """Return a box of a tensor (see TensorSource)."""
        key, whole = self._place(name, box)
        target = torch.empty([part.stop - part.start for part in whole], dtype=self._shards.tensors[key].dtype)
        num_read = self._shards.read_into(target, key, [part.start for part in whole])
        assert num_read == target.numel(), f"{key} is not whole in the checkpoint"
        return target.view([part.stop - part.start for part in box])

    def _place(self, name: str, box: tuple[slice, ...]) -> tuple[str, tuple[slice, ...]]:
        """Return where a box is stored: the tensor, and the box of it."""
        if name in self._shards.tensors:
            return name, box
        if expert := _STORED_EXPERT.fullmatch(name):
            key, number = f"{expert.group(1)}.{expert.group(3)}", int(expert.group(2))
            if len(self._shards.tensors[key].sizes) == 4:
                # The rows of the gate and of the other half are one dimension here. A box has rows of one half, or all rows of both.
                size, rows = self._shards.tensors[key].sizes[2], box[0]
                first, last = rows.start // size, (rows.stop - 1) // size
                box = (slice(first, last + 1), slice(rows.start - first * size, rows.stop - last * size), *box[1:])
            return key, (slice(number, number + 1), *box)
        stacked = re.fullmatch(r"(decoder\.layers\.)(\d+)\.(.*)", name)
        assert stacked is not None, f"{name} is not in the checkpoint"
        layer = int(stacked.group(2))
        return stacked.group(1) + stacked.group(3), (slice(layer, layer + 1), *box)
