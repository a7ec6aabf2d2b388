"""Corrections of megatron-core 0.19 that a test here proves necessary; each says what goes wrong without it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def keep_bucket_padding_in_checkpoints() -> None:
    """Save the optimizer state of gradient buffers with several buckets correctly.

    megatron-core gathers the state with the padding between buckets taken out, and then cuts parameters out of it at offsets
    that count the padding: every parameter behind the first bucket is saved from the wrong place, and the last one is filled
    up with zeros ("... can lead to data corruption", a log line). A resume in the same layout then goes on with other weights.
    Here the padding is put back before the cut (tests/parallel/test_reshard.py).
    """
    original = DistributedOptimizer.get_parameter_state_dp_zero
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def with_padding(self: DistributedOptimizer, *args: Any, empty_data: bool = False, **kwargs: Any) -> Any:
        state = original(self, *args, empty_data=empty_data, **kwargs)
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values() if state is not None else ():
                for name, tensor in tensors.items():
                    if isinstance(tensor, Tensor):
                        # Loading asks for places alone: long enough, or megatron-core warns of corruption; but nothing to copy.
                        tensors[name] = tensor.new_zeros(buffer.numel) if empty_data else _put_padding_back(tensor, buffer)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = with_padding


def _put_padding_back(tensor: Tensor, buffer: Any) -> Tensor:
    padded = torch.zeros(buffer.numel, dtype=tensor.dtype, device=tensor.device)
    pieces = tensor.split([bucket.numel_unpadded for bucket in buffer.buckets])
    for bucket, piece in zip(buffer.buckets, pieces, strict=True):
        padded[bucket.offset : bucket.offset + len(piece)] = piece
    return padded
