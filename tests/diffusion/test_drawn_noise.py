"""Noise as it is drawn: its statistics, and that it is the same whatever samples are in the batch."""

import dataclasses
from dataclasses import fields

import numpy as np
import pytest
import torch

from tests.tiny import VOCAB_SIZE, packed_batch
from w1train.config.errors import UserError
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.diffusion.per_id_masked import relative_information
from w1train.diffusion.processes import noise_process

MASK = DiffusionConfig().mask_token_id
MIXTURES = {
    "hybrid": {"objective": "hybrid", "uniform_share": 0.2, "t_max": 0.9999},
    "log-SNR": {"objective": "log_snr"},
    "token-to-token": {"objective": "token_to_token", "uniform_share": 0.3, "t_max": 0.9999},
}


def a_config(**values) -> DiffusionConfig:
    return DiffusionConfig(**{"num_noise_ids": VOCAB_SIZE, "random_length_probability": 0.0, "num_strata": 8, **values})


@pytest.fixture
def counts(tmp_path):
    """Return a file in which low ids are frequent, and no id below 16 occurs."""
    path = tmp_path / "counts.npy"
    np.save(path, np.where(np.arange(VOCAB_SIZE) < 16, 0, 100_000 // (1 + np.arange(VOCAB_SIZE))))
    return str(path)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("complementary", [False, True])
def test_the_shares_of_masks_and_words(name, complementary):
    """Both have the shares of the process at each t, in both samples of a pair, and all words have the same share."""
    config = a_config(**MIXTURES[name], complementary=complementary)
    if complementary and name == "hybrid":
        return
    process, batch = noise_process(config), packed_batch([*range(1024)])
    noisy = corrupt(batch, config, seed=5)
    real = noisy.document_ids >= 0
    is_mask, is_word = (noisy.input_ids == MASK) & real, noisy.target_is_noised & (noisy.input_ids != MASK)
    times = noisy.target_timesteps.double()
    for partner in (0, 1) if complementary else (0,):
        rows = slice(partner, None, 2 if complementary else 1)
        for low, high in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0)):
            here = real[rows] & (times[rows] >= low) & (times[rows] < high)
            for found, expected in ((is_mask, process.mask_noise), (is_word, process.uniform_noise)):
                assert abs(float(found[rows][here].double().mean() - expected(times[rows][here]).mean())) < 0.025
    drawn = torch.bincount(noisy.input_ids[is_word], minlength=VOCAB_SIZE).double()
    assert drawn[MASK] == 0
    assert drawn.sum() > 2000
    assert drawn[torch.arange(VOCAB_SIZE) != MASK].min() > 0.3 * drawn.mean()


def test_only_ids_below_the_bound_are_drawn():
    config = a_config(objective="uniform", num_noise_ids=20, exclude_mask_logit=False)
    noisy = corrupt_at(packed_batch(range(64)), config, seed=1, timestep=0.999, draw=1)
    assert set(noisy.input_ids[noisy.target_is_noised].unique().tolist()) == set(range(20)), "the model can predict the mask token here"


@pytest.mark.parametrize("kind", [*MIXTURES, "uniform", "edits", "per id", "Gaussian"])
@pytest.mark.parametrize("timestep_per", ["sequence", "document", "block"])
def test_noise_is_the_same_in_any_batch(kind, timestep_per, counts):
    values = {
        **MIXTURES,
        "uniform": {"objective": "uniform"},
        "edits": {"objective": "edits", "edited_share": 0.5, "edit_rate": 0.9},
        "per id": {"objective": "per_id_masked", "token_counts": counts},
        "Gaussian": {"objective": "uniform", "noise_schedule": "gaussian_argmax"},
    }[kind]
    config = a_config(**values, timestep_per=timestep_per, block_size=4)
    batch = packed_batch(range(8))
    whole = corrupt(batch, config, seed=3)
    for row in range(8):
        one = PackedBatch(*(getattr(batch, entry.name)[row : row + 1] for entry in fields(batch)))
        alone = corrupt(one, config, seed=3)
        for name in ("input_ids", "loss_mask", "target_is_noised", "target_timesteps"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[row]), name


