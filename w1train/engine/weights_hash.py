"""The hash of a model's weights over all ranks, which is the same in every layout.

The bits of each element and the name of its parameter are mixed into one number, and the numbers of a parameter are added up. A sum does
not depend on how ranks share the elements. Any change of a value changes the hash; an exchange of two values of one parameter does not.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from w1train.model.initialization import EXPERTS, global_named_biases, global_named_parameters

_ELEMENTS_AT_A_TIME = 1 << 22
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTORS = (-7046029254386353131, -4658895280553007687)  # odd 64-bit constants (those of SplitMix64), as signed integers


@torch.no_grad()
def weights_hash(stages: Sequence[torch.nn.Module], leave_out: tuple[str, ...] = ()) -> str:
    """Return the SHA-256 of the weights of a model whose stages all ranks have together. Every rank calls this.

    Args:
        leave_out: the ends of the names of parameters that are left out.
    """
    own: Counter[str] = Counter()
    for stage in stages:
        for name, tensor in _counted(stage):
            if not name.endswith(leave_out):
                own[name] += _mixed_sum(tensor, name)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, dict(own))
    total: Counter[str] = Counter()
    for part in gathered:
        total.update(part)
    sums = {name: value % (1 << 64) for name, value in sorted(total.items())}
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _counted(stage: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that this rank adds to the hash, each element on one rank of all."""
    is_first = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    has_all_parts = parallel_state.get_tensor_model_parallel_rank() == 0
    for name, parameter in global_named_parameters(stage):
        if EXPERTS in name:
            yield from _own_experts(name, parameter)
        elif not is_first or _is_copy(stage, parameter):
            continue
        elif has_all_parts or getattr(parameter, "tensor_model_parallel", False):
            yield name, parameter
    if is_first and has_all_parts:
        yield from global_named_biases(stage)


def _is_copy(stage: torch.nn.Module, parameter: Tensor) -> bool:
    """Tell whether a parameter is the last stage's copy of the embedding, for a tied head."""
    return getattr(parameter, "shared_embedding", False) and not stage.pre_process


def _own_experts(name: str, matrices: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrix of each expert of this rank with the expert's number in the whole layer."""
    if parallel_state.get_expert_data_parallel_rank() != 0:
        return
    first = parallel_state.get_expert_model_parallel_rank() * len(matrices)
    yield from ((name.replace(EXPERTS, f"{EXPERTS}{first + index}."), matrix) for index, matrix in enumerate(matrices))


def _mixed_sum(tensor: Tensor, name: str) -> int:
    """Return the sum over a tensor's elements of 64 mixed bits, modulo 2^64."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    bits = tensor.detach().contiguous().flatten().view(_BITS[tensor.element_size()])
    total = 0
    for part in bits.split(_ELEMENTS_AT_A_TIME):
        mixed = part.long() + key
        for factor in _FACTORS:
            mixed = (mixed ^ (mixed >> 31)) * factor
        total += int((mixed ^ (mixed >> 31)).sum())
    return total % (1 << 64)
