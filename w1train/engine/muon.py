"""Muon: momentum whose matrices are orthogonalized before each update (arXiv 2502.16982), with AdamW for all other parameters.

    M <- momentum M + (1 - momentum) G
    W <- W - rate (decay W + scale NewtonSchulz(momentum M + (1 - momentum) G))

The momentum is a mean of gradients here, as torch.optim.Muon has it. The published sum is larger by 1 / (1 - momentum), which the
orthogonalization divides out.

An orthogonalization needs the whole matrix. Momentum and weights stay where the distributed optimizer has them. In each round the ranks
send their elements of a few matrices to these matrices' owners, and get the elements of the updates back. The numbers are therefore those
of a single process, whatever the layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import megatron.core.optimizer as megatron_optimizer
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from w1train.config.schema import Config, ModelConfig
from w1train.engine.adamw import AdamW, install, prepare_adamw
from w1train.engine.matrices import (
    NUM_ITERATIONS,
    Fusion,
    Range,
    fusion,
    is_matrix,
    iteration_flops,
    logical_shapes,
    owners,
    rounds,
    shared_ranges,
)
from w1train.model.initialization import global_named_parameters

Scale = Literal["moonlight", "original"]
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the published quintic polynomial (https://kellerjordan.github.io/posts/muon)
_SMALLEST_NORM = 1e-7


def prepare_muon(config: Config) -> dict[str, Any]:
    """Make megatron-core use Muon, and return the fields that it shares with AdamW."""
    fields = prepare_adamw(config)
    install("torch")
    megatron_optimizer.Adam = functools.partial(
        Muon,
        model=config.model,
        momentum=config.optimizer.momentum,
        scale=config.optimizer.update_scale,
        precision=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
    )
    return fields


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A parameter that Muon updates, and its elements on this rank."""

    shape: tuple[int, int]
    """Shape on one tensor-parallel rank."""
    parts: Fusion
    ranges: list[Range]
    """Elements that each data-parallel rank updates; one range if every rank updates all of them."""
    elements: Tensor | None
    """The optimizer's parameter with this rank's elements; None = this rank has no element."""


