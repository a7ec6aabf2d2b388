"""Checkpoints of somebody else run nothing here, whatever is done with them; and those of earlier versions of this project load."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint_files import vouch
from tests.end_to_end.runs import NUM_STEPS, TinyRun
from tests.end_to_end.test_average import in_a_process
from tests.slow import slow_except
from w1train import average, convert, evaluate, sample
from w1train.checkpoints.format.shard_reader import Shards

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_before_2026_12.tar.xz"
OLD_STEP = "step_0000000006"


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def unpack_old_run(directory: Path) -> TinyRun:
    """A run of two ranks whose checkpoint of step 6 is torch's format with ``.metadata``, with the records of all its 12 steps."""
    with tarfile.open(OLD_RUN) as archive:
        archive.extractall(directory, filter="data")
    return TinyRun(directory / "data", directory / "runs")


def with_code_in_metadata(checkpoint: Path, command: Command) -> None:
    """As before 2026-12, the metadata are a pickle."""
    (checkpoint / "shards.json").unlink(missing_ok=True)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(command))
    vouch(checkpoint)


def with_code_in_shards(checkpoint: Path, command: Command) -> None:
    """Each archive of a shard, of an old checkpoint, is a pickle that runs a command."""
    torch.save(command, checkpoint / "archive")
    content = (checkpoint / "archive").read_bytes()
    (checkpoint / "archive").unlink()
    for shards in checkpoint.glob("__*.distcp"):
        old = shards.read_bytes()
        # Every archive begins with the first file of a zip archive; the first of the file is the one of the step counts.
        shards.write_bytes(content + old[len(content) :])
    vouch(checkpoint)


COMMANDS: dict[str, Callable[[TinyRun, Path], tuple[int, str, str]]] = {
    "sample": lambda run, out: in_a_process(run, sample),
    "evaluate": lambda run, out: in_a_process(run, evaluate),
    "average": lambda run, out: in_a_process(run, average, "--steps", "5,6"),
    "convert": lambda run, out: in_a_process(run, _ToHuggingFace, str(out)),
    "resume": lambda run, out: _trained(run, world_size=2),
    "initial weights": lambda run, out: _trained(run, f"training.initial_weights={run.path}", "name=second", world_size=1),
}


class _ToHuggingFace:
    @staticmethod
    def main(arguments: list[str]) -> int:
        return convert.main(["to-hf", *arguments])


def _trained(run: TinyRun, *overrides: str, world_size: int) -> tuple[int, str, str]:
    outcome = run.train(*overrides, world_size=world_size)
    return max(outcome.statuses), "", outcome.output


@pytest.mark.parametrize("damage", [with_code_in_metadata, with_code_in_shards])
@pytest.mark.parametrize("command", slow_except(["sample", "resume"], COMMANDS))
def test_no_command_runs_what_is_in_a_checkpoint(command, damage, tmp_path):
    run, ran = unpack_old_run(tmp_path), tmp_path / "ran"
    damage(run.checkpoints / OLD_STEP, Command(f"touch {ran}"))
    shutil.copytree(run.checkpoints / OLD_STEP, run.checkpoints / "step_0000000005")  # an average has two members
    status, _, output = COMMANDS[command](run, tmp_path / "out")
    assert not ran.exists(), "the checkpoint ran a command"
    assert status in (1, 2), output
    assert "Traceback" not in output
    if damage is with_code_in_metadata:
        assert "it names 'posix.system', which no checkpoint needs and which may run a program" in output
    else:
        assert f"{OLD_STEP} is damaged: " in output or "step_0000000005 is damaged: " in output


def test_an_old_checkpoint_has_the_tensors_that_it_had(tmp_path):
    run = unpack_old_run(tmp_path)
    shards, expected = Shards(run.checkpoints / OLD_STEP), json.loads((tmp_path / "tensors.json").read_text())
    assert shards.tensors.keys() == expected.keys()
    for key, stored in shards.tensors.items():
        tensor = torch.empty(stored.sizes, dtype=stored.dtype)
        shards.read_into(tensor, key, [0] * len(stored.sizes))
        assert hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy()).hexdigest() == expected[key], key


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_old_run_goes_on(tmp_path, world_size):
    run = unpack_old_run(tmp_path)
    expected = run.metrics()
    run.train(world_size=world_size).require(0)
    found = run.metrics()
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["step"] > 6 or ours == theirs
        # The old records are of another machine.
        assert ours["loss" if ours["kind"] == "train" else "elbo"] == pytest.approx(
            theirs["loss" if ours["kind"] == "train" else "elbo"], rel=1e-4
        )
    assert (run.checkpoints / f"step_{NUM_STEPS:010d}" / "shards.json").is_file()


@pytest.mark.slow
def test_an_old_run_is_averaged_with_a_new_checkpoint_and_sampled(tmp_path):
    run = unpack_old_run(tmp_path)
    run.train("checkpoint.keep=9", world_size=1).require(0)
    old, new = (Shards(run.checkpoints / f"step_{step:010d}") for step in (6, NUM_STEPS))
    status, _, err = in_a_process(run, average, "--steps", f"6,{NUM_STEPS}")
    assert status == 0, err
    (path,) = run.checkpoints.glob("average_*")
    found, key = Shards(path), "output_layer.weight"
    tensors = [torch.empty(found.tensors[key].sizes) for _ in range(3)]
    for shards, tensor in zip((old, new, found), tensors, strict=True):
        shards.read_into(tensor, key, [0, 0])
    assert torch.equal((tensors[0] + tensors[1]) / 2, tensors[2])
    status, out, err = in_a_process(run, sample, "--checkpoint", "average", "--num-tokens", "4")
    assert status == 0, err
    assert out


@pytest.fixture
def with_hostile_files(tiny_data, undisturbed, tmp_path):
    """A new run, to be changed."""
    shutil.copytree(undisturbed(1, "fp32").runs_dir, tmp_path / "runs")
    return TinyRun(tiny_data, tmp_path / "runs")


def test_values_that_are_no_optimizers_are_refused(with_hostile_files):
    run = with_hostile_files
    for checkpoint in run.checkpoints.glob("step_*"):
        index = json.loads((checkpoint / "shards.json").read_bytes())
        index["values"]["optimizer"]["optimizer"]["param_groups"][0]["lr"] = {"$tuple": ["often"]}
        (checkpoint / "shards.json").write_text(json.dumps(index))
        vouch(checkpoint)
    outcome = run.train("checkpoint.on_damage=stop").require(1)
    assert "param_groups[0].lr is ('often',), expected 0.0" in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname"])
def test_a_name_that_leaves_the_checkpoint_is_refused(with_hostile_files, name):
    run = with_hostile_files
    (run.path / "outside").write_text("secret")
    for checkpoint in run.checkpoints.glob("step_*"):
        manifest = json.loads((checkpoint / "manifest.json").read_bytes())
        content = Path(checkpoint, name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    outcome = run.train("checkpoint.on_damage=stop").require(1)
    assert f"manifest.json names {name!r}, which is not the name of another file in its directory" in outcome.output
    status, _, err = in_a_process(run, sample)
    assert status == 2
    assert "is not the name of another file" in err
