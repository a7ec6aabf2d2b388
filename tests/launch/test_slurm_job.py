"""What a job does while it runs (launch/job.sh), in bash, with stand-ins for srun and the other commands of Slurm.

The stand-in for srun ends as the next line of a plan says: a status, after which it may have saved a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launch.slurm_script import Job, RunPlace, render

SRUN = """\
number=$(grep -c '^srun' CALLS)
read -r status saved signal < <(sed -n "${number}p" PLAN)
for word in "$@"; do case "$word" in --output=*) echo "rank 0 of attempt $number" >"${word#--output=}" ;; esac; done
mv "$(dirname LOGS)/logs/latest/rank_%5t.log" "$(dirname LOGS)/logs/latest/rank_00000.log"
if [ "$signal" = wait ]; then
  trap 'trap - USR1; ended=yes' USR1
  touch READY
  while [ -z "$ended" ]; do sleep 0.05; done
elif [ -n "$signal" ]; then
  kill -"$signal" "$PPID"
  sleep 0.2
fi
if [ "$saved" != - ]; then mkdir -p "RUN/checkpoints/step_$saved"; fi
exit "$status"
"""


class JobRun:
    """A job's script, run here."""

    def __init__(self, stand_in, directory: Path) -> None:
        self.stand_in, self.directory = stand_in, directory
        self.run = directory / "runs" / "demo"
        self.ready = directory / "ready"
        (self.run / "logs").mkdir(parents=True)
        self.state("RUNNING")
        for name in ("scontrol", "scancel"):
            stand_in.command(name, "")
        stand_in.command("python", "exit 75")

    def state(self, state: str) -> None:
        self.stand_in.command("squeue", f"echo {state}")

    def plan(self, *lines: str) -> None:
        """Of the starts of the ranks: "STATUS SAVED [SIGNAL]", where SAVED is a step or "-"."""
        plan = self.directory / "plan"
        plan.write_text("".join(f"{line}\n" for line in lines))
        names = {"CALLS": self.stand_in.calls_file, "PLAN": plan, "LOGS": self.run / "logs", "RUN": self.run, "READY": self.ready}
        body = SRUN
        for name, path in names.items():
            body = body.replace(name, str(path))
        self.stand_in.command("srun", body)

    def start(self, restart: int = 0, number: int = 7, **options: Any) -> subprocess.Popen[str]:
        """``options``: fields of Job."""
        job = Job(nodes=1, gpus_per_node=0, ranks_per_node=1, python="python", **options)
        script = self.directory / "job.sh"
        script.write_text(render(job, RunPlace("demo", self.run, self.directory, stop_timeout=100.0), ["recipe=demo"]))
        variables = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "node1"} | (
            {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        )
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(["bash", script], env=os.environ | variables, start_new_session=True, **output)
        return self.process

    def kill(self) -> None:
        """What a failed test has left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, restart: int = 0, number: int = 7, **options: Any) -> tuple[int, str]:
        """(exit status, output)."""
        process = self.start(restart, number, **options)
        output = process.communicate(timeout=60)[0]
        return process.returncode, output

    @property
    def num_starts(self) -> int:
        return len(self.stand_in.calls("srun"))

    @property
    def requeued(self) -> bool:
        return self.stand_in.calls("scontrol") == [["requeue", "7"]]


@pytest.fixture
def job(stand_in, tmp_path):
    job = JobRun(stand_in, tmp_path)
    yield job
    job.kill()


def test_finished(job):
    job.plan("0 0000000010")
    status, output = job.end()
    assert status == 0, output
    assert "rank 0 of attempt 1" in output  # rank 0 on top
    assert (job.run / "logs/job_7_0_1/rank_00000.log").is_file()
    assert (job.run / "logs/latest").resolve().name == "job_7_0_1"
    (arguments,) = job.stand_in.calls("srun")
    assert arguments[-4:] == ["python", "-m", "w1train.pretrain", "recipe=demo"]
    assert not job.requeued


def test_the_warning_before_the_limit_goes_to_the_ranks_and_the_job_is_requeued(job):
    job.plan("75 0000000005 wait")
    process = job.start()
    deadline = time.monotonic() + 30
    while not job.ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 75, output
    assert "Slurm's warning (SIGUSR1)" in output
    assert job.requeued
    assert job.num_starts == 1


def test_a_requeued_job_says_so_and_goes_on(job):
    job.plan("0 0000000010")
    status, output = job.end(restart=2)
    assert status == 0
    assert "restart 2" in output
    assert (job.run / "logs/job_7_2_1").is_dir()


def test_a_failure_is_started_again_in_place(job):
    job.plan("1 0000000003", "137 0000000006", "0 0000000010")
    status, output = job.end()
    assert status == 0, output
    assert job.num_starts == 3
    assert not job.requeued
    assert "attempt 2 from step_0000000003" in output
    assert "rank 0 of attempt 3" in output


def test_failures_without_progress_end_it(job):
    job.plan("1 0000000003", "1 -", "1 -", "0 -")
    status, output = job.end(max_failures=2)
    assert status == 1
    assert job.num_starts == 3
    assert "given up: 2 attempts in a row without a new checkpoint" in output


def test_failures_are_counted_over_jobs(job):
    """A run that is stopped before its first checkpoint each time would be requeued for ever."""
    job.plan("75 -", "75 -", "75 -")
    assert job.end(max_failures=2)[0] == 75
    assert job.requeued
    status, output = job.end(max_failures=2, restart=1)
    assert status == 1, output
    assert "given up" in output


STRAY = [
    "step_latest",
    "step_9",
    "step_99999999999",
    "step_9999999999.tmp",
    "step_x",
    ".writing-step_9999999999",
    "damaged-step_9999999999",
]


def test_progress_is_that_of_checkpoints_alone(job):
    """Links, files and directories that somebody else has put beside them sort after them."""
    checkpoints = job.run / "checkpoints"
    (checkpoints / "step_0000000001").mkdir(parents=True)
    for name in STRAY:
        (checkpoints / name).symlink_to("step_0000000001")
    (checkpoints / "step_9999999998").write_text("a file")
    (checkpoints / "step_9999999997").symlink_to("a link that leads nowhere")
    job.plan("1 0000000003", "1 0000000006", "1 0000000009", "0 -")
    status, output = job.end(max_failures=2)
    assert status == 0, output
    assert "attempt 1 from step_0000000001" in output
    assert "attempt 4 from step_0000000009" in output


def test_stray_entries_are_no_progress(job):
    (job.run / "checkpoints/step_latest").mkdir(parents=True)
    job.plan("2 -", "0 -")
    status, output = job.end()
    assert status == 2, output
    assert "attempt 1 from the start" in output


@pytest.mark.parametrize(("before", "end"), [([], 2), (["1 0000000003"], 2), ([], 130)])
def test_a_mistake_of_the_user_and_ctrl_c_are_not_repeated(job, before, end):
    """Also not in a run that has saved checkpoints: a directory that another process still holds is no mistake, but a failure."""
    job.plan(*before, f"{end} -", "0 -")
    status, _ = job.end()
    assert status == end
    assert job.num_starts == len(before) + 1
    assert not job.requeued


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "CANCELLED"])
def test_what_slurm_ends_is_not_requeued(job, state):
    """scancel: SIGTERM to all, the ranks save and end with 75, and the job must stay cancelled."""
    job.plan("75 0000000005 TERM")
    job.state(state)
    status, output = job.end()
    assert status == 75
    assert "SIGTERM: Slurm ends the job" in output
    assert not job.requeued
    assert job.num_starts == 1


def test_stopped_ranks_in_a_job_that_goes_on_are_requeued(job):
    """Preemption with a time of grace signals the ranks alone, and leaves the job to end by itself: no one else would requeue it."""
    job.plan("75 0000000005")
    assert job.end()[0] == 75
    assert job.requeued


def test_after_a_warning_no_ranks_are_started(job):
    """It comes with the script's first words, which ask for the date."""
    job.stand_in.command("date", f'[ $(grep -c ^date {job.stand_in.calls_file}) = 1 ] && kill -USR1 "$PPID"; exec /usr/bin/date "$@"')
    job.plan("0 0000000005")
    status, output = job.end()
    assert status == 75, output
    assert job.num_starts == 0
    assert job.requeued
    assert (job.run / "logs/failures").read_text() == "1\n", "again and again, it is given up"


def test_cancelled_before_the_ranks_start_it_stays_so(job):
    job.stand_in.command("date", f'[ $(grep -c ^date {job.stand_in.calls_file}) = 1 ] && kill -TERM "$PPID"; exec /usr/bin/date "$@"')
    job.state("COMPLETING")
    job.plan("0 0000000005")
    status, output = job.end()
    assert status == 75, output
    assert job.num_starts == 0
    assert not job.requeued


def test_without_requeue_it_says_what_to_do(job):
    job.plan("75 0000000005")
    status, output = job.end(requeue=False)
    assert status == 75
    assert not job.stand_in.calls("scontrol")
    assert "submit this job again" in output


def test_a_chain_hands_over_and_its_rest_is_cancelled_at_the_end(job):
    (job.run / "logs/chain").write_text("7\n8\n9\n")
    job.plan("75 0000000005", "0 0000000010")
    status, output = job.end(chain=3)
    assert status == 75
    assert "the next job of the chain resumes the run" in output
    assert not job.requeued
    assert not job.stand_in.calls("scancel")
    assert job.end(chain=3, number=8)[0] == 0
    assert job.stand_in.calls("scancel") == [["--state=PENDING", "7"], ["--state=PENDING", "9"]]


def test_a_job_of_a_chain_that_comes_too_late_does_nothing(job):
    """Only later ones ask: the first may be there to take a finished run further, with more tokens."""
    (job.run / "logs/chain").write_text("7\n8\n")
    job.stand_in.command("python", '[ "$2" = w1train.status ] && exit 0; exit 9')
    job.plan("75 0000000005", "0 0000000010")
    assert job.end(chain=2)[0] == 75
    assert job.num_starts == 1
    status, output = job.end(chain=2, number=8)
    assert status == 0
    assert job.num_starts == 1
    assert "nothing is left to do" in output
    assert job.stand_in.calls("python") == [["-m", "w1train.status", str(job.run)]]


def test_a_percent_sign_of_a_path_is_no_field_of_slurms(stand_in, tmp_path):
    (tmp_path / "100%j").mkdir()
    job = JobRun(stand_in, tmp_path / "100%j")
    stand_in.command("srun", "exit 0")
    assert job.end()[0] == 0
    (output,) = [word for word in stand_in.calls("srun")[0] if word.startswith("--output=")]
    assert output.removeprefix("--output=") == f"{tmp_path}/100%%j/runs/demo/logs/job_7_0_1/rank_%5t.log"
