"""Losses: the context-free identity, weights, normalisers, terms, and sums that add."""

import math
from dataclasses import fields
from typing import ClassVar, get_args, get_type_hints

import pytest
import torch

from tests.objectives.losses import NUM_BINS, loss, metrics
from tests.tiny import packed_batch
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.diffusion.corruption import corrupt, corrupt_at
from w1train.model.row_terms import CrossEntropy
from w1train.objectives import objective
from w1train.objectives.loss_rows import loss_rows
from w1train.objectives.named_sums import NamedSums, scalars_first, size_of
from w1train.objectives.objective import NORMALIZERS, objective_of
from w1train.objectives.weights import WEIGHTS


def _uniform_documents(num_samples, length):
    documents = torch.zeros((num_samples, length), dtype=torch.int32)
    return documents, torch.arange(num_samples)


@pytest.mark.parametrize("timestep_per", ["sequence", "document"])
def test_context_free_model_gives_its_exact_likelihood(timestep_per):
    """E[sum over masked of -log p / t] = NLL for a model that ignores its input: the ELBO (MDLM, arXiv 2406.07524, eq. 10) is exact then.

    A corruption that forces a masked token, or that masks with another probability than t, fails.
    """
    config = DiffusionConfig(timestep_per=timestep_per, t_min=1e-3, num_strata=64, random_length_probability=0.0)
    documents, indices = _uniform_documents(8192, 64)
    documents[:, 24:] = 1
    tokens = torch.randint(16, 20, documents.shape, generator=torch.Generator().manual_seed(0))
    log_probability = torch.log(torch.tensor([0.1, 0.2, 0.3, 0.4]))[tokens - 16]
    noisy = corrupt(PackedBatch(tokens, documents, documents, indices), config, seed=11)
    weighted, sums = loss(-log_probability[noisy.loss_mask], noisy, config)
    nll = -log_probability.double().mean()
    # t starts at t_min, not 0: the weight makes up for it exactly, whatever t_min is. One standard deviation is 0.35 %.
    assert float(weighted) / tokens.numel() == pytest.approx(float(nll), rel=0.012)
    assert metrics(sums, config)["elbo"] == pytest.approx(float(nll), rel=0.012)


def test_weights_and_normalizers():
    batch = packed_batch(range(8))
    cross_entropy_of = {"inverse_t": 1 / 0.25, "constant": 1.0, "one_minus_t": 0.75}
    for weight, expected in cross_entropy_of.items():
        for normalizer in ("tokens", "masked_tokens"):
            config = DiffusionConfig(weight=weight, normalizer=normalizer, random_length_probability=0.0)
            noisy = corrupt_at(batch, config, seed=3, timestep=0.25, draw=1)
            num_masked, num_tokens = int(noisy.loss_mask.sum()), int((noisy.document_ids >= 0).sum())
            weighted, sums = loss(torch.full((num_masked,), 2.0), noisy, config)
            count = num_tokens if normalizer == "tokens" else num_masked
            assert int(sums[objective_of(config, NUM_BINS).normalizer]) == count
            assert float(weighted) == pytest.approx(2.0 * expected * num_masked, rel=1e-6)
            found = metrics(sums, config)
            assert found["loss"] == pytest.approx(2.0 * expected * num_masked / count, rel=1e-6)
            assert found["elbo"] == pytest.approx(2.0 * 4 * num_masked / num_tokens)
            assert found["masked_cross_entropy"] == pytest.approx(2.0)
            assert found["mask_ratio"] == pytest.approx(num_masked / num_tokens)


