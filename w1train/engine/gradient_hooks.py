"""The list of measurements around megatron-core's gradient and parameter communication, and the order in which they are called.

Only this module replaces these functions of megatron-core. A measurement registers under its name in ``ORDER``, which decides the order of
calls; the order of registration does not matter. A function without a registered measurement stays megatron-core's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

from w1train.runtime.ranges import step_part

Function = Callable[..., Any]
Hook = Callable[[Function, Any], Function]
"""A decorator: (function, its owner, which is the model's configuration or a bucket group) -> the function that is called in its place."""
HookName = Literal["time range", "stragglers", "communication", "local gradients"]

ORDER: dict[str, tuple[HookName, ...]] = {
    # This is called once in each step, at the end of the reduction. "stragglers" lets the ranks wait for each other. This wait belongs to
    # the part "reduce" of a profile. It ends before the stopwatch of "communication" starts, which would otherwise count it as time of the
    # network.
    "finalize_model_grads_func": ("time range", "stragglers", "communication"),
    # This sends a bucket, whose gradients are still those of this rank alone.
    "start_grad_sync": ("local gradients",),
    # These gather a bucket of parameters.
    "start_param_sync": ("communication",),
    "finish_param_sync": ("communication",),
}
"""Name of a function of megatron-core -> the measurements around it, the outermost first."""


class GradientHooks:
    """The measurements around the functions of one model. ``build_trained_model`` makes the object."""

    def __init__(self, config: TransformerConfig, chunks: Sequence[DistributedDataParallel]) -> None:
        """
        Args:
            config: the model's configuration, which has finalize_model_grads_func.
            chunks: the model's chunks on this rank, whose bucket groups have the other functions.
        """
        groups = [group for chunk in chunks for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
        owners = {name: [config] if name == "finalize_model_grads_func" else groups for name in ORDER}
        self._originals = [(name, owner, getattr(owner, name)) for name, each in owners.items() for owner in each]
        self._hooks: dict[HookName, Hook] = {}
        self.register("time range", lambda function, _: step_part("reduce")(function))

    def register(self, name: HookName, hook: Hook) -> None:
        """Put ``hook`` around each function for which ``ORDER`` lists ``name``, at its place among the registered hooks."""
        assert name not in self._hooks, f"{name} is registered already"
        self._hooks[name] = hook
        for function_name, owner, original in self._originals:
            if name in ORDER[function_name]:
                setattr(owner, function_name, self._composed(function_name, owner, original))

    def _composed(self, function_name: str, owner: Any, original: Function) -> Function:
        function = original
        for name in reversed(ORDER[function_name]):
            if name in self._hooks:
                function = self._hooks[name](function, owner)
        return function
