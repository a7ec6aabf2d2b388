"""Submit a run to Slurm.

    python -m launch.slurm --nodes 8 --partition gpu --time 24:00:00 -- recipe=w1_4b
    python -m launch.slurm --nodes 8 --container-image w1train.sqsh --dry-run -- recipe=w1_4b

The script that is submitted is made by launch/slurm_script.py; what it does while the job runs is in launch/job.sh.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.slurm_arguments import PROGRAM, Submission, parse
from launch.slurm_script import render
from w1train.config.errors import ConfigurationError
from w1train.runtime.command import command


class SubmissionError(Exception):
    """sbatch did not take the job; the text says why."""


@command("launch.slurm")
def main(words: Sequence[str]) -> int:
    """Exit status: 0, 1 where sbatch fails or is not there, 2 for a mistake in what was asked."""
    try:
        submission = parse(words, Path.cwd())
    except ConfigurationError as error:
        print(f"{PROGRAM}: {error}\n\n'python -m {PROGRAM} --help' explains the options.", file=sys.stderr)
        return 2
    script = render(submission.job, submission.run, submission.arguments)
    if submission.dry_run:
        print(script, end="")
        return 0
    try:
        submit(submission, script)
    except SubmissionError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    return 0


def submit(submission: Submission, script: str) -> list[str]:
    """Hand the script to sbatch, once for each job of the chain; the numbers of the jobs.

    Raises:
        SubmissionError: there is no sbatch, or it refused; jobs of a chain that it had taken are cancelled. Or an earlier chain of the
            run has not ended: it could neither tell its own jobs from these, nor end itself.
    """
    if shutil.which("sbatch") is None:
        raise SubmissionError("sbatch is not on PATH: call this on a login node, or see the script with --dry-run")
    logs = submission.run.directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)  # Slurm would not make it, and the job would fail without a word
    _require_no_living_chain(logs / "chain", submission.job.job_name or submission.run.name)
    path = logs / "job.sh"
    path.write_text(script, encoding="utf-8")
    # What counts the failures of an earlier submission must not end this one.
    for name in ("failures", "chain"):
        (logs / name).unlink(missing_ok=True)
    jobs: list[str] = []
    try:
        for _ in range(submission.job.chain):
            jobs.append(_sbatch(path, after=jobs[-1] if jobs else None))
    except SubmissionError:
        if jobs:
            subprocess.run(["scancel", *jobs], check=False)
        raise
    if len(jobs) > 1:
        (logs / "chain").write_text("".join(f"{job}\n" for job in jobs), encoding="utf-8")
    print(f"submitted: job {', '.join(jobs)}, {submission.job.num_ranks} ranks on {submission.job.nodes} nodes")
    print(f"run directory: {submission.run.directory}\nlog: {logs}/slurm_{jobs[0]}.log (rank 0; all ranks: {logs}/latest/)")
    return jobs


def _require_no_living_chain(chain: Path, job_name: str) -> None:
    jobs = chain.read_text(encoding="utf-8").split() if chain.exists() else []
    if not jobs:
        return
    # Of this name and user: the numbers may be another cluster's. One that Slurm has forgotten is an error where it is asked for alone.
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--name={job_name}", f"--jobs={','.join(jobs)}"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise SubmissionError(f"squeue, which knows whether jobs {', '.join(jobs)} of this run have ended: {error}") from error
    if result.returncode == 0 and result.stdout.strip():
        alive = " ".join(result.stdout.split())
        raise SubmissionError(f"an earlier chain of this run has not ended; to replace it: scancel {alive}")


def _sbatch(script: Path, after: str | None) -> str:
    dependency = [] if after is None else [f"--dependency=afterany:{after}"]
    result = subprocess.run(
        ["sbatch", "--parsable", *dependency, str(script)], capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    if result.returncode != 0:
        raise SubmissionError(f"sbatch refused {script}: {result.stderr.strip() or 'without a reason'}")
    return result.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
