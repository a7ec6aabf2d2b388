"""Validation under every kind of noise against the whole bound from plain logits: the integral over t, and both end terms."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_distributed
from tests.objectives.references import noised_laws, reference_values
from tests.parallel.layouts import open_gates
from tests.tiny import VOCAB_SIZE, packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.config.schema import Config  # noqa: E402
from w1train.data.batch import PackedBatch  # noqa: E402
from w1train.diffusion.corruption import corrupt_at  # noqa: E402
from w1train.diffusion.processes import noise_process  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.objectives.losses import bound_of  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402
from w1train.training.validation import validate  # noqa: E402

FRACTIONS = [0.125, 0.375, 0.625, 0.875]
CASES = {
    # (diffusion, the loss that is the bound, t of each fraction with dt/du, t_0 if noise replaces tokens there)
    "hybrid": ({"objective": "hybrid", "loss": "kl_is", "weight": "gidd_dynamic"}, "kl_is", None, True),
    "blocks": ({"objective": "hybrid", "loss": "kl_is", "block_size": 4, "shift": True}, "kl_is", None, True),
    "cross-entropy": ({"objective": "uniform", "weight": "constant", "loss_positions": "all", "prediction": "full"}, "kl_is", None, True),
    "geometric": (
        {"objective": "uniform", "noise_schedule": "geometric", "schedule_sigma_max": 3.0, "loss": "kl_is"},
        "kl_is",
        [(u, 1.0) for u in FRACTIONS],
        True,
    ),
    "masked": ({"schedule_epsilon": 0.05}, "cross_entropy", [(u, 1.0) for u in FRACTIONS], True),
    "steps": ({"objective": "hybrid", "loss": "finite_kl", "num_timesteps": 6}, "finite_kl", [(t / 6, 1.0) for t in (1, 3, 4, 6)], False),
    "scores": ({"loss": "score_entropy"}, "score_entropy", [(u, 1.0) for u in FRACTIONS], False),
    "one token a block": ({"objective": "uniform", "loss": "kl_is", "block_size": 1}, "kl_is", None, True),
}

IN_EACH_RUN = ["hybrid", "cross-entropy", "masked", "steps"]


def _config(diffusion: dict) -> Config:
    given = {"num_noise_ids": VOCAB_SIZE, "num_strata": 8, "t_min": 0.01, "t_max": 0.99, **diffusion}
    return tiny_config(diffusion=given, validation={"timesteps": FRACTIONS, "block_sizes": []})


def _batches() -> list[PackedBatch]:
    return [packed_batch(range(first, first + 2)) for first in (0, 2)]


@torch.no_grad()
def _mean(model, config: Config, t: float, draw: int, loss: str) -> float:
    """Return the sum of weight * loss at t, divided by the number of tokens, from plain logits."""
    total = num_tokens = 0.0
    diffusion = dataclasses.replace(config.diffusion, loss=loss)
    process, bound = noise_process(diffusion), bound_of(dataclasses.replace(diffusion, weight="elbo"))
    for batch in _batches():
        noisy = corrupt_at(batch, diffusion, 0, t, draw=draw)
        inputs = rank_inputs(noisy, config)
        rows, logits = inputs.rows, model.stages[0](inputs.model).double()
        if loss == "reconstruction" and diffusion.prediction == "full":
            values = torch.nn.functional.cross_entropy(logits, rows.targets, reduction="none")
        else:
            values = reference_values(diffusion, process, rows, logits)
        weights = 1.0 if loss == "reconstruction" else bound.elbo_weight(rows.timesteps.double(), rows.inputs, rows.targets)
        used = rows.is_noised | torch.tensor(process.predicts_every_token)
        total += float((weights * values)[used].sum())
        num_tokens += int(noisy.has_target.sum())
    return total / num_tokens


def _prior(config: Config, t: float) -> float:
    """Return KL(q(z | x) || q(z | a uniform prediction)) by its sum over all ids."""
    process, time = noise_process(config.diffusion), torch.tensor([t], dtype=torch.float64)
    uniform = torch.full((1, VOCAB_SIZE), 1 / (VOCAB_SIZE - 1), dtype=torch.float64)
    uniform[0, config.diffusion.mask_token_id] = 0
    of_token = torch.nn.functional.one_hot(torch.tensor([20]), VOCAB_SIZE).double()
    true, prior = noised_laws(process, time, of_token)[0], noised_laws(process, time, uniform)[0]
    return sum(float(a * (a / b).log()) for a, b in zip(true, prior, strict=True) if a > 0)


def _measure(_rank: int, _size: int, configs: list[Config], cases: list) -> list[tuple[float, float]]:
    found = []
    with distributed(configs[0].parallel):
        model = build_trained_model(configs[0])
        open_gates(model)
        for config, (_, loss, points, has_reconstruction) in zip(configs, cases, strict=True):
            validation = SimpleNamespace(batches=_batches, bits_per_byte=lambda elbo: elbo)
            data = SimpleNamespace(validation=validation, validation_sets={"": validation})
            record = validate(config, model, data)
            if points is None:
                times = torch.sigmoid(9 * (2 * torch.tensor(FRACTIONS, dtype=torch.float64) - 1))
                points = [(t, 18 * t * (1 - t)) for t in times.tolist()]
                ends = [torch.sigmoid(torch.tensor(end, dtype=torch.float64)).item() for end in (-9.0, 9.0)]
            else:
                ends = [0.0, 1.0]
            expected = sum(rate * _mean(model, config, t, draw, loss) for draw, (t, rate) in enumerate(points, start=1)) / len(points)
            expected += _prior(config, ends[1])
            if has_reconstruction:
                expected += _mean(model, config, ends[0], 1 + len(points), "reconstruction")
            found.append((record["elbo"], expected))
    return found


@pytest.mark.parametrize("names", [IN_EACH_RUN, pytest.param(sorted(set(CASES) - set(IN_EACH_RUN)), marks=pytest.mark.slow)], ids=str)
def test_is_the_whole_bound(names):
    cases = [CASES[name] for name in names]
    (outcomes,) = run_distributed(_measure, 1, [_config(diffusion) for diffusion, *_ in cases], cases, process_group=False)
    for name, (found, expected) in zip(names, outcomes, strict=True):
        assert found == pytest.approx(expected, rel=2e-5), name
