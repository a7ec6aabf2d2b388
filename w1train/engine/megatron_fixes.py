"""Corrections of megatron-core 0.19 that a test here proves necessary; each says what goes wrong without it."""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


def give_padded_places_for_loading() -> None:
    """Tell megatron-core the places of optimizer states behind the first of several gradient buckets.

    It makes stand-ins without the padding between buckets, and then cuts parameters out of them at offsets that count the padding: the
    last ones come out too short, and are filled up ("... can lead to data corruption", a log line). Here the stand-ins are long enough.
    Saving had the same fault with the states themselves; it goes another way now (w1train/engine/optimizer_slices.py,
    tests/parallel/test_reshard.py).
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
