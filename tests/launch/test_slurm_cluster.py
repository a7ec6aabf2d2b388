"""A job's script under a real Slurm (tests/slurm_cluster.py), with ranks that are shell scripts: what Slurm does, not what its manual says.

tests/end_to_end/test_slurm.py has the same with real ranks.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm_cluster import SlurmCluster, slurm_cluster

REPOSITORY = Path(__file__).resolve().parents[2]
# "Python" in the job. Attempts are counted by rank 0; the next line of the plan says how they end: the statuses of both ranks
# (WAIT: until a signal comes), and a step that is saved.
RANK = """#!/bin/bash
[ "$2" = w1train.status ] && exit 3
cd PLACE
if [ "$SLURM_PROCID" = 0 ]; then echo >>attempts; fi
sleep 0.5
read -r first second saved < <(sed -n "$(wc -l <attempts)p" plan)
if [ "$SLURM_PROCID" = 0 ]; then status=$first; else status=$second; fi
if [ "$saved" != - ]; then mkdir -p "runs/demo/checkpoints/step_$saved"; fi
trap 'sleep 0.3; exit 75' TERM USR1
echo "rank $SLURM_PROCID waits"
while [ "$status" = WAIT ]; do sleep 0.1; done
[ "$status" = KILL ] && kill -KILL $$
exit "$status"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


class Place:
    """Where a job runs, and how it is submitted."""

    def __init__(self, cluster: SlurmCluster, directory: Path, plan: list[str]) -> None:
        self.cluster, self.directory = cluster, directory
        (directory / "plan").write_text("".join(f"{line}\n" for line in plan))
        (directory / "attempts").touch()
        rank = directory / "rank.sh"
        rank.write_text(RANK.replace("PLACE", str(directory)))
        rank.chmod(0o755)

    def submit(self, *options: str) -> list[str]:
        size = ["--gpus-per-node=0", "--ranks-per-node=2", "--partition=low", f"--python={self.directory}/rank.sh"]
        command = [sys.executable, "-m", "launch.slurm", *size, *options, "--", "recipe=demo"]
        line = self.cluster.run(*command, cwd=self.directory, variables={"PYTHONPATH": str(REPOSITORY)}).splitlines()[0]
        return line.partition("job ")[2].split(", ")[:-1]

    def wait_for_ranks(self, job: str, restart: int = 0) -> None:
        logs = [self.directory / f"runs/demo/logs/job_{job}_{restart}_1/rank_0000{rank}.log" for rank in range(2)]
        self.cluster.wait_until(lambda: all(log.exists() and "waits" in log.read_text() for log in logs), "ranks that wait")

    def wait_for_end(self, *jobs: str) -> list[str]:
        """States of the jobs when all have ended."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}
        self.cluster.wait_until(lambda: {self.cluster.job(job)["JobState"] for job in jobs} <= over, f"the end of {jobs}")
        return [self.cluster.job(job)["JobState"] for job in jobs]

    @property
    def num_attempts(self) -> int:
        return len((self.directory / "attempts").read_text())

    def log(self, job: str) -> str:
        return (self.directory / f"runs/demo/logs/slurm_{job}.log").read_text()


@pytest.fixture
def place(cluster, tmp_path):
    """plan -> Place."""
    yield lambda *plan: Place(cluster, tmp_path, list(plan))
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def test_a_chain_goes_on_and_its_rest_is_cancelled(place):
    """One rank is killed and started again in place; the first job hands over; the second finishes; the third is never started."""
    run = place("0 KILL 0000000001", "75 75 0000000002", "0 0 0000000003")
    jobs = run.submit("--chain", "3", "--srun=--wait=1")
    assert run.wait_for_end(*jobs) == ["FAILED", "COMPLETED", "CANCELLED"], run.log(jobs[0])
    assert run.cluster.job(jobs[0])["ExitCode"] == "75:0"
    assert run.num_attempts == 3
    assert "the ranks ended with status 137" in run.log(jobs[0])


def test_a_cancelled_job_saves_and_stays_cancelled(place):
    run = place("WAIT WAIT 0000000001")
    (job,) = run.submit()
    run.wait_for_ranks(job)
    run.cluster.run("scancel", job)
    assert run.wait_for_end(job) == ["CANCELLED"]
    assert "the ranks ended with status 75" in run.log(job)
    assert run.cluster.job(job)["Restarts"] == "0"


def test_warned_before_the_limit_it_saves_and_requeues_itself(place):
    """The signal of --signal=B:USR1, sent as Slurm sends it: to the shell of the job alone."""
    run = place("WAIT WAIT 0000000001", "0 0 0000000002")
    (job,) = run.submit()
    run.wait_for_ranks(job)
    run.cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert run.wait_for_end(job) == ["COMPLETED"], run.log(job)
    assert run.cluster.job(job)["Restarts"] == "1"
    assert "Slurm's warning (SIGUSR1)" in run.log(job)
    assert "the ranks ended with status 75" in run.log(job)


def test_a_job_that_saves_nothing_is_given_up(place):
    run = place("1 1 -", "1 1 -", "0 0 0000000001")
    (job,) = run.submit("--max-failures", "2")
    assert run.wait_for_end(job) == ["FAILED"]
    assert run.cluster.job(job)["ExitCode"] == "1:0"
    assert run.num_attempts == 2


def test_preempted_with_a_time_of_grace_it_requeues_itself(place):
    """Slurm signals the ranks and waits; a job that then ends is over for it, however it was asked to requeue."""
    run = place("WAIT WAIT 0000000001", "0 0 0000000002")
    (job,) = run.submit("--partition=graceful")
    run.wait_for_ranks(job)
    run.cluster.run("sbatch", "--partition=high", "--output=/dev/null", "--wrap=true")
    assert run.wait_for_end(job) == ["COMPLETED"], run.log(job)
    assert run.cluster.job(job)["Restarts"] == "1"
    assert "SIGTERM" not in run.log(job)
    assert "requeued" in run.log(job)
