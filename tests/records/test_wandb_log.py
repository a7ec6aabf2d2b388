"""W&B's records, read back from the files that it writes offline."""

from __future__ import annotations

import json
import logging
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.records.recorded_run import STAGES, TIMESTEPS, recorded_run
from tests.records.wandb_file import read_history, read_run
from tests.reports.fake_run import train_record, validation_record
from w1train.config.schema import HealthConfig, LoggingConfig
from w1train.config.serialization import flatten
from w1train.records import wandb_log
from w1train.records.chart_metrics import chart_metrics
from w1train.records.summary import code_versions
from w1train.records.wandb_log import WandbSink, resolve_mode


def start(run_dir: Path, mode: str = "offline") -> WandbSink:
    sink = not_started(run_dir, mode)
    sink.start()
    return sink


def not_started(run_dir: Path, mode: str = "offline") -> WandbSink:
    return WandbSink(recorded_run(run_dir, wandb=mode, wandb_project="a-project"))


def wait_for_history(run_dir: Path, steps: set[int]) -> dict[int, dict[str, Any]]:
    """Read what W&B has written, when it has all steps or half a minute is over: a process of W&B writes the files, and on a busy machine
    it ends after finish() has returned."""
    deadline = time.monotonic() + 30
    while set(history := read_history(run_dir)) != steps and time.monotonic() < deadline:
        time.sleep(0.2)
    return history


@pytest.mark.parametrize(("key", "expected"), [("secret", "online"), ("", "offline"), (None, "offline")])
def test_auto_is_online_only_with_a_key(monkeypatch, key, expected):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert resolve_mode("auto") == expected
    assert resolve_mode("offline") == "offline"


def test_offline_files_hold_every_metric_at_its_step(tmp_path, caplog, capfd):
    caplog.set_level(logging.INFO)
    records = [validation_record(step=0, num_timesteps=2), train_record(step=1), train_record(step=2)]
    first = start(tmp_path)
    for record in records:
        first.record(record)
    first.record_samples([{"step": 2, "tokens": 64, "prompt": "def", "text": "def f():"}])
    first.close(failed=False)
    second = start(tmp_path)
    second.record(train_record(step=3))
    second.close(failed=False)

    history = wait_for_history(tmp_path, {0, 1, 2, 3})
    assert set(history) == {0, 1, 2, 3}
    for record in [*records, train_record(step=3)]:
        for name, value in chart_metrics(record, TIMESTEPS, STAGES).items():
            assert history[record["step"]][name] == value, name
    assert history[2]["samples/_type"] == "table-file"
    assert history[2]["samples/nrows"] == 1

    runs = read_run(tmp_path)
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {(run_id, "a-project", "demo")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    expected = flatten(recorded_run(tmp_path, wandb="offline", wandb_project="a-project").config)
    assert {key: config[key] for key in expected} == expected
    assert {key: config[f"versions.{key}"] for key in code_versions()} == code_versions()
    assert not any(run.git.commit for run in runs)
    assert not list(tmp_path.rglob("*.patch"))
    assert f"wandb sync --id {run_id}" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("server", ["refuses", "hangs"])
def test_without_a_network_a_run_with_a_key_is_recorded_offline_from_its_first_step(tmp_path, monkeypatch, caplog, capfd, server):
    """A socket of this machine stands for W&B's servers: nobody listens at it, or nobody answers."""
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        if server == "refuses":
            listening.close()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        # wandb reads WANDB_INIT_TIMEOUT once in a process, and an earlier test may have been first.
        monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
        monkeypatch.setattr(wandb_log, "_INIT_SECONDS", 1.0)
        run = start(tmp_path, mode="auto")
        assert run.is_active
        for step in (1, 2):
            run.record(train_record(step=step))
        run.close(failed=False)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("W&B is offline, because its servers do not answer or refuse (CommError: ")
    assert "\n" not in warning
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert (
        f"Run {run_id} is written to {folder}; send it with: wandb sync --id {run_id} {tmp_path}/wandb/offline-run-*-{run_id}*" in warning
    )
    assert set(wait_for_history(tmp_path, {1, 2})) == {1, 2}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("key", ["0" * 40, None])
@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        (
            "WANDB_BASE_URL",
            "https://app.wandb.ai",
            "base_url of W&B, or its environment variable: Value error, https://app.wandb.ai is not",
        ),
        ("WANDB_BASE_URL", "nobody:hunter2@localhost", "base_url of W&B, or its environment variable: "),
        ("WANDB_INIT_TIMEOUT", "abc", "init_timeout of W&B, or its environment variable: Input should be a valid number"),
    ],
)
def test_an_unusable_setting_is_one_warning(tmp_path, monkeypatch, caplog, variable, value, reason, key):
    """wandb reads its environment once in a process, and again after a teardown."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv(variable, value)
    if key is None:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    else:
        monkeypatch.setenv("WANDB_API_KEY", key)
    try:
        run = start(tmp_path, mode="auto")
        run.record(train_record(step=1))
        run.close(failed=False)
    finally:
        wandb.teardown()
    assert not run.is_active
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith(f"W&B could not start (ValidationError: the setting {reason}")
    assert "Training goes on without W&B" in warning
    assert "\n" not in warning
    assert "hunter2" not in warning


def test_a_damaged_id_gives_another_run(tmp_path, caplog):
    (tmp_path / "wandb_run_id").write_bytes(b"\xff\0")
    run = start(tmp_path)
    run.record(train_record(step=1))
    run.close(failed=False)
    assert "wandb_run_id is damaged" in caplog.text
    assert len((tmp_path / "wandb_run_id").read_text().strip()) == 8
    assert set(wait_for_history(tmp_path, {1})) == {1}


def test_the_wait_for_the_servers_is_of_seconds(tmp_path, monkeypatch):
    """wandb's own is of 90 s."""
    import wandb

    found = []
    of_wandb = wandb.Settings().init_timeout

    def init(settings: wandb.Settings, mode: str, **_: object) -> None:
        found.append((mode, settings.init_timeout))
        raise OSError("seen enough")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_INIT_TIMEOUT", raising=False)
    start(tmp_path, mode="online")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "40")
    start(tmp_path, mode="online")
    assert found == [("online", 15.0), ("offline", 15.0), ("online", of_wandb), ("offline", of_wandb)], "wandb reads the variable itself"


