"""Which token each output predicts: pairs, shift, autoregression, the clean stream; and noise on embeddings."""

from statistics import NormalDist

import pytest
import torch

from tests.tiny import LENGTH, packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.diffusion.embedding_noise import EmbeddingNoise
from w1train.diffusion.philox import Purpose, random_words

MASK = DiffusionConfig().mask_token_id


def _pairs(num_pairs, first=0):
    """Each text twice in a row, as the loader serves them."""
    texts = packed_batch(range(num_pairs))
    twice = torch.arange(num_pairs).repeat_interleave(2)
    return PackedBatch(texts.tokens[twice], texts.document_ids[twice], texts.positions[twice], first + torch.arange(2 * num_pairs))


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_partners_predict_each_token_once(timestep_per):
    config = DiffusionConfig(complementary=True, timestep_per=timestep_per, num_strata=8)
    noisy = corrupt(_pairs(32), config, seed=3)
    first, second = noisy.loss_mask[0::2], noisy.loss_mask[1::2]
    assert torch.equal(first ^ second, noisy.document_ids[0::2] >= 0)
    real = noisy.document_ids[0::2] >= 0
    assert torch.equal(noisy.document_ids[0::2], noisy.document_ids[1::2]), "both are cut alike"
    t = noisy.target_timesteps
    torch.testing.assert_close(t[0::2][real] + t[1::2][real], torch.ones_like(t[0::2][real]))
    assert t.min() >= config.t_min * 0.99
    assert abs(float(first[real].float().mean() - t[0::2][real].mean())) < 0.03


def test_partners_are_the_same_in_any_batch():
    config = DiffusionConfig(complementary=True, num_strata=8)
    whole = corrupt(_pairs(8, first=16), config, seed=3)
    texts = _pairs(8, first=16)
    for row in range(16):
        one = PackedBatch(*(getattr(texts, name)[row : row + 1] for name in ("tokens", "document_ids", "positions", "sample_indices")))
        assert torch.equal(corrupt(one, config, seed=3).input_ids[0], whole.input_ids[row])


def test_validation_has_no_partners():
    noisy = [corrupt_at(packed_batch(range(8)), DiffusionConfig(complementary=pairs), 0, 0.3, draw=1) for pairs in (False, True)]
    assert torch.equal(noisy[0].input_ids, noisy[1].input_ids)


@pytest.mark.parametrize("draw_t", [None, 1.0])
def test_shift_predicts_the_next_token_and_never_the_first(draw_t):
    config = DiffusionConfig(shift=True, timestep_per="document", num_strata=8, random_length_probability=0.0)
    batch = packed_batch(range(12))
    noisy = corrupt(batch, config, seed=1) if draw_t is None else corrupt_at(batch, config, 1, draw_t, draw=1)
    starts = batch.positions == 0
    assert (noisy.input_ids != MASK)[starts].all()
    rows, columns = noisy.loss_mask.nonzero(as_tuple=True)
    assert (noisy.input_ids[rows, columns + 1] == MASK).all()
    assert torch.equal(noisy.targets[noisy.loss_mask], batch.tokens[rows, columns + 1])
    assert torch.equal(batch.document_ids[rows, columns], batch.document_ids[rows, columns + 1]), "no target of another document"
    assert len(rows) == int((noisy.input_ids == MASK).sum()), "every masked token has a loss"
    t = noisy.segment_timesteps[noisy.segment_index]
    assert torch.equal(noisy.target_timesteps[rows, columns], t[rows, columns + 1]), "t is the target's"
    real = batch.document_ids >= 0
    assert int(noisy.num_tokens) == int((real & ~starts).sum())


def test_autoregression_predicts_every_next_token_of_a_document():
    batch = packed_batch(range(9))
    noisy = corrupt(batch, DiffusionConfig(objective="autoregressive", random_length_probability=0.0), seed=1)
    assert torch.equal(noisy.input_ids, batch.tokens)
    for row in range(9):
        for place in range(LENGTH):
            follows = place + 1 < LENGTH and batch.document_ids[row, place] == batch.document_ids[row, place + 1] >= 0
            assert bool(noisy.loss_mask[row, place]) == follows
            assert not follows or noisy.targets[row, place] == batch.tokens[row, place + 1]


