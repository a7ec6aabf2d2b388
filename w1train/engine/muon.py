"""Muon: momentum whose matrices are orthogonalized before each update (arXiv 2502.16982), with AdamW for all other parameters.

    M <- momentum M + (1 - momentum) G
    W <- W - rate (decay W + scale NewtonSchulz(momentum M + (1 - momentum) G))

The momentum is a mean of gradients here, as torch.optim.Muon has it. The published sum is larger by 1 / (1 - momentum), which the
orthogonalization divides out.

An orthogonalization needs the whole matrix. Momentum and weights stay where the distributed optimizer has them. In each round the ranks
send their elements of a few matrices to these matrices' owners, and get the elements of the updates back. The numbers are therefore those
of a single process, whatever the layout. Each expert's matrices are matrices of their own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
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
    part_of_ranges,
    rounds,
    shared_ranges,
    stack,
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


@dataclass(frozen=True, slots=True)
class Holders:
    """The ranks that hold elements of the same matrices. A place is the data-parallel rank times ``num_tensor`` plus the tensor-parallel
    rank; for experts, both ranks are those of the experts' layout."""

    group: dist.ProcessGroup
    num_tensor: int
    places: list[int]
    """The rank in the group of each place, in ascending order. Other ranks of the group hold other matrices."""

    @property
    def own_place(self) -> int:
        return self.places.index(dist.get_rank(self.group))

    def by_rank(self, sizes: Sequence[int]) -> list[int]:
        """Return sizes by the rank in the group, from sizes by place."""
        spread = [0] * dist.get_world_size(self.group)
        for rank, size in zip(self.places, sizes, strict=True):
            spread[rank] = size
        return spread


def _dense_holders(*, is_sharded: bool) -> Holders:
    with_data = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    group = with_data if is_sharded else parallel_state.get_tensor_model_parallel_group()
    return Holders(group, parallel_state.get_tensor_model_parallel_world_size(), list(range(dist.get_world_size(group))))


def _expert_holders(*, is_sharded: bool) -> Holders:
    num_tensor = parallel_state.get_expert_tensor_parallel_world_size()
    if not is_sharded:
        return Holders(parallel_state.get_expert_tensor_parallel_group(), num_tensor, list(range(num_tensor)))
    # No group has just the ranks of the same experts. The ranks of a pipeline stage are in the order tensor, expert, data.
    stage = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    own = parallel_state.get_expert_model_parallel_rank() * num_tensor
    starts = range(own, dist.get_world_size(stage), num_tensor * parallel_state.get_expert_model_parallel_world_size())
    places = [start + tensor for start in starts for tensor in range(num_tensor)]
    return Holders(stage, num_tensor, places)