def test_missing_wandb_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = start(tmp_path)
    run.record(train_record(step=1))
    run.record_samples([{"step": 1, "tokens": 1, "prompt": "", "text": ""}])
    run.close(failed=False)
    assert not run.is_active
    assert "Training goes on without W&B" in caplog.text


def test_unwritable_directory_is_a_warning(tmp_path, caplog):
    (tmp_path / "wandb").write_text("a file where the directory should be")
    assert not start(tmp_path).is_active
    assert "FileExistsError" in caplog.text


class DeadRun:
    step = 0

    def log(self, *_args, **_kwargs):
        raise ConnectionResetError("the service is gone")


def test_a_dead_service_ends_the_logging_once(tmp_path, caplog):
    run = not_started(tmp_path)
    run._run = DeadRun()
    for step in (1, 2):
        run.record(train_record(step=step))
    assert caplog.text.count("the service is gone") == 1


def test_the_end_does_not_wait_for_a_network_for_ever(tmp_path, monkeypatch, caplog):
    run = start(tmp_path)
    settings = run._run.settings
    if not hasattr(settings, "finish_timeout"):
        pytest.skip("this release of wandb waits as long as it takes")
    assert 0 < settings.finish_timeout == wandb_log._FINISH_SECONDS < HealthConfig().stop_timeout
    monkeypatch.setattr(wandb_log, "_FINISH_SECONDS", 0.0)
    run.close(failed=False)
    assert f"send the rest with: wandb sync {tmp_path}" in caplog.text


def test_our_own_mistakes_are_not_swallowed(tmp_path):
    run = not_started(tmp_path)
    run._run = object()
    with pytest.raises(AttributeError):
        run.record(train_record(step=1))


def test_disabled_is_no_sink():
    assert not WandbSink.is_wanted(LoggingConfig(wandb="disabled"))
    assert all(WandbSink.is_wanted(LoggingConfig(wandb=mode)) for mode in ("auto", "online", "offline"))


def test_wandb_sees_no_password_on_the_command_line(tmp_path, monkeypatch):
    """W&B keeps the command line in the run's metadata, and sends it."""
    seen = []

    import wandb

    def init(settings: wandb.Settings, **_: object) -> None:
        seen.extend(settings._args)
        raise OSError("seen enough")

    monkeypatch.setattr(sys, "argv", ["w1train.pretrain", "recipe=demo", "checkpoint.upload=s3://user:hunter2@host/runs"])
    monkeypatch.setattr(wandb, "init", init)
    start(tmp_path, mode="online")
    assert seen == ["recipe=demo", "checkpoint.upload=s3://user:***@host/runs"] * 2, "online, and then offline"
