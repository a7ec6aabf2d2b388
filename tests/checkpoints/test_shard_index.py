"""Indexes and manifests of checkpoints: what is written is read, and what somebody else made up is refused before anything is opened."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from w1train.checkpoints.format.plain_values import decode, encode, first_unlike
from w1train.checkpoints.format.shard_files import write_index, write_part
from w1train.checkpoints.format.shard_index import INDEX, ShardIndex
from w1train.checkpoints.format.shard_plan import Box
from w1train.checkpoints.format.shard_reader import Shards
from w1train.checkpoints.manifest import CheckpointError, check_manifest
from w1train.checkpoints.verification import verify_checkpoint
from w1train.runtime.names import open_inside

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(["$tuple", "$items"]) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(PLAIN)
def test_plain_values_are_read_as_they_were_written(value):
    text = json.dumps(encode(value))
    found = decode(json.loads(text))
    assert found == value
    assert repr(found) == repr(value), "1, 1.0 and True are equal, and not the same"


@pytest.mark.parametrize("value", [torch.zeros(1), {1, 2}, b"bytes", object()])
def test_what_is_not_plain_is_not_written(value):
    with pytest.raises(TypeError, match="cannot hold a value of type"):
        encode({"state": [value]})


@pytest.mark.parametrize("tree", [{"$tuple": 1}, {"$items": [[1]]}, {"$items": [[{}, 1]]}, {"$other": []}, {"$tuple": [], "a": 1}])
def test_invented_plain_values_are_refused(tree):
    with pytest.raises(ValueError, match=r"expected|needs|known"):
        decode({"state": tree})


def test_the_first_difference_of_kind_is_named():
    expected = {"groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": object()}], "kind": "adam"}
    assert first_unlike(expected, {"groups": [{"lr": 1, "betas": (0.9, 0.95)}] * 2, "kind": "adam", "more": 1}, "optimizer") is None
    for found, words in [
        ([], "optimizer is [], expected a table"),
        ({"kind": ""}, "optimizer lacks groups"),
        ({"groups": []}, "optimizer lacks kind"),
        ({"groups": {}, "kind": ""}, "optimizer.groups is {}, expected a list"),
        ({"groups": [{"betas": (1, 2)}], "kind": ""}, "optimizer.groups[0] lacks lr"),
        ({"groups": [{"lr": "a", "betas": (1, 2)}], "kind": ""}, "optimizer.groups[0].lr is 'a', expected 0.1"),
        ({"groups": [{"lr": 1, "betas": [1, 2]}], "kind": ""}, "optimizer.groups[0].betas is [1, 2], expected a tuple"),
        ({"groups": [{"lr": 1, "betas": (1, "b")}], "kind": ""}, "optimizer.groups[0].betas[1] is 'b', expected 0.9"),
    ]:
        assert first_unlike(expected, found, "optimizer") == words


def write_checkpoint(directory: Path, tensor: torch.Tensor, num_ranks: int = 1) -> None:
    """A tensor in as many boxes as ranks, and a manifest."""
    directory.mkdir(exist_ok=True)
    sizes = tuple(tensor.shape)
    for rank, part in enumerate(tensor.chunk(num_ranks)):
        offset = (rank * (sizes[0] // num_ranks), *[0] * (len(sizes) - 1))
        box = Box("weight", sizes, tensor.dtype, offset, tuple(part.shape))
        write_part(directory, rank, [box], [part], {"progress": {"step": 1}} if rank == 0 else {})
    write_manifest(directory, write_index(directory, num_ranks))


def write_manifest(directory: Path, files: dict[str, Any]) -> None:
    """A manifest of the ranks' files and the index."""
    content = (directory / INDEX).read_bytes()
    files = {**files, INDEX: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    manifest = {"step": 1, "samples": 0, "seconds": 0.0, "dataset": None, "files": files}
    (directory / "manifest.json").write_text(json.dumps(manifest))


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_box_of_a_tensor_is_read_from_any_boxes(dtype, tmp_path):
    tensor = torch.randint(0, 200, (6, 4, 3)).to(dtype)
    write_checkpoint(tmp_path, tensor, num_ranks=3)
    verify_checkpoint(tmp_path)
    shards, generator = Shards(tmp_path), random.Random(1)
    assert shards.values() == {"progress": {"step": 1}}
    for _ in range(20):
        offset = [generator.randrange(size) for size in tensor.shape]
        sizes = [generator.randint(1, size - start) for size, start in zip(tensor.shape, offset, strict=True)]
        target = torch.empty(sizes, dtype=dtype)
        assert shards.read_into(target, "weight", offset) == target.numel()
        expected = tensor[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))]
        assert torch.equal(target, expected)


