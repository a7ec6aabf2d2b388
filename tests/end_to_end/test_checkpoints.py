"""Saving in the background, and going on from the newest good checkpoint, in whole runs."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, NUM_STEPS, TinyRun
from tests.end_to_end.test_failures import DAMAGES, flip, one_line, small_disk
from tests.end_to_end.test_resume import require_equal
from tests.slow import slow_except
from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.manifest import size_of
from w1train.config.serialization import config_from_yaml
from w1train.planning.checkpoint_sizes import checkpoint_bytes

__all__ = ["small_disk"]  # a fixture, used here too


def copy_of(run: TinyRun, directory: Path) -> TinyRun:
    """For a test that damages it."""
    shutil.copytree(run.runs_dir, directory / "runs")
    return TinyRun(run.data, directory / "runs")


DEATHS = [
    ("a part of step 3 is written", traps.after_shards(1, rank=1)),
    ("step 3 has no manifest", traps.before_manifest(1)),
    ("step 3 is not renamed", traps.before_commit(1)),
    ("step 3 is renamed", traps.after_commit(1)),
    ("step 9 is there, step 3 is half removed", traps.while_removing(1)),
]


@pytest.mark.parametrize("deaths", [DEATHS[::2], pytest.param(DEATHS, marks=pytest.mark.slow)], ids=["three", "all"])
def test_killed_while_a_save_is_in_the_background(tiny_run, undisturbed, deaths):
    for where, trap in deaths:
        outcome = tiny_run.train(world_size=2, sabotage=trap)
        assert outcome.killed, f"was not killed when {where}:\n{outcome.output}"
    tiny_run.train(world_size=2).require(0)
    require_equal(tiny_run, undisturbed(2, "fp32"))
    assert not list(tiny_run.checkpoints.glob(".*")), "leftovers of a save"


@pytest.mark.slow
def test_what_saving_costs_is_in_the_records(tiny_run):
    # Three steps more than usual: the save of step 12 waits for that of step 9, however slow, and the record of step 13 tells of it.
    longer = f"schedule.stages.stable.tokens={13 * BATCH * LENGTH}"
    tiny_run.train(longer, sabotage=traps.after_commit(2))
    outcome = tiny_run.train(longer).require(0)
    lines = [json.loads(line) for line in (tiny_run.path / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in lines if record["kind"] == "train"]
    assert all(record["checkpoint/stall_seconds"] > 0 for record in records if record["step"] in (4, 10))
    assert sum("checkpoint/background_seconds" in record for record in records) >= 1
    assert [record["step"] for record in records if "checkpoint/restart_seconds" in record] == [7]
    assert "s in the background" in outcome.output


@pytest.mark.parametrize("damage", slow_except(["a flipped bit"], ["a flipped bit", "a missing manifest", "a manifest of another step"]))
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(undisturbed, tmp_path, damage):
    expected = undisturbed(2, "fp32")
    run = copy_of(expected, tmp_path)
    act, _ = DAMAGES[damage]
    act(run.checkpoints / "step_0000000012")
    outcome = run.train(world_size=2).require(0)
    assert "step_0000000012 is damaged" in outcome.output
    assert "is now damaged-step_0000000012; training resumes from step 9" in outcome.output
    assert f"resuming from {run.checkpoints}/step_0000000009" in outcome.output
    assert (run.checkpoints / "damaged-step_0000000012" / "config.yaml").exists()
    require_equal(run, expected)


def test_without_a_good_checkpoint_a_run_does_not_begin_again(undisturbed, tmp_path):
    run = copy_of(undisturbed(2, "fp32"), tmp_path)
    records = run.metrics()
    for step in (9, 12):
        os.truncate(next((run.checkpoints / f"step_{step:010d}").glob("rank_00001.*")), 100)
    for _ in range(2):  # nothing is set aside, so the second start says the same
        outcome = run.train(world_size=2).require(1)
        one_line(outcome.output, "has no good checkpoint, only damaged checkpoints: step_0000000009, step_0000000012.")
        assert run.steps_saved() == [9, 12]
        assert run.metrics() == records


def test_copies_elsewhere_replace_damaged_checkpoints(undisturbed, tmp_path):
    expected = undisturbed(2, "fp32")
    run = copy_of(expected, tmp_path)
    shutil.copytree(run.checkpoints, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere" / "step_0000000012")
    for step in (9, 12):
        flip(next((run.checkpoints / f"step_{step:010d}").glob("rank_00000.*")))
    outcome = run.train(f"checkpoint.upload=file://{tmp_path}/elsewhere", world_size=2).require(0)
    assert "fetching the checkpoint of step 9" in outcome.output
    require_equal(run, expected)
    assert {path.name for path in run.checkpoints.glob("damaged-*")} == {"damaged-step_0000000009", "damaged-step_0000000012"}
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"step_0000000009", "step_0000000012", "run.json"}


def test_a_chosen_step_is_gone_back_to_once(undisturbed, tmp_path):
    expected = undisturbed(1, "fp32")
    run = copy_of(expected, tmp_path)
    one_line(run.train("checkpoint.resume_step=10").require(2).output, "has no complete checkpoint of step 10; it has: 9, 12")
    outcome = run.train("checkpoint.resume_step=9").require(0)
    assert "is now undone-step_0000000012: checkpoint.resume_step=9" in outcome.output
    assert f"resuming from {run.checkpoints}/step_0000000009" in outcome.output
    require_equal(run, expected)
    outcome = run.train("checkpoint.resume_step=9").require(0)
    assert f"has all its {NUM_STEPS} steps: nothing to do" in outcome.output
    require_equal(run, expected)


@pytest.mark.slow
def test_saves_that_fail_do_not_stop_training_but_its_end(tiny_run, undisturbed):
    def limit(rank: int) -> None:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    outcome = tiny_run.train(world_size=2, sabotage=limit).require(1)
    message = one_line(outcome.output, "step_0000000012, with ")
    assert "rank 1: a file could not be written to its end" in message
    assert outcome.output.count("Training continues, and saves again") >= 2
    assert tiny_run.train_records() == undisturbed(2, "fp32").train_records(), "all steps were done"
    assert list(tiny_run.checkpoints.iterdir()) == []
    tiny_run.train(world_size=2).require(0)
    require_equal(tiny_run, undisturbed(2, "fp32"))


def test_a_full_disk_loses_a_checkpoint_and_nothing_else(small_disk, tiny_data, undisturbed):
    run = TinyRun(tiny_data, small_disk / "runs")

    def full_for_a_while(rank: int) -> None:
        traps.fill_disk(small_disk, 200_000, number=2)(rank)
        if rank == 0:
            traps.after_call_of_save(2, (small_disk / "ballast").unlink)(rank)

    outcome = run.train("checkpoint.asynchronous=false", world_size=2, sabotage=full_for_a_while).require(0)
    assert "the next checkpoint may not fit into" in outcome.output
    assert "step_0000000006, with 0." in outcome.output
    assert "The checkpoint of step 3 is untouched" in outcome.output
    require_equal(run, undisturbed(2, "fp32"))


@pytest.mark.parametrize("precision", slow_except(["fp32"], ["fp32", "bf16"]))
def test_the_plan_knows_the_size_of_a_checkpoint(undisturbed, precision):
    newest = step_path(undisturbed(2, precision).checkpoints, NUM_STEPS)
    planned = checkpoint_bytes(config_from_yaml(newest / "config.yaml"))
    assert planned <= size_of(newest) <= 1.1 * planned
