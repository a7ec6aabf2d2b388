"""The measurement of loader and corruption runs, and measures batches that differ. Times are never asserted."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.data import corruption
from w1train.config.schema import DiffusionConfig


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_prints_the_three_speeds(capsys, timestep_per):
    sizes = {"length": 32, "micro-batch-size": 2, "document-length": 20, "num-tokens": 2000, "batches": 3}
    assert corruption.main([f"--{name}={value}" for name, value in {**sizes, "timestep-per": timestep_per}.items()]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("loader and corruption", "loader alone", "corruption alone"))


def test_every_batch_is_another_one():
    """A source that gave one batch again and again would be measured from the caches."""
    documents = torch.zeros((1, 64), dtype=torch.int32)
    packed = (corruption.PackedBatch(documents.long() + 20, documents, documents, torch.tensor([index])) for index in itertools.count())
    first, second = itertools.islice(corruption.noisy_batches(packed, DiffusionConfig(random_length_probability=0.0)), 2)
    assert not torch.equal(first.loss_mask, second.loss_mask)
