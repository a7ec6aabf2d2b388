"""A term of an objective that asks for more than the cross-entropy, as one file: the confidence-aware loss of LLaDA2.0
(arXiv 2512.15745), the entropy of the noised tokens that the model predicts correctly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import micro_batches, open_gates, whole_tensors
from tests.tiny import tiny_config
from w1train.model.row_terms import CrossEntropy, Entropy
from w1train.objectives import objective
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.model.initialization import global_named_parameters  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402
from w1train.training.inputs import rank_inputs  # noqa: E402

WEIGHT = 3.0
PARALLEL = {"distributed_optimizer": False}


@dataclass(slots=True, frozen=True)
class IsMostProbable(CrossEntropy):
    """1 where no token is more probable than the target, otherwise 0. It has no gradient."""

    def value(self, statistics):
        return (statistics.chosen[0] == statistics.largest).float()

    def write_gradient(self, *_):
        raise AssertionError("a number that is only a condition has no gradient")


class Confidence:
    """The sum of the entropies of the noised tokens that are predicted correctly."""

    layout: ClassVar = {"entropy_of_correct": (), "num_correct": ()}

    def row_terms(self, rows):
        return {"entropy": Entropy(), "is_most_probable": IsMostProbable(rows.targets), "cross_entropy": CrossEntropy(rows.targets)}

    def loss(self, values, rows):
        return WEIGHT * rows.of_noisy_stream(values["entropy"] * values["is_most_probable"].detach()).sum()

    def sums(self, values, rows):
        is_correct = rows.of_noisy_stream(values["is_most_probable"]).double()
        return {"entropy_of_correct": (rows.of_noisy_stream(values["entropy"]) * is_correct).sum(), "num_correct": is_correct.sum()}

    def total(self, sums):
        return WEIGHT * sums["entropy_of_correct"]

    def metrics(self, sums):
        return {"accuracy": sums["num_correct"] / max(sums["num_masked"], 1.0)}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(objective, "TERMS", (*objective.TERMS, lambda _config, _num_t_bins: Confidence()))


def _dense(config, model, batches):
    """Return the loss, the accuracy and the gradients, by autograd from all logits of all micro-batches."""
    stage, total, num_tokens, is_correct = model.stages[0], 0.0, 0, []
    for noisy in batches:
        inputs = rank_inputs(noisy, config)
        logits, rows = stage(inputs.model), inputs.rows
        log_probabilities = logits.log_softmax(dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities.clamp_min(-1e9)).sum(dim=-1)
        correct = logits.argmax(dim=-1) == rows.targets
        chosen = log_probabilities.gather(1, rows.targets[:, None])[:, 0]
        total = total + WEIGHT * (entropy * correct).sum() - (chosen * rows.weights).sum()
        num_tokens += int(rows.num_tokens)
        is_correct += correct.tolist()
    names, parameters = zip(*global_named_parameters(stage), strict=True)
    gradients = torch.autograd.grad(total / num_tokens, parameters)
    return float(total.detach()) / num_tokens, sum(is_correct) / len(is_correct), dict(zip(names, gradients, strict=True))


def _measure(_rank, _size, configs):
    """Return the metrics and gradients of a step in each configuration, and with one rank the dense reference of the first."""
    outcomes, dense = [], None
    with distributed(configs[0].parallel) as ranks:
        for config in configs:
            model = build_trained_model(config)
            open_gates(model)
            batches = list(micro_batches(config, 0, ranks.data_parallel_rank, ranks.data_parallel_size))
            if dense is None and config.parallel.tensor == 1:
                dense = _dense(config, model, batches)
            model.zero_gradients()
            metrics, _ = run_micro_batches(config, list(model.chunks), iter(batches), len(batches), training=True)
            outcomes.append((metrics, whole_tensors(model, lambda parameter: parameter.main_grad)))
    return outcomes, dense


def _config(loss_chunk_size, **parallel):
    return tiny_config(
        training={"loss_chunk_size": loss_chunk_size, "global_batch_size": 32, "micro_batch_size": 16}, parallel={**PARALLEL, **parallel}
    )


def test_the_term_has_the_gradient_of_its_formula(registered):
    """With all rows at once and in chunks, and over a vocabulary of two tensor-parallel ranks."""
    outcomes, (loss, accuracy, gradients) = run_distributed(_measure, 1, [_config(None), _config(5)], process_group=False)[0]
    outcomes += run_distributed(_measure, 2, [_config(5, tensor=2, sequence=True)], process_group=False)[0][0]
    assert 0 < accuracy < 1, "some tokens are predicted correctly, and others are not"
    for metrics, found in outcomes:
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(accuracy)
        assert found.keys() == gradients.keys()
        for name, gradient in found.items():
            assert (gradient - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name


def test_each_row_term_is_asked_for_once(registered):
    config = tiny_config()
    rows = rank_inputs(next(micro_batches(config, 0, 0, 1)), config).rows
    asked = objective.objective_of(config.diffusion, 4).row_terms(rows)
    assert list(asked) == ["cross_entropy", "entropy", "is_most_probable"]
    assert asked["cross_entropy"].targets is rows.targets


@pytest.mark.parametrize("other", [lambda targets: Entropy(), lambda targets: CrossEntropy(targets + 1), IsMostProbable])
def test_two_row_terms_of_one_name_are_refused(other, registered, monkeypatch):
    """Otherwise one of the two terms of the objective would silently get the other's numbers."""
    monkeypatch.setattr(Confidence, "row_terms", lambda _self, rows: {"cross_entropy": other(rows.targets)})
    config = tiny_config()
    rows = rank_inputs(next(micro_batches(config, 0, 0, 1)), config).rows
    with pytest.raises(AssertionError, match="cross_entropy"):
        objective.objective_of(config.diffusion, 4).row_terms(rows)
