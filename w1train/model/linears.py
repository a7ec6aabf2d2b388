"""The linear layers that the layer spec is built from: megatron-core's own, or transformer-engine's."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from w1train.config.errors import UserError

TransformerImplementation = Literal["local", "te"]


class Linears(NamedTuple):
    """Classes of the layers split by outputs and by inputs."""

    column: Any
    row: Any


def has_transformer_engine() -> bool:
    """Tell whether transformer-engine is installed."""
    return find_spec("transformer_engine") is not None


def linears(implementation: TransformerImplementation) -> Linears:
    """Return the classes of one implementation. The parameters of both implementations have the same names, shapes and splits, so that
    weights fit both. transformer-engine's modules also have an ``_extra_state`` (FP8 scaling), which checkpoints of megatron-core's lack.

    Raises:
        UserError: the caller asks for transformer-engine, which is not installed.
    """
    if implementation == "local":
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

        return Linears(ColumnParallelLinear, RowParallelLinear)
    require_transformer_engine("model.transformer_impl", "te", "local")
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

    return Linears(TEColumnParallelLinear, TERowParallelLinear)


def require_transformer_engine(key: str, value: str, instead: str) -> None:
    """Raise UserError if transformer-engine, which a setting needs, is not installed."""
    if not has_transformer_engine():
        raise UserError(
            f"{key} is {value}, which needs transformer-engine, and it is not installed here: "
            f"pip install --no-build-isolation -e .[te] (it is compiled, and wants a CUDA toolkit), or set {key}={instead}"
        )
