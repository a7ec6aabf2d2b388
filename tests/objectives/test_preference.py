"""Preferences: golden values of DPO, identities of its margin, and the gradient of split batches against autograd through whole pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import NoisyBatch, corrupt
from w1train.objectives.loss_rows import LossRows, loss_rows
from w1train.objectives.named_sums import NamedSums
from w1train.objectives.objective import Objective, objective_of
from w1train.objectives.preference import PairScores, Preference

SEED = 3
LENGTH = 12
MASK = 14
NUM_TEXTS = 6
BETA, SFT = 0.3, 0.05


def _config(num_draws: int, **fields: object) -> DiffusionConfig:
    given = {
        "random_length_probability": 0.0,
        "t_min": 0.05,
        "num_strata": 4,
        "preference_beta": BETA,
        **fields,
    }
    return DiffusionConfig(**given, preference_draws=num_draws)


def _texts(num_draws: int, first_sample: int = 0) -> PackedBatch:
    """Return the samples of a global batch: n draws of each text, whose prompts have 3 tokens, and whose replies have 4 to 9."""
    texts = torch.arange(NUM_TEXTS).repeat_interleave(num_draws)
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(16, 90, (NUM_TEXTS, LENGTH), generator=generator)[texts]
    places = torch.arange(LENGTH).expand(len(texts), LENGTH)
    is_text = places < (7 + texts % 6)[:, None]
    return PackedBatch(
        tokens=tokens,
        document_ids=torch.where(is_text, 0, -1).int(),
        positions=torch.where(is_text, places, 0).int(),
        may_be_noised=is_text & (places >= 3),
        sample_indices=first_sample + torch.arange(len(texts)),
    )


def _batch(config: DiffusionConfig, first_sample: int = 0) -> NoisyBatch:
    noisy = corrupt(_texts(config.preference_draws, first_sample), config, SEED)
    noisy.first_sample = first_sample
    return noisy


def _part(noisy: NoisyBatch, start: int, stop: int) -> NoisyBatch:
    """Return some samples of a batch as a micro-batch, whose segments are samples."""
    per_sample = {name: getattr(noisy, name)[start:stop] for name in (*noisy.names("token"), *noisy.names("sample"))}
    segments = {"segment_timesteps": noisy.segment_timesteps[start:stop], "segment_index": per_sample["segment_index"] - start}
    return dataclasses.replace(noisy, **{**per_sample, **segments})


def _objective(config: DiffusionConfig) -> Objective:
    return objective_of(config, 4, NUM_TEXTS)


def _run(config: DiffusionConfig, noisy: NoisyBatch, cross_entropy: Tensor) -> tuple[Tensor, NamedSums]:
    objective = _objective(config)
    return objective.loss({"cross_entropy": cross_entropy}, loss_rows(noisy, objective.weights(noisy)))


def _measured(config: DiffusionConfig, noisy: NoisyBatch, policy: Tensor, reference: Tensor) -> Mapping[str, Tensor]:
    with torch.no_grad():
        (_, of_policy), (_, of_reference) = _run(config, noisy, policy), _run(config, noisy, reference)
    return {name: of_policy[name] for name in of_policy.layout} | {f"reference_{name}": of_reference[name] for name in of_reference.layout}


def _rows(config: DiffusionConfig, noisy: NoisyBatch) -> LossRows:
    return loss_rows(noisy, _objective(config).weights(noisy))


def _whole_loss(config: DiffusionConfig, noisy: NoisyBatch, policy: Tensor, reference: Tensor) -> Tensor:
    """Return the loss by its formula, from whole pairs."""
    rows, num_draws = _rows(config, noisy), config.preference_draws
    texts = noisy.loss_mask.nonzero()[:, 0] // num_draws
    of_policy, of_reference = (
        -torch.zeros(NUM_TEXTS, dtype=torch.float64).index_add(0, texts, rows.weights.double() * values) / num_draws
        for values in (policy, reference)
    )
    gains = of_policy - of_reference
    margins = config.preference_beta * (gains[0::2] - gains[1::2])
    lengths = noisy.has_target.sum(dim=1)[::num_draws][0::2]
    return (-logsigmoid(margins) - config.preference_cross_entropy_weight * of_policy[0::2] / lengths).mean()


def _losses(noisy: NoisyBatch) -> tuple[Tensor, Tensor]:
    """Return cross-entropies of the model and of the reference at all rows, float64."""
    generator = torch.Generator().manual_seed(8)
    num_rows = int(noisy.loss_mask.sum())
    policy, reference = (5 * torch.rand(num_rows, generator=generator, dtype=torch.float64) for _ in range(2))
    return policy.requires_grad_(), reference


CASES = {
    "plain": {},
    "antithetic": {"antithetic": True},
    "complementary": {"complementary": True},
    "with the chosen reply": {"preference_cross_entropy_weight": SFT},
    "blocks": {"block_size": 4, "timestep_per": "sequence", "shift": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch_size", [1, 4, 24])
def test_the_gradient_of_micro_batches_is_that_of_whole_pairs(case, micro_batch_size):
    config = _config(4, **CASES[case])
    noisy = _batch(config, first_sample=48)
    policy, reference = _losses(noisy)
    expected = _whole_loss(config, noisy, policy, reference)
    (gradient,) = torch.autograd.grad(expected, policy)

    found = torch.zeros((), dtype=torch.float64)
    total = torch.zeros(1)
    measured = _measured(config, noisy, policy, reference)
    for start in range(0, 24, micro_batch_size):
        part = _part(noisy, start, start + micro_batch_size)
        part.measured = measured
        chosen = noisy.loss_mask.nonzero()[:, 0]
        weighted, sums = _run(config, part, policy[(chosen >= start) & (chosen < start + micro_batch_size)])
        found, total = found + weighted, total + sums.values
    objective = _objective(config)
    sums = NamedSums(total, objective.layout)
    (split,) = torch.autograd.grad(found / sums["num_units"], policy)
    torch.testing.assert_close(split, gradient, rtol=1e-6, atol=1e-9)
    assert objective.metrics(sums)["loss"] == pytest.approx(expected.item(), rel=1e-10)


# (beta, B(chosen), B_ref(chosen), B(rejected), B_ref(rejected)) -> (s, loss, dL / dB(chosen)), from posttraining.md.
GOLDEN = {0.1: (0.3, 0.554355, -0.042556), 0.2: (0.6, 0.437488, -0.070869)}


@pytest.mark.parametrize("beta", GOLDEN)
def test_golden_values(beta):
    margin, loss, slope = GOLDEN[beta]
    bounds, reference = torch.tensor([10.0, 20.0], dtype=torch.float64), torch.tensor([12.0, 19.0], dtype=torch.float64)
    scores = PairScores.of(bounds, reference, beta)
    assert scores.margins.item() == pytest.approx(margin)
    assert scores.loss.item() == pytest.approx(loss, abs=1e-6)
    assert scores.accuracy.item() == 1
    term = Preference(num_draws=1, beta=beta, cross_entropy_weight=0.0, num_texts=2)
    measured = {"text_bounds": bounds, "reference_text_bounds": reference, "text_tokens": torch.ones(2)}
    # The factor belongs to cross-entropies, which are -B, and the sum is divided by the two samples of the pair.
    assert (-term.factors(measured) / 2).tolist() == pytest.approx([slope, -slope], abs=1e-6)


@pytest.mark.parametrize("num_draws", [1, 8])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_a_model_that_is_its_reference_has_the_loss_of_a_coin(num_draws, beta):
    config = _config(num_draws, preference_beta=beta)
    noisy = _batch(config)
    policy, _ = _losses(noisy)
    measured = _measured(config, noisy, policy, policy)
    noisy.measured = measured
    weighted, sums = _run(config, noisy, policy)
    metrics = _objective(config).metrics(sums)
    assert metrics["loss"] == metrics["preference_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert metrics["preference_margin"] == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(weighted / sums["num_units"], policy)
    sides = torch.where(noisy.loss_mask.nonzero()[:, 0] // num_draws % 2 == 0, 0.5, -0.5)
    expected = sides * beta * _rows(config, noisy).weights / (num_draws * NUM_TEXTS / 2)
    torch.testing.assert_close(gradient, expected.double(), rtol=1e-6, atol=0.0)


def test_exchanged_replies_change_the_sign_of_the_margin():
    bounds, reference = torch.rand(2, 8, dtype=torch.float64)
    exchanged = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    scores, other = PairScores.of(bounds, reference, BETA), PairScores.of(bounds[exchanged], reference[exchanged], BETA)
    torch.testing.assert_close(other.margins, -scores.margins)
    assert other.accuracy == pytest.approx(1 - scores.accuracy)


def test_the_metrics_say_what_both_sides_have_gained():
    config = _config(2)
    noisy = _batch(config)
    policy, reference = _losses(noisy)
    noisy.measured = _measured(config, noisy, policy, reference)
    metrics = _objective(config).metrics(_run(config, noisy, policy)[1])
    weights, sides = _rows(config, noisy).weights.double(), noisy.loss_mask.nonzero()[:, 0] // 2 % 2
    for side, name in enumerate(("chosen", "rejected")):
        num_tokens = noisy.has_target[torch.arange(2 * NUM_TEXTS) // 2 % 2 == side].sum()
        of_policy, of_reference = ((weights * values)[sides == side].sum() / num_tokens for values in (policy, reference))
        assert metrics[f"elbo_{name}"] == pytest.approx(of_policy.item())
        assert metrics[f"elbo_{name}_change"] == pytest.approx((of_policy - of_reference).item())


def test_the_draws_of_a_reply_are_stratified_and_differ():
    noisy = _batch(_config(8, num_strata=8, t_min=1e-3))
    by_text = noisy.segment_timesteps.view(NUM_TEXTS, 8)
    strata = ((by_text - 1e-3) / (1 - 1e-3) * 8).long()
    assert all(sorted(row.tolist()) == list(range(8)) for row in strata)


def test_without_preferences_nothing_is_added():
    objective = objective_of(DiffusionConfig(), 4)
    assert not objective.is_measured
    assert "text_bounds" not in objective.layout


def _toy_estimates(num_repeats: int = 300, seed: int = SEED, **fields: object) -> tuple[Tensor, Tensor]:
    """Return estimates of the ELBO of one reply of 32 tokens, [repeats] each, of a model and of a reference that is nearly the same. The
    cross-entropy of a token grows with the number of masks among its neighbours."""
    config = _config(8, **{"t_min": 1e-3, "num_strata": 1, **fields})
    num_samples = 8 * num_repeats
    texts = PackedBatch(
        tokens=torch.full((num_samples, 32), 20),
        document_ids=torch.zeros((num_samples, 32), dtype=torch.int32),
        positions=torch.arange(32, dtype=torch.int32).expand(num_samples, 32),
        sample_indices=torch.arange(num_samples),
    )
    noisy = corrupt(texts, config, seed)
    masked = noisy.target_is_noised.double()
    neighbours = sum(masked.roll(shift, dims=1) for shift in (-2, -1, 1, 2))
    cross_entropy = 0.5 + 0.5 * neighbours
    weights = _objective(config).weights(noisy) * noisy.loss_mask
    estimates = (-(weights * values).sum(dim=1).view(num_repeats, 8).mean(dim=1) for values in (cross_entropy, 1.02 * cross_entropy + 0.01))
    policy, reference = estimates
    return policy, reference


def test_shared_and_stratified_draws_vary_less():
    """The order of the variances is that of LLaDA 1.5's analysis. Each bound is about half or twice the ratio that is measured."""
    policy, reference = _toy_estimates()
    _, other = _toy_estimates(seed=SEED + 1)
    independent = policy.var()
    assert (policy - reference).var() < 0.005 * (policy - other).var(), "model and reference share their draws"
    stratified = _toy_estimates(num_strata=8)[0].var()
    assert stratified < 0.6 * independent
    assert _toy_estimates(num_strata=4, complementary=True)[0].var() < 0.5 * stratified
    assert _toy_estimates(antithetic=True)[0].var() < independent
