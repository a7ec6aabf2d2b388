"""Killed at any moment and started again, a run leaves what it would have left undisturbed, bit for bit."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import CHECKPOINT_INTERVAL, NUM_STEPS, TinyRun
from w1train.runtime.exit_status import ExitStatus
from w1train.status import describe_run


def require_equal(run: TinyRun, expected: TinyRun) -> None:
    assert run.metrics() == expected.metrics()
    assert run.samples() == expected.samples()
    assert run.steps_saved() == expected.steps_saved()
    not_measured = {"tokens_per_second", "wall_seconds", "versions"}
    assert {key: value for key, value in run.summary().items() if key not in not_measured} == {
        key: value for key, value in expected.summary().items() if key not in not_measured
    }


def test_a_trial_ends_at_its_step_and_continues_as_if_it_had_not(tiny_run, undisturbed):
    options = ("training.precision=bf16", "checkpoint.asynchronous=false")
    for _ in range(2):  # the second start has nothing to do
        tiny_run.train(*options, "--max-steps", "5", world_size=2).require(0)
        assert tiny_run.steps_saved() == [3, 5]
        assert [record["step"] for record in tiny_run.train_records()] == [1, 2, 3, 4, 5]
        status = json.loads((tiny_run.path / "status.json").read_text())
        assert (status["state"], status["step"], status["num_steps"]) == ("paused", 5, NUM_STEPS)
        line, exit_status = describe_run(tiny_run.path)
        assert line.endswith("ended at step 5 as --max-steps asked; the same command without --max-steps continues")
        assert exit_status == ExitStatus.PAUSED
        assert not (tiny_run.path / "summary.json").exists()
    tiny_run.train(*options, "--max-steps", "99", world_size=2).require(0)
    require_equal(tiny_run, undisturbed(2, "bf16"))


IN_EACH_RUN = (
    "shards of step 3 without metadata",
    "torn record of step 5",
    "torn validation of step 8",
    "removal of step 3",
    "the end without summary",
)


@pytest.mark.parametrize(
    ("world_size", "precision", "places"),
    [
        (2, "bf16", IN_EACH_RUN),
        pytest.param(1, "fp32", None, marks=pytest.mark.slow),
        pytest.param(2, "bf16", None, marks=pytest.mark.slow),
    ],
    ids=["2-bf16", "1-fp32-everywhere", "2-bf16-everywhere"],
)
def test_killed_at_the_worst_places(tiny_run, undisturbed, world_size, precision, places):
    options = (f"training.precision={precision}", "checkpoint.asynchronous=false")  # so that each save is done before what comes next
    # Each start goes on from where the one before it was killed; numbers count calls in one process.
    deaths = [
        ("step 1, nothing saved", traps.before_record(1), []),
        ("step 2, a boundary", traps.after_record(2), []),
        ("shards of step 3 without metadata", traps.after_shards(1, rank=world_size - 1), []),
        ("step 3 without manifest", traps.before_manifest(1), []),
        ("step 3 before its rename", traps.before_commit(1), []),
        ("step 3 after its rename", traps.after_commit(1), [3]),
        ("validation of step 4", traps.after_validation(1), [3]),
        ("torn record of step 5", traps.torn_line("train", 5), [3]),
        ("torn sample of step 6", traps.torn_line("sample", 6), [3]),
        ("samples of step 6, not saved", traps.after_samples(1), [3]),
        ("torn validation of step 8", traps.torn_line("validation", 8), [3, 6]),
        ("removal of step 3", traps.while_removing(1), [6, 9]),
        ("the end without summary", traps.before_summary(), [9, 12]),
    ]
    for where, trap, saved in (death for death in deaths if places is None or death[0] in places):
        outcome = tiny_run.train(*options, world_size=world_size, sabotage=trap)
        assert outcome.killed, f"was not killed at {where}:\n{outcome.output}"
        assert tiny_run.steps_saved() == saved, where
    tiny_run.train(f"training.precision={precision}", world_size=world_size).require(0)
    require_equal(tiny_run, undisturbed(world_size, precision))
    assert not list(tiny_run.checkpoints.glob(".*")), "leftovers of a save"


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "precision"), [(1, "bf16"), (2, "fp32")])
def test_killed_at_random_moments(tiny_run, undisturbed, world_size, precision):
    expected = undisturbed(world_size, precision)
    generator = random.Random(world_size)
    num_deaths = 0
    for _ in range(6):
        # A start from a cold cache takes as long as all steps, and a run that has ended is not killed. The first kill therefore comes soon.
        trap = traps.at_a_moment(generator.uniform(0.0, 0.3 if num_deaths else 0.1), victim=generator.randrange(world_size))
        outcome = tiny_run.train(f"training.precision={precision}", world_size=world_size, sabotage=trap)
        num_deaths += outcome.killed
    assert num_deaths > 0
    tiny_run.train(f"training.precision={precision}", world_size=world_size).require(0)
    require_equal(tiny_run, expected)


def test_a_finished_run_has_nothing_to_do(tiny_run):
    tiny_run.train().require(0)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tiny_run.path.rglob("*") if path.is_file()}
    outcome = tiny_run.train("logging.wandb=offline").require(0)
    assert f"has all its {NUM_STEPS} steps: nothing to do" in outcome.output
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tiny_run.path.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {".lock", "config.yaml"}


def test_data_may_move_while_a_run_waits(tiny_run, undisturbed, tmp_path):
    tiny_run.train(sabotage=traps.after_commit(2))
    for name in ("train", "validation", "tokenizer"):
        for path in tiny_run.data.glob(f"{name}.*"):
            shutil.copy(path, tmp_path)
    places = [f"data.train={tmp_path}/train", f"data.validation={tmp_path}/validation", f"data.tokenizer={tmp_path}/tokenizer.json"]
    outcome = tiny_run.train(*places).require(0)
    assert f"configuration changed on resume: data.train: train -> {tmp_path}/train" in outcome.output
    require_equal(tiny_run, undisturbed(1, "fp32"))


def test_a_resume_does_no_step_twice(tiny_run):
    tiny_run.train(sabotage=traps.after_commit(2))
    outcome = tiny_run.train().require(0)
    assert f"resuming from {tiny_run.checkpoints}/step_{2 * CHECKPOINT_INTERVAL:010d}" in outcome.output
    steps = [line.split("/")[0].split()[1] for line in outcome.output.splitlines() if line.startswith("step ")]
    assert [int(step) for step in steps] == list(range(2 * CHECKPOINT_INTERVAL + 1, NUM_STEPS + 1))


def test_from_the_last_checkpoint_alone(tiny_run, undisturbed):
    """Such as an average under the name of a step: nothing is left to train, and nothing is known of what came before."""
    last = tiny_run.checkpoints / f"step_{NUM_STEPS:010d}"
    shutil.copytree(undisturbed(1, "fp32").checkpoints / last.name, last)
    misnamed = last.rename(last.with_name("step_0000000009"))
    assert f"{misnamed} is a checkpoint of step 12, by its manifest: rename it to {last.name}" in tiny_run.train().require(2).output
    misnamed.rename(last)
    outcome = tiny_run.train().require(0)
    assert "has no records of 12 of the 12 steps before this start (step 1 to 12)" in outcome.output
    summary = tiny_run.summary()
    assert (summary["steps"], summary["tokens_per_second"], summary["validation"]) == (NUM_STEPS, None, None)


def test_records_that_are_lost_are_said_to_be(tiny_run):
    tiny_run.train(sabotage=traps.after_commit(2))
    (tiny_run.path / "metrics.jsonl").unlink()
    outcome = tiny_run.train().require(0)
    assert "has no records of 6 of the 6 steps before this start (step 1 to 6)" in outcome.output
    validation = tiny_run.summary()["validation"]
    assert (validation["start"], validation["end"]["step"]) == (None, NUM_STEPS)
    assert tiny_run.summary()["tokens_per_second"] > 0
