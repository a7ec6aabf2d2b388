"""Metadata of checkpoints from before December 2026: no code of theirs runs, and no stream costs more than its size says."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints.test_shard_index import write_checkpoint
from w1train.checkpoints.format import legacy_index
from w1train.checkpoints.format.shard_index import INDEX, encode_values
from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.manifest import CheckpointError


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_old_metadata_run_nothing(tmp_path):
    for value in (Command(f"touch {tmp_path}/ran"), {"state_dict_metadata": Command(f"touch {tmp_path}/ran")}):
        with pytest.raises(ValueError, match=r"it names '(posix|nt).system', which no checkpoint needs and which may run a program"):
            legacy_index.read(pickle.dumps(value))
        assert not (tmp_path / "ran").exists()


DANGEROUS = [
    "builtins eval",
    "builtins getattr",
    "torch load",
    "torch.serialization load",
    "torch Tensor.__class__",
    "w1train.checkpoints.format.shard_reader Shards",
]


@pytest.mark.parametrize("name", DANGEROUS)
@pytest.mark.parametrize("protocol", [0, 4])
def test_only_listed_names_are_known(name, protocol):
    module, attribute = name.split()
    if protocol == 0:
        stream = f"c{module}\n{attribute}\n.".encode()
    else:
        parts = [b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, attribute)]
        stream = b"\x80\x04" + b"".join(parts) + b"\x93."
    with pytest.raises(ValueError, match=f"it names '{module}.{attribute}'"):
        legacy_index.read(stream)


@given(st.binary(max_size=60))
def test_garbage_is_no_metadata(content):
    with pytest.raises(ValueError, match=r".+"):
        legacy_index.read(content)


def test_an_archive_with_code_is_refused(tmp_path):
    torch.save([Command(f"touch {tmp_path}/ran")], tmp_path / "archive")
    place = legacy_index.Place("archive", 0, (tmp_path / "archive").stat().st_size)
    with pytest.raises(ValueError, match=r"it names 'posix.system', which no checkpoint needs"):
        legacy_index.read_object(tmp_path, place)
    with pytest.raises(ValueError, match=r"does not have one data/0"):
        legacy_index.read_tensor(tmp_path, place, torch.float32, [1])
    assert not (tmp_path / "ran").exists()


def archive_of(directory: Path, compression: int = zipfile.ZIP_STORED, **files: bytes) -> legacy_index.Place:
    """An archive as torch writes it, with these files in it."""
    with zipfile.ZipFile(directory / "archive", "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name.replace('_', '/', 1) if name.startswith('data_') else 'data.pkl'}", content)
    return legacy_index.Place("archive", 0, (directory / "archive").stat().st_size)


def shared(depth: int, container: Any) -> Any:
    """Containers that hold the one below them twice."""
    value: Any = container(["x"])
    for _ in range(depth):
        value = container([value, value])
    return value


def of_texts(*parts: str | bytes) -> bytes:
    """A pickle of codes, and of texts that are put on its stack."""
    codes = [part if isinstance(part, bytes) else b"\x8c" + bytes([len(part)]) + part.encode() for part in parts]
    return b"\x80\x04" + b"".join(codes) + b"."


def old_metadata(index: bytes, chunks: bytes = b"") -> bytes:
    """The metadata of a checkpoint of one tensor w of 1024 boxes, which has an index of one box."""
    classes = "torch.distributed.checkpoint.metadata"
    offset, tensor = b"](K\x00e", (classes, "TensorStorageMetadata", b"\x93)\x81}(")
    properties = (classes, "TensorProperties", b"\x93)\x81(", "torch", "float32", b"\x93tb")
    chunk = (classes, "ChunkStorageMetadata", b"\x93)\x81}(", "offsets", offset, "sizes", b"](K\x01eubq\x01")
    storage = ("torch.distributed.checkpoint.filesystem", "_StorageInfo", b"\x93)\x81}(", "relative_path", "f", "offset", b"K\x00")
    first = (classes, "MetadataIndex", b"\x93)\x81}(", "fqn", "w", "offset", offset, index, b"ub", *storage, "length", b"K\x04ub")
    tensors = ("w", *tensor, "properties", *properties, "size", b"](K\x01e", "chunks", b"](", *chunk, chunks, b"eub")
    body = ("state_dict_metadata", b"}(", *tensors, b"u", "storage_data", b"}(", *first, b"u")
    return of_texts(classes, "Metadata", b"\x93)\x81}(", *body, b"ub")


def test_metadata_made_by_hand_are_read():
    tensors, objects = legacy_index.read(old_metadata(b""))
    assert tensors == {"w": ("float32", (1,), {(0,): ((1,), legacy_index.Place("f", 0, 4))})}
    assert objects == []


METADATA_BOMBS = {
    # The members of a set are hashed, and a set of sets asks its members for theirs.
    "frozen sets": (of_texts(b"(K\x01\x91", b"0N"), "a code that no checkpoint has"),
    "a set": (of_texts(b"\x8f"), "a code that no checkpoint has"),
    "an item of a set": (of_texts(b"}(K\x01\x90"), "a code that no checkpoint has"),
    "a tuple as a key": (of_texts(b"}(K\x01tNs"), "a key is neither"),
    "tuples as keys": (of_texts(b"}((K\x01tN(K\x01tNu"), "a key is neither"),
    "an attribute that is no text": (old_metadata(b"K\x01N"), "other attributes"),
    "attributes without number": (old_metadata(b"".join(b"\x8c\x03%03dN" % n for n in range(100))), "other attributes"),
    "one box again and again": (old_metadata(b"", b"h\x01" * 1024), "'w' has two boxes in one place"),
    "an offset of many dimensions": (old_metadata(of_texts("offset", b"](" + b"K\x00" * 1024 + b"e")[2:-1]), "has 1024 dimensions"),
    "a long integer": (of_texts(b"\x8a\xff" + b"\x7f" * 255), "an integer of more than 64 bits"),
}


@pytest.mark.parametrize("name", METADATA_BOMBS)
def test_old_metadata_cost_what_their_size_says(name):
    content, words = METADATA_BOMBS[name]
    with pytest.raises(ValueError, match=words):
        legacy_index.read(content)


def test_the_codes_and_bytes_of_old_metadata_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(legacy_index, "_MOST_CODES", 1000)
    with pytest.raises(ValueError, match="it has more than 1000 codes"):
        legacy_index.read(b"\x80\x04" + b"]" * 1000 + b".")
    write_checkpoint(tmp_path, torch.zeros(6, 4))
    (tmp_path / INDEX).unlink()
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + b"]" * 100)
    monkeypatch.setattr(legacy_index, "LARGEST_METADATA", 100)
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read: it has more than 100 bytes"):
        Shards(tmp_path)


OBJECT_BOMBS = {
    "shared lists": pickle.dumps([{"a": shared(60, list)}]),
    "shared tuples": pickle.dumps([{"a": shared(60, tuple)}]),
    "lists of texts": pickle.dumps([{"a": ["x" * 10_000] * 20}], 4),
    "a list of itself": b"\x80\x02]q\x00}(X\x01\x00\x00\x00a](" + b"h\x00" * 300 + b"eua.",
    "tuples as a key": b"\x80\x04}" + pickle.dumps(shared(60, tuple), 4)[2:-1] + b"Ns.",
    "an index of the memo": b"Nr\xff\xff\xff\x7f.",
    "a byte array of a terabyte": b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
    "a frame without an end": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
    "a set": pickle.dumps([{"a": {1}}]),
    "an int as a key": pickle.dumps([{1: 2}]),
}


@pytest.mark.parametrize("name", OBJECT_BOMBS)
def test_objects_of_old_checkpoints_are_small_plain_values(name, tmp_path):
    place = archive_of(tmp_path, pickle=OBJECT_BOMBS[name])
    with pytest.raises((TypeError, ValueError)) as failure:
        encode_values(legacy_index.read_object(tmp_path, place))
    assert len(str(failure.value)) < 300
    with pytest.raises(ValueError, match=r".+"):
        legacy_index.read(OBJECT_BOMBS[name])


def test_archives_of_old_checkpoints_are_not_compressed(tmp_path):
    place = archive_of(tmp_path, zipfile.ZIP_DEFLATED, data_0=bytes(1 << 20), pickle=b"a" * 1000)
    for read in (
        lambda: legacy_index.read_tensor(tmp_path, place, torch.uint8, [1 << 20]),
        lambda: legacy_index.read_object(tmp_path, place),
    ):
        with pytest.raises(ValueError, match="that is not compressed"):
            read()
    place = archive_of(tmp_path, data_0=bytes(12))
    assert torch.equal(legacy_index.read_tensor(tmp_path, place, torch.float32, [3]), torch.zeros(3))
    with pytest.raises(ValueError, match="its archive has 12 bytes, expected 16"):
        legacy_index.read_tensor(tmp_path, place, torch.float32, [4])


def test_a_stream_changes_nothing_for_the_next_one():
    for stream in (
        b"\x80\x02ctorch\nfloat32\n}X\x08\x00\x00\x00__name__X\x08\x00\x00\x00bfloat16sb.",
        b"\x80\x02ctorch\nfloat32\nN}X\x08\x00\x00\x00__name__X\x08\x00\x00\x00bfloat16s\x86b.",
    ):
        with pytest.raises(ValueError, match="attributes to an object that has no attributes"):
            legacy_index.read(stream)
    assert legacy_index._NAMES["torch.float32"].__name__ == "float32"
