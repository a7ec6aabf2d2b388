"""Low-rank adapters of linear layers (LoRA, arXiv 2106.09685, section 4.1): y = W x + scale * B (A x).

Only B (A x) crosses tensor-parallel ranks, and only as its r numbers between A and B, so that the ranks exchange little:

- A linear layer that is split by outputs has all of A on each rank, and B is split by outputs. Under sequence parallelism A takes this
  rank's tokens, and the r numbers of all tokens are gathered before B.
- A linear layer that is split by inputs has A split by inputs, and all of B on each rank. The partial sums of the r numbers are added up
  before B; under sequence parallelism they are scattered over the tokens at the same time.

A matrix that is whole on each rank and sees a part of the tokens has the attribute ``sequence_parallel``, so that megatron-core adds up its
gradients over the tensor-parallel ranks.

Shapes: s = tokens of this rank, S = tokens behind a gather or before a scatter, b = samples, i = inputs and o = outputs of this rank,
r = rank of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_pg_size
from torch import Tensor

from w1train.config.schema_adapters import AdaptersConfig, is_adapted
from w1train.model.linears import Linears
from w1train.model.megatron_config import parameter_device


class AdaptedLinear(torch.nn.Module):
    """The part that a linear layer with an adapter adds to its base class, which is the next class in the order of inheritance."""

    split_dimension: ClassVar[dict[str, int]]
    """The dimension over which tensor-parallel ranks share a matrix; a matrix that is missing here is whole on each rank."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        adapters: AdaptersConfig,
        is_gated: bool,
        tp_group: torch.distributed.ProcessGroup | None = None,
        **keywords: Any,
    ) -> None:
        """Build the base layer, and the adapter with uninitialised matrices.

        Args:
            is_gated: the outputs are SwiGLU's gate and its other half, of each of which a rank has a part.
        """
        super().__init__(input_size, output_size, config=config, tp_group=tp_group, **keywords)
        self.adapter_is_on = True
        self.adapter_scale, self._is_gated = adapters.scale, is_gated
        self._group = tp_group or parallel_state.get_tensor_model_parallel_group()
        self._is_sequence_parallel = config.sequence_parallel and get_pg_size(self._group) > 1
        for name, shape in {"lora_a": [adapters.rank, input_size], "lora_b": [output_size, adapters.rank]}.items():
            self.register_parameter(name, self._matrix(name, shape, config))

    def _matrix(self, name: str, shape: list[int], config: TransformerConfig) -> torch.nn.Parameter:
        dimension = self.split_dimension.get(name)
        if dimension is not None:
            shape[dimension] //= get_pg_size(self._group)
        matrix = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=parameter_device(config)))
        if dimension is None:
            matrix.sequence_parallel = self._is_sequence_parallel
        else:
            set_tensor_model_parallel_attributes(matrix, is_parallel=True, dim=dimension, stride=1)
        return matrix

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the outputs, [S, b, o] or [s, b, o] as the base layer returns them, and its bias."""
        output, bias = super().forward(input_)
        if self.adapter_is_on:
            output = output + F.linear(self._exchange(F.linear(input_, self.lora_a)) * self.adapter_scale, self.lora_b)
        return output, bias

    def _exchange(self, inner: Tensor) -> Tensor:
        """Return what B reads, from A x of this rank, [s or S, b, r]."""
        raise NotImplementedError

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Return megatron-core's sharded state of the base layer, with the adapter's matrices as they are split."""
        assert metadata is not None
        matrices = {name: getattr(self, name) for name in ("lora_a", "lora_b")}
        group = metadata["dp_cp_group"]
        own = make_sharded_tensors_for_checkpoint(
            matrices, prefix, self.split_dimension, sharded_offsets, tp_group=self._group, dp_cp_group=group
        )
        if self._is_gated:
            key = f"{prefix}lora_b"
            own[key] = apply_swiglu_sharded_factory(own[key], sharded_offsets, tp_group=self._group, dp_group=group)
        return {**super().sharded_state_dict(prefix, sharded_offsets, metadata), **own}


class _AdaptedColumn(AdaptedLinear):
    """A linear layer that is split by outputs."""

    split_dimension: ClassVar = {"lora_b": 0}

    def _exchange(self, inner: Tensor) -> Tensor:
        if self._is_sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=self._group)
        return copy_to_tensor_model_parallel_region(inner, group=self._group)


class _AdaptedRow(AdaptedLinear):
    """A linear layer that is split by inputs."""

    split_dimension: ClassVar = {"lora_a": 1}

    def _exchange(self, inner: Tensor) -> Tensor:
        if self._is_sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(inner, group=self._group)
        return reduce_from_tensor_model_parallel_region(inner, group=self._group)


@cache
def _class_with(adapted: type[AdaptedLinear], base: type) -> type:
    return type(f"Adapted{base.__name__}", (adapted, base), {})


def adapted(linear: Linears, name: str, adapters: AdaptersConfig) -> Any:
    """Return what builds a linear layer, by its name inside a layer of the Transformer: with an adapter if the configuration wants it."""
    is_column = name.endswith(("linear_qkv", "linear_fc1"))
    base = linear.column if is_column else linear.row
    if not is_adapted(name, adapters):
        return base
    return partial(_class_with(_AdaptedColumn if is_column else _AdaptedRow, base), adapters=adapters, is_gated=name.endswith("linear_fc1"))


@contextmanager
def adapters_off(stages: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Turn the adapters of this rank's stages off for as long as the context lasts: a pass then computes the base model, bit for bit."""
    adapted = [module for stage in stages for module in stage.modules() if isinstance(module, AdaptedLinear)]
    before = [module.adapter_is_on for module in adapted]
    for module in adapted:
        module.adapter_is_on = False
    try:
        yield
    finally:
        for module, was_on in zip(adapted, before, strict=True):
            module.adapter_is_on = was_on
