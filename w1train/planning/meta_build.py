"""The build of a layout's ranks on meta tensors, in this process, over a process group that does not communicate.

Ranks with equal tensor and pipeline coordinates build modules of equal shapes, so only one of these ranks is built. The groups of all ranks
are checked against megatron-core's own rank generator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from w1train.config.schema import Config
from w1train.planning.layout import Coordinates, Layout, chunks_of, layout_of
from w1train.planning.parameters import Parameter, chunk_parameters
from w1train.planning.state import buffer_layout


class LayoutError(ValueError):
    """A layout that cannot be built; the text is megatron-core's reason."""


@dataclass(frozen=True, slots=True)
class Build:
    """The result of building the ranks."""

    num_ranks: int
    num_built: int
    """Number of different (tensor, pipeline) coordinates; the first rank of each is built."""
    num_parameters: int
    """Parameters of the model, each counted once."""
    seconds: float


@dataclass(slots=True)
class _Found:
    """Elements of one parameter that were found on the built ranks."""

    is_split: bool
    num_expert_slices: int
    """Ranks that share the parameter because it has routed experts, each of which has as many elements; 0 = it has no experts."""
    by_tensor_rank: dict[int, int]

    @property
    def numel(self) -> int:
        """Elements of the whole parameter: of a split parameter each rank has a part, and of a replicated parameter each rank has all
        elements."""
        numels = list(self.by_tensor_rank.values())
        assert (self.is_split and not self.num_expert_slices) or len(set(numels)) == 1, numels
        if self.num_expert_slices:
            return numels[0] * self.num_expert_slices
        return sum(numels) if self.is_split else numels[0]


def build_ranks(config: Config, world_size: int) -> Build:
    """Build one rank for each pair of a tensor and a pipeline coordinate of the layout.

    Raises:
        LayoutError: megatron-core refuses the layout.
        RuntimeError: the model differs from the closed forms of the plan.
    """
    start = time.perf_counter()
    layout = layout_of(config, world_size)
    _prepare()
    found: dict[str, _Found] = {}
    places = [(tensor, pipeline) for pipeline in range(layout.pipeline) for tensor in range(layout.tensor)]
    for tensor, pipeline in places:
        rank = layout.rank(Coordinates(tensor=tensor, context=0, data=0, pipeline=pipeline))
        try:
            with _rank(config, rank, world_size):
                if rank == 0:
                    _check_groups(layout)
                _build_one(config, layout, rank, found)
        except _PlanMismatchError:
            raise
        except Exception as error:
            # megatron-core refuses layouts by errors of every kind, a division by zero included.
            reason = str(error) if isinstance(error, AssertionError | ValueError) and str(error) else f"{type(error).__name__}: {error}"
            raise LayoutError(f"rank {rank} (tensor {tensor}, pipeline {pipeline}) cannot be built: {reason}") from error
    total = sum(parameter.numel for parameter in found.values())
    return Build(world_size, len(places), total, time.perf_counter() - start)


class _PlanMismatchError(RuntimeError):
    """A disagreement of model and plan, which is a mistake in w1train and not in the layout."""


def _prepare() -> None:
    from w1train.runtime.megatron_on_cpu import import_megatron, redirect_cuda_to_cpu

    import_megatron()
    redirect_cuda_to_cpu()


