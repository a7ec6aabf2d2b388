"""Learned rates of noise in every layout: masks, loss, gradients and rates of the single process, whose gradient is autograd's."""

from __future__ import annotations

import math

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import open_gates, texts_of, train_layouts
from tests.parallel.test_layouts import assert_equal_numbers
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.config.schema import Config  # noqa: E402
from w1train.diffusion.corruption import NoisyBatch, corrupt  # noqa: E402
from w1train.diffusion.learned_masked import EPSILON  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

RATES = "noise_rates.unconstrained"
LEARNED = {"objective": "learned_masked", "loss": "per_id", "coupled_draws": True, "random_length_probability": 0.3}
STREAMS = {
    "one-stream": LEARNED | {"timestep_per": "document"},
    "two-stream": LEARNED | {"timestep_per": "block", "block_size": 4},
}
LAYOUTS = {
    "tp2-pp2": ({"tensor": 2, "pipeline": 2, "sequence": True}, 1),
    "cp2": ({"context": 2}, 1),
    "tp2-dp2": ({"tensor": 2}, 2),
    "pp2-vpp2": ({"pipeline": 2, "virtual_pipeline": 2}, 1),
    "tp2-pp2-cp2": ({"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}, 1),
}


def _config(streams: str, data_parallel: int = 1, **parallel) -> Config:
    """Return a configuration of four pairs, in as many micro-batches as fill a pipeline."""
    return tiny_config(
        model={"num_layers": 4 if parallel.get("pipeline", 1) > 1 else 2, "learns_noise_rates": True},
        parallel={"context_chunk_size": 4, "distributed_optimizer": False, **parallel},
        diffusion=STREAMS[streams],
        training={"global_batch_size": 8, "micro_batch_size": 2 if parallel.get("pipeline", 1) > 1 else 4 // data_parallel},
    )


@pytest.mark.parametrize("name", slow_except(["tp2-pp2"], LAYOUTS))
def test_every_layout_gives_the_numbers_of_the_single_process(name):
    parallel, data = LAYOUTS[name]
    single = [_config(streams) for streams in STREAMS]
    for config in single:
        config.model.num_layers = _config("one-stream", **parallel).model.num_layers
    expected = train_layouts(single)
    found = train_layouts([_config(streams, data, **parallel) for streams in STREAMS], data)
    for outcome, wanted in zip(found, expected, strict=True):
        assert_equal_numbers(outcome, wanted)
        assert wanted.gradients[RATES].count_nonzero() > 40, "most ids are words of the text"


@pytest.mark.slow
def test_a_run_goes_on_with_the_rates_of_its_checkpoint(tmp_path):
    """The rates change quickly here, so a checkpoint without them, or masks of other rates, would give other losses."""

    def config() -> Config:
        made = _config("one-stream")
        made.optimizer.rate_multipliers = {"noise_rates.*": 300.0}
        return made

    straight = train_layouts([config()], num_steps=4)[0]
    train_layouts([config()], num_steps=2, save=tmp_path)
    resumed = train_layouts([config()], num_steps=2, load=tmp_path / "step_0000000002")[0]
    assert resumed.losses == straight.losses[2:]
    assert torch.equal(resumed.parameters[RATES], straight.parameters[RATES])
    slow = train_layouts([_config("one-stream")], num_steps=4)[0]
    assert slow.noise != straight.noise, "the rates of a step draw the masks of the next"


@pytest.mark.slow
@pytest.mark.parametrize("streams", STREAMS)
def test_a_checkpoint_of_rates_goes_on_in_another_layout(streams, tmp_path):
    straight = train_layouts([_config(streams)], num_steps=4)[0]
    options = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    train_layouts([_pipelined(streams, 2, **options)], 2, num_steps=2, save=tmp_path)
    for layout, data in (({}, 1), ({"tensor": 2}, 2)):
        config = _config(streams, data, distributed_optimizer=True, **layout)
        resumed = train_layouts([config], data, num_steps=2, load=tmp_path / "step_0000000002")[0]
        assert resumed.losses == pytest.approx(straight.losses[2:], rel=1e-6)


def _pipelined(streams: str, data: int, **options) -> Config:
    config = _config(streams, data, pipeline=2, tensor=2, sequence=True, **options)
    config.model.num_layers = 2
    return config


def _by_autograd(config: Config) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return (loss and gradients of the training path, those of the loss written out over whole logits in one graph)."""
    model = build_trained_model(config)
    open_gates(model)
    size, stage = config.training.global_batch_size, model.stages[0]
    noisy = corrupt(texts_of(range(size), config), config.diffusion, config.training.seed, rates=model.noise_rates())
    bound, score = _written_out(stage, noisy, config)
    wanted = torch.autograd.grad((bound + score) / noisy.num_tokens, list(stage.parameters()))
    names = [name for name, _ in global_named_parameters(stage)]
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    metrics, _ = run_micro_batches(config, list(model.chunks), iter([noisy]), 1, training=True)
    found = {name: parameter.main_grad.clone() for name, parameter in global_named_parameters(stage)}
    found |= {name: torch.tensor([metrics[name]]) for name in ("loss", "elbo")}
    logged = (bound.detach() / noisy.num_tokens)[None].float()
    return found, {**dict(zip(names, wanted, strict=True)), "loss": logged, "elbo": logged}


def _written_out(stage: torch.nn.Module, noisy: NoisyBatch, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the bound, its score-function term), summed over all samples, token by token, from the formulas of the paper."""
    rates, mask = torch.nn.functional.softplus(dict(stage.named_parameters())[RATES]).double(), config.diffusion.mask_token_id
    masked, times = noisy.input_ids == mask, noisy.target_timesteps.double()
    log_p = torch.zeros(*noisy.tokens.shape, config.model.vocab_size, dtype=torch.float64)
    log_p[masked] = stage(rank_inputs(noisy, config).model).double().log_softmax(dim=-1)
    words, known = rates[noisy.tokens], noisy.has_target
    density = (words * (-log_p.gather(2, noisy.tokens[..., None])[..., 0] - 1) + log_p.exp() @ rates) / times.clamp_min(1e-9)
    losses = torch.where(masked, density, 0.0)
    q_mask = (1 - EPSILON) * torch.where(known, times, 0.5) ** words
    log_q = torch.where(masked, q_mask, 1 - q_mask).log()
    score = torch.zeros(())
    for first in range(0, len(losses), 2):
        for segment in noisy.target_segments[first].unique():
            place = (noisy.target_segments[first] == segment) & known[first]
            f = losses[first : first + 2, place].sum(dim=1)
            logs = log_q[first : first + 2, place].sum(dim=1)
            score = score + (f[0] - f[1]).detach() * (logs[0] - logs[1])
    smallest = math.log(config.diffusion.t_min)
    others = torch.arange(len(rates)) != mask
    guess = rates[noisy.tokens] * smallest - torch.logsumexp(rates[others] * smallest, dim=0)
    end = -(1 - EPSILON) * config.diffusion.t_min**words * guess
    # The loss is the mean over t from t_min to 1.
    return losses.sum() + end[known].sum() / (1 - config.diffusion.t_min), score


def _all_by_autograd(_rank: int, _size: int, configs: list[Config]):
    with distributed(configs[0].parallel):
        return [_by_autograd(config) for config in configs]


def test_the_loss_and_its_gradients_are_those_of_autograd_over_whole_logits():
    (results,) = run_distributed(_all_by_autograd, 1, [_config(streams) for streams in STREAMS], process_group=False)
    for found, wanted in results:
        for name, gradient in wanted.items():
            error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
            assert error <= 1e-5, f"{name}: relative error {error:.1e}"


def test_the_balance_of_experts_teaches_no_rates():
    """The rates are taught by the bound alone. The losses of routers are no part of the bound, and only move the model."""
    configs = []
    for auxiliary in (0.0, 0.5):
        config = _config("one-stream")
        config.model.experts.num_experts, config.model.experts.num_active, config.model.experts.ffn_hidden_size = 4, 2, 16
        config.balance.auxiliary, config.balance.router_z = auxiliary, auxiliary
        configs.append(config)
    plain, balanced = train_layouts(configs, num_steps=1)
    routers = [name for name in plain.gradients if name.endswith("router.weight")]
    assert len(routers) == 2
    assert torch.equal(plain.gradients[RATES], balanced.gradients[RATES])
    assert plain.gradients[RATES].abs().max() > 0
    assert all((plain.gradients[name] - balanced.gradients[name]).abs().max() > 0 for name in routers)
