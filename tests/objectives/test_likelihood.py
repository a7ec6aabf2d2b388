"""Losses: the context-free identity, weights, normalisers, and sums that add."""

import math

import pytest
import torch

from tests.tiny import packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.objectives.likelihood import LossSums, denominator, diffusion_loss

NUM_BINS = 10


def _uniform_documents(num_samples, length):
    documents = torch.zeros((num_samples, length), dtype=torch.int32)
    return documents, torch.arange(num_samples)


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_context_free_model_gives_its_exact_likelihood(timestep_per):
    """E[sum over masked of -log p / t] = NLL for a model that ignores its input (masks.md, property 1).

    Fixed: which tokens are masked must be unbiased at every t, with no forcing of a masked token (masks.md G14).
    """
    config = DiffusionConfig(timestep_per=timestep_per, t_min=1e-3, num_strata=64, random_length_probability=0.0)
    documents, indices = _uniform_documents(8192, 64)
    documents[:, 24:] = 1
    tokens = torch.randint(16, 20, documents.shape, generator=torch.Generator().manual_seed(0))
    log_probability = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))[tokens - 16]
    noisy = corrupt(PackedBatch(tokens, documents, documents, indices), config, seed=11)
    weighted, sums = diffusion_loss(-log_probability[noisy.loss_mask], noisy, config, NUM_BINS)
    nll = -log_probability.double().mean()
    # t starts at t_min, not 0: the weight makes up for it exactly, whatever t_min is. One standard deviation is 0.35 %.
    assert float(weighted) / tokens.numel() == pytest.approx(float(nll), rel=0.012)
    assert sums.metrics(config)["elbo"] == pytest.approx(float(nll), rel=0.012)


def test_weights_and_normalizers():
    batch = packed_batch(range(8))
    cross_entropy_of = {"inverse_t": 1 / 0.25, "constant": 1.0, "one_minus_t": 0.75}
    for weight, expected in cross_entropy_of.items():
        for normalizer in ("tokens", "masked_tokens"):
            config = DiffusionConfig(weight=weight, normalizer=normalizer, random_length_probability=0.0)
            noisy = corrupt_at(batch, config, seed=3, timestep=0.25, draw=1)
            num_masked, num_tokens = int(noisy.loss_mask.sum()), int((noisy.document_ids >= 0).sum())
            weighted, sums = diffusion_loss(torch.full((num_masked,), 2.0), noisy, config, NUM_BINS)
            count = num_tokens if normalizer == "tokens" else num_masked
            assert int(denominator(config, noisy)) == count
            assert float(weighted) == pytest.approx(2.0 * expected * num_masked, rel=1e-6)
            metrics = sums.metrics(config)
            assert metrics["loss"] == pytest.approx(2.0 * expected * num_masked / count, rel=1e-6)
            assert metrics["elbo"] == pytest.approx(2.0 * 4 * num_masked / num_tokens)
            assert metrics["masked_cross_entropy"] == pytest.approx(2.0)
            assert metrics["mask_ratio"] == pytest.approx(num_masked / num_tokens)


def test_loss_by_t_puts_each_token_in_its_bin():
    config = DiffusionConfig(random_length_probability=0.0)
    batch = packed_batch(range(4))
    noisy = corrupt_at(batch, config, seed=3, timestep=0.95, draw=1)
    _, sums = diffusion_loss(torch.full((int(noisy.loss_mask.sum()),), 1.5), noisy, config, NUM_BINS)
    assert sums.metrics(config)["loss_by_t"] == [None] * 9 + [1.5]


def test_sums_of_parts_are_the_sums_of_the_whole():
    """A mean of means would not be: the parts have different counts (masks.md G12)."""
    config = DiffusionConfig(num_strata=8)
    whole_noisy = corrupt(packed_batch(range(12)), config, seed=2)
    cross_entropy = torch.rand(whole_noisy.input_ids.shape)
    _, whole = diffusion_loss(cross_entropy[whole_noisy.loss_mask], whole_noisy, config, NUM_BINS)
    total = torch.zeros_like(whole.values)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 12)):
        noisy = corrupt(packed_batch(list(range(12))[rows]), config, seed=2)
        total += diffusion_loss(cross_entropy[rows][noisy.loss_mask], noisy, config, NUM_BINS)[1].values
    added = LossSums(total, NUM_BINS).metrics(config)
    expected = whole.metrics(config)
    assert added["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    for sum_of_parts, of_whole in zip(added["loss_by_t"], expected["loss_by_t"], strict=True):
        assert (sum_of_parts is None) == (of_whole is None)
        assert of_whole is None or sum_of_parts == pytest.approx(of_whole, rel=1e-12)


def test_a_batch_without_a_masked_token_is_finite():
    config = DiffusionConfig(random_length_probability=0.0)
    noisy = corrupt_at(packed_batch([0]), config, seed=3, timestep=1e-9, draw=1)
    weighted, sums = diffusion_loss(torch.zeros(0, requires_grad=True), noisy, config, NUM_BINS)
    assert float(weighted.detach()) == 0.0
    assert all(math.isfinite(value) for value in sums.values.tolist())