def test_rare_tokens_are_masked_before_frequent_tokens(counts):
    """The share of masks of each token follows from its own probability; the published values are those of four ids."""
    config = a_config(objective="per_id_masked", token_counts=counts, t_min=0.5, t_max=0.5001)
    batch = packed_batch(range(2048))
    noisy = corrupt(batch, config, seed=5)
    process, real = noise_process(config), batch.document_ids >= 0
    table = process.table[batch.tokens]
    expected = process.spindle.noising_probability(table, noisy.target_timesteps.double())
    for low, high in ((-9.0, -0.2), (-0.2, 0.0), (0.0, 1.0)):
        here = real & (table >= low) & (table < high)
        assert here.sum() > 1000
        assert float(noisy.loss_mask[here].double().mean()) == pytest.approx(float(expected[here].mean()), abs=0.02)


def test_the_spindle_of_four_ids(tmp_path):
    np.save(tmp_path / "counts.npy", np.array([100, 10, 1, 50, 0]))
    config = DiffusionConfig(objective="per_id_masked", mask_token_id=4, token_counts=str(tmp_path / "counts.npy"))
    process = noise_process(config)
    half = torch.tensor(0.5, dtype=torch.float64)
    kept = 1 - process.spindle.noising_probability(process.table, half)
    assert kept.tolist()[:4] == pytest.approx([1, 0.4566, 0.3403, 0.8097], abs=1e-4)
    assert float(process.table[4]) == 1, "an id that does not occur has no bound of information"
    # The rates are the derivatives of the logarithms, and 0 where an id cannot be masked yet.
    times = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    probability = process.spindle.noising_probability(process.table, times[:, None])
    rates = process.spindle(process.table, times.detach()[:, None])
    assert ((probability == 0) == (rates == 0)).all()
    assert (rates >= 0).all()
    for column in range(5):
        (slope,) = torch.autograd.grad(probability[:, column].sum(), times, retain_graph=True)
        possible = probability[:, column] > 0
        torch.testing.assert_close(rates[possible, column], (slope / probability[:, column])[possible].detach())


def test_the_reverse_kernel_of_the_spindle_is_bayes_rule(tmp_path):
    """Given the clean token, a mask stays a mask with the ratio of its own probabilities."""
    np.save(tmp_path / "counts.npy", np.array([30, 10, 20, 50, 0]))
    process = noise_process(DiffusionConfig(objective="per_id_masked", mask_token_id=4, token_counts=str(tmp_path / "counts.npy")))
    masks, times = torch.full((4,), 4), (torch.full((4,), 0.8).double(), torch.full((4,), 0.5).double())
    kernel = process.reverse_probabilities(masks, torch.eye(5).double()[:4], *times)
    now, before = (process.spindle.noising_probability(process.table[:4], time[0]) for time in times)
    torch.testing.assert_close(kernel[:, 4], before / now)
    torch.testing.assert_close(kernel[:, :4].diagonal(), 1 - before / now)
    torch.testing.assert_close(kernel.sum(dim=1), torch.ones(4).double())
    mixed = process.reverse_probabilities(masks[:1], torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0]]).double(), *(time[:1] for time in times))
    assert float(mixed.sum()) == pytest.approx(1)


def test_a_mask_becomes_no_id_that_cannot_be_masked_yet(tmp_path):
    """The first id is masked neither at t = 0.5 nor at 0.25: its part of a prediction stays on the mask token."""
    np.save(tmp_path / "counts.npy", np.array([100, 10, 1, 50, 0]))
    process = noise_process(DiffusionConfig(objective="per_id_masked", mask_token_id=4, token_counts=str(tmp_path / "counts.npy")))
    times = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.25, 0.25]).double()
    predictions = torch.tensor([[1.0, 0, 0, 0, 0], [0.6, 0.4, 0, 0, 0]]).double()
    sure, mixed = process.reverse_probabilities(torch.tensor([4, 4]), predictions, *times)
    now, before = (float(process.spindle.noising_probability(process.table, time)[1]) for time in (time[0] for time in times))
    assert sure.tolist() == [0, 0, 0, 0, 1]
    assert mixed.tolist() == pytest.approx([0, 0.4 * (1 - before / now), 0, 0, 0.6 + 0.4 * before / now])


