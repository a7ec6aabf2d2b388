"""The inputs that the chunks of a virtual pipeline share: made once for all of them, kept until the last one has them and no longer."""

from __future__ import annotations

import importlib
import weakref
from types import ModuleType

import pytest

from tests.tiny import tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

NUM_MICRO_BATCHES = 6


class _Inputs:
    """Stands for what is made of a micro-batch."""

    def __init__(self, number: int) -> None:
        self.number = number


# Which chunk draws next; megatron-core's order of two chunks on two stages, and one alone.
ORDERS = {1: [0] * NUM_MICRO_BATCHES, 2: [0, 0, 1, 1] * (NUM_MICRO_BATCHES // 2), 3: [0, 0, 1, 1, 2, 2] * (NUM_MICRO_BATCHES // 2)}


@pytest.fixture
def forward() -> ModuleType:
    import_megatron()
    return importlib.import_module("w1train.training.forward")


@pytest.mark.parametrize("num_chunks", ORDERS)
def test_inputs_are_made_once_and_let_go(num_chunks, forward, monkeypatch):
    made: list[weakref.ref] = []

    def next_inputs(_config, batches, _live_rates):
        inputs = _Inputs(next(batches))
        made.append(weakref.ref(inputs))
        return inputs

    monkeypatch.setattr(forward, "_next_inputs", next_inputs)
    iterators = forward._inputs_of_chunks(tiny_config(), iter(range(100)), NUM_MICRO_BATCHES, num_chunks)
    assert not made, "none before a chunk asks for it"
    drawn: list[list[int]] = [[] for _ in range(num_chunks)]
    for chunk in ORDERS[num_chunks]:
        drawn[chunk].append(next(iterators[chunk]).number)
        alive = [number for number, inputs in enumerate(made) if inputs() is not None]
        assert alive == list(range(min(map(len, drawn)), len(made)))
    assert drawn == [list(range(NUM_MICRO_BATCHES))] * num_chunks
    assert len(made) == NUM_MICRO_BATCHES
    assert all(next(iterator, None) is None for iterator in iterators)
