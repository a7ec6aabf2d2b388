"""Ranks from Slurm's variables; those below were printed by a real srun, sbatch and salloc (Slurm 22.05), or follow its manual."""

from __future__ import annotations

import pytest

from w1train.config.errors import ConfigurationError
from w1train.runtime.cluster import discover_ranks, first_host, tasks_per_node

JOB = {"SLURM_JOB_ID": "1042", "SLURM_NTASKS": "20", "SLURM_TASKS_PER_NODE": "8(x2),4", "SLURM_JOB_NODELIST": "gpu[007-008],old1"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_STEP_NODELIST": "gpu[007-008],old1",
}


def task(rank: int, node: int, local_rank: int, **others: str) -> dict[str, str]:
    return JOB | STEP | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_rank)} | others


def test_a_task_of_srun_is_a_rank():
    environment = task(17, 2, 1)
    assert "rank 17 of 20 on 3 nodes" in discover_ranks(environment)
    expected = {"RANK": "17", "WORLD_SIZE": "20", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu007"}
    assert expected.items() <= environment.items()


def test_all_ranks_meet_at_one_port_and_other_steps_at_another():
    def port(**others: str) -> str:
        environment = task(0, 0, 0) | others
        discover_ranks(environment)
        return environment["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="19", SLURM_NODEID="2", SLURM_LOCALID="3")
    ports = {port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="1043"), port(SLURM_JOB_ID="4000000")}
    assert len(ports) == 4
    assert all(1024 < int(number) < 32768 for number in ports)


def test_one_node_needs_no_name_service():
    environment = task(1, 0, 1, SLURM_STEP_NUM_TASKS="2", SLURM_STEP_TASKS_PER_NODE="2")
    discover_ranks(environment)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="no-slurm"),
        pytest.param({"RANK": "3", "WORLD_SIZE": "4"} | task(1, 0, 1), id="torchrun-in-a-step"),
        pytest.param({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, id="batch-of-one"),
        pytest.param(task(0, 0, 0, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1"), id="step-of-one-in-a-larger-job"),
    ],
)
def test_nothing_is_touched(environment):
    before = dict(environment)
    assert discover_ranks(environment) is None
    assert environment == before


@pytest.mark.parametrize("in_sbatch", [True, False])
def test_a_shell_in_an_allocation_is_alone_and_hears_of_it(in_sbatch):
    """sbatch's shell has SLURM_PROCID=0 and SLURM_NTASKS=20: it must not take itself for rank 0 of 20 and wait for the others."""
    environment = JOB | ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"} if in_sbatch else {})
    before = dict(environment)
    assert "allocation of 20 tasks" in discover_ranks(environment)
    assert environment == before


@pytest.mark.parametrize("around", [{}, task(0, 0, 0, SLURM_STEP_NUM_TASKS="3", SLURM_STEP_TASKS_PER_NODE="1(x3)")])
def test_mpirun_is_refused(around):
    """Its processes have the variables of the step that its daemons are: four of one node would all be the same rank."""
    with pytest.raises(ConfigurationError, match="mpirun with 16 processes"):
        discover_ranks(around | {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "5"})
    assert discover_ranks({"RANK": "5", "OMPI_COMM_WORLD_SIZE": "16"}) is None


def test_what_the_user_set_stays():
    environment = task(0, 0, 0, MASTER_ADDR="10.0.0.7", MASTER_PORT="5000")
    discover_ranks(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"], environment["RANK"]) == ("10.0.0.7", "5000", "0")


def test_contradicting_variables_are_named():
    with pytest.raises(ConfigurationError, match=r"SLURM_STEP_NUM_TASKS=20, SLURM_STEP_TASKS_PER_NODE=8"):
        discover_ranks(task(17, 2, 1, SLURM_STEP_TASKS_PER_NODE="8"))


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("vm", "vm"),
        ("gpu[001-004,007]", "gpu001"),
        ("gpu[7,9],login1", "gpu7"),
        ("login1,gpu[001-004]", "login1"),
        ("rack[2-3]node[01-16]", "rack2node01"),
        ("ip-10-0-1-[17-18].ec2", "ip-10-0-1-17.ec2"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(("text", "counts"), [("2", [2]), ("8(x3)", [8, 8, 8]), ("8(x2),4", [8, 8, 4]), ("1,2(x2)", [1, 2, 2])])
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts
