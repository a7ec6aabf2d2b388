"""A reader of W&B's offline files (run-ID.wandb): the LevelDB log format after a header of seven bytes, protobuf records inside.

wandb itself reads them only in its compiled part.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER = struct.Struct("<4sHB")
CHUNK = struct.Struct("<IHB")
BLOCK_SIZE = 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert HEADER.unpack_from(data)[0] == b":W&B"
    position, parts = HEADER.size, b""
    while position < len(data):
        left_in_block = BLOCK_SIZE - position % BLOCK_SIZE
        if left_in_block < CHUNK.size:
            position += left_in_block
            continue
        _, length, chunk_type = CHUNK.unpack_from(data, position)
        position += CHUNK.size
        parts = (b"" if chunk_type in (FULL, FIRST) else parts) + data[position : position + length]
        position += length
        if chunk_type in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def read_history(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return {step: {metric: value}} of all offline files under a run directory."""
    history: dict[int, dict[str, Any]] = {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in read_records(path):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                history.setdefault(items.pop("_step"), {}).update(items)
    return history


def read_run(run_dir: Path) -> list[Any]:
    """Return the run records (id, project, config) of all offline files, one for each start."""
    runs = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        runs.extend(record.run for record in read_records(path) if record.WhichOneof("record_type") == "run")
    return runs
