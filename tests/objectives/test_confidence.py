"""Confidence-aware training: the entropy of the noised tokens that the model predicts correctly, as a mean over the global batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from tests.parallel.layouts import micro_batches, open_gates, whole_tensors
from tests.parallel.routing import routers
from tests.tiny import tiny_config, tiny_experts
from w1train.config.schema import Config
from w1train.model.chunked_head import Head, linear_row_terms
from w1train.model.row_terms import CrossEntropy, Entropy, IsMostProbable, value_of
from w1train.model.row_terms.row_term import WHOLE_VOCABULARY
from w1train.objectives import objective
from w1train.objectives.confidence import Confidence
from w1train.objectives.loss_rows import LossRows
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.objectives.description import num_measuring_passes  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402
from w1train.training.measurement import measured  # noqa: E402
from w1train.training.run_records import step_flops  # noqa: E402

BETA = 2.0
GOLDEN = {
    1.0: (0.947537, [-0.326688, 0.116701, 0.130076, 0.079911]),
    0.5: (0.455429, [-0.536879, 0.395577, 0.116904, 0.024397]),
}
"""dParallel's term for the logits (2, 1, 0, -1) and the target 0, at each temperature: the entropy and its gradient."""
GOLDEN_LOGITS, GOLDEN_CROSS_ENTROPY = [2.0, 1.0, 0.0, -1.0], 0.440190


def _rows(targets: Tensor, sums: Mapping[str, float] | None, is_noised: Tensor | None = None) -> LossRows:
    noised = torch.ones_like(targets, dtype=torch.bool) if is_noised is None else is_noised
    found = None if sums is None else {name: torch.tensor(value, dtype=torch.float64) for name, value in sums.items()}
    ones, count = torch.ones(len(targets)), torch.tensor(len(targets))
    return LossRows(targets, torch.zeros_like(targets), noised, ones, ones, noised.sum(), count, None, measured=found)


def _values(logits: Tensor, term: Confidence, rows: LossRows, chunk_size: int = 100, excluded: int | None = None) -> dict[str, Tensor]:
    head = Head(dataclasses.replace(WHOLE_VOCABULARY, excluded_token=excluded), chunk_size, sum_row_gradients=True)
    asked = term.row_terms(rows)
    return dict(zip(asked, linear_row_terms(logits, torch.eye(logits.shape[1]), tuple(asked.values()), head), strict=True))


def _entropy_gradient(logits: Tensor, targets: Tensor, temperature: float = 1.0, **options: int) -> tuple[float, Tensor]:
    """Return the mean entropy of correct rows and its gradient, as a batch of these rows alone gives them."""
    logits = logits.clone().requires_grad_()
    term, rows = Confidence(1.0, temperature, "num_masked"), _rows(targets, None)
    with torch.no_grad():
        counted = term.sums(_values(logits, term, rows, **options), rows)
    rows = _rows(targets, {"num_masked": 1.0, "num_correct": float(counted["num_correct"])})
    loss = term.loss(_values(logits, term, rows, **options), rows)
    assert loss is not None
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.item(), gradient


@pytest.mark.parametrize("temperature", GOLDEN)
def test_golden_values(temperature):
    logits = torch.tensor([GOLDEN_LOGITS])
    entropy, gradient = GOLDEN[temperature]
    found = _entropy_gradient(logits, torch.tensor([0]), temperature)
    assert found[0] == pytest.approx(entropy, abs=2e-6)
    assert found[1][0].tolist() == pytest.approx(gradient, abs=2e-6)
    assert value_of(CrossEntropy(torch.tensor([0])), logits.double()).item() == pytest.approx(GOLDEN_CROSS_ENTROPY, abs=1e-6)
    assert value_of(Entropy(temperature), logits.double()).item() == pytest.approx(entropy, abs=1e-6)


def test_a_wrong_row_and_a_kept_row_have_no_gradient():
    """The divisor counts neither of them."""
    logits = torch.tensor([GOLDEN_LOGITS, GOLDEN_LOGITS, GOLDEN_LOGITS], requires_grad=True)
    term = Confidence(BETA, 1.0, "num_tokens")
    rows = _rows(torch.tensor([0, 1, 0]), {"num_tokens": 6.0, "num_correct": 1.0}, torch.tensor([True, True, False]))
    loss = term.loss(values := _values(logits, term, rows), rows)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(BETA * 6 * GOLDEN[1.0][0], rel=1e-6)
    assert gradient[1:].count_nonzero() == 0
    sums = {name: float(value.detach()) for name, value in term.sums(values, rows).items()}
    assert sums["num_correct"] == 1
    assert term.metrics({**sums, "num_masked": 2.0})["masked_accuracy"] == 0.5
    assert term.total({**sums, "num_tokens": 6.0}) == pytest.approx(loss.item())


