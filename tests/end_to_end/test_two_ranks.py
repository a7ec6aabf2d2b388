"""The same data in the same order, on one rank and on two: the numbers differ by rounding alone."""

from __future__ import annotations

import pytest

from tests.end_to_end import traps


def test_losses_are_those_of_one_rank(undisturbed):
    one, two = undisturbed(1, "fp32"), undisturbed(2, "fp32")
    pairs = list(zip(one.train_records(), two.train_records(), strict=True))
    for alone, together in pairs[:4]:
        for name in ("loss", "elbo", "masked_cross_entropy", "elbo_bits_per_byte", "grad_norm"):
            assert together[name] == pytest.approx(alone[name], rel=1e-6), (name, alone["step"])
        by_t = list(zip(alone["loss_by_t"], together["loss_by_t"], strict=True))
        assert all((a is None) == (b is None) for a, b in by_t)
        assert [b for _, b in by_t if b] == pytest.approx([a for a, _ in by_t if a], rel=1e-6)
    for alone, together in pairs:
        # Rounding grows from step to step; what is counted does not.
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        for name in ("step", "samples", "tokens", "epoch", "learning_rate", "mask_ratio"):
            assert together[name] == alone[name]


def test_validation_is_that_of_one_rank(undisturbed):
    records = [[record for record in undisturbed(size, "fp32").metrics() if record["kind"] == "validation"] for size in (1, 2)]
    assert [record["step"] for record in records[1]] == [0, 4, 8, 12]
    for alone, together in zip(*records, strict=True):
        tolerance = 1e-6 if alone["step"] <= 4 else 1e-4
        for name in ("elbo", "elbo_bits_per_byte", "masked_cross_entropy", "loss_by_t"):
            assert together[name] == pytest.approx(alone[name], rel=tolerance), (name, alone["step"])


def test_one_rank_goes_on_where_two_stopped(tiny_run, undisturbed):
    """The checkpoint fits any layout, and the order of the data does not depend on it."""
    tiny_run.train(world_size=2, sabotage=traps.after_commit(2))
    tiny_run.train(world_size=1).require(0)
    expected = undisturbed(2, "fp32").train_records()
    for found, record in zip(tiny_run.train_records(), expected, strict=True):
        assert found["loss"] == pytest.approx(record["loss"], rel=1e-4)
        assert found["mask_ratio"] == record["mask_ratio"]


def test_collectives_in_flight_and_a_loss_in_chunks(tiny_run, undisturbed):
    """Validation, samples (on the first rank alone) and checkpoints come while updated parameters wait to be gathered."""
    overlap = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true", "training.loss_chunk_size=50")
    assert tiny_run.train(*overlap, world_size=2, sabotage=traps.after_commit(2)).killed
    tiny_run.train(*overlap, world_size=2).require(0)
    expected = undisturbed(2, "fp32")
    for found, record in zip(tiny_run.metrics(), expected.metrics(), strict=True):
        assert (found["kind"], found["step"]) == (record["kind"], record["step"])
        assert found["elbo"] == pytest.approx(record["elbo"], rel=1e-4)
    assert len(tiny_run.samples()) == len(expected.samples()) > 0
