"""Named ranges of time around functions that megatron-core calls by itself."""

from __future__ import annotations

import functools

from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import attention, mlp

from w1train.runtime.ranges import kernel_group, step_part


@functools.cache
def mark_megatron() -> None:
    """Mark megatron-core's functions, in the modules that call them; a second call does nothing."""
    schedules.backward_step = step_part("backward")(schedules.backward_step)
    attention.apply_rotary_pos_emb = kernel_group("rotary and SwiGLU")(attention.apply_rotary_pos_emb)
    mlp.bias_swiglu_impl = kernel_group("rotary and SwiGLU")(mlp.bias_swiglu_impl)
