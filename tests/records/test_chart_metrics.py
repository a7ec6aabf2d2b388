"""The names that W&B and TensorBoard show."""

from __future__ import annotations

from tests.records.recorded_run import TIMESTEPS
from tests.reports.fake_run import train_record, validation_record
from w1train.records.average_comparison import compare
from w1train.records.chart_metrics import chart_metrics


def test_metrics_have_readable_names_and_no_nulls():
    record = train_record(step=3, num_t_bins=2)
    record["loss_by_t"] = [1.5, None]
    record["time/mfu"] = None
    metrics = chart_metrics(record)
    assert metrics["loss_by_t/0.25"] == 1.5
    assert metrics["tokens_per_second"] == record["time/tokens_per_second"]
    assert not {"loss_by_t/0.75", "mfu", "kind", "step", "loss_by_t"} & metrics.keys()


def test_every_training_metric_has_a_name():
    expected = {"consumed_samples", "tokens", "loss", "elbo", "elbo_bits_per_byte", "masked_cross_entropy", "mask_ratio", "grad_norm"}
    expected |= {"learning_rate", "epoch", "step_seconds", "tokens_per_second", "tflops", "mfu", "data_wait_seconds", "memory_gib"}
    expected |= {f"loss_by_t/0.{tenth}5" for tenth in range(10)}
    assert chart_metrics(train_record(step=1) | {"time/mfu": 0.4}).keys() == expected


def test_validation_is_named_by_its_timesteps():
    metrics = chart_metrics(validation_record(step=0, num_timesteps=2), TIMESTEPS)
    assert {"validation/elbo", "validation/elbo_bits_per_byte", "validation/loss_by_t/0.25", "validation/loss_by_t/0.75"} <= metrics.keys()


def test_an_average_has_names_of_its_own():
    validation = {key: value for key, value in validation_record(step=8, num_timesteps=2).items() if key not in ("kind", "step", "tokens")}
    member = {"elbo": 9.0, "masked_cross_entropy": 9.0}
    record = {"kind": "average", "step": 8, "tokens": 1, **compare("average_x", "elbo", validation, {4: member, 8: member})}
    expected = {"elbo", "elbo_bits_per_byte", "masked_cross_entropy", "loss_by_t/0.25", "loss_by_t/0.75", "is_better", "seconds"}
    assert chart_metrics(record, TIMESTEPS).keys() == {f"average/{name}" for name in expected}