def test_of_a_shard_only_the_rows_of_a_box_are_read(tmp_path, monkeypatch):
    """A checkpoint has the matrices of all experts of a rank in one shard, and each would otherwise cost a read of all of them."""
    tensor = torch.arange(6 * 4 * 3.0).reshape(6, 4, 3)
    write_checkpoint(tmp_path, tensor, num_ranks=1)
    shards, lengths = Shards(tmp_path), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda sizes, **kwargs: (lengths.append(math.prod(sizes)), empty(sizes, **kwargs))[1])
    boxes = [((4, 1, 0), (1, 2, 2), 6), ((2, 0, 0), (2, 4, 3), 24), ((5, 3, 1), (1, 1, 1), 1), ((1, 2, 0), (3, 1, 3), 36)]
    for offset, sizes, num_read in boxes:
        target = empty(sizes)
        shards.read_into(target, "weight", offset)
        assert torch.equal(target, tensor[tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))])
        assert lengths.pop() == num_read
        assert not lengths


def test_a_scalar_is_stored_and_views_are_stored_alone(tmp_path):
    write_part(tmp_path, 0, [Box("scalar", (), torch.float32, (), ())], [torch.arange(3.0)[1]], {})
    files = write_index(tmp_path, 1)
    assert files["rank_00000.shards"]["size"] == 4
    write_manifest(tmp_path, files)
    shards = Shards(tmp_path)
    assert shards.read("scalar", shards.tensors["scalar"].shards[0]) == 1.0