def test_the_clean_stream_predicts_next_tokens_of_the_same_document():
    config = DiffusionConfig(block_size=4, clean_attention="token_causal", autoregressive_weight=0.5, random_length_probability=0.0)
    batch = packed_batch(range(6))
    noisy = corrupt(batch, config, seed=1)
    rows, columns = noisy.next_mask.nonzero(as_tuple=True)
    assert torch.equal(batch.document_ids[rows, columns], batch.document_ids[rows, columns + 1])
    assert torch.equal(noisy.next_targets[noisy.next_mask], batch.tokens[rows, columns + 1])
    assert len(rows) == int(((batch.document_ids >= 0) & (batch.positions > 0)).sum())


def test_noise_on_masked_embeddings_is_normal_and_belongs_to_the_token():
    size, std = 64, 0.5
    rows, columns = torch.arange(8).repeat_interleave(50), torch.arange(50).repeat(8)
    noise = EmbeddingNoise(std, 7, rows, columns, 100 + rows, 3 + columns)
    embedded = torch.zeros(60, 8, size, requires_grad=True)
    noisy = noise.add_to(embedded)
    assert torch.equal(noisy[50:], embedded[50:])
    values = noisy[:50].detach().double()
    assert abs(float(values.mean())) < 0.01
    assert abs(float(values.std()) - std) < 0.01
    later = EmbeddingNoise(std, 7, rows[columns >= 20], columns[columns >= 20], 100 + rows[columns >= 20], 3 + columns[columns >= 20])
    assert torch.equal(later.add_to(embedded[20:], first_column=20), noisy[20:]), "a sequence-parallel rank draws its part"
    noisy.sum().backward()
    assert (embedded.grad == 1).all()


def test_noise_on_embeddings_is_a_function_of_seed_sample_and_position():
    """Each number against the inverse of the normal distribution function, of a word that nothing else draws."""
    size, std, seed = 6, 0.25, 11
    samples, places = [3, 2**35, 3], [0, 9, 31]
    noise = EmbeddingNoise(std, seed, torch.arange(3), torch.tensor([2, 0, 1]), torch.tensor(samples), torch.tensor(places))
    noisy = noise.add_to(torch.zeros(4, 3, size, dtype=torch.float64))
    for row, (sample, place, column) in enumerate(zip(samples, places, [2, 0, 1], strict=True)):
        words = random_words(seed, torch.tensor([sample * 2**24 + place]), draw=0, purpose=Purpose.EMBEDDING, num=size)[0].tolist()
        expected = [NormalDist(0, std).inv_cdf((word + 0.5) / 2**32) for word in words]
        torch.testing.assert_close(noisy[column, row], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert noisy.count_nonzero() == 3 * size


def test_with_shift_t_and_segment_are_those_of_the_target():
    """Where blocks have their own t, an output and its target may be in different blocks."""
    config = DiffusionConfig(shift=True, block_size=4, timestep_per="block", num_strata=8, random_length_probability=0.0)
    noisy = corrupt(packed_batch(range(12)), config, seed=1)
    rows, columns = noisy.has_target.nonzero(as_tuple=True)
    of_targets = noisy.segment_index[rows, columns + 1]
    assert not torch.equal(of_targets, noisy.segment_index[rows, columns])
    assert torch.equal(noisy.target_timesteps[rows, columns], noisy.segment_timesteps[of_targets])
    num_segments = len(noisy.segment_timesteps) // 12
    assert torch.equal(noisy.target_segments[rows, columns], of_targets % num_segments)


def test_autoregression_has_no_clean_stream_beside_it():
    """Also in a stage of a run whose other stages have a joint loss."""
    config = DiffusionConfig(objective="autoregressive", autoregressive_weight=0.5, block_size=4, clean_attention="token_causal")
    noisy = corrupt(packed_batch(range(2)), config, seed=1)
    assert noisy.next_mask is None
    assert noisy.next_targets is None
