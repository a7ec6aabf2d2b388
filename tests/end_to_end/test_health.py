"""What goes wrong in a run is noticed on every rank, said, and survived: with the metrics of the undisturbed run, or a declared skip."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, NUM_STEPS, TinyRun
from tests.end_to_end.test_failures import flip
from w1train import status

# Longer than a busy machine makes a tiny step take.
HANG = ("health.hang_timeout=6", "health.heartbeat_interval=0.5")


def state(run: TinyRun) -> dict[str, Any]:
    return json.loads((run.path / "status.json").read_text())


def require_undisturbed(run: TinyRun, expected: TinyRun) -> None:
    assert run.metrics() == expected.metrics()
    assert run.samples() == expected.samples()


@pytest.mark.parametrize("overlap", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_transient_nan_changes_nothing_and_names_its_rank(tiny_run, undisturbed, tiny_data, tmp_path, overlap):
    """In a gradient of one rank, the first time that its step is computed."""
    overrides = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true") if overlap else ()
    expected = undisturbed(2, "fp32")
    if overlap:
        expected = TinyRun(tiny_data, tmp_path / "expected")
        expected.train(*overrides, world_size=2).require(0)
    outcome = tiny_run.train(*overrides, world_size=2, sabotage=traps.nan_in_gradient(rank=1, steps=[5], times=1)).require(0)
    assert "step 5: grad_norm is nan (the gradients of rank 1 on " in outcome.output
    assert "step 5: a transient fault" in outcome.output
    require_undisturbed(tiny_run, expected)
    assert not (tiny_run.path / "bad_batches").exists()


def test_a_persistent_nan_is_left_out_and_written_aside(tiny_run, undisturbed):
    often = ("health.straggler_interval=8", "health.gc_interval=1")
    outcome = tiny_run.train(*often, world_size=2, sabotage=traps.nan_in_gradient(rank=1, steps=[5], times=2)).require(0)
    measured = [record["step"] for record in tiny_run.train_records() if {"health/slowest_rank", "health/rank_spread"} <= record.keys()]
    assert measured == [8]
    records, expected = tiny_run.train_records(), undisturbed(2, "fp32").train_records()
    assert [record["step"] for record in records] == list(range(1, NUM_STEPS + 1))
    assert records[:4] == expected[:4]
    assert [record.get("skipped") for record in records] == [None] * 4 + ["nonfinite"] + [None] * 7
    assert records[4]["loss"] == expected[4]["loss"], "the loss was good"
    assert records[4]["nonfinite"] == {"grad_norm": "nan"}
    assert [record["health/skipped_steps"] for record in records] == [0] * 4 + [1] * 8
    assert [record["samples"] for record in records] == [record["samples"] for record in expected]
    assert records[5]["loss"] != expected[5]["loss"], "the weights are those of step 4"
    directory = tiny_run.path / "bad_batches/step_5"
    for rank in range(2):
        description = json.loads((directory / f"rank_{rank}.json").read_text())
        arrays = np.load(directory / f"rank_{rank}.npz")
        indices = [*range(4 * BATCH + 4 * rank, 4 * BATCH + 4 * rank + 4)]
        assert description["sample_indices"] == arrays["sample_indices"].tolist() == indices
        assert arrays["tokens"].shape == (4, LENGTH)
        assert (description["grad_norm"], description["rank"]) == ("nan", rank)
    # The distributed optimizer has added up each rank's part alone, and one parameter's gradient was no number.
    assert {name for rank in range(2) for name in json.loads((directory / f"rank_{rank}.json").read_text())["nonfinite_parameters"]}
    assert f"its batch is in {directory}" in outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [(), ("parallel.distributed_optimizer=false",), ("checkpoint.interval=1",)], ids=str)
def test_a_first_step_that_is_left_out_costs_no_checkpoint(tiny_data, tmp_path, overrides):
    """The optimizer has no moments yet when it is first looked at for what a save holds."""
    run, expected = TinyRun(tiny_data, tmp_path / "runs"), TinyRun(tiny_data, tmp_path / "expected")
    trap = traps.nan_in_gradient(rank=1, steps=[1], times=2)
    expected.train(*overrides, world_size=2, sabotage=trap).require(0)
    assert [record["step"] for record in expected.train_records() if record.get("skipped")] == [1]

    def killed(rank: int) -> None:
        trap(rank)
        traps.after_commit(1)(rank)

    assert run.train(*overrides, world_size=2, sabotage=killed).killed
    outcome = run.train(*overrides, world_size=2).require(0)
    assert "resuming from" in outcome.output
    assert run.metrics() == expected.metrics()


def test_after_too_many_skips_the_run_goes_back_and_is_undisturbed(tiny_run, undisturbed):
    """The fault, in step 5 and on, is gone the second time."""
    trap = traps.nan_in_gradient(rank=0, steps=[5, 6, 7], times=2)
    outcome = tiny_run.train("health.max_skips=2", world_size=2, sabotage=trap).require(0)
    assert "Going back to the checkpoint of step 6 (1 of 1 times)" in outcome.output
    assert [record.get("skipped") for record in tiny_run.train_records()][4:8] == ["nonfinite", "nonfinite", None, None]
    # With a checkpoint before the first skip, all of it is undone.
    again = TinyRun(tiny_run.data, tiny_run.runs_dir.parent / "again")
    outcome = again.train("health.max_skips=1", world_size=2, sabotage=traps.nan_in_gradient(rank=0, steps=[4, 5], times=2)).require(0)
    assert "Going back to the checkpoint of step 3 (1 of 1 times)" in outcome.output
    require_undisturbed(again, undisturbed(2, "fp32"))


@pytest.mark.slow
def test_a_run_goes_back_past_a_damaged_checkpoint(tiny_run, undisturbed):
    nan = traps.nan_in_gradient(rank=0, steps=[8], times=2)

    def sabotage(rank: int) -> None:
        nan(rank)
        traps.act_after_record(7, lambda: flip(next((tiny_run.checkpoints / "step_0000000006").glob("rank_00000.*"))))(rank)

    overrides = ("health.max_skips=0", "checkpoint.asynchronous=false")
    outcome = tiny_run.train(*overrides, world_size=2, sabotage=sabotage).require(0)
    assert "is now damaged-step_0000000006; training resumes from step 3" in outcome.output
    assert "Going back to the checkpoint of step 3 (1 of 1 times)" in outcome.output
    require_undisturbed(tiny_run, undisturbed(2, "fp32"))
    assert [path.name for path in tiny_run.checkpoints.glob("*-step_*")] == ["damaged-step_0000000006"]


@pytest.mark.slow
def test_weights_that_are_lost_come_back_from_a_checkpoint_but_not_for_ever(tiny_run, undisturbed):
    outcome = tiny_run.train(world_size=2, sabotage=traps.infinite_parameter(6, rank=1)).require(1)
    assert outcome.output.count("Going back to the checkpoint of step 3") == 1
    assert "the largest parameter is inf at step 6; training stops before this reaches a checkpoint" in outcome.output.splitlines()[-1]
    assert state(tiny_run)["state"] == "failed"
    tiny_run.train(world_size=2).require(0)
    require_undisturbed(tiny_run, undisturbed(2, "fp32"))


@pytest.mark.slow
def test_a_spike_is_left_out_and_the_window_survives_a_kill(tiny_data, tmp_path):
    """The spike, in steps 10 and 11, comes after a kill that the window must live through to know it."""
    spiked = ("health.spike_window=8", "health.spike_gradient_sigma=3")
    run, expected = TinyRun(tiny_data, tmp_path / "runs"), TinyRun(tiny_data, tmp_path / "expected")
    trap = traps.scaled_gradient([10, 11], 1e6)
    expected.train(*spiked, sabotage=trap).require(0)
    assert [record["step"] for record in expected.train_records() if record.get("skipped") == "spike"] == [10, 11]
    assert run.train(*spiked, sabotage=traps.after_commit(3)).killed
    run.train(*spiked, sabotage=trap).require(0)
    assert run.metrics() == expected.metrics()
    assert not [record for record in run.train_records() if record.get("skipped") == "nonfinite"]


def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(tiny_run, undisturbed, capsys):
    trap = traps.signal_after_record(7, signal.SIGTERM, rank=1)
    outcome = tiny_run.train(world_size=2, sabotage=trap).require(75)
    saved = tiny_run.steps_saved()[-1]
    assert saved in (7, 8)
    assert f"tiny was stopped by SIGTERM after step {saved} of 12; the same command resumes from step {saved}" in outcome.output
    assert (state(tiny_run)["state"], state(tiny_run)["step"]) == ("stopped", saved)
    assert status.main([str(tiny_run.path)]) == 75
    outcome = tiny_run.train(world_size=2).require(0)
    require_undisturbed(tiny_run, undisturbed(2, "fp32"))
    assert status.main([str(tiny_run.path)]) == 0
    assert f"finished, step 12/12 (100.0%), {12 * BATCH * LENGTH:,} of " in capsys.readouterr().out


@pytest.mark.slow
def test_a_signal_in_a_step_that_does_not_end(tiny_run):
    """The main thread sits where no handler runs."""
    outcome = tiny_run.train(
        "health.stop_timeout=1", "health.heartbeat_interval=0.5", sabotage=traps.hang_at_step(5, rank=0, number=signal.SIGUSR1)
    )
    assert outcome.statuses == [1]
    assert "not stopped 1 s after SIGUSR1 (health.stop_timeout), at step 4, training: ended as it is" in outcome.output.splitlines()[-1]
    assert "in hang" in (tiny_run.path / "stacks/rank_0.txt").read_text()
    assert state(tiny_run)["state"] == "failed"
    tiny_run.train().require(0)
    assert "in hang" in (tiny_run.path / "stacks.previous/rank_0.txt").read_text()


def test_a_rank_that_hangs_is_named(tiny_run, undisturbed):
    """It sleeps before a collective in which the other waits: both are equally far."""
    outcome = tiny_run.train(*HANG, world_size=2, sabotage=traps.hang_at_step(5, rank=1)).require(1)
    last = outcome.output.splitlines()[-1]
    assert re.search(r"no progress for \d+ s at step 4 \(health.hang_timeout\): rank 1 on ", last), last
    assert "is behind, the other ranks wait; stacks are in" in last
    assert "hang" in (tiny_run.path / "stacks/rank_1.txt").read_text()
    assert "distributed_c10d.py" in (tiny_run.path / "stacks/rank_0.txt").read_text()
    assert last.endswith(state(tiny_run)["message"])
    tiny_run.train(world_size=2).require(0)
    require_undisturbed(tiny_run, undisturbed(2, "fp32"))


@pytest.mark.slow
def test_a_stopped_rank_is_missed(tiny_run, undisturbed):
    def when_rank_0_has_ended(path: Path, act: Callable[[int], None]) -> None:
        """What a launcher does to the ranks that are left."""
        for _ in range(1200):
            if path.exists() and "failed" in path.read_text():
                break
            threading.Event().wait(0.05)
        threading.Event().wait(2.0)
        act(json.loads((tiny_run.path / "heartbeats/rank_00001.json").read_text())["pid"])

    killer = threading.Thread(
        target=when_rank_0_has_ended, args=(tiny_run.path / "status.json", lambda pid: os.kill(pid, signal.SIGKILL)), daemon=True
    )
    killer.start()
    outcome = tiny_run.train(*HANG, world_size=2, sabotage=traps.signal_after_record(5, signal.SIGSTOP, rank=1))
    killer.join()
    assert outcome.statuses == [1, -signal.SIGKILL]
    assert "rank 1 on " in outcome.output.splitlines()[-1]
    assert "of 2 is missing (stopped, or the machine is gone)" in outcome.output.splitlines()[-1]
    assert [path.name for path in (tiny_run.path / "stacks").glob("*.txt")] == ["rank_0.txt"]
    tiny_run.train(world_size=2).require(0)
    require_undisturbed(tiny_run, undisturbed(2, "fp32"))
