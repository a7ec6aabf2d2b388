"""AdamW that keeps its step count in the parameter group.

torch's own AdamW has a ``step`` tensor for every parameter, which megatron-core's distributed optimizer cannot put into a
checkpoint (``fully_reshardable`` fails on load with KeyError 'step'). NVIDIA's FusedAdam keeps one count per group; so does
this, which stands in for it where neither transformer-engine nor apex is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer


def install() -> None:
    """Make megatron-core use this AdamW, and treat it as the FusedAdam it imitates, where NVIDIA's is not installed."""
    if not megatron_optimizer.USING_PYTORCH_OPTIMIZER:
        return
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_optimizer.Adam = AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay (arXiv 1711.05101) through torch's fused kernel, on CUDA and on CPU."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """The last two are FusedAdam's; megatron-core passes them."""
        if not adam_w_mode or capturable:
            raise ValueError("only AdamW without graph capture is implemented here; install transformer-engine for the rest")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            # Counted even for a group without parameters on this rank: ranks' groups must agree in a checkpoint.
            group["step"] = group.get("step", 0) + 1
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(params, group)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            if not self.state[parameter]:
                self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
        steps = torch.full((len(params),), float(group["step"]), device=params[0].device).unbind()
        torch._fused_adamw_(
            params,
            [parameter.grad for parameter in params],
            [self.state[parameter]["exp_avg"] for parameter in params],
            [self.state[parameter]["exp_avg_sq"] for parameter in params],
            [],
            list(steps),
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
