"""AdamW that keeps its step count in the parameter group.

torch's own AdamW has a ``step`` tensor for every parameter, which megatron-core's distributed optimizer cannot put into a
checkpoint (``fully_reshardable`` fails on load with KeyError 'step'). NVIDIA's FusedAdam keeps one count per group. The class
here does the same, and takes the place of FusedAdam where neither transformer-engine nor apex is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any, Literal

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.optimizer import distrib_optimizer

from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.runtime.kernel_choices import note_kernel

Choice = Literal["auto", "te", "apex", "torch"]
_MODULES = {"te": "transformer_engine.pytorch.optimizers", "apex": "apex.optimizers"}


def prepare_adamw(config: Config) -> dict[str, Any]:
    """Make megatron-core use the AdamW of ``kernels.adamw``, and return its fields of megatron-core's OptimizerConfig.

    Raises:
        UserError: ``kernels.adamw`` names an implementation that is not installed.
    """
    install(config.kernels.adamw)
    settings = config.optimizer
    return {"optimizer": "adam", "adam_beta1": settings.beta1, "adam_beta2": settings.beta2, "adam_eps": settings.epsilon}


def install(choice: Choice = "auto") -> None:
    """Make megatron-core use the chosen AdamW, and treat the class of this module like the FusedAdam that it imitates. "auto" chooses that
    of transformer-engine, or else that of apex, or else the class of this module.

    Raises:
        UserError: ``choice`` names a library that is not installed.
    """
    found = {name: _import(module) for name, module in _MODULES.items()}
    if choice in _MODULES and found[choice] is None:
        raise UserError(f"kernels.adamw is {choice}, but {_MODULES[choice]} cannot be imported here; set kernels.adamw=auto or torch")
    name = choice if choice != "auto" else next((name for name, adam in found.items() if adam is not None), "torch")
    missing = [_MODULES[other] for other, adam in found.items() if adam is None]
    reason = f" (not importable: {', '.join(missing)})" if missing and choice == "auto" and name == "torch" else ""
    note_kernel("adamw", name, f"kernels.adamw: {name}{reason}")
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    megatron_optimizer.Adam = found.get(name) or AdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = name == "te"
    distrib_optimizer.USING_APEX_OPTIMIZER = name != "te"


def _import(module: str) -> Any:
    """Return the FusedAdam of a module, or None where the module is not installed or was built for another machine."""
    try:
        return importlib.import_module(module).FusedAdam
    except ImportError:
        return None


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
        """Take torch's arguments, and two arguments of FusedAdam that megatron-core passes: ``adam_w_mode`` and ``capturable``."""
        if not adam_w_mode or capturable:
            raise ValueError("only AdamW without graph capture is implemented here; install transformer-engine for the rest")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter that has a gradient once."""
        assert closure is None
        for group in self.param_groups:
            # The step counts even for a group without parameters on this rank, because the groups of all ranks must agree in a checkpoint.
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