@pytest.mark.parametrize(
    "given", [{}, {"shift": True}, {"objective": "autoregressive"}, {"weight": "constant", "complementary": True}], ids=str
)
def test_a_cut_sample_weighs_as_much_as_a_whole_one(given):
    """Algorithm 1 of LLaDA (arXiv 2502.09992): the mean over samples of -1 / (t L) * sum of log p, with L the tokens of each sample."""
    config = DiffusionConfig(normalizer="samples", random_length_probability=0.5, num_strata=8, **given)
    batch = packed_batch(range(12))
    batch.may_be_noised[4] = False  # a sample without a target is no part of the mean
    noisy = corrupt(batch, config, seed=3)
    cross_entropy = torch.rand(noisy.input_ids.shape)
    weights = objective_of(DiffusionConfig(**given), NUM_BINS).weights(noisy)
    means = [
        float((cross_entropy[row] * weights[row])[noisy.loss_mask[row]].double().sum()) / int(noisy.has_target[row].sum())
        for row in range(12)
        if noisy.has_target[row].any()
    ]
    assert len(means) == 11 or "shift" in given or "objective" in given
    assert len({int(count) for count in noisy.has_target.sum(dim=1)}) > 3, "samples are of several lengths"
    _, whole = loss(cross_entropy[noisy.loss_mask], noisy, config)
    assert metrics(whole, config)["loss"] == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert "num_units" not in objective_of(DiffusionConfig(**given), NUM_BINS).layout, "last bits of other losses would change"


def test_samples_are_counted_once_where_ranks_share_their_positions():
    """Parts of the positions and parts of the samples, as context- and data-parallel ranks have them."""
    config = DiffusionConfig(normalizer="samples", random_length_probability=0.5, num_strata=8)
    noisy = corrupt(packed_batch(range(12)), config, seed=2)
    objective = objective_of(config, NUM_BINS)
    weights, cross_entropy = objective.weights(noisy), torch.rand(noisy.input_ids.shape)
    _, whole = loss(cross_entropy[noisy.loss_mask], noisy, config)
    assert int(whole["num_units"]) == 12
    total = torch.zeros_like(whole.values)
    for first in range(3):
        positions = torch.arange(first, noisy.input_ids.shape[1], 3).expand(12, -1)
        part = noisy.at(positions)
        values = cross_entropy.gather(1, positions)[part.loss_mask]
        total += objective.loss({"cross_entropy": values}, loss_rows(part, weights.gather(1, positions)))[1].values
    torch.testing.assert_close(total, whole.values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("timestep", "place"), [(0.05, 0), (0.25, 2), (0.95, 9), (1.0, 9)])
def test_loss_by_t_puts_each_token_in_its_bin(timestep, place):
    config = DiffusionConfig(random_length_probability=0.0)
    batch = packed_batch(range(4))
    noisy = corrupt_at(batch, config, seed=3, timestep=timestep, draw=1)
    _, sums = loss(torch.full((int(noisy.loss_mask.sum()),), 1.5), noisy, config)
    assert metrics(sums, config)["loss_by_t"] == [None] * place + [1.5] + [None] * (9 - place)