def test_uniform_logits_have_the_largest_entropy_and_no_gradient():
    """All ids share the first place, so each target counts as most probable; the excluded token is not one of the ids."""
    for excluded, num_ids in ((None, 8), (5, 7)):
        entropy, gradient = _entropy_gradient(torch.full((3, 8), 0.25), torch.tensor([0, 4, 7]), 0.5, excluded=excluded)
        assert entropy == pytest.approx(math.log(num_ids), rel=1e-6)
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_entropy_never_opposes_the_cross_entropy(temperature):
    logits = 3 * torch.randn((20_000, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = logits.argmax(dim=1)
    log_probabilities = (logits / temperature).log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    entropy = value_of(Entropy(temperature), logits)
    of_entropy = -probabilities * (log_probabilities + entropy[:, None]) / temperature
    of_cross_entropy = logits.softmax(dim=1) - torch.nn.functional.one_hot(targets, 6)
    assert (of_entropy * of_cross_entropy).sum(dim=1).min() >= -1e-12
    found = _entropy_gradient(logits.float(), targets, temperature)[1]
    assert (found - of_entropy / len(logits)).abs().max() < 1e-9


def test_no_correct_row_gives_zero():
    """Also where the micro-batch has no rows at all."""
    term = Confidence(BETA, 0.5, "num_masked")
    for targets in (torch.tensor([3, 3]), torch.tensor([], dtype=torch.int64)):
        logits = torch.tensor([GOLDEN_LOGITS] * len(targets)).reshape(len(targets), 4).requires_grad_()
        rows = _rows(targets, {"num_masked": float(len(targets)), "num_correct": 0.0})
        loss = term.loss(values := _values(logits, term, rows), rows)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.count_nonzero() == 0
        assert torch.isfinite(gradient).all()
        sums = {name: float(value.detach()) for name, value in term.sums(values, rows).items()}
        assert term.total({**sums, "num_masked": 0.0}) == 0
        assert term.metrics({**sums, "num_masked": 0.0}) == {"masked_accuracy": 0, "entropy_of_correct": 0}


def test_a_target_that_shares_the_first_place_is_most_probable():
    logits = torch.tensor([[1.0, 1.0, 0.0, float("-inf")]] * 4)
    assert value_of(IsMostProbable(torch.arange(4)), logits).tolist() == [1, 1, 0, 0]


def test_without_the_weight_nothing_is_measured():
    config = tiny_config(diffusion={"confidence_temperature": 0.5})
    assert not any(isinstance(term, Confidence) for term in objective.objective_of(config.diffusion, 4).terms)
    assert num_measuring_passes(config) == 0
    batches = iter(())
    assert measured(config, [], batches, 1) is batches
    autoregressive = tiny_config(diffusion={"confidence_weight": 1.0, "objective": "autoregressive"})
    assert num_measuring_passes(autoregressive) == 0, "in autoregression no token is noised"


# The whole model


def _config(layout: Sequence[int] = (1, 1, 1), *, micro_batch_size: int = 16, chunk: int | None = 5, **diffusion: object) -> Config:
    tensor, context, pipeline = layout
    return tiny_config(
        model={"num_layers": 2, "qk_norm": True},
        training={"loss_chunk_size": chunk, "global_batch_size": 32, "micro_batch_size": micro_batch_size},
        parallel={
            **{"distributed_optimizer": False, "tensor": tensor, "sequence": tensor > 1, "context": context, "pipeline": pipeline},
            "context_chunk_size": 4,
        },
        diffusion={
            **{"confidence_weight": BETA, "confidence_temperature": 0.5, "normalizer": "masked_tokens", "weight": "constant"},
            **diffusion,
        },
    )


def _dense(config, model, batches):
    """Return the loss, the accuracy and the gradients, by autograd from all logits of all micro-batches."""
    stage, total, entropies, is_correct, num_tokens = model.stages[0], 0.0, [], [], 0
    for noisy in batches:
        inputs = rank_inputs(noisy, config)
        logits, rows = stage(inputs.model), inputs.rows
        cooled = (logits / config.diffusion.confidence_temperature).log_softmax(dim=-1)
        entropies.append(-(cooled.exp() * cooled.clamp_min(-1e9)).sum(dim=-1))
        is_correct.append((logits.argmax(dim=-1) == rows.targets) & rows.is_noised)
        total = total + (torch.nn.functional.cross_entropy(logits, rows.targets, reduction="none") * rows.weights).sum()
        num_tokens += int(rows.num_masked)
    correct = torch.cat(is_correct)
    loss = total / num_tokens + BETA * (torch.cat(entropies) * correct).sum() / correct.sum()
    names, parameters = zip(*global_named_parameters(stage), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return float(loss.detach()), correct.double().mean().item(), dict(zip(names, gradients, strict=True))


def _measure(_rank, _size, configs):
    """Return the metrics and gradients of a step in each configuration, and with one rank the dense reference of the first."""
    outcomes, dense = [], None
    with distributed(configs[0].parallel) as ranks:
        for config in configs:
            model = build_trained_model(config)
            open_gates(model)
            batches = list(micro_batches(config, 0, ranks.data_parallel_rank, ranks.data_parallel_size))
            if dense is None and ranks.world_size == 1:
                dense = _dense(config, model, batches)
            model.zero_gradients()
            with_sums = measured(config, list(model.chunks), iter(batches), len(batches))
            assert all(chunk.training for chunk in model.chunks)
            assert all(router.counts.sum() == 0 for router in routers(model.stages)), "only the pass with gradients counts tokens"
            metrics, work = run_micro_batches(config, list(model.chunks), with_sums, len(batches), training=True)
            outcomes.append(({**metrics, "flops": step_flops(config, work)}, whole_tensors(model, lambda parameter: parameter.main_grad)))
    return outcomes, dense


def _assert_equal(found, wanted, tolerance=1e-5):
    (metrics, gradients), (loss, accuracy, expected) = found, wanted
    assert metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["masked_accuracy"] == pytest.approx(accuracy, rel=1e-9)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= tolerance * expected[name].norm(), name


def _run(num_ranks, configs):
    return run_distributed(_measure, num_ranks, configs, process_group=False)[0]


def test_the_step_is_the_formula_for_all_sizes_of_micro_batches_and_layouts():
    """The number of correct tokens differs between micro-batches and ranks, and no mean of means is the mean."""
    experts = _config(micro_batch_size=32)
    experts.model.experts = tiny_experts()["experts"]
    outcomes, dense = _run(1, [_config(micro_batch_size=32), _config(micro_batch_size=4, chunk=None), experts])
    assert 0 < dense[1] < 1, "some tokens are predicted correctly, and others are not"
    for outcome in outcomes[:2]:
        _assert_equal(outcome, dense, 1e-4)
    reference = (outcomes[0][0]["loss"], dense[1], outcomes[0][1])
    # Two ranks share the vocabulary, and there are two model replicas.
    _assert_equal(_run(4, [_config((2, 1, 1), micro_batch_size=8)])[0][0], reference)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 1, 1)], ids=["tp2", "cp2", "pp2", "dp2"])
