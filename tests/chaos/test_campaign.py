"""The campaign itself, in short: one fault of each kind of recovery; and that it sees what it looks for."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import random
import signal
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.chaos.campaign import Campaign, draw
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.file_hooks import fail_files, kill_at_change, slow_file
from tests.chaos.scene import LAYOUTS, NUM_STEPS, Scene
from tests.chaos.supervisor import BEGINS_AT, supervise
from tests.chaos.verdict import first_difference, negative_durations
from tests.end_to_end.runs import Sabotage, TinyRun
from tests.tiny import tiny_config
from w1train.checkpoints.manifest import Progress
from w1train.records.console import print_block
from w1train.runtime import files
from w1train.runtime.run_directory import RunDirectory
from w1train.training import loop, run_description


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("chaos") / "campaign", seed=0)


def run(campaign: Campaign, name: str, layout: str) -> str:
    fault = next(fault for fault in FAULTS if fault.name == name)
    number = FAULTS.index(fault)
    return campaign.run(number, fault, layout).line()


# A restart, the first save, an older checkpoint (for changed bits, and for what cannot be read), the watchdog, and the guard of a step.
# tests/end_to_end has each of them in a faster form too: test_resume.py, test_checkpoints.py and test_health.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", ["save", "hang", "first-save", "flip", "unreadable", "nan"])
def test_a_fault_of_each_kind(campaign, name):
    # In one layout, whose undisturbed run is made once.
    line = run(campaign, name, "pipeline")
    assert "recovered" in line, line


def change_one_bit(rank: int) -> None:
    """Of one moment of Adam's on rank 1, before the last step: what a recovery might get wrong without a trace in the metrics."""
    original = loop.Trainer.train_step

    def train_step(trainer: loop.Trainer, batches: object) -> None:
        if rank == 1 and trainer.progress.step == NUM_STEPS - 1:
            (optimizer,) = trainer.model.optimizer.chained_optimizers[:1]
            moment = next(iter(optimizer.optimizer.state.values()))["exp_avg"]
            moment.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 12)
        original(trainer, batches)

    loop.Trainer.train_step = train_step


@pytest.mark.slow
def test_one_changed_bit_is_seen(campaign):
    def strike(scene: Scene):
        yield from scene.moment(last=3)
        scene.strike()

    fault = Fault(name="bit", title="one changed bit", strike=strike, hook=lambda scene: change_one_bit, max_restarts=0)
    (problem,) = campaign.run(900, fault, "pipeline").problems
    assert "tensors of the last checkpoint differ" in problem


def test_the_first_difference_is_named():
    records = [{"kind": "train", "step": step, "loss": step / 7} for step in (1, 2, 3)]
    assert first_difference(records, records) is None
    changed = [records[0], {**records[1], "loss": math.nextafter(2 / 7, 1.0)}, records[2]]
    assert first_difference(changed, records) == (
        "metrics differ first at train step 2: loss is 0.28571428571428575, expected 0.2857142857142857"
    )
    assert first_difference(records[:2], records) == "2 records in metrics.jsonl, expected 3"


class Endless:
    """A job that never ends, as one that hangs and is not noticed."""

    num_starts = 1

    def __init__(self) -> None:
        self.was_killed = False

    def ranks(self) -> dict[int, int]:
        return {0: os.getpid()}

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        self.was_killed = True

    def log(self) -> str:
        return ""


def test_a_run_that_hangs_is_killed_when_its_time_is_over(tmp_path):
    job = Endless()
    scene = Scene(TinyRun(tmp_path, tmp_path / "runs"), "data", tmp_path, random.Random(0))
    story = supervise(lambda number: job, scene, iter(()), timeout=0.2)
    assert story.hung
    assert job.was_killed


class Start(Endless):
    """A job that has ended, and what its ranks wrote."""

    def __init__(self, statuses: list[int], log: str) -> None:
        self._statuses, self._log = statuses, log

    def poll(self) -> list[int]:
        return self._statuses

    def kill(self) -> None:
        pass

    def log(self) -> str:
        return self._log


