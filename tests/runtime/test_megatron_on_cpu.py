"""megatron-core without CUDA: collectives over one rank are left out exactly where nothing would change."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed import run_distributed
from w1train.runtime.megatron_on_cpu import redirect_cuda_to_cpu, unless_alone, unless_alone_in_place


@dataclass
class Group:
    num_ranks: int

    def size(self):
        return self.num_ranks


@pytest.mark.parametrize(
    ("num_ranks", "in_place", "async_op", "is_called"),
    [(1, True, False, False), (1, False, False, True), (2, True, False, True), (1, True, True, True)],
)
def test_collective_is_left_out_only_where_it_changes_nothing(num_ranks, in_place, async_op, is_called):
    calls = []
    collective = unless_alone(lambda *args, **kwargs: calls.append((args, kwargs)) or "handle")
    buffer = torch.zeros(8)
    output = buffer[:4] if in_place else torch.zeros(4)
    group = Group(num_ranks)
    result = collective(output, buffer, op="sum", group=group, async_op=async_op)
    assert result == ("handle" if is_called else None)
    assert [(args[0] is output, args[1] is buffer, kwargs) for args, kwargs in calls] == (
        [(True, True, {"op": "sum", "group": group, "async_op": async_op})] if is_called else []
    )


def _sums(rank: int, world_size: int) -> dict[str, tuple[float, bool, bool]]:
    """(all_reduce of 1, whether gloo was asked for it, whether there is a handle) by how it was called."""
    alone = [torch.distributed.new_group([member]) for member in range(world_size)][rank]
    plus = torch.distributed.ReduceOp.SUM
    sums = {}
    for how, args, kwargs in (
        ("alone", (), {"group": alone}),
        ("alone, with an operation", (plus,), {"group": alone}),
        ("alone, not waited for", (), {"group": alone, "async_op": True}),
        ("alone, by position", (plus, alone), {}),
        ("all", (), {}),
        ("all, named", (plus,), {"group": None}),
    ):
        asked = []

        def noted(*args, asked=asked, **kwargs):
            asked.append(args)
            return torch.distributed.all_reduce(*args, **kwargs)

        value = torch.ones(1)
        handle = unless_alone_in_place(noted)(value, *args, **kwargs)
        if handle is not None:
            handle.wait()
        sums[how] = (value.item(), bool(asked), handle is not None)
    return sums


def test_sum_over_one_rank_asks_nobody():
    for sums in run_distributed(_sums, 2):
        assert sums == {
            "alone": (1.0, False, False),
            "alone, with an operation": (1.0, False, False),
            "alone, not waited for": (1.0, True, True),
            "alone, by position": (1.0, True, False),
            "all": (2.0, True, False),
            "all, named": (2.0, True, False),
        }


class _Asked(TorchDispatchMode):
    """Names of the collectives that reach torch's process groups."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def _asked_where_redirected(rank: int, world_size: int) -> tuple[list[str], bool]:
    redirect_cuda_to_cpu()
    value = torch.ones(1)
    with _Asked() as asked:
        torch.distributed.all_reduce(value)
        torch.distributed.broadcast(value, 0)
    handle = torch.distributed.all_reduce(value, torch.distributed.ReduceOp.SUM, None, True)  # async_op by position
    return asked.names, handle is not None and handle.wait()


def test_torchs_own_functions_ask_nobody_in_a_world_of_one():
    assert run_distributed(_asked_where_redirected, 1) == [([], True)]
    (names, _), _ = run_distributed(_asked_where_redirected, 2)
    assert names == ["c10d::allreduce_", "c10d::broadcast_"]


def test_without_a_group_the_error_is_torchs():
    with pytest.raises(ValueError, match="process group"):
        unless_alone_in_place(torch.distributed.all_reduce)(torch.ones(1))


FIRST_IMPORT_OF_MEGATRON = """
import importlib, json, pathlib, sys, traceback

class Imported(BaseException):
    pass

class Finder:
    def find_spec(self, name, *_):
        if name == "megatron":
            raise Imported("import_megatron" in [frame.name for frame in traceback.extract_stack()])

sys.meta_path.insert(0, Finder())
run = pathlib.Path(sys.argv[1])
for command in json.loads(sys.argv[2]):
    module, *arguments = command.replace("RUN", str(run)).split()
    try:
        importlib.import_module(module).main(arguments)
    except Imported as imported:
        print(module, imported)
"""


@pytest.mark.slow
def test_commands_import_megatron_without_its_compiler_and_warnings(tmp_path):
    (tmp_path / "config.yaml").touch()
    commands = [
        "w1train.average RUN",
        "w1train.convert to-hf RUN out",
        "w1train.evaluate RUN",
        "w1train.plan recipe=demo gpus=2",
        "w1train.pretrain recipe=demo runs_dir=RUN",
        "w1train.sample RUN",
    ]
    arguments = [sys.executable, "-c", FIRST_IMPORT_OF_MEGATRON, str(tmp_path), json.dumps(commands)]
    output = subprocess.run(arguments, timeout=120, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [f"{command.split()[0]} True" for command in commands]