@pytest.mark.parametrize("content", [None, np.array([1, 0]), np.array([[1, 2]]), np.array([1.0, 2.0]), np.array([3, -1, 4]), b"no counts"])
def test_files_that_are_no_counts_are_refused(tmp_path, content):
    path = tmp_path / "counts.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    with pytest.raises(UserError, match="count-tokens"):
        relative_information(str(path))


def _edits(**values):
    config = a_config(objective="edits", **{"edited_share": 1.0, "edit_rate": 1.0, "t_min": 1.0, "t_max": 1.0, **values})
    batch = packed_batch(range(96))
    batch.may_be_noised[:, 6:9] = False
    return config, batch, corrupt(batch, config, seed=2)


def test_edits_stay_inside_stretches_and_all_their_tokens_have_a_loss():
    """No token leaves its document or block, and no prompt moves, even if every token is edited."""
    _, batch, noisy = _edits(block_size=4, block_index="sample")
    assert torch.equal(noisy.loss_mask, batch.may_be_noised & (batch.document_ids >= 0)), "every token may be predicted"
    assert torch.equal(noisy.input_ids[~batch.may_be_noised], batch.tokens[~batch.may_be_noised])
    assert (noisy.target_timesteps == 1).all()
    marked = dataclasses.replace(batch, tokens=torch.where(torch.arange(batch.tokens.shape[1]) // 4 == 3, 95, 20).expand_as(batch.tokens))
    config = a_config(objective="edits", edited_share=1.0, edit_rate=0.6, t_min=1.0, num_noise_ids=14, block_size=4, block_index="sample")
    inputs = corrupt(marked, config, seed=2).input_ids
    assert (inputs[:, 12:16] != 20).all()
    assert (inputs[:, :12] != 95).all()
    assert (inputs[:, 16:] != 95).all()


def test_the_kinds_of_edits_are_alike_and_keep_the_order():
    """What is left of a document is a subsequence of it, and each kind of edit has a third of the rate."""
    config, batch, noisy = _edits(edit_rate=0.3, num_noise_ids=14)
    kept = 0
    for row in range(96):
        for document in batch.document_ids[row].unique().tolist():
            here = (batch.document_ids[row] == document) & batch.may_be_noised[row] & (document >= 0)
            left = [token for token in noisy.input_ids[row][here].tolist() if token > MASK]
            text = iter(batch.tokens[row][here].tolist())
            assert all(token in text for token in left)
            kept += len(left)
    count = int((batch.may_be_noised & (batch.document_ids >= 0)).sum())
    # Inserted tokens push some of the others over the end.
    assert 0.7 < kept / count < 0.8
    new = int(((noisy.input_ids < 14) & noisy.loss_mask).sum()) / count
    assert 0.16 < new < 0.21, "insertions and substitutions are new ids"
    masks = int(((noisy.input_ids == MASK) & noisy.loss_mask).sum()) / count
    assert 0.02 < masks < 0.12, "the end of a stretch that got shorter"
    assert float(noisy.segment_timesteps.mean()) == pytest.approx(config.edit_rate), "the model gets the share of edited tokens"


def test_samples_that_are_not_edited_are_masked_as_ever():
    batch = packed_batch(range(256))
    edited, masked = (corrupt(batch, a_config(objective=name, edited_share=0.25), seed=4) for name in ("edits", "diffusion"))
    same = (edited.input_ids == masked.input_ids).all(dim=1) & (edited.loss_mask == masked.loss_mask).all(dim=1)
    assert 0.65 < float(same.double().mean()) < 0.85
    assert torch.equal(edited.target_timesteps[same], masked.target_timesteps[same])
    assert (edited.loss_mask[~same] == (batch.document_ids >= 0)[~same]).all()
    assert (edited.target_timesteps[~same] == 1).all(), "their loss has the weight 1"
    at = (corrupt_at(batch, a_config(objective=name), seed=4, timestep=0.4, draw=1) for name in ("edits", "diffusion"))
    assert torch.equal(*(noisy.input_ids for noisy in at)), "validation is that of masked diffusion"
