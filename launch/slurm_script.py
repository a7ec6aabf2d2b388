"""The sbatch script of a run: directives and variables, then the text of launch/settings.sh, newest_checkpoint.sh and job.sh.

The script refers to no script of this repository, so that it can be read, kept and submitted by hand.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.nsys import nsys_command

# Added to health.stop_timeout, the seconds that ranks may take to save: Slurm may send the warning up to a minute early.
_SPARE_SECONDS = 60
# The seconds that the other ranks have after one rank has ended, to log the reason and to write their part of a checkpoint. A rank that
# waits in a collective for a dead rank would otherwise wait until the collective's timeout.
_LAST_RANK_SECONDS = 120
# The variables that the script sets reach the ranks. Without this option, `sbatch --export=NONE` would also hold for every srun of the job.
_ENVIRONMENT_OPTIONS = ("--export=ALL",)


@dataclass(slots=True, frozen=True, kw_only=True)
class Job:
    """The options of the user for Slurm."""

    nodes: int
    gpus_per_node: int
    """0 for a run on CPUs."""
    ranks_per_node: int
    python: str
    """The interpreter in the job; if there is a container, the interpreter in the container."""
    cpus_per_rank: int | None = None
    job_name: str | None = None
    """None = the run's name."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """The time limit in a form of sbatch; None = the partition's."""
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    """Variables of the job's environment, as NAME=VALUE."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the ranks, on the first node."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch."""
    srun: tuple[str, ...] = ()
    """Further options of srun, for the ranks."""
    chain: int = 1
    """The number of jobs that are submitted together, each of which waits for the job before it."""
    requeue: bool = True
    max_failures: int = 3
    nsys: str | None = None
    """The ranks that run under nsys: numbers separated by commas, or "all"; None = no rank."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the whole run."""
        return self.nodes * self.ranks_per_node


@dataclass(slots=True, frozen=True)
class RunPlace:
    """The run of a job, and its directories."""

    name: str
    directory: Path
    """The run directory, absolute."""
    working_directory: Path
    """The directory in which launch.slurm was called, at which relative paths begin; absolute."""
    stop_timeout: float
    """The seconds that ranks may take to save and end after a signal (health.stop_timeout)."""
    code: Path | None = None
    """The checkout whose code the ranks run, absolute; None = the code that is installed in their environment."""


def render(job: Job, run: RunPlace, arguments: Sequence[str]) -> str:
    """Return the script. ``arguments`` are those of w1train.pretrain."""
    parts = [
        "#!/bin/bash",
        f"# Trains {run.name} with w1train; written by python -m launch.slurm, which submits it. By hand: sbatch THIS_FILE",
        *(f"#SBATCH {_directive(option)}" for option in _directives(job, run)),
        "",
        # Before `set -u`, under which the scripts of environment modules and conda fail.
        *_environment(job, run.code),
        "set -uo pipefail",
        *_variables(job, run, arguments),
        "",
        _source("settings.sh"),
        _source("newest_checkpoint.sh"),
        _source("job.sh"),
    ]
    return "\n".join(parts)


def warning_seconds(stop_timeout: float) -> int:
    """Return how many seconds before the time limit Slurm sends its warning."""
    return math.ceil(stop_timeout) + _SPARE_SECONDS


def _directives(job: Job, run: RunPlace) -> list[str]:
    log = run.directory / "logs"
    given = {
        "job-name": job.job_name or run.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_rank,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "time": job.time,
        "signal": f"B:USR1@{warning_seconds(run.stop_timeout)}",
        "chdir": run.working_directory,
        "output": f"{str(log).replace('%', '%%')}/slurm_%j.log",
        "open-mode": "append",
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return [*options, "--requeue" if job.requeue else "--no-requeue", *job.sbatch]


def _variables(job: Job, run: RunPlace, arguments: Sequence[str]) -> list[str]:
    container = _container_options(job, run)
    # Without binding, each rank sees all GPUs of its node and uses the one of its local rank. NCCL needs to see the other GPUs.
    gpu_options = ["--gpu-bind=none"] if job.gpus_per_node else []
    ranks = [*_ENVIRONMENT_OPTIONS, "--kill-on-bad-exit=0", f"--wait={_LAST_RANK_SECONDS}", *gpu_options, *container, *job.srun]
    train = [job.python, *nsys_command(job.nsys, run.directory), "-m", "w1train.pretrain", *arguments]
    alone = ["srun", *_ENVIRONMENT_OPTIONS, "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", *container] if container else []
    return [
        f"run={shlex.quote(str(run.directory))}",
        f"max_failures={job.max_failures}",
        f"requeue={'yes' if job.requeue else 'no'}",
        f"chain={'yes' if job.chain > 1 else 'no'}",
        _array("srun_options", ranks),
        _array("command", train),
        _array("status_command", [*alone, job.python, "-m", "w1train.status"]),
    ]


def _container_options(job: Job, run: RunPlace) -> list[str]:
    """Return pyxis's options of srun. The caller's directory, the code and the run directory have the same paths in the container as
    outside."""
    if job.container_image is None:
        return []
    own = [run.working_directory]
    # The target of a link is mounted too: if runs/ is a link to another file system, it would not exist in the container.
    others = [run.directory.parent, run.directory.parent.resolve(), *([run.code] if run.code is not None else [])]
    own += [path for path in dict.fromkeys(others) if not path.is_relative_to(own[0])]
    mounts = [*(f"{path}:{path}" for path in own), *job.container_mounts]
    return [
        f"--container-image={job.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={run.working_directory}",
    ]


def _environment(job: Job, code: Path | None) -> list[str]:
    lines = [f"export {name}={shlex.quote(value)}" for name, _, value in (text.partition("=") for text in job.environment)]
    if code is not None:
        # Without PYTHONSAFEPATH, a module of the same name in the caller's directory would come first.
        lines.append(f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1')
    if job.cpus_per_rank is not None:
        # Since Slurm 22.05, srun takes it only from this variable. Without it, every rank would be bound to one core.
        lines.append(f"export SRUN_CPUS_PER_TASK={job.cpus_per_rank}")
    return [*lines, *job.setup]


def _array(name: str, words: Sequence[str]) -> str:
    """Return the shell's definition of an array, with one word on each line, so that a changed option is a changed line."""
    # shellcheck takes a comma without quotes for a separator of elements.
    quoted = [f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words]
    return "\n".join([f"{name}=(", *(f"  {word}" for word in quoted), ")"])


def _directive(option: str) -> str:
    """Quote an option. sbatch reads quotes in directives as the shell does."""
    return shlex.quote(option)


def _source(name: str) -> str:
    """Return the text of a script beside this file, without the line that only shellcheck needs."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return text.removeprefix("# shellcheck shell=bash\n")