def test_sums_of_parts_are_the_sums_of_the_whole():
    """A mean of means would not be: the parts have different counts."""
    config = DiffusionConfig(num_strata=8)
    whole_noisy = corrupt(packed_batch(range(12)), config, seed=2)
    cross_entropy = torch.rand(whole_noisy.input_ids.shape)
    _, whole = loss(cross_entropy[whole_noisy.loss_mask], whole_noisy, config)
    total = torch.zeros_like(whole.values)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 12)):
        noisy = corrupt(packed_batch(list(range(12))[rows]), config, seed=2)
        total += loss(cross_entropy[rows][noisy.loss_mask], noisy, config)[1].values
    added = metrics(NamedSums(total, whole.layout), config)
    expected = metrics(whole, config)
    assert added["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    for sum_of_parts, of_whole in zip(added["loss_by_t"], expected["loss_by_t"], strict=True):
        assert (sum_of_parts is None) == (of_whole is None)
        assert of_whole is None or sum_of_parts == pytest.approx(of_whole, rel=1e-12)


def test_a_batch_without_a_masked_token_is_finite():
    config = DiffusionConfig(random_length_probability=0.0)
    noisy = corrupt_at(packed_batch([0]), config, seed=3, timestep=1e-9, draw=1)
    weighted, sums = loss(torch.zeros(0, requires_grad=True), noisy, config)
    assert float(weighted.detach()) == 0.0
    assert all(math.isfinite(value) for value in sums.values.tolist())


def test_every_weight_and_normalizer_of_the_configuration_is_registered():
    """The schema cannot import the registrations: it is below them."""
    names = {field.name: get_args(get_type_hints(DiffusionConfig)[field.name]) for field in fields(DiffusionConfig)}
    assert set(WEIGHTS) == set(names["weight"])
    assert set(NORMALIZERS) == set(names["normalizer"])
    for name, count in NORMALIZERS.items():
        assert count in objective_of(DiffusionConfig(normalizer=name), NUM_BINS).layout


@pytest.mark.parametrize("options", [{}, {"shift": True}, {"objective": "autoregressive"}, {"loss_positions": "all"}], ids=str)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_the_parts_of_samples_add_up_to_the_denominator(normalizer, options):
    config = DiffusionConfig(normalizer=normalizer, random_length_probability=0.5, **options)
    noisy = corrupt(packed_batch(range(12)), config, seed=1)
    objective = objective_of(config, NUM_BINS)
    sums = objective.loss({"cross_entropy": torch.zeros(int(noisy.loss_mask.sum()))}, loss_rows(noisy, objective.weights(noisy)))[1]
    parts = objective.denominators(noisy)
    assert parts.shape == (12,)
    assert float(parts.sum()) == float(sums[objective.normalizer]) > 0
    assert float(objective.denominators(corrupt(packed_batch([5]), config, seed=1))) == float(parts[5])


@pytest.mark.parametrize("timestep_per", ["sequence", "document", "block"])
@pytest.mark.parametrize("shift", [False, True])
def test_inverse_fraction_counts_each_segment(timestep_per, shift):
    config = DiffusionConfig(weight="inverse_fraction", timestep_per=timestep_per, block_size=8, num_strata=8, shift=shift)
    noisy = corrupt(packed_batch(range(12)), config, seed=1)
    weights = objective_of(config, NUM_BINS).weights(noisy)
    for row in range(12):
        for segment in noisy.target_segments[row].unique():
            here = (noisy.target_segments[row] == segment) & noisy.has_target[row]
            masked = here & noisy.loss_mask[row]
            expected = torch.full((int(masked.sum()),), float(here.sum()) / max(int(masked.sum()), 1))
            torch.testing.assert_close(weights[row][masked], expected)


@pytest.mark.parametrize("weight", ["inverse_t", "constant", "one_minus_t", "inverse_fraction"])
def test_autoregression_weighs_every_token_alike(weight):
    config = DiffusionConfig(objective="autoregressive", weight=weight, random_length_probability=0.0)
    noisy = corrupt(packed_batch(range(9)), config, seed=1)
    cross_entropy = torch.rand(int(noisy.loss_mask.sum()))
    weighted, sums = loss(cross_entropy, noisy, config)
    assert float(weighted) == pytest.approx(float(cross_entropy.sum()), rel=1e-6)
    found = metrics(sums, config)
    assert found["elbo"] == found["loss"] == pytest.approx(float(cross_entropy.double().mean()))


def test_joint_loss_adds_the_clean_streams_next_tokens():
    config = DiffusionConfig(block_size=4, clean_attention="token_causal", autoregressive_weight=0.5, random_length_probability=0.0)
    noisy = corrupt(packed_batch(range(6)), config, seed=1)
    masked, following = torch.rand(int(noisy.loss_mask.sum())), torch.rand(int(noisy.next_mask.sum()))
    total, sums = loss(torch.cat([masked, following]), noisy, config)
    alone, without = loss(masked, noisy, DiffusionConfig())
    assert float(total - alone) == pytest.approx(0.5 * float(following.sum()), rel=1e-5)
    found = metrics(sums, config)
    assert found["autoregressive_loss"] == pytest.approx(float(following.double().mean()))
    assert found["loss"] == pytest.approx(float(total) / int(noisy.num_tokens), rel=1e-5)
    assert found["elbo"] == metrics(without, DiffusionConfig())["elbo"], "the ELBO is that of the noisy stream alone"
    assert "autoregressive_loss" not in metrics(without, DiffusionConfig())


def test_the_elbo_is_the_processs_whatever_is_trained():
    """Beside each weight and normaliser the same number, bit for bit."""
    options = [{"weight": weight} for weight in WEIGHTS] + [{"normalizer": normalizer} for normalizer in NORMALIZERS]
    configs = [DiffusionConfig(timestep_per="document", **given) for given in options]
    *_, noisy = batches = [corrupt(packed_batch(range(6)), config, seed=1) for config in configs]
    cross_entropy = torch.rand(int(noisy.loss_mask.sum()))
    elbos = {metrics(loss(cross_entropy, each, config)[1], config)["elbo"] for each, config in zip(batches, configs, strict=True)}
    expected = (cross_entropy.double() * (1.0 / noisy.target_timesteps[noisy.loss_mask].double())).sum() / int(noisy.num_tokens)
    assert elbos == {float(expected)}


def test_names_of_metrics_in_records():
    """Dashboards, W&B panels and the files of earlier runs go by them."""
    config = DiffusionConfig(autoregressive_weight=0.5)
    names = ["loss", "elbo", "masked_cross_entropy", "mask_ratio", "loss_by_t", "autoregressive_loss"]
    _, sums = loss(torch.rand(0), corrupt_at(packed_batch([0]), config, seed=3, timestep=1e-9, draw=1), config)
    assert list(metrics(sums, config)) == names


def test_named_sums_keep_their_shapes():
    layout = scalars_first({"many": (3,), "one": (), "more": (2,)})
    assert list(layout) == ["one", "many", "more"]
    sums = NamedSums.pack({"one": torch.tensor(7), "more": torch.tensor([4.0, 5.0]), "many": torch.tensor([1, 2, 3])}, layout)
    assert sums.values.tolist() == [7, 1, 2, 3, 4, 5]
    assert sums.values.dtype == torch.float64
    assert len(sums.values) == size_of(layout)
    assert sums.numbers() == {"one": 7.0, "many": [1.0, 2.0, 3.0], "more": [4.0, 5.0]}
    assert (sums["one"].shape, sums["many"].tolist()) == ((), [1, 2, 3])


class _Squares:
    """A term that the product does not have: a tenth of the squared cross-entropies of the noised tokens."""

    layout: ClassVar = {"squares": (), "squares_of_halves": (2,)}

    def row_terms(self, rows):
        return {"cross_entropy": CrossEntropy(rows.targets)}

    def loss(self, values, rows):
        return 0.1 * rows.of_noisy_stream(values["cross_entropy"]).square().sum()

    def sums(self, values, rows):
        squares = rows.of_noisy_stream(values["cross_entropy"]).square().double()
        return {"squares": squares.sum(), "squares_of_halves": torch.stack([half.sum() for half in squares.tensor_split(2)])}

    def total(self, sums):
        return 0.1 * sums["squares"]

    def metrics(self, sums):
        return {"squares": sums["squares"] / max(sums["num_masked"], 1.0), "halves": sums["squares_of_halves"]}


def test_another_term_is_one_file_and_its_registration(monkeypatch):
    config = DiffusionConfig(random_length_probability=0.0, num_strata=8)
    noisy = corrupt(packed_batch(range(6)), config, seed=1)
    cross_entropy = torch.rand(int(noisy.loss_mask.sum()), requires_grad=True)
    alone, sums_alone = loss(cross_entropy, noisy, config)
    unused = lambda config, num_t_bins: None  # noqa: E731
    monkeypatch.setattr(objective, "TERMS", (*objective.TERMS, unused, lambda config, num_t_bins: _Squares()))
    weighted, sums = loss(cross_entropy, noisy, config)
    squares = cross_entropy.detach().double().square()
    torch.testing.assert_close((weighted - alone).double(), 0.1 * squares.sum(), rtol=1e-4, atol=0)
    (gradient,) = torch.autograd.grad(weighted - alone, cross_entropy)
    torch.testing.assert_close(gradient, 0.2 * cross_entropy.detach(), rtol=1e-4, atol=1e-4)
    found = metrics(sums, config)
    assert found["loss"] == pytest.approx(float(weighted.detach()) / int(noisy.num_tokens), rel=1e-6)
    assert found["squares"] == pytest.approx(float(squares.mean()))
    assert sum(found["halves"]) == pytest.approx(float(squares.sum()))
    monkeypatch.undo()
    before = metrics(sums_alone, config)
    assert {name: found[name] for name in before if name != "loss"} == {name: before[name] for name in before if name != "loss"}


def test_another_weight_is_one_function_and_its_registration(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "by_place", lambda noisy, _process: noisy.places.float())
    config = DiffusionConfig(weight="by_place", random_length_probability=0.0)
    noisy = corrupt(packed_batch(range(6)), config, seed=1)
    weighted, _ = loss(torch.ones(int(noisy.loss_mask.sum())), noisy, config)
    assert float(weighted) == float(noisy.places[noisy.loss_mask].sum())