@contextmanager
def _rank(config: Config, rank: int, world_size: int) -> Iterator[None]:
    """Set up megatron-core's groups as this rank of the world sees them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from w1train.runtime.distributed import destroy, initialize_model_parallel

    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        initialize_model_parallel(config.parallel)
        yield
    finally:
        destroy()


def _build_one(config: Config, layout: Layout, rank: int, found: dict[str, _Found]) -> None:
    """Build this rank's chunks, compare them with the plan, and add their parameters to ``found``."""
    from w1train.engine.building import build_stage
    from w1train.model.initialization import global_named_parameters
    from w1train.model.megatron_config import transformer_config

    place = layout.coordinates(rank)
    # Kernels, FP8 and transformer-engine may be missing where a plan is made, and they change no parameter.
    model = replace(config.model, transformer_impl="local")
    config = replace(config, model=model, parallel=replace(config.parallel, tp_comm_overlap=False))
    megatron = transformer_config(config.model, config.parallel, config.training.precision)
    # Parameters then use torch's default device, also on machines with a GPU.
    megatron.use_cpu_initialization = True
    with torch.device("meta"):
        stages = [build_stage(config, megatron, vp_stage) for vp_stage in range(layout.virtual_pipeline)]
    for chunk, stage in zip(chunks_of(layout, place.pipeline), stages, strict=True):
        parameters = list(global_named_parameters(stage))
        planned = chunk_parameters(config.model, layout, chunk, config.adapters)
        if [(name, tuple(parameter.shape)) for name, parameter in parameters] != [(p.name, p.shape) for p in planned]:
            raise _PlanMismatchError(f"rank {rank}: the model's parameters are not those of w1train.planning.parameters")
        if layout.distributed_optimizer:
            pairs = [(built, described) for (_, built), described in zip(parameters, planned, strict=True) if described.is_trained]
            _check_buffers([built for built, _ in pairs], [described for _, described in pairs], layout, layout.bucket_size(place.pipeline))
        for (name, parameter), described in zip(parameters, planned, strict=True):
            is_split = bool(getattr(parameter, "tensor_model_parallel", False))
            num_slices = layout.num_expert_slices if described.is_expert else 0
            found.setdefault(name, _Found(is_split, num_slices, {})).by_tensor_rank[place.tensor] = parameter.numel()


def _check_buffers(parameters: list[torch.nn.Parameter], planned: list[Parameter], layout: Layout, bucket_size: int | None) -> None:
    """Check that megatron-core's own layouts of the flat buffers, of experts and of all other parameters, have the planned lengths."""
    from w1train.engine.building import flat_buffer_sizes

    kinds = ((False, layout.num_optimizer_shards), (True, layout.expert_data))
    expected = {
        is_expert: buffer_layout(own, num_shards, bucket_size)[-1].end
        for is_expert, num_shards in kinds
        if (own := [parameter for parameter in planned if parameter.is_expert == is_expert])
    }
    found = flat_buffer_sizes(parameters, bucket_size, layout.num_optimizer_shards, layout.expert_data)
    if found != expected:
        raise _PlanMismatchError(f"the flat buffers (of experts: True) have {found} elements, and w1train.planning.state says {expected}")


def _check_groups(layout: Layout) -> None:
    """Check that every rank of the world is in the groups that belong to its coordinates."""
    from megatron.core.parallel_state import RankGenerator

    order = {"order": "tp-cp-ep-dp-pp", "rank_offset": 0}
    dense = RankGenerator(tp=layout.tensor, ep=1, dp=layout.data, pp=layout.pipeline, cp=layout.context, **order)
    experts = RankGenerator(tp=layout.expert_tensor, ep=layout.expert, dp=layout.expert_data, pp=layout.pipeline, cp=1, **order)
    of_dense = (("tp", "tensor"), ("cp", "context"), ("dp", "data"), ("pp", "pipeline"))
    of_experts = (("tp", "expert_tensor"), ("ep", "expert"), ("dp", "expert_data"), ("pp", "pipeline"))
    kinds = ((dense, layout.coordinates, of_dense), (experts, layout.expert_coordinates, of_experts))
    for generator, coordinates, tokens in kinds:
        for token, field in tokens:
            groups = generator.get_ranks(token)
            seen = sorted(rank for group in groups for rank in group)
            expected = all(_is_group(coordinates, group, field, getattr(layout, field)) for group in groups)
            if seen != list(range(layout.world_size)) or not expected:
                raise _PlanMismatchError(f"megatron-core's {token} groups are not those of w1train.planning.layout")


def _is_group(coordinates: Callable[[int], Any], ranks: list[int], field: str, size: int) -> bool:
    """Tell whether the ranks differ only in one coordinate, and are in its order."""
    places = [asdict(coordinates(rank)) for rank in ranks]
    return places == [{**places[0], field: index} for index in range(size)]