@given(data=st.data())
def test_boxes_are_whole_exactly_if_each_element_is_in_one(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    boxes, counts = [], torch.zeros(sizes, dtype=torch.int64)
    for _ in range(data.draw(st.integers(1, 5))):
        offset = [data.draw(st.integers(0, size - 1)) for size in sizes]
        box = [data.draw(st.integers(1, size - start)) for size, start in zip(sizes, offset, strict=True)]
        counts[tuple(slice(start, start + size) for start, size in zip(offset, box, strict=True))] += 1
        boxes.append(["rank_00000.shards", 0, offset, box])
    for place in (counts == 0).nonzero().tolist() if data.draw(st.booleans()) else []:
        counts[tuple(place)] += 1
        boxes.append(["rank_00000.shards", 0, place, [1] * len(sizes)])
    tree = {"version": 1, "values": {}, "tensors": {"weight": {"dtype": "float32", "sizes": sizes, "shards": boxes}}}
    index = ShardIndex.from_json(tree)
    with contextlib.nullcontext() if bool((counts == 1).all()) else pytest.raises(ValueError, match="do not cover its sizes"):
        index.require_whole()


def test_a_tensor_cut_for_many_ranks_is_whole_and_one_cut_into_dust_is_refused():
    columns = [["f", 0, [row, 8 * column], [4, 8]] for row in range(0, 512, 4) for column in range(8)]
    # Two triangles of columns, all of which are looked at wherever one ends and another begins: 150 times each.
    triangles = [["f", 0, [row, row], [300 - row, 1]] for row in range(300)] + [["f", 0, [0, row], [row, 1]] for row in range(1, 300)]
    for boxes, sizes, words in ((columns, [512, 64], None), (triangles, [300, 300], "do not cover")):
        tree = {"version": 1, "values": {}, "tensors": {"weight": {"dtype": "float32", "sizes": sizes, "shards": boxes}}}
        with contextlib.nullcontext() if words is None else pytest.raises(ValueError, match=words):
            ShardIndex.from_json(tree).require_whole()


def read_all(directory: Path) -> None:
    """Every tensor of a checkpoint, as a reader would."""
    shards = Shards(directory)
    for key, tensor in shards.tensors.items():
        for shard in tensor.shards:
            shards.read(key, shard)


def edit(directory: Path, change: Any) -> None:
    """Change the parsed index, and write it back."""
    tree = json.loads((directory / INDEX).read_bytes())
    change(tree, tree["tensors"]["weight"], tree["tensors"]["weight"]["shards"][0])
    (directory / INDEX).write_text(json.dumps(tree))


HOSTILE_INDEXES = {
    "a file above": lambda tree, weight, shard: shard.__setitem__(0, "../secret"),
    "an absolute file": lambda tree, weight, shard: shard.__setitem__(0, "/etc/hostname"),
    "the directory": lambda tree, weight, shard: shard.__setitem__(0, ".."),
    "no name": lambda tree, weight, shard: shard.__setitem__(0, ""),
    "a name with NUL": lambda tree, weight, shard: shard.__setitem__(0, "rank\0"),
    "a number as name": lambda tree, weight, shard: shard.__setitem__(0, 7),
    "a file that is not there": lambda tree, weight, shard: shard.__setitem__(0, "rank_00009.shards"),
    "a negative start": lambda tree, weight, shard: shard.__setitem__(1, -1),
    "a start behind the end": lambda tree, weight, shard: shard.__setitem__(1, 1 << 40),
    "a start that is text": lambda tree, weight, shard: shard.__setitem__(1, "0"),
    "a start that is true": lambda tree, weight, shard: shard.__setitem__(1, True),
    "an offset outside": lambda tree, weight, shard: shard.__setitem__(2, [7, 0]),
    "an offset of other rank": lambda tree, weight, shard: shard.__setitem__(2, [0]),
    "sizes outside": lambda tree, weight, shard: shard.__setitem__(3, [3, 5]),
    "a petabyte": lambda tree, weight, shard: (weight.__setitem__("sizes", [1 << 40, 1 << 8]), shard.__setitem__(3, [1 << 40, 1 << 8])),
    "a petabyte of nothing": lambda tree, weight, shard: (weight.__setitem__("sizes", [1 << 40, 0]), weight.__setitem__("shards", [shard])),
    "no elements": lambda tree, weight, shard: (
        weight.__setitem__("sizes", [1 << 40, 0]),
        shard.__setitem__(3, [1 << 40, 0]),
        weight["shards"].pop(),
    ),
    "thousands of dimensions": lambda tree, weight, shard: (
        weight.__setitem__("sizes", [1] * 5000 + [6, 4]),
        weight.__setitem__("shards", [["rank_00000.shards", 0, [0] * 5002, [1] * 5000 + [6, 4]]]),
    ),
    "sizes of fractions": lambda tree, weight, shard: weight.__setitem__("sizes", [6.0, 4]),
    "a shard less": lambda tree, weight, shard: weight["shards"].pop(),
    "a shard twice": lambda tree, weight, shard: weight["shards"].__setitem__(1, shard),
    "overlapping shards": lambda tree, weight, shard: (shard.__setitem__(3, [4, 4]), weight["shards"][1].__setitem__(3, [2, 4])),
    "a short shard": lambda tree, weight, shard: shard.pop(),
    "another type": lambda tree, weight, shard: weight.__setitem__("dtype", "object"),
    "a type that is a list": lambda tree, weight, shard: weight.__setitem__("dtype", ["float32"]),
    "a function as type": lambda tree, weight, shard: weight.__setitem__("dtype", "load"),
    "no tensors": lambda tree, weight, shard: tree.pop("tensors"),
    "tensors in a list": lambda tree, weight, shard: tree.__setitem__("tensors", [weight]),
    "a tensor that is null": lambda tree, weight, shard: tree["tensors"].__setitem__("weight", None),
    "values in a list": lambda tree, weight, shard: tree.__setitem__("values", []),
    "invented values": lambda tree, weight, shard: tree.__setitem__("values", {"$tuple": 3}),
    "a later version": lambda tree, weight, shard: tree.__setitem__("version", 2),
}


@pytest.mark.parametrize("name", HOSTILE_INDEXES)
def test_an_invented_index_is_refused(name, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(1000))
    directory = tmp_path / "checkpoint"
    write_checkpoint(directory, torch.arange(24.0).view(6, 4), num_ranks=2)
    edit(directory, HOSTILE_INDEXES[name])
    with pytest.raises(CheckpointError, match="checkpoint is damaged: ") as failure:
        read_all(directory)
    assert len(str(failure.value)) < 600


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"{", b"[" * 100_000, b'{"version": 1' + b"0" * 5000 + b"}", b"\xff\xfe", b"null"])
def test_an_index_that_is_garbage_is_refused(content, tmp_path):
    write_checkpoint(tmp_path, torch.zeros(6, 4))
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"shards.json cannot be read"):
        Shards(tmp_path)


