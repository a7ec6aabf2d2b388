"""AdamW against torch's own, group by group."""

from __future__ import annotations

import torch

from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.engine.adamw import AdamW  # noqa: E402

NUM_STEPS = 4
OPTIONS = {"lr": 0.03, "betas": (0.7, 0.95), "eps": 1e-2}


def _groups() -> list[dict]:
    """Two groups with another decay and rate each."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2), (4,)], [(5,)]
    made = [[torch.randn(shape, generator=generator).requires_grad_() for shape in each] for each in shapes]
    return [{"params": made[0], "weight_decay": 0.5}, {"params": made[1], "weight_decay": 0.0, "lr": 0.1}]


def test_updates_are_torchs():
    ours, theirs = _groups(), _groups()
    optimizers = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS)
    for step in range(NUM_STEPS):
        generator = torch.Generator().manual_seed(step)
        for one, other in zip(ours, theirs, strict=True):
            for parameter, twin in zip(one["params"], other["params"], strict=True):
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                twin.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one["params"], other["params"], rtol=1e-6, atol=1e-7)


def test_steps_are_counted_in_every_group():
    """A rank without a parameter of a group still counts, because the groups of all ranks are one group in a checkpoint."""
    parameter, frozen = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = AdamW([{"params": [parameter]}, {"params": []}, {"params": [frozen]}], **OPTIONS)
    for _ in range(NUM_STEPS):
        parameter.grad = torch.ones(2)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [NUM_STEPS] * 3
    assert torch.equal(frozen, torch.ones(2)), "a parameter without a gradient is left alone"
