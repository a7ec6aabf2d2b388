"""The section of low-rank adapters (LoRA, arXiv 2106.09685), and which linear layers and parameters it names.

An adapted linear layer computes y = W x + scale * B (A x), with A [rank, inputs] and B [outputs, rank]. W is frozen.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field

from w1train.config.constraints import NonNegativeInteger, PositiveFloat
from w1train.config.schema_model import ModelConfig

_DENSE = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_SHARED = ("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2")
LORA_A, LORA_B = ".lora_a", ".lora_b"
"""The ends of the names of an adapter's matrices, behind the name of the linear layer."""


@dataclass(slots=True, kw_only=True)
class AdaptersConfig:
    """Low-rank adapters of linear layers (LoRA). With adapters all other parameters are frozen, unless adapters.train names them."""

    rank: NonNegativeInteger = 0
    """Rank of the adapters; 0 = the model has no adapters, and all its parameters are trained."""
    alpha: PositiveFloat = 16.0
    """The adapters' part of an output is multiplied by alpha / rank. There is no dropout in adapters, as in the whole model."""
    rank_stabilized: bool = False
    """true: the factor is alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    modules: list[str] = field(default_factory=lambda: ["*"])
    """Patterns of the linear layers that have adapters, in all layers that have them: self_attention.linear_qkv,
    self_attention.linear_proj, mlp.linear_fc1 (SwiGLU's gate and up), mlp.linear_fc2 (down), and the same two of mlp.shared_experts in a
    mixture of experts. Routed experts have no adapters."""
    train: list[str] = field(default_factory=list)
    """Patterns of further parameters that are trained beside the adapters, such as ["*norm.weight"] or ["output_layer.weight"]. Names are
    those of optimizer.rate_multipliers."""

    @property
    def scale(self) -> float:
        """The factor of B (A x)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def linear_names(model: ModelConfig) -> tuple[str, ...]:
    """Return the names of the linear layers that can have adapters, as they are inside a layer of the Transformer."""
    has_shared = model.experts.num_experts > 0 and model.experts.shared_ffn_hidden_size > 0
    has_dense = model.experts.num_experts == 0 or model.experts.num_dense_layers > 0
    return (*(name for name in _DENSE if has_dense or name.startswith("self_attention.")), *(_SHARED if has_shared else ()))


def is_adapted(name: str, adapters: AdaptersConfig) -> bool:
    """Tell whether a module, by its name inside a layer of the Transformer, has an adapter. Modules that cannot have adapters have no
    adapter, although a pattern such as ``*`` fits them."""
    can_have = adapters.rank > 0 and name in (*_DENSE, *_SHARED)
    return can_have and any(fnmatch.fnmatchcase(name, pattern) for pattern in adapters.modules)


def is_adapter(name: str) -> bool:
    """Tell whether a parameter is a matrix of an adapter."""
    return name.endswith((LORA_A, LORA_B))


def is_trained(name: str, adapters: AdaptersConfig) -> bool:
    """Tell whether a parameter, by its name in the whole model, is trained as far as the adapters say."""
    return adapters.rank == 0 or is_adapter(name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in adapters.train)
