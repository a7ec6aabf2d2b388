"""All ranks of one start get one name, and no start gets another's, whatever dead ranks have left in the store."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch.distributed as dist

from w1train.runtime.rendezvous import name_of_this_start

TIMEOUT = timedelta(seconds=20)


def start(store: dist.Store, world_size: int, delays: Sequence[float], timeout: timedelta = TIMEOUT) -> list[str | None]:
    """The name that each rank gets; None for one that gave up. A rank comes after its delay, one whose delay is infinite never."""
    names: list[str | None] = [None] * world_size

    def come(rank: int) -> None:
        time.sleep(delays[rank])
        with contextlib.suppress(TimeoutError):
            names[rank] = name_of_this_start(store, rank, world_size, timeout)

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in range(world_size) if delays[rank] != float("inf")]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return names


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_start_has_one_name_of_its_own(world_size):
    store, generator, seen = dist.HashStore(), random.Random(world_size), set()
    for _ in range(4):
        # The quick ones find only what the start before has left.
        name, *others = start(store, world_size, [generator.uniform(0.0, 0.3) for _ in range(world_size)])
        assert name is not None
        assert set(others) <= {name}
        assert name not in seen
        seen.add(name)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_after_a_start_at_which_a_rank_was_missing(missing):
    store = dist.HashStore()
    before = start(store, 3, [0.0, 0.0, 0.0])
    delays = [0.0, 0.0, 0.0]
    delays[missing] = float("inf")
    assert start(store, 3, delays, timedelta(seconds=0.4)) == [None] * 3
    name, *others = start(store, 3, [0.1, 0.2, 0.0])
    assert name is not None
    assert others == [name] * 2
    assert name not in before
