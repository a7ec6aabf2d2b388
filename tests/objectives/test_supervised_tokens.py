"""Identities of fine-tuning: what the loss is divided by, bands of masks, and pairs, where prompts are never masked."""

import math

import pytest
import torch

from tests.objectives.losses import NUM_BINS, loss, metrics
from tests.tiny import LENGTH, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt
from w1train.objectives.named_sums import NamedSums
from w1train.objectives.objective import objective_of

WHOLE = {"random_length_probability": 0.0, "num_strata": 8}


def _rows(num_samples, num_prompt, num_reply):
    length = num_prompt + num_reply
    tokens = torch.full((num_samples, length), 20)
    batch = PackedBatch(tokens, torch.zeros((num_samples, length), dtype=torch.int32), torch.zeros_like(tokens), torch.arange(num_samples))
    batch.may_be_noised[:, :num_prompt] = False
    return batch


def _conversations(num_samples=12):
    """Packed documents, each of which begins with a prompt; the last sample is a prompt alone."""
    batch = packed_batch(range(num_samples))
    batch.may_be_noised = (batch.document_ids >= 0) & (batch.positions >= 3)
    batch.may_be_noised[-1] = False
    return batch


@pytest.mark.parametrize("count", ["random", "exact"])
def test_constant_logits_cost_the_logarithm_of_the_vocabulary(count):
    """E[loss] = ln V with the weight 1/t, and ln V in each draw with an exact number of masks (S1)."""
    config = DiffusionConfig(**{**WHOLE, "num_strata": 64}, mask_count=count, t_min=0.05 if count == "random" else 0.0)
    noisy = corrupt(_rows(8192, 5, 8), config, seed=1)
    found = metrics(loss(torch.full((int(noisy.loss_mask.sum()),), math.log(10)), noisy, config)[1], config)["loss"]
    assert found == pytest.approx(math.log(10), rel=0.02 if count == "random" else 1e-6)


@pytest.mark.parametrize("normalizer", ["documents", "samples", "sum_per_sample", "positions"])
@pytest.mark.parametrize(
    "given", [{}, {"shift": True}, {"block_size": 4, "timestep_per": "block"}, {"objective": "autoregressive"}], ids=str
)
def test_divisors_by_hand(normalizer, given):
    config = DiffusionConfig(**WHOLE, **given, normalizer=normalizer)
    noisy = corrupt(_conversations(), config, seed=3)
    cross_entropy = torch.rand(noisy.input_ids.shape)
    weights = objective_of(DiffusionConfig(**WHOLE, **given), NUM_BINS).weights(noisy)
    weighted = torch.where(noisy.loss_mask, weights * cross_entropy, 0.0).double()
    units = []
    for row in range(12):
        for document in noisy.document_ids[row].unique() if normalizer == "documents" else [None]:
            here = noisy.has_target[row] & (document is None or noisy.document_ids[row] == document)
            if here.any():
                own = {"documents": int(here.sum()), "samples": int(here.sum()), "positions": LENGTH}.get(normalizer, 1)
                units.append(float(weighted[row][here].sum()) / own)
    assert len(units) > 20 if normalizer == "documents" else len(units) == 11
    found = metrics(loss(cross_entropy[noisy.loss_mask], noisy, config)[1], config)["loss"]
    assert found == pytest.approx(sum(units) / len(units), rel=1e-6)


@pytest.mark.parametrize("normalizer", ["documents", "sum_per_sample", "positions"])
def test_units_are_counted_once_where_ranks_share_their_positions(normalizer):
    config = DiffusionConfig(**WHOLE, normalizer=normalizer)
    noisy = corrupt(_conversations(), config, seed=2)
    parts = [noisy.at(torch.arange(first, LENGTH, 3).expand(12, -1)) for first in range(3)]
    assert noisy.units is not None
    assert sum(int(part.units.sum()) for part in parts) == int(noisy.units.sum()) > 0


def test_the_divisor_is_that_of_the_whole_batch():
    """Two micro-batches of 10 nats on 5 tokens and 30 nats on 30 tokens: 40 / 35, and not the mean of the means, 1.5 (S5)."""
    config = DiffusionConfig(**WHOLE, weight="constant", t_min=1.0)
    total, layout = 0.0, None
    for num_tokens, nats in ((5, 10.0), (30, 30.0)):
        noisy = corrupt(_rows(1, 3, num_tokens), config, seed=1)
        sums = loss(torch.full((num_tokens,), nats / num_tokens), noisy, config)[1]
        total, layout = total + sums.values, sums.layout
    assert metrics(NamedSums(total, layout), config)["loss"] == pytest.approx(1.142857, rel=1e-6)


def test_a_band_of_pairs_and_empty_views():
    """Pairs at t in [0.3, 0.8] and 1 - t in [0.2, 0.7]: each token is masked once, and a view without a mask costs nothing (S3, S4)."""
    config = DiffusionConfig(**{**WHOLE, "num_strata": 64}, t_min=0.3, t_max=0.8, weight="constant", complementary=True)
    for num_reply, empty in ((1, 0.45), (8, 0.009)):
        noisy = corrupt(_rows(16384, 4, num_reply), config, seed=7)
        first, second = noisy.segment_timesteps[::2], noisy.segment_timesteps[1::2]
        assert 0.3 <= float(first.min()) < 0.302 < 0.798 < float(first.max()) <= 0.8
        torch.testing.assert_close(second, 1 - first)
        assert torch.equal(noisy.loss_mask[::2] ^ noisy.loss_mask[1::2], noisy.has_target[::2])
        assert float((~noisy.loss_mask[::2].any(dim=1)).double().mean()) == pytest.approx(empty, abs=0.012 if num_reply == 1 else 0.003)
        # A model without context: the mean over draws of the share of masked tokens is the mean of t.
        assert metrics(loss(torch.ones(int(noisy.loss_mask.sum())), noisy, config)[1], config)["loss"] == pytest.approx(0.5, rel=1e-6)
        assert float(noisy.loss_mask[::2].double().sum() / noisy.has_target[::2].sum()) == pytest.approx(0.55, rel=0.02)


@pytest.mark.parametrize("weight", ["elbo", "constant"])
def test_only_weights_with_a_bound_make_a_band(weight):
    config = DiffusionConfig(**WHOLE, t_min=0.3, t_max=0.8, weight=weight, complementary=True)
    largest = float(corrupt(_rows(512, 1, 8), config, seed=7).segment_timesteps[::2].max())
    assert largest > 0.79 if weight == "constant" else largest <= 0.7


@pytest.mark.parametrize("normalizer", ["tokens", "documents", "samples", "sum_per_sample", "positions", "masked_tokens"])
def test_a_batch_without_a_reply_is_zero_and_finite(normalizer):
    config = DiffusionConfig(**WHOLE, normalizer=normalizer)
    batch = _rows(4, 8, 0)
    found = metrics(loss(torch.zeros(0), corrupt(batch, config, seed=1), config)[1], config)
    assert found["loss"] == found["elbo"] == found["masked_cross_entropy"] == 0


def test_the_labels_of_prompts_change_nothing():
    """Other prompts leave masks and losses of a model that does not read them as they are (S7)."""
    config, batch = DiffusionConfig(**WHOLE), _conversations()
    other = PackedBatch(
        torch.where(batch.may_be_noised, batch.tokens, 17), batch.document_ids, batch.positions, batch.sample_indices, batch.may_be_noised
    )
    ours, theirs = corrupt(batch, config, seed=5), corrupt(other, config, seed=5)
    assert torch.equal(ours.loss_mask, theirs.loss_mask)
    assert torch.equal(ours.targets[ours.loss_mask], theirs.targets[theirs.loss_mask])