def test_a_start_that_is_killed_before_it_says_anything_has_not_begun_again_at_step_0(tmp_path):
    starts = [Start([-9, -9], "  begins  at step 0\n"), Start([-9, -9], ""), Start([0, 0], "  begins  resumes from step 8\n")]
    scene = Scene(TinyRun(tmp_path, tmp_path / "runs"), "data", tmp_path, random.Random(0))
    story = supervise(lambda number: starts[number], scene, iter(()), timeout=10.0)
    assert story.endings == [[-9, -9], [-9, -9], [0, 0]]
    assert story.resumed_at == 8


@pytest.mark.parametrize("step", [0, 12])
def test_the_supervisor_reads_the_step_at_which_a_start_says_that_it_begins(tmp_path, capsys, step):
    print_block("tiny", {"model": "", "begins": run_description._beginning(tiny_config(), RunDirectory(tmp_path), Progress(step=step))})
    assert BEGINS_AT.findall(capsys.readouterr().out) == [str(step)]


@pytest.mark.parametrize("hook", ["full", "slow"])
def test_the_faults_of_written_files_strike_the_files_that_w1train_writes(tmp_path, monkeypatch, hook):
    monkeypatch.setattr(files, "NamedFile", files.NamedFile)  # the hook replaces it, and the test puts it back
    mark, chosen = tmp_path / "mark", str(tmp_path / "b")
    if hook == "full":
        fail_files(mark, errno.ENOSPC, "w", lambda path: path.startswith(chosen))(0)
    else:
        slow_file(mark, victim=0, name=chosen, seconds=0.5)(0)
    with files.open_new(tmp_path / "a") as file:
        file.write(b"text")
    assert not mark.exists()
    with pytest.raises(OSError, match="No space left") if hook == "full" else nullcontext(), files.open_new(chosen) as file:
        file.write(b"text")
        file.flush()
    assert mark.exists()


def change_three_directories(directory: Path, sabotage: Sabotage) -> None:
    sabotage(0)
    for name in ("a", "b", "c"):
        writing = directory / f".writing-{name}"
        writing.mkdir()
        (writing / "x").write_text("x")
        writing.rename(directory / name)


@pytest.mark.parametrize(
    ("number", "group", "expected"),
    [(1, 0, "before os.mkdir of {}/.writing-a"), (2, 1, "before open of {}/.writing-b/x"), (9, 2, "before os.rename of {}/.writing-c")],
)
def test_a_rank_is_killed_before_the_change_that_was_drawn(tmp_path, number, group, expected):
    sabotage = kill_at_change(tmp_path / "mark", victim=0, word=".writing-", number=number, group=group)
    process = multiprocessing.get_context("fork").Process(target=change_three_directories, args=(tmp_path, sabotage))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "mark").read_text() == expected.format(tmp_path)


def test_a_negative_duration_is_found(tmp_path):
    run = TinyRun(tmp_path, tmp_path / "runs")
    run.path.mkdir(parents=True)
    (run.path / "metrics.jsonl").write_text('{"step": 1, "time/step_seconds": 0.1}\n{"step": 2, "checkpoint/restart_seconds": -3596.7}\n')
    (run.path / "events.jsonl").write_text("")
    assert negative_durations(run) == ["metrics.jsonl, step 2: checkpoint/restart_seconds is -3596.7"]


def test_every_fault_meets_every_layout():
    num_runs = len(FAULTS) * len(LAYOUTS)
    runs = list(draw(num_runs))
    assert [number for number, _, _ in runs] == list(range(num_runs))
    met = Counter((fault.name, layout) for _, fault, layout in runs)
    assert set(met) == {(fault.name, layout) for fault in FAULTS for layout in LAYOUTS}
    assert {fault.name for _, fault, _ in draw(5, ["hang", "nan"])} == {"hang", "nan"}


def test_signals_are_not_sent_to_ranks_that_are_gone(tmp_path):
    scene = Scene(TinyRun(tmp_path, tmp_path / "runs"), "data", tmp_path, random.Random(0))
    scene.job = Endless()
    scene.signal(signal.SIGCONT, [0, 1])
