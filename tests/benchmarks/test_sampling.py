"""The ways that the sampling benchmark compares generate the same tokens. Times are never asserted."""

from __future__ import annotations

import argparse

import torch

from benchmarks import sampling
from tests.benchmarks.test_step_overhead import TINY
from tests.distributed import run_distributed
from w1train.runtime.distributed import distributed

MODEL = [override for override in TINY if override.startswith("model.")]
OPTIONS = argparse.Namespace(lengths=[13, 24], prompt_length=5, rows=2, steps=4, rounds=2, threads=1)


def _measure(_rank: int, _size: int):
    config = sampling.benchmark_config([*MODEL, "diffusion.block_size=8"], longest=29)
    with distributed(config.parallel), torch.no_grad():
        table, agreement = sampling.measure(config, OPTIONS)
        return table, agreement, sampling._notes(config, OPTIONS, agreement)


def test_all_ways_generate_the_same():
    table, agreement, notes = run_distributed(_measure, 1, process_group=False)[0]
    assert agreement == 1
    assert [row[0] for row in table.rows] == ["13", "24"]
    assert all(len(row) == len(table.columns) == 6 for row in table.rows)
    assert "100.00%" in notes
