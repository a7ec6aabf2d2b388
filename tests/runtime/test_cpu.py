"""megatron-core without CUDA: collectives over one rank are left out exactly where nothing would change."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from w1train.runtime.cpu import unless_alone


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
