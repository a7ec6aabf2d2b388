"""The agreement of ranks on a name for their start, under torchrun.

torchrun keeps one store for all its restarts, and torch's groups write their addresses under the same keys at every start. A rank that
is quick after a restart finds the address of a process that has ended (gloo: "Connection refused"; NCCL: an old communicator's id;
https://github.com/pytorch/pytorch/issues/135712). torchrun's count of restarts cannot tell starts apart, because each node counts its own.
Therefore the ranks agree on a name for this start, and store their keys under it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

_POLL_SECONDS = 0.05


def store_of_this_start(timeout: timedelta) -> tuple[dist.Store, int, int] | None:
    """Return (store, rank, world size) for ``init_process_group`` under torchrun's agent, or None where no store outlives the ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    return dist.PrefixStore(name_of_this_start(store, rank, world_size, timeout), store), rank, world_size


def name_of_this_start(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name that is the same on all ranks that call this now, and new, whatever earlier starts have left in the store.

    Each rank stores a random number, its hello. Rank 0 makes a name from the hellos that it finds, which at first may be those of ranks
    that have ended, and makes a new name when a hello changes. Another rank agrees only to a name that was made with its own hello, and
    uses the name only after rank 0 has seen that all ranks agree.

    Raises:
        TimeoutError: a rank did not come in time.
    """
    names = _Names(store, rank, world_size)
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        if (name := names.offer() if rank == 0 else names.accept()) is not None:
            return name
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"rank {rank}: not all {world_size} ranks came within {timeout.total_seconds():g} s of the start")


class _Names:
    """One rank's side of the agreement."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank = dist.PrefixStore("w1train", store), rank
        self._hellos = [f"hello/{other}" for other in range(world_size)]
        self._answers = [f"answer/{other}" for other in range(1, world_size)]
        self._hello = uuid.uuid4().hex
        self._offered = ""
        self._store.set(self._hellos[rank], self._hello)

    def offer(self) -> str | None:
        """Publish a name that is made from all hellos. Only rank 0 calls this. Return the name when all ranks have answered with it."""
        hellos = self._read(self._hellos)
        if hellos is None:
            return None
        name = hashlib.sha256("".join(hellos).encode()).hexdigest()
        if name != self._offered:
            self._store.set("offer", json.dumps([name, hellos]))
            self._offered = name
        if any(answer != name for answer in self._read(self._answers) or [""] * len(self._answers)):
            return None
        self._store.set("settled", name)
        return name

    def accept(self) -> str | None:
        """Answer an offer of rank 0 that was made with this process's hello. All other ranks call this. Return the name when rank 0 has
        confirmed it."""
        found = self._read(["offer"])
        name, hellos = json.loads(found[0]) if found else ("", [])
        if self._hello not in hellos:
            return None
        if name != self._offered:
            self._store.set(self._answers[self._rank - 1], name)
            self._offered = name
        return name if self._read(["settled"]) == [name] else None

    def _read(self, keys: list[str]) -> list[str] | None:
        """Return the values of the keys, or None unless all are there: the store's get would wait for them."""
        if keys and not self._store.check(keys):
            return None
        return [self._store.get(key).decode() for key in keys]
