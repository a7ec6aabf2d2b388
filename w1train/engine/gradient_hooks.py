"""The list of measurements around megatron-core's gradient and parameter communication, and the order in which they are called.

This is the one place where those functions of megatron-core are replaced. A measurement registers under its name in ``ORDER``; who
registers first does not matter. A function around which nothing is registered stays megatron-core's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig

from w1train.runtime.ranges import step_part

Function = Callable[..., Any]
Hook = Callable[[Function, Any], Function]
"""(function, the object that it belongs to: the model's configuration or a bucket group) -> the function that is called in its place."""
HookName = Literal["time range", "stragglers", "communication", "local gradients"]

ORDER: dict[str, tuple[HookName, ...]] = {
    # The end of the reduction, once a step. The ranks' meeting (stragglers) belongs to the part "reduce" of a profile. It comes before the
    # stopwatch starts, so that the time in which ranks wait for a slow one is not taken for that of the network.
    "finalize_model_grads_func": ("time range", "stragglers", "communication"),
    # A bucket of gradients is sent, still this rank's own.
    "start_grad_sync": ("local gradients",),
    # A bucket of parameters is gathered.
    "start_param_sync": ("communication",),
    "finish_param_sync": ("communication",),
}
"""Function of megatron-core -> the measurements around it, the outermost first."""


class GradientHooks:
    """The measurements around one model's functions. It is made once, when the model is built."""

    def __init__(self, config: TransformerConfig, chunks: Sequence[DistributedDataParallel]) -> None:
        """
        Args:
            config: the model's; it has finalize_model_grads_func.
            chunks: their bucket groups have the other functions.
        """
        groups = [group for chunk in chunks for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)]
        owners = {name: [config] if name == "finalize_model_grads_func" else groups for name in ORDER}
        self._originals = [(name, owner, getattr(owner, name)) for name, each in owners.items() for owner in each]
        self._hooks: dict[HookName, Hook] = {}
        self.register("time range", lambda function, _: step_part("reduce")(function))

    def register(self, name: HookName, hook: Hook) -> None:
        """Put ``hook`` around the functions whose ``ORDER`` has its name, at its place among the hooks that are there."""
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
