"""What stops a run says so in a sentence, stops every rank, and loses nothing that was saved."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, TinyRun, launch, output_to
from tests.poor_file_systems import lock_nothing, sync_no_directory
from tests.slow import slow_except
from w1train import sample
from w1train.data import loader
from w1train.data.dataset import DatasetError
from w1train.runtime import record_files as metrics_log


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MiB: six checkpoints."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root; test_one_rank_cannot_write covers a part")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def one_line(output: str, words: str) -> str:
    """The last line of a rank's output, which has these words, where there is no traceback."""
    assert "Traceback" not in output, output
    last = output.splitlines()[-1]
    assert words in last, output
    return last


def blocks(path: Path) -> int:
    """Bytes that a file takes on its disk."""
    return path.stat().st_blocks * 512


def test_a_poor_file_system_is_a_warning(tiny_run, undisturbed):
    """Its directories cannot be synced, its files not be locked: every checkpoint is there, and the records are those of another run."""

    def sabotage(rank: int) -> None:
        patch = pytest.MonkeyPatch()  # never undone, because the rank ends
        sync_no_directory(patch)
        lock_nothing(patch)

    outcome = tiny_run.train(sabotage=sabotage).require(0)
    assert outcome.output.count("this file system cannot sync directories") == 1
    assert outcome.output.count("its file system has no locks") == 1
    assert tiny_run.metrics() == undisturbed(1, "fp32").metrics()
    assert tiny_run.steps_saved() == [9, 12]