class Muon(AdamW):
    """Muon for the layers' matrices, AdamW for all other parameters.

    A matrix has the state ``exp_avg`` only, which is its momentum.
    """

    def __init__(self, params: Any, *, model: ModelConfig, momentum: float, scale: Scale, precision: torch.dtype, **adamw: Any) -> None:
        """
        Args:
            scale: moonlight = 0.2 sqrt(max(rows, columns)), which gives an update the size of AdamW's; original = sqrt(max(1, rows /
                columns)).
            precision: the type in which the iteration multiplies matrices.
        """
        super().__init__(params, **adamw)
        self._model, self._momentum, self._scale, self._precision = model, momentum, scale, precision
        self._matrices: list[Matrix] = []
        self._is_matrix: set[Tensor] = set()

    def attach(self, wrapper: MegatronOptimizer, chunks: Sequence[DistributedDataParallel]) -> None:
        """Find the matrices among the parameters that megatron-core's optimizer has given this object."""
        self._num_tensor = parallel_state.get_tensor_model_parallel_world_size()
        is_sharded = isinstance(wrapper, DistributedOptimizer)
        self._group = (
            parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            if is_sharded
            else parallel_state.get_tensor_model_parallel_group()
        )
        data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True) if is_sharded else 0
        self._place = data_rank * self._num_tensor + parallel_state.get_tensor_model_parallel_rank()
        assert self._place == dist.get_rank(self._group), "tensor-parallel ranks are neighbours in the group"
        for chunk in chunks:
            for name, parameter in global_named_parameters(chunk.module):
                if parameter.requires_grad and is_matrix(name):
                    parameter.optimizer_states = ("exp_avg",)
                    ranges, elements = (_sharded if is_sharded else _whole)(wrapper, parameter)
                    shape = (parameter.shape[0], parameter.shape[1])
                    self._matrices.append(Matrix(shape, fusion(name, shape[0], self._model), ranges, elements))
        self._is_matrix = {matrix.elements for matrix in self._matrices if matrix.elements is not None}
        flops = [sum(map(iteration_flops, logical_shapes(matrix.parts, matrix.shape, self._num_tensor))) for matrix in self._matrices]
        self._owners = owners([matrix.ranges for matrix in self._matrices], flops, self._num_tensor)
        self._rounds = rounds(self._owners)
        wrapper.init_state_fn = lambda *_: self._make_states()

    def _make_states(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                for name in ("exp_avg",) if parameter in self._is_matrix else ("exp_avg", "exp_avg_sq"):
                    if name not in self.state[parameter]:
                        self.state[parameter][name] = torch.zeros_like(parameter.data)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update every parameter once. All ranks that hold parts of the same matrices call this together."""
        self._make_states()
        super().step(closure)
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for numbers in self._rounds:
            held = [number for number in sorted(numbers, key=self._owners.__getitem__) if self._matrices[number].elements is not None]
            elements = [each for number in held if (each := self._matrices[number].elements) is not None]
            updates = self._exchange(numbers, held, [self._moved(each) for each in elements])
            for parameter, update in zip(elements, updates, strict=True):
                rate, decay = groups[parameter]["lr"], groups[parameter]["weight_decay"]
                parameter.mul_(1 - rate * decay).view(-1).add_(update, alpha=-rate)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        others = [parameter for parameter in params if parameter not in self._is_matrix]
        if others:
            super()._update(others, group)

    def _moved(self, parameter: Tensor) -> Tensor:
        """Move the momentum towards the gradient, and return Nesterov's direction, flat."""
        mean = self.state[parameter]["exp_avg"].lerp_(parameter.grad, 1 - self._momentum)
        return parameter.grad.lerp(mean, self._momentum).view(-1)

    def _exchange(self, numbers: list[int], held: list[int], directions: list[Tensor]) -> list[Tensor]:
        """Return this rank's elements of the updates.

        Args:
            numbers: the matrices of this round.
            held: those of which this rank has elements, in the order of their owners.
            directions: this rank's elements of them, flat.
        """
        mine = next((self._matrices[number] for number in numbers if self._owners[number] == self._place), None)
        sent = [0] * dist.get_world_size(self._group)
        for number, direction in zip(held, directions, strict=True):
            sent[self._owners[number]] = direction.numel()
        ranges = mine.ranges if mine is not None else [(0, 0)] * (len(sent) // self._num_tensor)
        received = [end - start for start, end in ranges for _ in range(self._num_tensor)]
        flat = torch.cat(directions) if directions else torch.empty(0, device=torch.cuda.current_device())
        gathered = self._all_to_all(flat, sent, received)
        if mine is not None:
            gathered = self._orthogonalized(mine, gathered.split(received))
        return list(self._all_to_all(gathered, received, sent).split([size for size in sent if size]))

    def _all_to_all(self, flat: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if len(sent) == 1:
            return flat
        result = flat.new_empty(sum(received))
        dist.all_to_all_single(result, flat, received, sent, group=self._group)
        return result

    def _orthogonalized(self, matrix: Matrix, pieces: Sequence[Tensor]) -> Tensor:
        """Return the updates of the elements in ``pieces``, which are those of all ranks, flat and in the same order."""
        shards = [torch.cat(pieces[tensor :: self._num_tensor]).view(matrix.shape) for tensor in range(self._num_tensor)]
        updates = orthogonalize_shards(shards, matrix.parts, self._scale, self._precision)
        of_ranks = [update.view(-1)[start:end] for start, end in matrix.ranges for update in updates]
        return torch.cat(of_ranks)


def _sharded(wrapper: DistributedOptimizer, parameter: torch.nn.Parameter) -> tuple[list[Range], Tensor | None]:
    """Return the ranges of all data-parallel ranks of the distributed optimizer, and the optimizer's parameter with this rank's range."""
    buffer = next(buffer for buffer in wrapper.buffers if parameter in buffer.param_index_map)
    start, end, bucket_number = buffer.param_index_map[parameter]
    bucket, num_shares = buffer.buckets[bucket_number], wrapper.data_parallel_group.size()
    ranges = shared_ranges(start, end, bucket.offset, bucket.grad_data.numel() // num_shares, num_shares)
    low, high = ranges[wrapper.data_parallel_group.rank()]
    if low == high:
        return ranges, None
    group, place = wrapper.model_param_group_index_map[parameter]
    elements = wrapper.optimizer.param_groups[group]["params"][place]
    assert elements.numel() == high - low, (elements.numel(), low, high)
    return ranges, elements


def _whole(_wrapper: MegatronOptimizer, parameter: torch.nn.Parameter) -> tuple[list[Range], Tensor]:
    """Return the one range of all elements, and the optimizer's parameter, which is the fp32 master in a bf16 run."""
    return [(0, parameter.numel())], getattr(parameter, "main_param", parameter)


def orthogonalize_shards(shards: Sequence[Tensor], parts: Fusion, scale: Scale, precision: torch.dtype) -> list[Tensor]:
    """Return the updates of a parameter, from its directions [rows, columns] on all tensor-parallel ranks, in the same form."""
    split = [_logical(shard, parts) for shard in shards]
    whole = [torch.cat(pieces, dim=parts.partition_dim) for pieces in zip(*split, strict=True)]
    updates = [orthogonalize(matrix, precision) * update_scale(matrix.shape, scale) for matrix in whole]
    of_ranks = zip(*(update.chunk(len(shards), dim=parts.partition_dim) for update in updates), strict=True)
    return [_fused(pieces, parts) for pieces in of_ranks]


def _logical(shard: Tensor, parts: Fusion) -> list[Tensor]:
    groups = shard.view(parts.num_groups, -1, shard.shape[1])
    return [piece.reshape(-1, shard.shape[1]) for piece in groups.split(parts.sizes, dim=1)]


def _fused(pieces: Sequence[Tensor], parts: Fusion) -> Tensor:
    columns = pieces[0].shape[1]
    return torch.cat([piece.reshape(parts.num_groups, -1, columns) for piece in pieces], dim=1).view(-1, columns)


def update_scale(shape: Sequence[int], scale: Scale) -> float:
    """Return the factor of an orthogonalized update, of a matrix [outputs, inputs].

    "moonlight" (arXiv 2502.16982, equation 4) gives every matrix an update whose root mean square is 0.2, as AdamW's usually is, so that
    both can have one learning rate. "original" (https://kellerjordan.github.io/posts/muon) depends on the ratio of the sides only.
    """
    if scale == "moonlight":
        return 0.2 * math.sqrt(max(shape))
    return math.sqrt(max(1.0, shape[0] / shape[1]))


def orthogonalize(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """Return about U V^T of the singular value decomposition U S V^T of a matrix, float32, by the published Newton-Schulz iteration: its
    singular values are between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    x = matrix.to(precision)
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).float()
