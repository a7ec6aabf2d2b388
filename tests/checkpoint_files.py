"""A checkpoint's files read without the product's code: what its reader is compared with."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch


def whole_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Put every tensor of a checkpoint together from its index and its ranks' files."""
    index = json.loads((path / "shards.json").read_bytes())
    files = {file.name: file.read_bytes() for file in path.glob("*.shards")}
    tensors = {}
    for key, stored in index["tensors"].items():
        dtype = getattr(torch, stored["dtype"])
        tensors[key] = torch.full(stored["sizes"], torch.iinfo(torch.int8).max, dtype=dtype)
        for name, start, offset, sizes in stored["shards"]:
            num_bytes = torch.Size(sizes).numel() * dtype.itemsize
            box = torch.frombuffer(bytearray(files[name][start : start + num_bytes]), dtype=dtype).view(sizes)
            tensors[key][tuple(slice(a, a + size) for a, size in zip(offset, sizes, strict=True))] = box
    return tensors


def vouch(checkpoint: Path) -> None:
    """Make the manifest say what the files are now, as whoever gives the checkpoint away would."""
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
    manifest["files"] = {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in names
        for content in [(checkpoint / name).read_bytes()]
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
