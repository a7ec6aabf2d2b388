"""The balance of experts: the bias and the losses of routers, as closed forms of the routing over the global batch, in every layout."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import expert_biases, open_gates, train_layouts
from tests.slow import slow_except
from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine import expert_balance  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.model.experts import router_losses  # noqa: E402
from w1train.model.experts.routed_tokens import TokenKind  # noqa: E402
from w1train.model.experts.router import ExpertRouter  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.objectives.objective import Objective, objective_of  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training import inputs as inputs_module  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

EXPERTS = {"num_experts": 8, "num_active": 2, "ffn_hidden_size": 16, "num_dense_layers": 1}
LING = {**EXPERTS, "score": "sigmoid", "scale": 2.5, "num_groups": 4, "num_active_groups": 2, "has_bias": True}
SOFTMAX = {**EXPERTS, "score": "softmax"}


def _config(experts, balance, *, two_streams=True, normalizer="tokens", micro_batch_size=1, **parallel):
    """Three layers, of which the first is dense. Samples are cut to random lengths, so that no two micro-batches count alike."""
    config = tiny_config(
        model={"num_layers": 3},
        parallel={"context_chunk_size": 4, "distributed_optimizer": False, **parallel},
        diffusion={"normalizer": normalizer, "random_length_probability": 0.5},
        training={"micro_batch_size": micro_batch_size},
        balance=balance,
    )
    for name, value in experts.items():
        setattr(config.model.experts, name, value)
    if two_streams:
        config.diffusion.block_size, config.diffusion.timestep_per = 4, "block"
    return config


TESTED = {
    "both streams": (LING, {"auxiliary": 0.5, "router_z": 0.1, "bias_rate": 0.05}, {}),
    "noisy stream": (LING, {"auxiliary": 0.5, "bias_rate": 0.05, "streams": "noisy", "zero_mean": True}, {"normalizer": "samples"}),
    "one stream": (SOFTMAX, {"auxiliary": 0.5, "router_z": 0.1}, {"two_streams": False, "normalizer": "masked_tokens"}),
}


def tiny(name, **how):
    experts, balance, other = TESTED[name]
    return _config(experts, balance, **other, **how)


class Expected:
    """One step of the global batch in one process: plain autograd, and counts by hand."""

    def __init__(self, config):
        model = build_trained_model(config)
        open_gates(model)
        stage = model.stages[0]
        routers = [module for module in stage.modules() if isinstance(module, ExpertRouter)]
        seen = [_watched(router) for router in routers]
        self.biases = expert_biases(model)
        noisy = corrupt(packed_batch(range(config.training.global_batch_size)), config.diffusion, config.training.seed)
        with torch.no_grad():
            inputs = rank_inputs(noisy, config)
        objective = objective_of(config.diffusion, config.logging.num_t_bins)
        terms = objective.row_terms(inputs.rows)
        loss = objective.loss(dict(zip(terms, stage(inputs.model, tuple(terms.values())), strict=True)), inputs.rows)[0]
        real = noisy.document_ids >= 0
        per_sample = {"tokens": real.sum(1), "masked_tokens": noisy.loss_mask.sum(1), "samples": real.any(1)}[config.diffusion.normalizer]
        shares = per_sample / per_sample.sum()
        counted = real
        if config.diffusion.block_size is not None:
            counted = torch.cat([real, real if config.balance.streams == "both" else torch.zeros_like(real)], dim=1)
        layers = [_losses_of_layer(logits[0], chosen[0], counted, shares, config) for logits, chosen in seen]
        self.auxiliary = sum(float(auxiliary) for auxiliary, _ in layers)
        self.z = sum(float(z) for _, z in layers)
        total = loss / per_sample.sum()
        total = total + sum(config.balance.auxiliary * auxiliary + config.balance.router_z * z for auxiliary, z in layers)
        names, parameters = zip(*global_named_parameters(stage), strict=True)
        self.gradients = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
        self.counts = [chosen[0].unflatten(0, counted.T.shape)[counted.T].sum(0).tolist() for _, chosen in seen]
        masked = (noisy.input_ids == config.diffusion.mask_token_id) & real
        masked = torch.cat([masked, torch.zeros_like(masked)], dim=1) if counted.shape != real.shape else masked
        both = torch.cat([real] * (counted.shape[1] // real.shape[1]), dim=1)
        self.real_counts = [chosen[0].unflatten(0, counted.T.shape)[both.T].sum(0).tolist() for _, chosen in seen]
        self.all_counts = [chosen[0].sum(0).tolist() for _, chosen in seen]
        self.masked_counts = [chosen[0].unflatten(0, counted.T.shape)[masked.T].sum(0).tolist() for _, chosen in seen]


def _watched(router):
    """The logits and the choice of a router, as lists that get an entry from each forward pass."""
    logits, chosen, original = [], [], router.gating

    def gating(hidden_states):
        logits.append(original(hidden_states))
        return logits[-1]

    router.gating = gating
    router.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[1].detach()))
    return logits, chosen


def _losses_of_layer(logits, chosen, counted, shares, config):
    """The mean over samples of the switch loss and of the squared logsumexp, each sample with its share of the denominator."""
    experts = config.model.experts
    auxiliary, z = 0.0, 0.0
    for sample, share in enumerate(shares):
        if share == 0:
            continue
        own = counted[sample]
        rows = logits[own, sample]
        scores = rows.softmax(-1) if experts.score == "softmax" else rows.sigmoid() / rows.sigmoid().sum(-1, keepdim=True)
        used = chosen.unflatten(0, logits.shape[:2])[own, sample].double().mean(0) * experts.num_experts / experts.num_active
        auxiliary += share * (used * scores.mean(0)).sum()
        z += share * rows.exp().sum(-1).log().square().mean()
    return auxiliary, z


def _expect(_rank, _size, config):
    with distributed(config.parallel):
        return Expected(config)


@functools.cache
def expected(name):
    return run_distributed(_expect, 1, tiny(name), process_group=False)[0]


LAYOUTS = {
    "one process": (1, {"micro_batch_size": 4}),
    "micro-batches": (1, {"micro_batch_size": 1}),
    "dp2": (2, {"micro_batch_size": 2}),
    "tp2": (1, {"tensor": 2, "sequence": True}),
    "cp2": (1, {"context": 2}),
    "pp2": (1, {"pipeline": 2, "num_layers_in_first_stage": 1}),
    "recomputed": (1, {"recompute": "full"}),
    "dp2 ep2": (2, {"expert": 2}),
    "tp2 cp2": (1, {"tensor": 2, "sequence": True, "context": 2}),
}


@pytest.mark.parametrize("layout", slow_except(["tp2 cp2"], LAYOUTS))
def test_values_gradients_and_bias_are_the_closed_forms(layout):
    _check(layout, list(TESTED))


def _check(layout, names):
    data_parallel, how = LAYOUTS[layout]
    true = [expected(name) for name in names]
    for name, one, outcome in zip(
        names, true, train_layouts([tiny(name, **how) for name in names], data_parallel, num_steps=1), strict=True
    ):
        assert outcome.gradients.keys() == one.gradients.keys()
        for key, gradient in outcome.gradients.items():
            assert (gradient - one.gradients[key]).norm() <= 1e-5 * one.gradients[key].norm() + 1e-9, (name, key)
        experts, balance, _ = TESTED[name]
        assert outcome.biases.keys() == ({2, 3} if experts is LING else set())
        for layer, bias in outcome.biases.items():
            assert torch.equal(bias, one.biases[layer] + _moves(one.counts[layer - 2], balance)), (name, layer)
        _check_metrics(outcome.balance[0], one, balance, how.get("expert", 1))


def _check_metrics(metrics, true, balance, num_ranks):
    assert metrics["experts/auxiliary_loss"] == pytest.approx(true.auxiliary / 2, rel=1e-5)
    assert metrics.get("experts/router_z_loss", 0) == pytest.approx(true.z / 2 if "router_z" in balance else 0, rel=1e-5)
    assert metrics["experts/load_masked"] == pytest.approx(_mean_unevenness(true.masked_counts))
    assert metrics["experts/load"] == pytest.approx(_mean_unevenness(true.real_counts))
    assert metrics["experts/load_worst_layer"] == pytest.approx(max(map(_unevenness, true.real_counts)))
    assert metrics["experts/unused"] == sum(counts.count(0) for counts in true.real_counts) / 16
    assert metrics["experts/loads"] == [[pytest.approx(8 * count / sum(row), abs=6e-4) for count in row] for row in true.real_counts]
    half = [[sum(counts[:4]), sum(counts[4:])] for counts in true.all_counts]
    assert metrics.get("experts/rank_load") == (None if num_ranks == 1 else pytest.approx(_mean_unevenness(half)))


def _unevenness(counts):
    return max(counts) / sum(counts) * len(counts)


def _mean_unevenness(layers):
    return sum(map(_unevenness, layers)) / len(layers)


def _moves(counts, balance):
    mean = sum(counts) / len(counts)
    signs = [(mean > count) - (mean < count) for count in counts]
    middle = sum(signs) / len(signs) if balance.get("zero_mean") else 0
    return torch.tensor([balance["bias_rate"] * (sign - middle) for sign in signs])


def _each_micro_batch_moves(original):
    def count(router, is_chosen, kinds):
        original(router, is_chosen, kinds)
        if router.expert_bias is not None:
            router.expert_bias += 0.05 * torch.sign(router.counts.sum() / 8 - router.counts.sum(0)).float()

    return count


MUTANTS = {
    "padding counts for the losses": (inputs_module, "first_counted_kind", lambda _: lambda streams: TokenKind.PADDING, "micro-batches"),
    "padding counts for the bias": (expert_balance, "first_counted_kind", lambda _: lambda streams: TokenKind.PADDING, "micro-batches"),
    "divided by micro-batches": (Objective, "denominators", lambda of: lambda *given: of(*given) / 8, "micro-batches"),
    "each micro-batch counts alike": (Objective, "denominators", lambda of: lambda *given: of(*given) * 0 + 20, "micro-batches"),
    "the bias moves with each micro-batch": (ExpertRouter, "_count", _each_micro_batch_moves, "micro-batches"),
    "the loss is dropped": (router_losses.AddLoss, "apply", lambda _: lambda weights, loss: weights, "micro-batches"),
    "only own tokens are counted": (router_losses, "dist", lambda _: SimpleNamespace(all_reduce=lambda counts, group: None), "tp2 cp2"),
}
"""Rule that is broken -> (owner, name, function of the original that gives the broken one, layout in which it matters)."""


@pytest.mark.slow
@pytest.mark.parametrize("rule", MUTANTS)
def test_a_broken_rule_is_noticed(monkeypatch, rule):
    owner, name, broken, layout = MUTANTS[rule]
    expected("both streams")
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with pytest.raises(AssertionError):
        _check(layout, ["both streams"])
