"""megatron-core's own functions are ranges of a profile, once, however many models are built."""

from __future__ import annotations

import contextlib

from tests.distributed import run_distributed
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from megatron.core.pipeline_parallel import schedules  # noqa: E402
from megatron.core.transformer import attention, mlp  # noqa: E402

from w1train.engine.megatron_ranges import mark_megatron  # noqa: E402
from w1train.runtime.ranges import kernel_group, step_part  # noqa: E402


def ranges(rank: int, world_size: int) -> list[str]:
    """What a listener hears of three calls by megatron-core, in a process that builds two models."""
    schedules.backward_step = attention.apply_rotary_pos_emb = mlp.bias_swiglu_impl = lambda x: x
    mark_megatron.cache_clear()
    mark_megatron()
    mark_megatron()
    heard: list[str] = []

    def listen(name: str) -> contextlib.AbstractContextManager[None]:
        heard.append(name)
        return contextlib.nullcontext()

    with step_part.listening(listen), kernel_group.listening(listen):
        assert [schedules.backward_step(1), attention.apply_rotary_pos_emb(2), mlp.bias_swiglu_impl(3)] == [1, 2, 3]
    return heard


def test_megatron_is_marked_once():
    assert run_distributed(ranges, 1, process_group=False) == [["backward", "rotary and SwiGLU", "rotary and SwiGLU"]]
