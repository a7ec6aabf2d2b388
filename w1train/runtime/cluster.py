"""The rank of this process on a cluster, found from Slurm where no launcher has set it.

torch.distributed reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, which torchrun sets. Under plain
`srun`, where each task is a rank, this module makes them from Slurm's variables. This module does not need torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping

from w1train.config.errors import ConfigurationError, Problem

# Below the ports that Linux hands out by itself (32768 and up) and above most services.
_FIRST_PORT, _NUM_PORTS = 12_000, 20_000


def discover_ranks(environment: MutableMapping[str, str] | None = None) -> str | None:
    """Set torch.distributed's variables from Slurm's, if this process is one of several tasks that `srun` started.

    Variables that are set already stay: those of torchrun, or MASTER_ADDR and MASTER_PORT of the user.

    A process that was started in a shell of `sbatch` or `salloc`, without `srun`, is alone. Slurm's variables describe the whole allocation
    there (SLURM_NTASKS=16, SLURM_PROCID=0), and a rank 0 of 16 would wait for fifteen ranks that nobody starts. Slurm's variables of a
    *step* tell the two cases apart.

    Returns:
        A line for the log (where the ranks came from, or that an allocation has more tasks than this single process uses), or None.

    Raises:
        ConfigurationError: Slurm's variables contradict each other, or `mpirun` started this process: each process would take itself for a
            whole run, and within Slurm for a rank of the step in which mpirun starts its own daemons.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment:
        return None
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise _mpirun(environment)
    if "SLURM_JOB_ID" not in environment:
        return None
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if num_tasks == 1:
        return _unused_tasks(environment)
    rank, node = int(environment["SLURM_PROCID"]), int(environment["SLURM_NODEID"])
    per_node = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    if sum(per_node) != num_tasks or node >= len(per_node) or rank >= num_tasks:
        raise _contradiction(environment)
    environment.update(
        RANK=str(rank), WORLD_SIZE=str(num_tasks), LOCAL_RANK=environment["SLURM_LOCALID"], LOCAL_WORLD_SIZE=str(per_node[node])
    )
    # On one node no name service is needed, and in a container it is often missing.
    address = "127.0.0.1" if len(per_node) == 1 else first_host(environment["SLURM_STEP_NODELIST"])
    environment.setdefault("MASTER_ADDR", address)
    environment.setdefault("MASTER_PORT", str(rendezvous_port(environment)))
    meeting_place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    return f"rank {rank} of {num_tasks} on {len(per_node)} nodes, from Slurm; they meet at {meeting_place}"


def rendezvous_port(environment: Mapping[str, str]) -> int:
    """Return a port that all ranks of a step compute alike. It differs between jobs and steps, which may share a node."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    return port_of_number(job * 7 + step)


def port_of_number(number: int) -> int:
    """Return a port that follows from a number."""
    return _FIRST_PORT + number % _NUM_PORTS


def first_host(nodes: str) -> str:
    """Return the first name of Slurm's short form of a list: ``gpu001`` for ``gpu[001-004,007],login1``. Rank 0 runs on that node."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def tasks_per_node(text: str) -> list[int]:
    """Expand Slurm's short form of a list of counts: ``8(x2),4`` is 8, 8, 4."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or "1")
    return counts


def _unused_tasks(environment: Mapping[str, str]) -> str | None:
    in_step = "SLURM_STEP_NUM_TASKS" in environment
    num_tasks = environment.get("SLURM_NTASKS", "1")
    if in_step or num_tasks == "1":
        return None
    return f"this single process is the whole run, in a Slurm allocation of {num_tasks} tasks: `srun` starts one rank a task"


def _mpirun(environment: Mapping[str, str]) -> ConfigurationError:
    found = f"mpirun with {environment['OMPI_COMM_WORLD_SIZE']} processes, and no RANK"
    valid = "torchrun, srun with one task a rank, or RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set by hand"
    return ConfigurationError([Problem("the launcher", found, valid, "launch/torchrun.sh")])


def _contradiction(environment: Mapping[str, str]) -> ConfigurationError:
    names = ("SLURM_PROCID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
    found = ", ".join(f"{name}={environment[name]}" for name in names)
    return ConfigurationError(
        [Problem("Slurm's environment", found, "variables of one step, as srun sets them", "start with srun, or set RANK")]
    )
