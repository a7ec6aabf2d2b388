"""The command that submits a run to Slurm.

    python -m launch.slurm --nodes 8 --partition gpu --time 24:00:00 -- recipe=w1_4b
    python -m launch.slurm --nodes 8 --container-image w1train.sqsh --dry-run -- recipe=w1_4b

launch/slurm_script.py writes the script that is submitted. launch/job.sh is the part of the script that runs the ranks.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.slurm_arguments import PROGRAM, Submission, parse
from launch.slurm_script import render
from w1train.config.errors import ConfigurationError, Problem
from w1train.runtime.command import command
from w1train.runtime.files import write_text


class SubmissionError(Exception):
    """sbatch did not accept the job; the message says why."""


@command("launch.slurm")
def main(words: Sequence[str]) -> int:
    """Run the command. Return the exit status: 0, 1 if sbatch fails or is not installed, 2 for bad input."""
    try:
        submission = parse(words, Path.cwd(), checkout())
    except ConfigurationError as error:
        print(f"{PROGRAM}: {error}\n\n'python -m {PROGRAM} --help' explains the options.", file=sys.stderr)
        return 2
    if submission.missing:
        print(_warning(submission.missing), file=sys.stderr)
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


def _warning(missing: Sequence[Problem]) -> str:
    """Return a warning of what this machine lacks, and the nodes may have: disks of their own, or a container's mounts."""
    listed = [f"{number}. {problem}" for number, problem in enumerate(missing, 1)]
    title = "warning: the job will fail unless its nodes have what this machine lacks:"
    return "\n".join([f"{PROGRAM}: {title}", *listed])


def checkout() -> Path | None:
    """Return the directory of the checkout that this file is in, or None if the package is installed without one."""
    directory = Path(__file__).absolute().parents[1]
    return directory if (directory / "pyproject.toml").is_file() else None


def submit(submission: Submission, script: str) -> list[str]:
    """Submit the script once for each job of the chain, and return the numbers of the jobs.

    Raises:
        SubmissionError: there is no sbatch, or it refused a job; the jobs of the chain that it had accepted are cancelled. Or an earlier
            chain of the run has not ended: it could not distinguish its own jobs from the new jobs when it cancels its jobs.
    """
    if shutil.which("sbatch") is None:
        raise SubmissionError("sbatch is not on PATH: run this on a login node, or print the script with --dry-run")
    logs = submission.run.directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)  # Slurm does not make it, and the job would fail silently
    _require_no_living_chain(logs / "chain", submission.job.job_name or submission.run.name)
    path = logs / "job.sh"
    write_text(path, script)
    # The count of failures of an earlier submission must not end this submission.
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
        write_text(logs / "chain", "".join(f"{job}\n" for job in jobs))
    print(f"submitted: job {', '.join(jobs)}, {submission.job.num_ranks} ranks on {submission.job.nodes} nodes")
    print(f"run directory: {submission.run.directory}\nlog: {logs}/slurm_{jobs[0]}.log (rank 0; all ranks: {logs}/latest/)")
    return jobs


def _require_no_living_chain(chain: Path, job_name: str) -> None:
    jobs = chain.read_text(encoding="utf-8").split() if chain.exists() else []
    if not jobs:
        return
    # The name and the user are compared too, because the numbers may be those of another cluster. squeue fails if Slurm has forgotten every
    # job that it is asked for, which means that these jobs have ended.
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
