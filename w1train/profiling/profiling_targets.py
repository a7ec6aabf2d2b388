"""Which functions a profile puts its ranges around."""

from __future__ import annotations

from typing import Any

from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer import attention as megatron_attention
from megatron.core.transformer import mlp as megatron_mlp

from w1train.attention.attention_plan import AttentionPlan
from w1train.engine.building import TrainedModel
from w1train.model import layer, norm
from w1train.model.conditioning import Modulation
from w1train.model.head import OutputHead
from w1train.profiling.kernel_times import Target
from w1train.training import forward

PARTS = ("data", "forward", "backward", "reduce", "optimizer", "validate", "sample", "save")


def part_targets(model: TrainedModel, trainer: Any) -> list[Target]:
    """The parts of a step, and what may come between two steps: ``trainer``'s methods."""
    from w1train.training import loop  # which imports the profiler

    return [
        ("data", forward, "_next_inputs"),
        *(("forward", stage, "forward") for stage in model.stages),
        ("forward", forward, "_loss"),
        ("backward", schedules, "backward_step"),
        ("reduce", model.config, "finalize_model_grads_func"),
        ("optimizer", loop, "prepare_gradients"),
        ("optimizer", model.optimizer, "step"),
        ("optimizer", model.optimizer, "zero_grad"),
        *(("optimizer", chunk, "zero_grad_buffer") for chunk in model.chunks),
        *((part, trainer, part) for part in ("validate", "sample", "save")),
    ]


def kernel_targets(model: TrainedModel) -> list[Target]:
    """What kernels are for, inside the parts; the rest is named by its kernels."""
    from w1train.training import loop  # which imports the profiler

    return [
        ("attention", AttentionPlan, "attend"),
        ("norm and modulation", norm, "rms_norm"),
        ("norm and modulation", layer, "gate_residual"),
        ("norm and modulation", Modulation, "forward"),
        ("rotary and SwiGLU", megatron_attention, "apply_rotary_pos_emb"),
        ("rotary and SwiGLU", megatron_mlp, "bias_swiglu_impl"),
        ("loss and head", OutputHead, "forward"),
        ("loss and head", forward, "_loss"),
        ("optimizer", loop, "prepare_gradients"),
        ("optimizer", model.optimizer, "step"),
        *(("optimizer", chunk, "zero_grad_buffer") for chunk in model.chunks),
    ]
