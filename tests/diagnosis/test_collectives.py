"""The test of collectives over forked ranks: it passes if all is well; otherwise it names the fault and the rank."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from w1train import doctor
from w1train.diagnosis import collectives
from w1train.diagnosis.collectives import collective_section, slowest
from w1train.diagnosis.findings import failures

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Leave out the sizes that take most of the time. The forked ranks have what this process has."""
    monkeypatch.setitem(collectives._SIZES, "cpu", collectives._SIZES["cpu"][:2])


def examine(rank, world_size, seconds=0.1):
    return collective_section(CPU, seconds, {"torch": torch.__version__}, [], [])


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_is_well(world_size):
    sections = run_distributed(examine, world_size)
    assert not list(failures(sections))
    names = {finding.name.split(" ")[0] for finding in sections[0].findings}
    assert {"all_reduce", "all_gather", "reduce_scatter", "slowest"} <= names
    assert all(section.findings == sections[0].findings for section in sections), "all ranks have to end with the same status"


@pytest.mark.parametrize(
    "kind",
    ["all_reduce", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("all_gather_into_tensor", "reduce_scatter_tensor"))],
)
def test_a_wrong_result_is_seen_and_its_rank_named(kind):
    sections = run_distributed(examine_with_broken, 2, kind)
    wrong = list(failures(sections[:1]))
    assert len(wrong) == len(collectives._SIZES["cpu"])
    assert all(finding.value == "WRONG RESULT" and finding.detail == "on rank 1 of 2" for finding in wrong)
    assert all(finding.name.startswith(kind.removesuffix("_into_tensor").removesuffix("_tensor")) for finding in wrong)


def examine_with_broken(rank, world_size, kind):
    right = getattr(dist, kind)

    def broken(tensor, *args, **kwargs):
        right(tensor, *args, **kwargs)
        if rank == 1 and tensor.dtype == torch.float32:
            tensor[-1] += 1

    setattr(dist, kind, broken)
    return examine(rank, world_size)


def test_ranks_that_differ_are_named():
    section = run_distributed(examine_with_another_version, 2)[0]
    (finding,) = failures([section])
    assert (finding.name, finding.value, finding.detail) == ("torch of all ranks", "3.0", "rank 1 has 3.1")


def examine_with_another_version(rank, world_size):
    return collective_section(CPU, 0.01, {"torch": f"3.{rank}", "megatron-core": "0.19"}, [], [])


def test_what_is_wrong_on_one_rank_is_shown_by_all():
    sections = run_distributed(examine_with_complaints, 2)
    for section in sections:
        findings = {finding.name: finding for finding in section.findings}
        kernels, hosts = findings["kernels of all ranks"], findings["hosts of all ranks"]
        assert (kernels.status, kernels.detail) == ("failed", f"rank 1 ({socket.gethostname()}): flex")
        assert (hosts.status, hosts.detail) == ("warning", f"rank 0 ({socket.gethostname()}): /dev/shm 0.1 GiB free")


def examine_with_complaints(rank, world_size):
    return collective_section(CPU, 0.01, {}, ["flex"] if rank == 1 else [], ["/dev/shm 0.1 GiB free"] if rank == 0 else [])


def test_the_slowest_rank_is_named():
    for finding in run_distributed(cost_of_rank, 3):
        assert (finding.value, finding.status) == ("rank 1", "warning")
        assert "local rank 1) takes 5.00 times the median" in finding.detail
    assert run_distributed(same_cost, 3)[0].status == "ok"


def cost_of_rank(rank, world_size):
    return slowest("something", [1.0, 5.0, 1.0][rank])


def same_cost(rank, world_size):
    return slowest("something", 1.0 + 0.1 * rank)


@pytest.mark.slow
def test_the_command_on_two_ranks(tmp_path, capfd):
    assert run_distributed(command, 2, tmp_path, process_group=False) == [0, 0]
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    report = json.loads(line)
    assert report["ok"]
    assert [section["title"] for section in report["sections"]][-1] == "2 ranks on cpu"


def command(rank, world_size, tmp_path):
    return doctor.main(["--json", "--seconds=0.2", f"--runs-dir={tmp_path}"])


def test_a_rank_that_does_not_come_is_an_error_and_no_wait(monkeypatch):
    findings = run_distributed(lone_command, 2, process_group=False)
    assert findings[0] == "failed on rank 0"


def lone_command(rank, world_size):
    if rank == 1:
        return None
    from datetime import timedelta

    from w1train.diagnosis.findings import Section

    collectives.TIMEOUT = timedelta(seconds=0.5)
    section = doctor._together(CPU, 0.1, Path("runs"), Section("kernels"))
    return section.findings[0].value
