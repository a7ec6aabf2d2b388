"""A token that may not be noised is never masked, is no target, counts in no denominator, and is visible as itself."""

import dataclasses

import pytest
import torch

from tests.objectives.losses import NUM_BINS, loss, metrics
from tests.tiny import LENGTH, VOCAB_SIZE, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.diffusion.corruption import corrupt, corrupt_at, cut_to_random_length
from w1train.objectives.loss_rows import loss_rows
from w1train.objectives.objective import objective_of

WHOLE = {"random_length_probability": 0.0, "num_strata": 8}
OBJECTIVES = {
    "masked": {"timestep_per": "document"},
    "blocks": {"block_size": 4, "timestep_per": "block"},
    "autoregressive": {"objective": "autoregressive"},
    "shifted pairs": {"block_size": 4, "shift": True, "complementary": True, "weight": "inverse_fraction"},
    "joint": {"block_size": 4, "clean_attention": "token_causal", "autoregressive_weight": 0.5, "normalizer": "masked_tokens"},
}
each_objective = pytest.mark.parametrize("given", OBJECTIVES.values(), ids=OBJECTIVES)


def _batch(num_samples=12):
    """Every second sample begins with a prompt; some more tokens may not be noised."""
    batch = packed_batch(range(num_samples))
    generator = torch.Generator().manual_seed(1)
    fixed = torch.rand((num_samples, LENGTH), generator=generator) < 0.3
    fixed[::2, :9] = True
    batch.may_be_noised = (batch.document_ids >= 0) & ~fixed
    return batch


def _expected_targets(batch, config, noisy, row):
    """(outputs of the noisy stream, of the clean stream) whose target may be predicted, by counting."""
    from_before = config.shift or config.objective == "autoregressive"
    documents, may = batch.document_ids[row].tolist(), batch.may_be_noised[row].tolist()
    follows = [place for place in range(1, LENGTH) if documents[place] == documents[place - 1] and may[place]]
    own = [place for place in range(LENGTH) if may[place]]
    return {place - 1 for place in follows} if from_before else set(own), {place - 1 for place in follows}


@each_objective
@pytest.mark.parametrize("timestep", [None, 1.0])
def test_is_visible_as_itself_and_no_target(given, timestep):
    config, batch = DiffusionConfig(**WHOLE, **given), _batch()
    noisy = corrupt(batch, config, 3) if timestep is None else corrupt_at(batch, config, 3, timestep, draw=1)
    fixed = ~batch.may_be_noised
    assert torch.equal(noisy.input_ids[fixed], batch.tokens[fixed])
    for row in range(len(batch.tokens)):
        expected, following = _expected_targets(batch, config, noisy, row)
        found = set(noisy.has_target[row].nonzero()[:, 0].tolist())
        assert found == expected
        masked = set(noisy.loss_mask[row].nonzero()[:, 0].tolist())
        assert masked == found if timestep == 1.0 or config.objective == "autoregressive" else masked < found
        if noisy.next_mask is not None:
            assert set(noisy.next_mask[row].nonzero()[:, 0].tolist()) == following
    assert int(noisy.num_tokens) == sum(len(_expected_targets(batch, config, noisy, row)[0]) for row in range(len(batch.tokens)))


@each_objective
def test_the_other_tokens_have_the_noise_that_they_had(given):
    """Noise belongs to a place of a sample, whatever else may be noised."""
    config, batch = DiffusionConfig(**WHOLE, **given), _batch()
    noisy = corrupt(batch, config, 3)
    everything = corrupt(dataclasses.replace(batch, may_be_noised=batch.document_ids >= 0), config, 3)
    assert torch.equal(noisy.input_ids, torch.where(batch.may_be_noised, everything.input_ids, batch.tokens))
    assert torch.equal(noisy.target_timesteps, everything.target_timesteps)


@each_objective
def test_the_loss_and_its_gradient_do_not_depend_on_it_as_a_target(given):
    """A model that ignores its input: what it says of each id. Other ids in the places that may not be noised change nothing."""
    config, batch = DiffusionConfig(**WHOLE, **given), _batch()
    other = torch.randint(16, VOCAB_SIZE, batch.tokens.shape, generator=torch.Generator().manual_seed(2))
    perturbed = dataclasses.replace(batch, tokens=torch.where(batch.may_be_noised, batch.tokens, other))
    found = []
    for one in (batch, perturbed):
        noisy = corrupt(one, config, 3)
        rows = loss_rows(noisy, objective_of(config, NUM_BINS).weights(noisy))
        table = torch.rand(VOCAB_SIZE, generator=torch.Generator().manual_seed(4)).requires_grad_()
        weighted, sums = loss(table[rows.targets], noisy, config)
        weighted.backward()
        found.append((weighted.detach(), sums.values, table.grad))
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_metrics_are_those_of_the_tokens_that_may_be_noised():
    """By counting, for a likelihood of ln 2 nats per token."""
    config, batch = DiffusionConfig(**WHOLE), _batch()
    noisy = corrupt_at(batch, config, 3, 0.5, draw=1)
    num_masked, num_tokens = int((noisy.input_ids != batch.tokens).sum()), int(batch.may_be_noised.sum())
    _, sums = loss(torch.full((num_masked,), 0.6931), noisy, config)
    found = metrics(sums, config)
    assert found["mask_ratio"] == pytest.approx(num_masked / num_tokens)
    assert found["elbo"] == found["loss"] == pytest.approx(2 * 0.6931 * num_masked / num_tokens)


def test_a_cut_to_random_length_takes_the_rest_away():
    batch = _batch(200)
    cut = cut_to_random_length(batch, DiffusionConfig(random_length_probability=0.5), 2, batch.sample_indices)
    assert torch.equal(cut.may_be_noised, batch.may_be_noised & (cut.document_ids >= 0))
    assert int(cut.may_be_noised.sum()) < int(batch.may_be_noised.sum())


def test_without_a_statement_every_token_of_a_document_may_be_noised():
    batch = packed_batch(range(3))
    assert torch.equal(batch.may_be_noised, batch.document_ids >= 0)