@pytest.mark.parametrize("diffusion", [{}, {"block_size": 4, "shift": True, "complementary": True, "normalizer": "tokens"}], ids=str)
def test_each_kind_of_parallelism_keeps_the_numbers(layout, diffusion):
    (metrics, gradients), *_ = _run(1, [_config(micro_batch_size=32, **diffusion)])[0]
    found = _run(2, [_config(layout, micro_batch_size=8, **diffusion)])[0][0]
    _assert_equal(found, (metrics["loss"], metrics["masked_accuracy"], gradients))


def test_each_row_term_is_asked_for_once():
    config = _config()
    rows = rank_inputs(next(micro_batches(config, 0, 0, 1)), config).rows
    assert list(objective.objective_of(config.diffusion, 4).row_terms(rows)) == ["cross_entropy", "is_most_probable"]
    rows.measured = {}
    asked = objective.objective_of(config.diffusion, 4).row_terms(rows)
    assert list(asked) == ["cross_entropy", "is_most_probable", "entropy"]
    assert asked["cross_entropy"].targets is rows.targets


@pytest.mark.parametrize("other", [lambda targets: Entropy(), lambda targets: CrossEntropy(targets + 1), IsMostProbable])
def test_two_row_terms_of_one_name_are_refused(other, monkeypatch):
    """Otherwise one of the two terms of the objective would silently get the other's numbers."""
    monkeypatch.setattr(Confidence, "row_terms", lambda _self, rows: {"cross_entropy": other(rows.targets)})
    config = _config()
    rows = rank_inputs(next(micro_batches(config, 0, 0, 1)), config).rows
    with pytest.raises(AssertionError, match="cross_entropy"):
        objective.objective_of(config.diffusion, 4).row_terms(rows)


def test_a_pass_with_gradients_needs_the_sums():
    """Without them the term would silently be missing in the loss."""
    rows = _rows(torch.tensor([0]), None)
    with pytest.raises(AssertionError, match="the pass before"):
        Confidence(1.0, 1.0, "num_masked").loss({}, rows)