@dataclass(frozen=True, slots=True, eq=False)
class Matrix:
    """A matrix that Muon updates, which is a parameter or one expert's part of a parameter, and its elements on this rank."""

    shape: tuple[int, int]
    """Shape on one tensor-parallel rank."""
    parts: Fusion
    ranges: list[Range]
    """Elements that each data-parallel rank updates; one range if every rank updates all of them."""
    parameter: Tensor | None
    """The optimizer's parameter that has this rank's elements; None = this rank has no element."""
    span: Range
    """The place of these elements in the parameter, after it is flattened."""

    def elements(self, tensor: Tensor) -> Tensor:
        """Return this rank's elements of the matrix, flat, from a tensor that is like ``parameter``."""
        return tensor.view(-1)[slice(*self.span)]


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
        """Find the matrices among the parameters that megatron-core's optimizer has given this object: those of experts, or all others."""
        is_sharded, of_experts = isinstance(wrapper, DistributedOptimizer), bool(self.param_groups[0]["is_expert_parallel"])
        self._holders = (_expert_holders if of_experts else _dense_holders)(is_sharded=is_sharded)
        for chunk in chunks:
            for name, parameter in global_named_parameters(chunk.module):
                is_own = getattr(parameter, "allreduce", True) != of_experts
                if is_own and parameter.requires_grad and is_matrix(name):
                    parameter.optimizer_states = ("exp_avg",)
                    self._matrices += self._matrices_of(name, parameter, *(_sharded if is_sharded else _whole)(wrapper, parameter))
        self._is_matrix = {matrix.parameter for matrix in self._matrices if matrix.parameter is not None}
        num_tensor = self._holders.num_tensor
        data_rank = wrapper.data_parallel_group.rank() if is_sharded else 0
        assert self._holders.own_place // num_tensor == data_rank, "tensor-parallel ranks are neighbours in the group"
        flops = [sum(map(iteration_flops, logical_shapes(matrix.parts, matrix.shape, num_tensor))) for matrix in self._matrices]
        self._owners = owners([matrix.ranges for matrix in self._matrices], flops, num_tensor)
        self._rounds = rounds(self._owners)
        wrapper.init_state_fn = lambda *_: self._make_states()

    def _matrices_of(self, name: str, parameter: torch.nn.Parameter, ranges: list[Range], own: Tensor | None) -> Iterator[Matrix]:
        """Yield the matrices of a parameter.

        Args:
            ranges: the elements of the parameter that each data-parallel rank updates.
            own: the optimizer's parameter with this rank's range.
        """
        number, shape = stack(name, parameter.shape)
        rank, size = self._holders.own_place // self._holders.num_tensor, math.prod(shape)
        first = ranges[rank][0]
        for index in range(number):
            parts = part_of_ranges(ranges, index, size)
            low, high = parts[rank]
            span = (index * size + low - first, index * size + high - first)
            yield Matrix(shape, fusion(name, shape[0], self._model), parts, own if low < high else None, span)

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
            held = [number for number in sorted(numbers, key=self._owners.__getitem__) if self._matrices[number].parameter is not None]
            updates = self._exchange(numbers, held, [self._moved(self._matrices[number]) for number in held])
            for number, update in zip(held, updates, strict=True):
                matrix = self._matrices[number]
                assert matrix.parameter is not None
                rate, decay = groups[matrix.parameter]["lr"], groups[matrix.parameter]["weight_decay"]
                matrix.elements(matrix.parameter).mul_(1 - rate * decay).add_(update, alpha=-rate)

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        others = [parameter for parameter in params if parameter not in self._is_matrix]
        if others:
            super()._update(others, group)

    def _moved(self, matrix: Matrix) -> Tensor:
        """Move the momentum of this rank's elements towards the gradient, and return Nesterov's direction, flat."""
        assert matrix.parameter is not None
        gradient = matrix.elements(matrix.parameter.grad)
        mean = matrix.elements(self.state[matrix.parameter]["exp_avg"]).lerp_(gradient, 1 - self._momentum)
        return gradient.lerp(mean, self._momentum)

    def _exchange(self, numbers: list[int], held: list[int], directions: list[Tensor]) -> list[Tensor]:
        """Return this rank's elements of the updates.

        Args:
            numbers: the matrices of this round.
            held: those of which this rank has elements, in the order of their owners.
            directions: this rank's elements of them, flat.
        """
        holders = self._holders
        mine = next((self._matrices[number] for number in numbers if self._owners[number] == holders.own_place), None)
        sent = [0] * len(holders.places)
        for number, direction in zip(held, directions, strict=True):
            sent[self._owners[number]] = direction.numel()
        ranges = mine.ranges if mine is not None else [(0, 0)] * (len(sent) // holders.num_tensor)
        received = [end - start for start, end in ranges for _ in range(holders.num_tensor)]
        flat = torch.cat(directions) if directions else torch.empty(0, device=torch.cuda.current_device())
        gathered = self._all_to_all(flat, sent, received)
        if mine is not None:
            gathered = self._orthogonalized(mine, gathered.split(received))
        return list(self._all_to_all(gathered, received, sent).split([size for size in sent if size]))

    def _all_to_all(self, flat: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send a part of ``flat`` to each place, in the order of places, and return what all places have sent."""
        if len(sent) == 1:
            return flat
        result = flat.new_empty(sum(received))
        holders = self._holders
        dist.all_to_all_single(result, flat, holders.by_rank(received), holders.by_rank(sent), group=holders.group)
        return result

    def _orthogonalized(self, matrix: Matrix, pieces: Sequence[Tensor]) -> Tensor:
        """Return the updates of the elements in ``pieces``, which are those of all ranks, flat and in the same order."""
        num_tensor = self._holders.num_tensor
        shards = [torch.cat(pieces[tensor::num_tensor]).view(matrix.shape) for tensor in range(num_tensor)]
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
