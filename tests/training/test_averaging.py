"""The average of checkpoints is the naive one to the last bit, whatever layout saved them, and trains on as if it had been trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import train_layout
from tests.parallel.test_layouts import layout_config
from w1train.runtime.distributed import initialize_process_group
from w1train.training.averaging import average_steps
from w1train.training.shards import Shards

STEPS = (1, 2, 4)


def whole(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together by torch's own reader."""
    shards = Shards(path)
    state = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in shards.tensors().items()}
    torch.distributed.checkpoint.load(state, checkpoint_id=path, no_dist=True)
    return state


def average_alone(directory: Path, steps=STEPS, output: Path | None = None) -> Path:
    """On one process, as the command does."""

    def average(_rank: int, _size: int) -> Path:
        initialize_process_group(torch.device("cpu"))
        return average_steps(directory, steps, output)

    return run_distributed(average, 1, process_group=False)[0]


def saved_run(directory: Path, config, data_parallel: int = 1, steps=STEPS) -> Path:
    """The checkpoints of a short run."""
    previous = None
    for step in steps:
        number = step - (0 if previous is None else int(previous.name.removeprefix("step_")))
        part = directory / f"part-{step}"
        train_layout(config, data_parallel, load=previous, save=part, num_steps=number)
        previous = directory / f"step_{step:010d}"
        (part / previous.name).rename(previous)
    return directory


LAYOUTS = [
    ({}, 1, "fp32"),
    ({"tensor": 2, "sequence": True, "pipeline": 2}, 2, "fp32"),
    ({"distributed_optimizer": False}, 1, "bf16"),
    ({"pipeline": 2, "virtual_pipeline": 2}, 2, "bf16"),
]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def run(request, tmp_path_factory):
    parallel, data_parallel, precision = request.param
    config = layout_config("one-stream", **parallel)
    config.training.precision = precision
    return saved_run(tmp_path_factory.mktemp("run"), config, data_parallel), config


def masters_of(tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """The fp32 weights behind a weight."""
    for prefix in ("optimizer.state.param.", "optimizer.state.fp32_param."):
        if prefix + key in tensors:
            return tensors[prefix + key]
    return tensors[key]


def test_weights_and_masters_are_the_naive_average_to_the_last_bit(run):
    directory, config = run
    found = whole(average_alone(directory))
    a, b, c = (whole(directory / f"step_{step:010d}") for step in STEPS)
    weights = [key for key in found if not key.startswith("optimizer.")]
    assert len(weights) > 10
    for key in weights:
        expected = (masters_of(a, key) + masters_of(b, key) + masters_of(c, key)) / 3
        assert expected.dtype == torch.float32
        assert torch.equal(masters_of(found, key).float(), expected), key
        assert torch.equal(found[key], expected.to(found[key].dtype)), key
        assert not torch.equal(masters_of(a, key), masters_of(c, key)), f"{key} was not trained: the test shows nothing"
    moments = [key for key in found if ".exp_avg" in key]
    assert len(moments) == 2 * len(weights)
    assert all(torch.equal(found[key], c[key]) for key in moments)
    if config.training.precision == "bf16":
        assert found[weights[0]].dtype == torch.bfloat16
        assert masters_of(found, weights[0]).dtype == torch.float32