@pytest.mark.parametrize("files", ["a shard, manifest.json", pytest.param("shards.json, config.yaml", marks=pytest.mark.slow)])
def test_no_space_left_at_any_file_of_a_checkpoint(small_disk, tiny_data, undisturbed, files):
    run = TinyRun(tiny_data, small_disk / "runs")
    run.train(world_size=2, sabotage=traps.after_commit(2))
    saved = run.checkpoints / "step_0000000006"
    shards, index = sum(map(blocks, saved.glob("*.shards"))), blocks(saved / "shards.json")
    # The writing of these files fails.
    free = {"a shard": shards // 2, "shards.json": shards, "config.yaml": shards + index, "manifest.json": shards + index + 8192}
    for num_bytes_left in (free[file] for file in files.split(", ")):
        trap = traps.fill_disk(small_disk, num_bytes_left, number=1)
        outcome = run.train("checkpoint.asynchronous=false", "checkpoint.on_error=stop", world_size=2, sabotage=trap).require(1)
        message = one_line(outcome.output, "step_0000000009, with 0.0 MiB free on that disk: ")
        assert "No space left on device" in message or "disk full" in message
        assert "The checkpoint of step 6 is untouched: the same command resumes from it" in message
        assert outcome.outputs[1] == ""
        assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_0000000003", "step_0000000006"]
        (small_disk / "ballast").unlink()
    run.train(world_size=2).require(0)
    assert run.metrics() == undisturbed(2, "fp32").metrics()
    assert run.samples() == undisturbed(2, "fp32").samples()


@pytest.mark.slow
def test_one_rank_cannot_write(tiny_run, undisturbed):
    def limit(rank: int) -> None:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    outcome = tiny_run.train("checkpoint.on_error=stop", world_size=2, sabotage=limit).require(1)
    message = one_line(outcome.output, "could not save")
    assert "rank 1: a file could not be written to its end (disk full, or a quota or file size limit reached" in message
    assert "rank 0: " not in message
    assert "There is no older checkpoint" in message
    assert list(tiny_run.checkpoints.iterdir()) == []
    tiny_run.train(world_size=2).require(0)
    assert tiny_run.metrics() == undisturbed(2, "fp32").metrics()


@pytest.mark.slow
def test_no_space_left_for_a_record(tiny_run, undisturbed):
    def fill(rank: int) -> None:
        original = metrics_log.MetricsLog.append

        def append(log: metrics_log.MetricsLog, record: dict) -> None:
            if record["step"] == 5:
                raise OSError(28, "No space left on device", str(log.path))
            original(log, record)

        if rank == 0:
            metrics_log.MetricsLog.append = append

    outcome = tiny_run.train(world_size=2, sabotage=fill).require(1)
    one_line(outcome.outputs[0], f"No space left on device: '{tiny_run.path}/metrics.jsonl'")
    one_line(outcome.outputs[1], "rank 1: lost the connection to another rank")
    tiny_run.train(world_size=2).require(0)
    assert tiny_run.metrics() == undisturbed(2, "fp32").metrics()


def test_damage_that_one_rank_meets_in_its_samples_is_told_by_that_rank(tiny_run):
    def damage(rank: int) -> None:
        original, calls = loader.collate, 0

        def collate(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 9:
                raise DatasetError("train.bin: token 4 of document 4 is 999, outside the model's vocabulary")
            return original(*args)

        if rank == 1:
            loader.collate = collate

    outcome = tiny_run.train(world_size=2, sabotage=damage)
    assert outcome.statuses == [1, 2]
    one_line(outcome.outputs[0], "rank 0: lost the connection")
    one_line(outcome.outputs[1], "rank 1: train.bin: token 4 of document 4 is 999")


DAMAGES = {
    "a flipped bit": (lambda path: flip(next(path.glob("rank_00001.*"))), r"rank_00001.shards has changed \(SHA-256 differs\)"),
    "a truncated shard": (
        lambda path: os.truncate(next(path.glob("rank_00000.*")), 1000),
        r"rank_00000.shards has 1000 bytes, expected \d+",
    ),
    "a missing shard": (lambda path: next(path.glob("rank_00000.*")).unlink(), "rank_00000.shards is missing"),
    "a missing index": (lambda path: (path / "shards.json").unlink(), "shards.json is missing"),
    "changed configuration": (lambda path: flip(path / "config.yaml"), "config.yaml has changed"),
    "a missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "a torn manifest": (lambda path: os.truncate(path / "manifest.json", 40), "manifest.json cannot be read"),
    "a manifest of another step": (lambda path: edit_manifest(path, step=13), "manifest.json says .*13.*, the shards say .*12"),
    "half a manifest": (lambda path: edit_manifest(path, files=None), "manifest.json lacks files"),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    (path / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if value is not None}))


@pytest.mark.parametrize("damage", slow_except(["a flipped bit", "a missing shard", "a torn manifest"], DAMAGES))
def test_a_damaged_checkpoint_is_named(tiny_data, undisturbed, tmp_path, damage):
    shutil.copytree(undisturbed(2, "fp32").runs_dir, tmp_path / "runs")
    run = TinyRun(tiny_data, tmp_path / "runs")
    act, words = DAMAGES[damage]
    act(run.checkpoints / "step_0000000012")
    before = run.metrics()
    outcome = run.train("checkpoint.on_damage=stop", world_size=2).require(1)
    message = one_line(outcome.output, f"w1train train: {run.checkpoints}/step_0000000012 is damaged: ")
    assert re.search(words, message), message
    assert message.endswith("Remove this directory to resume from an older checkpoint.")
    assert outcome.outputs[1] == ""
    assert run.metrics() == before


def test_without_the_damaged_checkpoint_the_older_one_serves(tiny_data, undisturbed, tmp_path):
    expected = undisturbed(2, "fp32")
    shutil.copytree(expected.runs_dir, tmp_path / "runs")
    run = TinyRun(tiny_data, tmp_path / "runs")
    shutil.rmtree(run.checkpoints / "step_0000000012")
    run.train(world_size=2).require(0)
    assert run.metrics() == expected.metrics()
    assert run.samples() == expected.samples()


def test_sampling_from_a_damaged_checkpoint(tiny_data, undisturbed, tmp_path):
    shutil.copytree(undisturbed(1, "fp32").runs_dir, tmp_path / "runs")
    run = TinyRun(tiny_data, tmp_path / "runs")
    flip(next((run.checkpoints / "step_0000000012").glob("rank_00000.*")))

    def main(rank: int) -> int:
        with output_to(tmp_path / "log"):
            os.chdir(tiny_data)
            return sample.main([str(run.path)])

    assert launch(1, main) == [2]
    one_line((tmp_path / "log").read_text(), "is damaged: rank_00000.shards has changed")


def test_a_run_directory_has_one_user(tiny_run, undisturbed, tmp_path):
    here, go_on = tmp_path / "here", tmp_path / "go-on"
    outcomes = []
    first = threading.Thread(
        target=lambda: outcomes.append(tiny_run.train(world_size=2, sabotage=traps.wait_at_step(5, here, go_on))), daemon=True
    )
    first.start()
    for _ in range(1200):
        if here.exists():
            break
        threading.Event().wait(0.05)
    holder = json.loads((tiny_run.path / ".lock").read_text())
    second = TinyRun(tiny_run.data, tiny_run.runs_dir).train(world_size=2, log="second").require(1)
    assert f"in use by process {holder['pid']} on " in one_line(second.output, str(tiny_run.path))
    assert second.outputs[1] == ""
    go_on.touch()
    first.join()
    outcomes[0].require(0)
    assert tiny_run.metrics() == undisturbed(2, "fp32").metrics()


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_nan_stops_the_run_before_a_checkpoint(tiny_run, world_size):
    outcome = tiny_run.train("health.on_nonfinite=stop", world_size=world_size, sabotage=traps.nan_gradient(6)).require(1)
    assert "loss is nan at step 6; training stops before this reaches a checkpoint" in one_line(outcome.output, "nan")
    assert tiny_run.steps_saved() == [3]
    assert tiny_run.metrics()[-1]["step"] == 5
    tiny_run.train(world_size=world_size).require(0)


@pytest.mark.slow
def test_an_update_that_overflows_reaches_no_checkpoint(tiny_run):
    """The loss of the step, taken before the update, is finite."""
    outcome = tiny_run.train("health.on_nonfinite=stop", world_size=2, sabotage=traps.infinite_parameter(6, rank=1)).require(1)
    one_line(outcome.output, "the largest parameter is inf at step 6; training stops before this reaches a checkpoint")
    assert outcome.outputs[1] == ""
    assert tiny_run.steps_saved() == [3]


@pytest.mark.slow
def test_a_learning_rate_that_is_much_too_high(tiny_run):
    outcome = tiny_run.train(
        f"schedule.stages={{all: {{tokens: {40 * BATCH * LENGTH}, learning_rate: 1e6}}}}",
        "~schedule.stages.warmup",
        "checkpoint.interval=100",
        "validation.interval=100",
        "sampling.interval=0",
        "health.on_nonfinite=stop",
    ).require(1)
    one_line(outcome.output, "training stops before this reaches a checkpoint")
    assert tiny_run.steps_saved() == []
