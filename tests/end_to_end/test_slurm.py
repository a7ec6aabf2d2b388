"""The demo recipe as a job of a real Slurm (tests/slurm_cluster.py): preempted, requeued, and the same run in the end.

tests/launch/test_slurm_cluster.py has Slurm's other ways of ending a job, with ranks that are shell scripts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import VOCAB_SIZE, TinyRun
from tests.slurm_cluster import SlurmCluster, slurm_cluster

REPOSITORY = Path(__file__).resolve().parents[2]
STEP = 16 * 128
"""Tokens."""
NUM_STEPS = 30
NUM_RANKS = 2


class DemoRun(TinyRun):
    """The demo's recipe on the tests' data, for seconds."""

    @property
    def path(self) -> Path:
        return self.runs_dir / "demo"

    def arguments(self, *overrides: str) -> list[str]:
        stages = {"warmup": 5, "stable": NUM_STEPS - 15, "decay": 10}
        return [
            "recipe=demo",
            "schedule=masked",
            f"runs_dir={self.runs_dir}",
            *(f"data.{name}={self.data / name}" for name in ("train", "validation")),
            f"data.tokenizer={self.data}/tokenizer.json",
            f"model.vocab_size={VOCAB_SIZE}",
            *(f"schedule.stages.{name}.tokens={steps * STEP}" for name, steps in stages.items()),
            *("validation.interval=20", "validation.num_samples=16", "sampling.interval=0", "checkpoint.interval=20"),
            *("logging.wandb=disabled", *overrides),
        ]

    def num_steps_done(self) -> int:
        """Whole lines only: the run is writing."""
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        return sum(line.endswith("\n") and json.loads(line)["kind"] == "train" for line in lines)


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


def submit(cluster: SlurmCluster, run: TinyRun) -> str:
    options = ["--gpus-per-node=0", f"--ranks-per-node={NUM_RANKS}", "--partition=low", "--time=10", "--env=GLOO_SOCKET_IFNAME=lo"]
    command = [sys.executable, "-m", "launch.slurm", *options, "--", *run.arguments()]
    return cluster.run(*command, cwd=REPOSITORY).partition("job ")[2].partition(",")[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_preempted_and_requeued_it_is_the_undisturbed_run(cluster, tiny_data, tmp_path):
    run = DemoRun(tiny_data, tmp_path / "runs")
    job = submit(cluster, run)
    cluster.wait_until(lambda: run.num_steps_done() >= 2, "the first steps")

    # One task is enough: the node has no CPU left.
    other = cluster.run("sbatch", "--parsable", "--partition=high", "--output=/dev/null", "--wrap=true")
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "1", "preempted")
    cluster.wait_until(lambda: cluster.job(other)["JobState"] == "COMPLETED", "the other job")
    preempted_at = run.num_steps_done()
    assert preempted_at < NUM_STEPS, "the run was over before it could be preempted"
    cluster.wait_until(lambda: cluster.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), "the end")

    log = (run.path / f"logs/slurm_{job}.log").read_text()
    assert cluster.job(job)["JobState"] == "COMPLETED", log
    assert "the ranks ended with status 75" in log
    assert "SIGTERM: Slurm ends the job" in log
    assert "restart 1" in log
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in log  # rank 0 on top
    logs = {restart: sorted((run.path / f"logs/job_{job}_{restart}_1").glob("rank_*.log")) for restart in range(2)}
    assert [[path.name for path in paths] for paths in logs.values()] == [["rank_00000.log", "rank_00001.log"]] * 2

    undisturbed = DemoRun(tiny_data, tmp_path / "undisturbed")
    undisturbed.train(world_size=NUM_RANKS).require(0)
    assert run.metrics() == undisturbed.metrics()
