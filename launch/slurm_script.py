"""The sbatch script of a run: directives and variables, then launch/settings.sh and launch/job.sh word for word.

Nothing in it refers to this repository's scripts, so that it can be read, kept and submitted by hand.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.nsys import nsys_command

# Slurm sends the warning up to a minute early, and asks for no more than it needs: saving has health.stop_timeout seconds.
_SPARE_SECONDS = 60
# After one rank has ended, the others may say why and write their part; what waits in a collective
# for a rank that is dead would wait for its timeout.
_LAST_RANK_SECONDS = 120


@dataclass(slots=True, frozen=True, kw_only=True)
class Job:
    """What the user asks of Slurm."""

    nodes: int
    gpus_per_node: int
    """0: a run on CPUs."""
    ranks_per_node: int
    python: str
    """The interpreter in the job, in the container if there is one."""
    cpus_per_rank: int | None = None
    job_name: str | None = None
    """None: the run's name."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    """As sbatch takes it; None: the partition's."""
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    """NAME=VALUE."""
    setup: tuple[str, ...] = ()
    """Shell lines that run before the ranks, on the first node."""
    sbatch: tuple[str, ...] = ()
    """Further options, as sbatch takes them."""
    srun: tuple[str, ...] = ()
    """The same of srun, for the ranks."""
    chain: int = 1
    """Jobs submitted at once, each waiting for the one before."""
    requeue: bool = True
    max_failures: int = 3
    nsys: str | None = None
    """Ranks under nsys: numbers separated by commas, or all."""

    @property
    def num_ranks(self) -> int:
        """Of the whole run."""
        return self.nodes * self.ranks_per_node


@dataclass(slots=True, frozen=True)
class RunPlace:
    """The run that the job is for."""

    name: str
    directory: Path
    """The run directory, absolute."""
    working_directory: Path
    """Where relative paths of the recipe begin, and the code lies; absolute."""
    stop_timeout: float
    """Seconds that ranks may take to save and end after a signal (health.stop_timeout)."""


def render(job: Job, run: RunPlace, arguments: Sequence[str]) -> str:
    """The script. ``arguments`` are w1train.pretrain's."""
    parts = [
        "#!/bin/bash",
        f"# Trains {run.name} with w1train; written by python -m launch.slurm, which submits it. By hand: sbatch THIS_FILE",
        *(f"#SBATCH {_directive(option)}" for option in _directives(job, run)),
        "",
        # Before `set -u`: the scripts of environment modules and conda do not stand it.
        *_environment(job),
        "set -uo pipefail",
        *_variables(job, run, arguments),
        "",
        _source("settings.sh"),
        _source("job.sh"),
    ]
    return "\n".join(parts)


def warning_seconds(stop_timeout: float) -> int:
    """How long before the time limit Slurm warns."""
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
    # Without binding each rank sees its node's GPUs and takes the one of its local rank; NCCL needs to see those of its neighbours.
    gpu_options = ["--gpu-bind=none"] if job.gpus_per_node else []
    ranks = ["--kill-on-bad-exit=0", f"--wait={_LAST_RANK_SECONDS}", *gpu_options, *container, *job.srun]
    train = [job.python, *nsys_command(job.nsys, run.directory), "-m", "w1train.pretrain", *arguments]
    alone = ["srun", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", *container] if container else []
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
    """Pyxis's options of srun. Code and run directory have the same paths inside as outside."""
    if job.container_image is None:
        return []
    own = [run.working_directory]
    # Also where runs/ is a link to another file system: inside, it would lead nowhere.
    own += [path for path in dict.fromkeys([run.directory.parent, run.directory.parent.resolve()]) if not path.is_relative_to(own[0])]
    mounts = [*(f"{path}:{path}" for path in own), *job.container_mounts]
    return [
        f"--container-image={job.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={run.working_directory}",
    ]


def _environment(job: Job) -> list[str]:
    lines = [f"export {name}={shlex.quote(value)}" for name, _, value in (text.partition("=") for text in job.environment)]
    if job.cpus_per_rank is not None:
        # srun takes it from here alone since Slurm 22.05; without, every rank would be bound to one core.
        lines.append(f"export SRUN_CPUS_PER_TASK={job.cpus_per_rank}")
    return [*lines, *job.setup]


def _array(name: str, words: Sequence[str]) -> str:
    """One word a line: a changed option is a changed line."""
    # shellcheck takes a bare comma for one between elements.
    quoted = [f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words]
    return "\n".join([f"{name}=(", *(f"  {word}" for word in quoted), ")"])


def _directive(option: str) -> str:
    """sbatch reads the values of its directives with quotes as the shell does."""
    return shlex.quote(option)


def _source(name: str) -> str:
    """A script beside this file, without the line that is for shellcheck alone."""
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return text.removeprefix("# shellcheck shell=bash\n")
