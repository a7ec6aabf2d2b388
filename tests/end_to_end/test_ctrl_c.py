"""Ctrl-C saves once and stops, wherever it comes, and the run that is started again is the undisturbed run. A second one ends at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, NUM_STEPS, TIMEOUT, TinyRun
from tests.slow import slow_except
from w1train.runtime import stop_signals

REPOSITORY = Path(__file__).parents[2]


def status(run: TinyRun) -> dict:
    return json.loads((run.path / "status.json").read_text())


def require_undisturbed(run: TinyRun, expected: TinyRun) -> None:
    assert run.metrics() == expected.metrics()
    assert run.samples() == expected.samples()


def test_at_step_18_it_resumes_at_step_18_bit_for_bit(tiny_data, tmp_path):
    longer = (f"schedule.stages.stable.tokens={18 * BATCH * LENGTH}", "checkpoint.interval=10", "sampling.interval=10")
    run, expected = TinyRun(tiny_data, tmp_path / "runs"), TinyRun(tiny_data, tmp_path / "expected")
    outcome = run.train(*longer, sabotage=traps.interrupt_step(18)).require(130)
    assert "tiny was stopped by Ctrl-C after step 18 of 20; the same command resumes from step 18" in outcome.output
    assert "Ctrl-C: the run saves after the current step, and stops; a second Ctrl-C ends it at once" in outcome.output
    assert "Traceback" not in outcome.output
    assert run.steps_saved() == [10, 18]
    assert (status(run)["state"], status(run)["step"], status(run)["message"]) == ("stopped", 18, None)
    outcome = run.train(*longer).require(0)
    assert "begins     resumes from step 18, " in outcome.output
    expected.train(*longer).require(0)
    require_undisturbed(run, expected)


@pytest.mark.parametrize("rank", [None, pytest.param(1, marks=pytest.mark.slow)], ids=["the group", "one process"])
def test_on_two_ranks(tiny_run, undisturbed, rank):
    outcome = tiny_run.train(world_size=2, sabotage=traps.interrupt_step(7, rank)).require(130)
    assert outcome.output.count("tiny was stopped by Ctrl-C after step 7 of 12; the same command resumes from step 7") == 1
    assert outcome.outputs[1] == ""
    tiny_run.train(world_size=2).require(0)
    require_undisturbed(tiny_run, undisturbed(2, "fp32"))


PLACES = {
    "save": (traps.interrupt_save(2), 7),
    "validation": (traps.interrupt_validation(2), 5),
    "sampling": (traps.interrupt_sampling(1), 7),
}


@pytest.mark.parametrize("place", slow_except(["save"], PLACES))
def test_nothing_is_lost_wherever_it_comes(tiny_run, undisturbed, place):
    """While a checkpoint of step 6 is made, in the validation after step 4, and in the sampling after step 6."""
    sabotage, first = PLACES[place]
    outcome = tiny_run.train(sabotage=sabotage).require(130)
    assert "Traceback" not in outcome.output
    assert first <= tiny_run.steps_saved()[-1] < NUM_STEPS
    assert not list(tiny_run.checkpoints.glob(".*"))
    tiny_run.train().require(0)
    require_undisturbed(tiny_run, undisturbed(1, "fp32"))


def test_in_the_last_save_the_run_finishes(tiny_run, undisturbed):
    outcome = tiny_run.train(sabotage=traps.interrupt_save(4)).require(0)
    assert "tiny is finished: it has all its 12 steps" in outcome.output
    assert (status(tiny_run)["state"], tiny_run.steps_saved()) == ("finished", [9, NUM_STEPS])
    require_undisturbed(tiny_run, undisturbed(1, "fp32"))


def test_a_second_one_ends_at_once(tiny_run, undisturbed):
    def twice() -> None:
        stop_signals._SAME_CTRL_C_SECONDS = 0.2
        traps.press_ctrl_c()
        threading.Event().wait(0.6)
        traps.press_ctrl_c()
        threading.Event().wait(60)

    outcome = tiny_run.train("checkpoint.asynchronous=false", sabotage=traps.interrupt_step(5, action=twice)).require(130)
    last = outcome.output.splitlines()[-1]
    assert last.endswith("a second Ctrl-C at step 4: ended at once; the same command resumes from step 3")
    assert "Traceback" not in outcome.output
    assert status(tiny_run)["state"] == "failed"
    tiny_run.train().require(0)
    require_undisturbed(tiny_run, undisturbed(1, "fp32"))


def test_during_the_start_the_message_says_whether_there_is_a_checkpoint(tiny_run):
    outcome = tiny_run.train(sabotage=traps.interrupt_start()).require(130)
    nothing = "it has no checkpoint yet, and the same command begins it again"
    assert outcome.output.splitlines()[-1] == f"w1train train: ended by Ctrl-C; {nothing}"
    assert (status(tiny_run)["state"], status(tiny_run)["message"]) == ("stopped", f"Ctrl-C during the start; {nothing}")
    assert "Traceback" not in outcome.output
    tiny_run.train(sabotage=traps.interrupt_step(4)).require(130)
    outcome = tiny_run.train(sabotage=traps.interrupt_start()).require(130)
    assert outcome.output.splitlines()[-1].endswith("ended by Ctrl-C; the same command resumes from step 4")


@pytest.mark.slow
def test_a_finished_run_stays_finished(tiny_run):
    tiny_run.train().require(0)
    before = (tiny_run.path / "status.json").read_bytes(), (tiny_run.path / "run.log").read_bytes()
    tiny_run.train(sabotage=traps.interrupt_start()).require(130)
    assert ((tiny_run.path / "status.json").read_bytes(), (tiny_run.path / "run.log").read_bytes()) == before


@pytest.mark.slow
def test_under_torchrun(tiny_run, undisturbed):
    """torchrun has its ranks in sessions of their own, and passes a terminal's signal on to them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "w1train.pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "100"}
    process = subprocess.Popen(
        [*command, *tiny_run.arguments()],
        cwd=tiny_run.data,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 2 * TIMEOUT
    # During the start, the run would end without a checkpoint.
    while not (tiny_run.path / "status.json").exists() or status(tiny_run)["state"] == "starting":
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=2 * TIMEOUT)
    assert process.returncode != 0
    assert status(tiny_run)["state"] == "stopped", output
    (saved,) = tiny_run.steps_saved()[-1:]
    assert f"tiny was stopped by Ctrl-C after step {saved} of 12; the same command resumes from step {saved}" in output
    tiny_run.train(world_size=2).require(0)
    require_undisturbed(tiny_run, undisturbed(2, "fp32"))