@given(data=st.data())
def test_no_change_of_an_index_is_anything_but_refused_or_read(data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory, torch.arange(24.0).view(6, 4), num_ranks=2)
    content = bytearray((directory / INDEX).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0123456789-.,:"[]{}aetn/'))
    (directory / INDEX).write_bytes(content)
    with contextlib.suppress(CheckpointError):
        read_all(directory)


def test_a_shard_in_a_file_that_the_manifest_does_not_name_is_refused(tmp_path):
    write_checkpoint(tmp_path, torch.zeros(6, 4), num_ranks=2)
    manifest = json.loads((tmp_path / "manifest.json").read_bytes())
    del manifest["files"]["rank_00001.shards"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"'weight' is in rank_00001.shards, which the manifest does not name"):
        Shards(tmp_path)


def links_to(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def test_a_shard_that_is_a_link_a_pipe_or_a_directory_is_not_read(tmp_path):
    directory, secret = tmp_path / "checkpoint", tmp_path / "secret"
    write_checkpoint(directory, torch.zeros(6, 4))
    shard = directory / "rank_00000.shards"
    secret.write_bytes(shard.read_bytes())
    shards = Shards(directory)
    links_to(shard, secret)
    with pytest.raises(CheckpointError, match="link, and may lead out of the checkpoint"):
        verify_checkpoint(directory)
    with pytest.raises(CheckpointError, match="cannot be read"):
        shards.read("weight", shards.tensors["weight"].shards[0])
    shard.unlink()
    os.mkfifo(shard)
    for check in (lambda: verify_checkpoint(directory), lambda: shards.read("weight", shards.tensors["weight"].shards[0])):
        with pytest.raises(CheckpointError, match="not a regular file"):
            check()
    links_to(directory / INDEX, secret)
    with pytest.raises(CheckpointError, match=r"shards.json cannot be read"):
        Shards(directory)
    links_to(directory / "manifest.json", secret)
    with pytest.raises(CheckpointError, match=r"manifest.json cannot be read"):
        verify_checkpoint(directory)


def test_a_read_that_fails_names_the_file(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, torch.zeros(6, 4))

    def failing(directory: Path, name: str) -> Any:
        if name.endswith(".shards"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return open_inside(directory, name)

    monkeypatch.setattr("w1train.checkpoints.verification.open_inside", failing)
    with pytest.raises(CheckpointError, match=r"rank_00000.shards cannot be read \(Input/output error\)"):
        verify_checkpoint(tmp_path)


MANIFEST: dict[str, Any] = {
    "step": 3,
    "samples": 24,
    "seconds": 1.5,
    "dataset": None,
    "health": {},
    "noise": "0" * 64,
    "reference": {"weights": "runs/sft", "sha256": "0" * 64},
    "validation": {"elbo": 3.0},
    "files": {"config.yaml": {"size": 3, "sha256": "0" * 64}},
}
HOSTILE_MANIFESTS = {
    "step": -1,
    "samples": "24",
    "seconds": float("nan"),
    "dataset": 7,
    "health": [],
    "noise": 7,
    "reference": {"weights": None},
    "validation": {"elbo": "low"},
    "files": [],
}


def test_a_manifest_is_read():
    assert check_manifest(json.dumps(MANIFEST).encode()) == MANIFEST


@pytest.mark.parametrize("key", HOSTILE_MANIFESTS)
def test_an_invented_value_of_a_manifest_is_named(key):
    manifest = {**MANIFEST, key: HOSTILE_MANIFESTS[key]}
    with pytest.raises(ValueError, match=f"manifest.json says {key}: "):
        check_manifest(json.dumps(manifest).encode())


NAMES = [
    "../x",
    "/etc/hostname",
    "a/b",
    "..",
    ".",
    "",
    "manifest.json",
    "a\\b",
    "a b",
    "C:x",
    "\N{FULLWIDTH SOLIDUS}etc",
    "x" * 300,
    "a\nb",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_names_files_of_its_directory_alone(name):
    manifest = copy.deepcopy(MANIFEST)
    manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
    with pytest.raises(ValueError, match="which is not the name of another file in its directory"):
        check_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize(
    "entry", [None, {}, {"size": -1, "sha256": "0" * 64}, {"size": 1.0, "sha256": "0" * 64}, {"size": 1, "sha256": "00"}]
)
def test_a_manifest_has_a_size_and_a_hash_for_each_file(entry):
    manifest = {**MANIFEST, "files": {"x": entry}}
    with pytest.raises(ValueError, match="has no size and SHA-256 for x"):
        check_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"7", b"null", b"{", b"[" * 100_000, b"\xff", b'"text"', b'{"files": {}}'])
def test_a_manifest_that_is_garbage_is_refused(content):
    with pytest.raises(ValueError, match=r"manifest.json (cannot be read|lacks)"):
        check_manifest(content)


def test_boxes_do_not_share_their_bytes(tmp_path):
    write_checkpoint(tmp_path, torch.zeros(6, 4), num_ranks=2)
    edit(tmp_path, lambda tree, weight, shard: (shard.__setitem__(0, "rank_00001.shards"), shard.__setitem__(1, 0)))
    with pytest.raises(CheckpointError, match=r"ends behind the end of rank_00001.shards"):
        Shards(tmp_path)
