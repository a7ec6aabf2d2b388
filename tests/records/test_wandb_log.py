"""What W&B gets, read back from the files it writes offline."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import pytest

from tests.records.wandb_file import read_history, read_run
from tests.reports.fake_run import train_record, validation_record
from w1train.config.schema import HealthConfig
from w1train.records import wandb_log as loggers
from w1train.records.average_comparison import compare
from w1train.records.wandb_log import WandbLogger, resolve_mode, wandb_metrics

TIMESTEPS = [0.25, 0.75]


def start(run_dir: Path, mode: str = "offline") -> WandbLogger:
    config = {"name": "fake", "model": {"num_layers": 2, "kv_channels": None}}
    return WandbLogger(run_dir, mode=mode, project="a-project", name="fake", config=config, validation_timesteps=TIMESTEPS)


def test_metrics_have_readable_names_and_no_nulls():
    record = train_record(step=3, num_t_bins=2)
    record["loss_by_t"] = [1.5, None]
    record["time/mfu"] = None
    metrics = wandb_metrics(record)
    assert metrics["loss_by_t/0.25"] == 1.5
    assert metrics["tokens_per_second"] == record["time/tokens_per_second"]
    assert not {"loss_by_t/0.75", "mfu", "kind", "step", "loss_by_t"} & metrics.keys()


def test_every_training_metric_has_a_name():
    expected = {"consumed_samples", "tokens", "loss", "elbo", "elbo_bits_per_byte", "masked_cross_entropy", "mask_ratio", "grad_norm"}
    expected |= {"learning_rate", "epoch", "step_seconds", "tokens_per_second", "tflops", "mfu", "data_wait_seconds", "memory_gib"}
    expected |= {f"loss_by_t/0.{tenth}5" for tenth in range(10)}
    assert wandb_metrics(train_record(step=1) | {"time/mfu": 0.4}).keys() == expected


def test_validation_is_named_by_its_timesteps():
    metrics = wandb_metrics(validation_record(step=0, num_timesteps=2), TIMESTEPS)
    assert {"validation/elbo", "validation/elbo_bits_per_byte", "validation/loss_by_t/0.25", "validation/loss_by_t/0.75"} <= metrics.keys()


def test_an_average_has_names_of_its_own():
    validation = {key: value for key, value in validation_record(step=8, num_timesteps=2).items() if key not in ("kind", "step", "tokens")}
    member = {"elbo": 9.0, "masked_cross_entropy": 9.0}
    record = {"kind": "average", "step": 8, "tokens": 1, **compare("average_x", "elbo", validation, {4: member, 8: member})}
    expected = {"elbo", "elbo_bits_per_byte", "masked_cross_entropy", "loss_by_t/0.25", "loss_by_t/0.75", "is_better", "seconds"}
    assert wandb_metrics(record, TIMESTEPS).keys() == {f"average/{name}" for name in expected}


@pytest.mark.parametrize(("key", "expected"), [("secret", "online"), ("", "offline"), (None, "offline")])
def test_auto_is_online_only_with_a_key(monkeypatch, key, expected):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert resolve_mode("auto") == expected
    assert resolve_mode("disabled") == "disabled"


def test_offline_files_hold_every_metric_at_its_step(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    records = [validation_record(step=0, num_timesteps=2), train_record(step=1), train_record(step=2)]
    first = start(tmp_path)
    for record in records:
        first.log(record)
    first.log_samples([{"step": 2, "tokens": 64, "prompt": "def", "text": "def f():"}])
    first.close()
    second = start(tmp_path)
    second.log(train_record(step=3))
    second.close()

    # W&B's own process writes the files, on a busy machine a moment after finish() has returned.
    deadline = time.monotonic() + 30
    while set(history := read_history(tmp_path)) != {0, 1, 2, 3} and time.monotonic() < deadline:
        time.sleep(0.2)
    assert set(history) == {0, 1, 2, 3}
    for record in [*records, train_record(step=3)]:
        for name, value in wandb_metrics(record, TIMESTEPS).items():
            assert history[record["step"]][name] == value, name
    assert history[2]["samples/_type"] == "table-file"
    assert history[2]["samples/nrows"] == 1

    runs = read_run(tmp_path)
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(run_id, "a-project", "fake")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["model"] == {"num_layers": 2, "kv_channels": None}
    assert not any(run.git.commit for run in runs)
    assert not list(tmp_path.rglob("*.patch"))
    assert f"wandb sync --id {run_id}" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_missing_wandb_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = start(tmp_path)
    run.log(train_record(step=1))
    run.log_samples([{"step": 1, "tokens": 1, "prompt": "", "text": ""}])
    run.close()
    assert not run.active
    assert "Training goes on without W&B" in caplog.text


def test_unwritable_directory_is_a_warning(tmp_path, caplog):
    (tmp_path / "wandb").write_text("a file where the directory should be")
    assert not start(tmp_path).active
    assert "FileExistsError" in caplog.text


class DeadRun:
    step = 0

    def log(self, *_args, **_kwargs):
        raise ConnectionResetError("the service is gone")


def test_a_dead_service_ends_the_logging_once(tmp_path, caplog):
    run = start(tmp_path, mode="disabled")
    run._run = DeadRun()
    for step in (1, 2):
        run.log(train_record(step=step))
    assert caplog.text.count("the service is gone") == 1


def test_the_end_does_not_wait_for_a_network_for_ever(tmp_path, monkeypatch, caplog):
    run = start(tmp_path)
    settings = run._run.settings
    if not hasattr(settings, "finish_timeout"):
        pytest.skip("this release of wandb waits as long as it takes")
    assert 0 < settings.finish_timeout == loggers._FINISH_SECONDS < HealthConfig().stop_timeout
    monkeypatch.setattr(loggers, "_FINISH_SECONDS", 0.0)
    run.close()
    assert f"send the rest with: wandb sync {tmp_path}" in caplog.text


def test_our_own_mistakes_are_not_swallowed(tmp_path):
    run = start(tmp_path, mode="disabled")
    run._run = object()
    with pytest.raises(AttributeError):
        run.log(train_record(step=1))


def test_disabled_writes_nothing(tmp_path):
    run = start(tmp_path, mode="disabled")
    run.log(train_record(step=1))
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_wandb_sees_no_password_on_the_command_line(tmp_path, monkeypatch):
    """It keeps the command line in the run's metadata, and sends it."""
    seen = []

    import wandb

    def init(settings: wandb.Settings, **_: object) -> None:
        seen.extend(settings._args)
        raise OSError("seen enough")

    monkeypatch.setattr(sys, "argv", ["w1train.pretrain", "recipe=demo", "checkpoint.upload=s3://user:hunter2@host/runs"])
    monkeypatch.setattr(wandb, "init", init)
    WandbLogger(tmp_path, mode="online", project="p", name="n", config={}, validation_timesteps=[])
    assert seen == ["recipe=demo", "checkpoint.upload=s3://user:***@host/runs"]
