"""On a GPU the host must not wait between a forward pass and its backward pass: the loss asks for no value and copies none over."""

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.data.batch import PackedBatch  # noqa: E402
from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.training.forward import _loss, _prepare  # noqa: E402

LENGTH, NUM_SAMPLES = 64, 2
# On CUDA each of these waits for the stream: its result, or its result's size, comes to the host, or a value comes from there.
WAITING = ("nonzero", "_local_scalar_dense", "bincount", "masked_select", "lift_fresh", "repeat_interleave", "unique", "equal")


class _WaitsOf(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or name.startswith(WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _noisy(config):
    positions = torch.arange(LENGTH, dtype=torch.int32).expand(NUM_SAMPLES, -1)
    tokens = torch.arange(16, 16 + LENGTH).expand(NUM_SAMPLES, -1) % VOCAB_SIZE
    batch = PackedBatch(tokens, positions // 16, positions % 16, torch.arange(NUM_SAMPLES))
    return corrupt(batch, config.diffusion, 0)


def _without_values(rows):
    """The same tensors on the meta device, also those of dataclasses inside of the dataclass."""
    found = {entry.name: getattr(rows, entry.name) for entry in fields(rows)}
    moved = {
        name: _without_values(value) if is_dataclass(value) else value.to("meta") for name, value in found.items() if value is not None
    }
    return type(rows)(**{**found, **moved})


objectives = pytest.mark.parametrize(
    "diffusion",
    [
        {},
        {"normalizer": "masked_tokens", "timestep_per": "document", "weight": "inverse_fraction"},
        {"block_size": 8, "autoregressive_weight": 0.5},
        {"normalizer": "samples"},
    ],
    ids=["masked", "by_document", "joint", "mean_of_samples"],
)


@objectives
def test_the_loss_asks_the_device_for_nothing(diffusion):
    config = tiny_config(diffusion=diffusion, data={"sequence_length": LENGTH})
    with _WaitsOf() as before:
        inputs, row_terms, work = _prepare(_noisy(config), config)
    assert "nonzero" in before.found, "what the loss needs is picked before the model runs"
    cross_entropy = torch.rand(len(inputs.targets), requires_grad=True)
    with _WaitsOf() as loss:
        _loss(config, inputs, work, tuple(row_terms), (cross_entropy,))[0].backward()
    assert loss.found == []


@objectives
def test_the_loss_is_computed_of_tensors_without_values(diffusion):
    """Tensors of the meta device refuse what no dispatched operation shows on a CPU: tolist, numpy, copies to the host."""
    config = tiny_config(diffusion=diffusion, data={"sequence_length": LENGTH})
    inputs, row_terms, work = _prepare(_noisy(config), config)
    rows = _without_values(inputs.rows)
    cross_entropy = torch.rand(len(inputs.targets), device="meta", requires_grad=True)
    weighted, denominator, kept = _loss(config, replace(inputs, rows=rows), work.to("meta"), tuple(row_terms), (cross_entropy,))
    weighted.backward()
    assert {tensor.device.type for tensor in (weighted, denominator, kept, cross_entropy.grad)} == {"meta"}
