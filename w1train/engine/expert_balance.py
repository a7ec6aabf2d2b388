"""The balance of tokens over the experts of a model: the counts of a step, the bias that moves with them, and what is recorded of both.

Shapes: m = layers of the whole model that have experts, E = experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from w1train.config.schema import Config
from w1train.model.experts.routed_tokens import TokenKind, first_counted_kind
from w1train.model.experts.router import ExpertRouter

_LOADS_OF_KINDS = {TokenKind.MASKED: "experts/load_masked", TokenKind.NOISY: "experts/load_noisy", TokenKind.CLEAN: "experts/load_clean"}


class ExpertBalance:
    """The routers of this rank, and the sums of all routers over a step. Every rank has an object, also a rank without experts."""

    def __init__(self, config: Config, stages: Sequence[torch.nn.Module]) -> None:
        """
        Args:
            stages: the model's stages on this rank.
        """
        self._settings, self._experts, self._expert_parallel = config.balance, config.model.experts, config.parallel.expert
        num_dense = self._experts.num_dense_layers
        self._num_layers = config.model.num_layers - num_dense if self._experts.num_experts else 0
        routers = [module for stage in stages for module in stage.modules() if isinstance(module, ExpertRouter)]
        # megatron-core numbers all layers of the model from 1.
        self._routers = {router.layer_number - num_dense - 1: router for router in routers}
        # Without sequence parallelism all tensor-parallel ranks have the same tokens.
        self._has_own_tokens = config.parallel.sequence or parallel_state.get_tensor_model_parallel_rank() == 0
        self._sums: _Sums | None = None

    def clear(self) -> None:
        """Forget the tokens of the last step, or of the first computation of this step."""
        self._sums = None
        for router in self._routers.values():
            router.counts.zero_()
            router.losses.zero_()

    @torch.no_grad()
    def gather(self) -> dict[str, float]:
        """Add up the counts of all ranks, after the last micro-batch, and return the metrics of the step. Every rank calls this."""
        if self._num_layers == 0:
            return {}
        self._sums = _Sums.zero(self._num_layers, self._experts.num_experts)
        has_first_tokens = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        for layer, router in self._routers.items() if self._has_own_tokens else ():
            self._sums.counts[layer], self._sums.losses[layer] = router.counts, router.losses
            is_first = has_first_tokens and parallel_state.get_tensor_model_parallel_rank() == 0
            if router.expert_bias is not None and is_first:
                self._sums.bias_range[layer] = router.expert_bias.max() - router.expert_bias.min()
        # The layers of other pipeline stages are zero here, so one sum over all ranks has all layers. float64 adds integers exactly in any
        # order, and the bias is the same in every layout.
        dist.all_reduce(self._sums.values)
        return self._metrics(self._sums)

    @torch.no_grad()
    def move_bias(self) -> None:
        """Move the biases of this rank's routers by the counts of the step that the optimizer takes. Each accepted step calls this once.

            b <- b + u sign(mean count - count)                     (arXiv 2408.15664, algorithm 1)

        With balance.zero_mean the mean of the signs over experts is taken off them first, as Ling-V2's training code does.
        """
        if self._settings.bias_rate == 0 or not self._experts.has_bias:
            return
        for layer, router in self._routers.items():
            assert self._sums is not None, "gather() comes first"
            counts = self._sums.counts[layer, first_counted_kind(self._settings.streams) :].sum(dim=0)
            # E times the mean is an integer, and the mean may not be.
            move = torch.sign(counts.sum() - len(counts) * counts)
            if self._settings.zero_mean:
                move -= move.mean()
            router.expert_bias += (self._settings.bias_rate * move).to(router.expert_bias.dtype)

    def details(self) -> dict[str, list[list[float]]]:
        """Return metrics of each expert, as lists [m][E]: its tokens of the step, without padding, divided by the mean over its layer."""
        if self._sums is None:
            return {}
        counts = self._sums.of_real_tokens
        return {"experts/loads": [[round(load, 3) for load in layer] for layer in (counts / _mean(counts)).tolist()]}

    def _metrics(self, sums: _Sums) -> dict[str, float]:
        """Return the metrics of a step. This waits for the GPU, once."""
        real, balance = sums.of_real_tokens, self._settings
        load = _unevenness(real)
        tensors: dict[str, Tensor] = {
            "experts/load": load.mean(),
            "experts/load_worst_layer": load.max(),
            **{name: _unevenness(sums.counts[:, kind]).mean() for kind, name in _LOADS_OF_KINDS.items()},
            "experts/unused": (real == 0).double().mean(),
        }
        if self._expert_parallel > 1:
            # A rank computes padding too.
            of_ranks = sums.counts.sum(dim=1).unflatten(1, (self._expert_parallel, -1)).sum(dim=2)
            tensors["experts/rank_load"] = _unevenness(of_ranks).mean()
        if self._experts.has_bias:
            tensors["experts/bias_range"] = sums.bias_range.max()
        means = sums.losses[:, :2].mean(dim=0) / sums.losses[0, 2].clamp_min(1)
        if balance.auxiliary:
            tensors["experts/auxiliary_loss"] = means[0]
        if balance.router_z:
            tensors["experts/router_z_loss"] = means[1]
        numbers: dict[str, Any] = dict(zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True))
        absent = [name for name in _LOADS_OF_KINDS.values() if numbers[name] == 0]
        return {name: number for name, number in numbers.items() if name not in absent}


class _Sums:
    """The sums of a step over all tokens, in one tensor, so that one all-reduce carries all of them."""

    def __init__(self, values: Tensor, num_experts: int) -> None:
        num_counts = len(TokenKind) * num_experts
        self.values = values
        self.counts = values[:, :num_counts].unflatten(1, (len(TokenKind), num_experts))
        """float64 [m, kinds, E]: the tokens of each kind of each expert."""
        self.losses = values[:, num_counts : num_counts + 3]
        """float64 [m, 3]: ``ExpertRouter.losses``."""
        self.bias_range = values[:, -1]
        """float64 [m]: the largest bias minus the smallest."""

    @classmethod
    def zero(cls, num_layers: int, num_experts: int) -> _Sums:
        size = len(TokenKind) * num_experts + 3 + 1
        return cls(torch.zeros(num_layers, size, dtype=torch.float64, device=torch.cuda.current_device()), num_experts)

    @property
    def of_real_tokens(self) -> Tensor:
        """The tokens of each expert without padding, float64 [m, E]."""
        return self.counts[:, TokenKind.CLEAN :].sum(dim=1)


def _unevenness(counts: Tensor) -> Tensor:
    """Return the largest count of each row divided by the mean of the row, [m], from counts [m, n]; 0 for a row without tokens."""
    return (counts / _mean(counts)).amax(dim=1)


def _mean(counts: Tensor) -> Tensor:
    return counts.mean(dim=1, keepdim=True).clamp_min(1e-9)
