"""Corrections of megatron-core 0.19. A test proves that each correction is necessary, and the docstring of a correction says what goes
wrong without it."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def give_padded_places_for_loading() -> None:
    """Make megatron-core load optimizer states to the right places if there are several gradient buckets.

    For a load, megatron-core makes empty tensors without the padding between buckets, and then cuts parameters out of them at offsets that
    count the padding. The last parameters come out too short, and are filled up ("... can lead to data corruption", a log line). Here the
    empty tensors are as long as the padded buffers. A save by megatron-core has the same fault with the states themselves, and is replaced
    by w1train/engine/optimizer_slices.py (tests/parallel/test_reshard.py).
    """
    original = DistributedOptimizer.get_parameter_state_dp_zero
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def with_padding(self: DistributedOptimizer, *args: Any, empty_data: bool = False, **kwargs: Any) -> Any:
        assert empty_data, "saving gathers no states"
        state = original(self, *args, empty_data=True, **kwargs)
        for index, buffer in enumerate(self.buffers):
            for tensors in state[index].values() if state is not None else ():
                for name, tensor in tensors.items():
                    if isinstance(tensor, Tensor):
                        tensors[name] = tensor.new_zeros(buffer.numel)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = with_padding
