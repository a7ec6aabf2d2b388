"""The attention that a run needs, and the cases that a backend cannot serve on any machine.

These limits belong to the configuration, not to the kernels, so that a configuration is refused before anything is imported or
built. w1train.attention.backends finds out what a machine lacks (a GPU, a package).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from w1train.config.schema import Config

VisibilityKind = Literal["documents", "causal", "extent", "scattered", "blocks"]
"""The kinds of visibility. documents: masked diffusion. causal: autoregressive. extent and scattered: the two kinds of annealing. blocks:
the two streams [x_t ; x_0] of block diffusion."""

_CUDNN_LARGEST_CHANNELS = 128
_CUDNN_OTHER_CHANNELS = 256
_TE_LARGEST_CHANNELS = 256
_FLEX_SMALLEST_CHANNELS = 16


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """The attention of one phase on one rank, which is the same for all micro-batches of the phase."""

    kind: VisibilityKind
    precision: Literal["fp32", "bf16"]
    num_heads: int
    """Query heads that a rank's kernel sees; under all_to_all, the heads after the exchange."""
    num_groups: int
    """Key/value heads that a rank's kernel sees."""
    channels: int
    """Channels of one head."""
    context_method: Literal["all_gather", "all_to_all"] | None = None
    """The exchange of keys between context-parallel ranks; None without context parallelism."""
    deterministic: bool = False

    @property
    def keys_travel(self) -> bool:
        """Tell whether a rank computes some query rows against the keys of all ranks."""
        return self.context_method == "all_gather"


def attention_case(config: Config, is_causal: bool) -> AttentionCase:
    """Return the case of a configuration at one of its stages. Sizes that other rules refuse raise no error here.

    Args:
        is_causal: whether the noise process is causal, as it says itself.
    """
    model, parallel = config.model, config.parallel
    heads = max(model.num_attention_heads, 1)
    exchanging = parallel.context > 1
    ranks = parallel.tensor * (parallel.context if exchanging and parallel.context_method == "all_to_all" else 1)
    return AttentionCase(
        kind=_kind(config, is_causal),
        precision=config.training.precision,
        num_heads=max(heads // max(ranks, 1), 1),
        num_groups=max((model.num_query_groups or heads) // max(ranks, 1), 1),
        channels=model.kv_channels or model.hidden_size // heads,
        context_method=parallel.context_method if exchanging else None,
        deterministic=config.training.deterministic,
    )


def _kind(config: Config, is_causal: bool) -> VisibilityKind:
    diffusion = config.diffusion
    if is_causal:
        return "causal"
    if diffusion.block_size is not None and diffusion.block_size < config.data.sequence_length:
        return "blocks"
    annealed: dict[str, VisibilityKind] = {"none": "documents", "extent": "extent", "random": "scattered"}
    return annealed[diffusion.attention_annealing]


def limit(name: str, case: AttentionCase) -> str | None:
    """Return the reason why no machine can serve the case with this backend; None if some machine can, or if only the backend knows."""
    return _LIMITS.get(name, _anything)(case)


def _cudnn(case: AttentionCase) -> str | None:
    if case.precision != "bf16":
        return "its kernels compute in bf16 (training.precision)"
    if case.channels % 8 or (case.channels > _CUDNN_LARGEST_CHANNELS and case.channels != _CUDNN_OTHER_CHANNELS):
        return f"its heads have a multiple of 8 channels up to {_CUDNN_LARGEST_CHANNELS}, or {_CUDNN_OTHER_CHANNELS}, not {case.channels}"
    return _only_intervals(case)


def _flex(case: AttentionCase) -> str | None:
    if case.channels < _FLEX_SMALLEST_CHANNELS:
        return f"its heads have at least {_FLEX_SMALLEST_CHANNELS} channels, not {case.channels}"
    return _only_intervals(case)


def _te(case: AttentionCase) -> str | None:
    if case.precision != "bf16":
        return "its fused kernels compute in bf16 (training.precision)"
    if case.channels % 8 or case.channels > _TE_LARGEST_CHANNELS:
        return f"its heads have a multiple of 8 channels up to {_TE_LARGEST_CHANNELS}, not {case.channels}"
    if case.keys_travel:
        return "it takes whole sequences, and all_gather leaves each rank a part of them (all_to_all does not)"
    return None


def _only_intervals(case: AttentionCase) -> str | None:
    if case.kind == "scattered":
        return "its masks are intervals of keys, and diffusion.attention_annealing=random scatters them"
    return None


def _anything(_case: AttentionCase) -> None:
    return None


_LIMITS: dict[str, Callable[[AttentionCase], str | None]] = {
    "cudnn": _cudnn,
    "flex": _flex,
    "te": _te,
    "sdpa": _anything,
    "reference": _anything,
}
