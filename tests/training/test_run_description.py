"""What the console says about a run at its start and at its end."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch

from tests.reports.fake_run import train_record, validation_record
from tests.tiny import tiny_config
from w1train.checkpoints.manifest import MANIFEST, Progress, describe_next_start
from w1train.config.schema import StageConfig
from w1train.config.schema_model import ExpertsConfig
from w1train.runtime.distributed import Ranks
from w1train.runtime.run_directory import RunDirectory
from w1train.training import run_description
from w1train.training.run_description import describe_run, print_end
from w1train.training.schedule_position import SchedulePosition


class Data:
    num_tokens = 1_000_000


def described(run: RunDirectory, step: int = 0, **sections) -> dict[str, str]:
    config, progress = tiny_config(**sections), Progress(step=step)
    ranks = Ranks(0, 2, 0, 2, torch.device("cpu"))
    return describe_run(config, ranks, run, Data(), progress, SchedulePosition(config, progress))


def test_the_start_of_a_run(tmp_path):
    found = described(RunDirectory(tmp_path / "a run"))
    assert found["model"].endswith("parameters in 2 layers of width 32")
    assert found["objective"] == "masked diffusion"
    assert found["data"] == "1,000,000 tokens for training; the run reads 10.00% of them"
    assert found["steps"] == "391, which are 100,000 tokens"
    assert found["device"] == "2 ranks on cpu, fp32 (data 2, tensor 1, pipeline 1, context 1)"
    assert found["begins"] == "at step 0, from random weights"
    assert found["watch"] == f"w1train status '{tmp_path}/a run' (Ctrl-C saves and stops)"


def test_the_start_of_a_mixture_of_experts(tmp_path):
    experts = ExpertsConfig(num_experts=4, num_active=1, ffn_hidden_size=16)
    found = described(RunDirectory(tmp_path), model={"experts": experts}, parallel={"expert": 2})
    total, active = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{4,}", found["model"]))
    assert total - active == 2 * 3 * 3 * 32 * 16  # two layers, in which three experts are idle
    assert found["model"] == f"{total:,} parameters, {active:,} of which compute a token, in 2 layers of width 32"
    assert found["device"].endswith("context 1, expert 2)")


def test_what_a_run_begins_from(tmp_path):
    run = RunDirectory(tmp_path)
    assert described(run, training={"initial_weights": "a/b"})["begins"] == "at step 0, from the weights of a/b"
    assert described(run, step=18)["begins"] == f"resumes from step 18, {tmp_path}/checkpoints/step_0000000018"


def test_objectives_in_a_row_are_named_once(tmp_path):
    stages = {name: StageConfig(tokens=700_000, learning_rate=1e-3) for name in "abcd"}
    stages["a"].diffusion = stages["b"].diffusion = {"objective": "autoregressive"}
    found = described(RunDirectory(tmp_path), schedule={"stages": stages})
    assert found["objective"] == "autoregressive, then masked diffusion"
    assert found["data"] == "1,000,000 tokens for training; the run reads them 2.8 times"


def recorded(tmp_path, validations: list[dict], steps: tuple[int, ...] = (10, 18)) -> RunDirectory:
    run = RunDirectory(tmp_path)
    for step in steps:
        (run.checkpoints / f"step_{step:010}").mkdir(parents=True)
        (run.checkpoints / f"step_{step:010}" / MANIFEST).touch()
    records = [train_record(step) | {"kind": "train", "time/step_seconds": 0.5, "time/tokens_per_second": 512.0} for step in range(1, 19)]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in [*records, *validations]))
    return run


def printed(capsys, run: RunDirectory, stop_signal: int, *, is_stopped: bool | None = None, **health) -> list[str]:
    config, progress = tiny_config(), Progress(step=18, samples=144, seconds=65.0, health=health)
    is_stopped = stop_signal != 0 if is_stopped is None else is_stopped
    print_end(config, run, progress, SchedulePosition(config, progress), stop_signal=stop_signal, is_stopped=is_stopped)
    return capsys.readouterr().out.splitlines()


def test_the_end_of_a_stopped_run(tmp_path, capsys):
    validations = [validation_record(step) | {"elbo_bits_per_byte": 8.0 / (step + 1)} for step in (0, 7)]
    assert printed(capsys, recorded(tmp_path, validations), signal.SIGINT, skipped=1) == [
        "",
        "tiny was stopped by Ctrl-C after step 18 of 391; the same command resumes from step 18",
        "  trained      4,608 tokens in 1:05, 512 tokens/s",
        "  validation   8.0000 -> 1.0000 bits per byte at step 7",
        f"  skipped      1 step, see {tmp_path}/bad_batches",
        f"  checkpoints  10, 18 in {tmp_path}/checkpoints",
        f"  next         w1train sample {tmp_path}",
        f"               w1train report {tmp_path}",
    ]
    assert "was stopped by SIGTERM after step 18" in printed(capsys, recorded(tmp_path / "b", []), signal.SIGTERM)[1]
    trial = printed(capsys, recorded(tmp_path / "c", []), 0, is_stopped=True)[1]
    assert trial == "tiny was stopped by --max-steps at step 18 of 391; the same command without --max-steps resumes from step 18"


def test_the_end_of_a_finished_run(tmp_path, capsys):
    """Its bytes are not known, and it has been validated once."""
    lines = printed(capsys, recorded(tmp_path, [validation_record(9) | {"elbo": 2.5, "elbo_bits_per_byte": None}]), 0)
    assert lines[1] == "tiny is finished: it has all its 391 steps"
    assert lines[3:5] == ["  validation   2.5000 nats per token at step 9", "  skipped      0 steps"]
    assert not any("validation" in line for line in printed(capsys, recorded(tmp_path / "none", []), 0))


def test_no_text_is_offered_where_no_mask_was_seen(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_description, "noise_process", lambda _diffusion: type("Causal", (), {"is_causal": True}))
    assert printed(capsys, recorded(tmp_path, []), 0)[-1] == f"  next         w1train report {tmp_path}"


def test_records_that_are_gone_do_not_make_an_end_a_failure(tmp_path, capsys, caplog):
    assert printed(capsys, RunDirectory(tmp_path), signal.SIGINT) == []
    assert "tiny was stopped by Ctrl-C after step 18 of 391; it has no checkpoint yet" in caplog.text
    assert "its records cannot be read" in caplog.text.lower()


@pytest.mark.parametrize(("steps", "expected"), [((), "it has no checkpoint yet"), ((3, 20), "the same command resumes from step 20")])
def test_the_next_start(tmp_path, steps, expected):
    recorded(tmp_path, [], steps)
    assert describe_next_start(tmp_path / "checkpoints").startswith(expected)
