"""Runs whose copies elsewhere are in a storage that fails, lies, is slow, or shows nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import Outcome, Sabotage, TinyRun
from tests.end_to_end.test_checkpoints import copy_of
from tests.end_to_end.test_failures import one_line
from tests.end_to_end.test_resume import require_equal
from tests.faulty_storage import counts, create, set_faults
from tests.slow import slow_except
from w1train.checkpoints.manifest import complete_steps
from w1train.checkpoints.remote.remote_checkpoints import MARKER
from w1train.runtime import object_storage


def impatient(sabotage: Sabotage = lambda rank: None) -> Sabotage:
    """Between attempts no rank waits."""

    def prepare(rank: int) -> None:
        object_storage.retry_seconds = 0.0
        sabotage(rank)

    return prepare


def train(run: TinyRun, bucket: Path, *overrides: str, world_size: int = 1, sabotage: Sabotage = lambda rank: None) -> Outcome:
    return run.train(f"checkpoint.upload=faulty://{bucket}", *overrides, world_size=world_size, sabotage=impatient(sabotage))


@pytest.fixture
def bucket(tmp_path):
    create(tmp_path / "bucket")
    return tmp_path / "bucket"


@pytest.fixture
def lost(undisturbed, tmp_path, bucket):
    """A run on a new machine: its directory is gone, and its copies are in the bucket."""
    expected = undisturbed(1, "fp32")
    shutil.copytree(expected.checkpoints, bucket, dirs_exist_ok=True)
    (bucket / MARKER).write_text('{"newest": 12}')
    return TinyRun(expected.data, tmp_path / "runs")


UPLOAD_FAULTS: dict[str, dict[str, Any]] = {
    "30 % of the puts fail": {"failing": {"put": 0.3}, "seed": 1},
    "30 % of the puts fail, as botocore says it, and all are slow": {
        "failing": {"put": 0.3},
        "seed": 2,
        "error": "ClientError",
        "slow_seconds": 0.05,
    },
}


@pytest.mark.parametrize("name", slow_except(list(UPLOAD_FAULTS)[:1], UPLOAD_FAULTS))
def test_uploads_with_faults_keep_what_the_settings_keep(tiny_run, undisturbed, bucket, name):
    set_faults(bucket, **UPLOAD_FAULTS[name])
    outcome = train(tiny_run, bucket).require(0)
    assert "Traceback" not in outcome.output
    require_equal(tiny_run, undisturbed(1, "fp32"))
    assert tiny_run.steps_saved() == [9, 12]
    assert complete_steps(bucket)[-1] == 12, "the newest is sent, whatever failed before"
    assert {*complete_steps(bucket)} <= {6, 9, 12}
    assert [path.name for path in sorted(bucket.iterdir()) if not (path / "manifest.json").exists()] == [MARKER]
    assert json.loads((bucket / MARKER).read_text()) == {"newest": 12}
    assert counts(bucket)["put failed"] > 0


def test_uploads_that_never_succeed_change_nothing_but_warnings(tiny_run, undisturbed, bucket):
    set_faults(bucket, failing={"put": 1.0}, error="PermissionError")
    outcome = train(tiny_run, bucket).require(0)
    assert "Traceback" not in outcome.output
    assert f"could not be uploaded to faulty://{bucket}: faulty://{bucket}: could not " in outcome.output
    assert "step_0000000012 is uploaded again" in outcome.output
    require_equal(tiny_run, undisturbed(1, "fp32"))
    assert complete_steps(bucket) == []


def test_a_lost_run_goes_on_from_the_newest_good_copy(lost, undisturbed, bucket):
    shard = next((bucket / "step_0000000012").glob("rank_00000.*"))
    os.truncate(shard, 100)
    (bucket / "step_0000000015").mkdir()
    outcome = train(lost, bucket).require(0)
    for step in (15, 12):
        assert f"the copy of step {step} in faulty://{bucket} is not used: " in outcome.output
    assert f"resuming from {lost.checkpoints}/step_0000000009" in outcome.output
    expected = undisturbed(1, "fp32")
    assert lost.train_records() == [record for record in expected.train_records() if record["step"] > 9]
    assert sorted(path.name for path in lost.checkpoints.iterdir()) == ["step_0000000009", "step_0000000012"]
    assert complete_steps(bucket) == [9, 12]


def test_a_storage_that_fails_ends_a_start_with_one_line(lost, bucket):
    for error, kind in (("ClientError", "list"), ("ClientError denied", "get"), ("ClientConnectionError", "info")):
        set_faults(bucket, failing={kind: 1.0}, error=error)
        outcome = train(lost, bucket, world_size=2).require(1)
        line = one_line(outcome.output, f"w1train train: faulty://{bucket}: could not ")
        assert "Check the" in line
        assert outcome.outputs[1] == ""
    assert list(lost.checkpoints.iterdir()) == []


@pytest.mark.slow
def test_a_run_whose_copies_and_checkpoints_are_gone_does_not_begin_again(undisturbed, lost, tmp_path, bucket):
    set_faults(bucket, gone=["step_*"])
    outcome = train(lost, bucket).require(1)
    one_line(outcome.output, f"faulty://{bucket} has no good checkpoint, but its run.json says that the checkpoint of step 12 was uploaded")
    # Here the run's own directory tells of it, whatever the storage shows.
    run = copy_of(undisturbed(1, "fp32"), tmp_path / "copy")
    shutil.rmtree(run.checkpoints)
    records = run.metrics()
    for upload in (f"faulty://{tmp_path}/nowhere", None):
        outcome = run.train(*([f"checkpoint.upload={upload}"] if upload else []), world_size=2).require(1)
        one_line(
            outcome.output, f"has no checkpoint, but {run.path}/events.jsonl says that this run has saved checkpoints, the last at step 12."
        )
        assert run.metrics() == records
    (run.path / "events.jsonl").unlink()
    run.train().require(0)
    require_equal(run, undisturbed(1, "fp32"))


def test_killed_before_the_first_upload_a_run_begins_again(tiny_run, undisturbed, bucket):
    assert train(tiny_run, bucket, sabotage=traps.before_commit(1)).killed
    assert json.loads((bucket / MARKER).read_text()) == {"newest": None}
    shutil.rmtree(tiny_run.path)
    outcome = train(tiny_run, bucket).require(0)
    assert "its run.json says that no checkpoint was uploaded: the run ended before its first upload ended" in outcome.output
    require_equal(tiny_run, undisturbed(1, "fp32"))
