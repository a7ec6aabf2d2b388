"""Random packs under every kind of visibility, and heads to go with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.attention.test_visibility import packs
from w1train.attention.visibility import (
    Visibility,
    block_diffusion_visibility,
    causal_visibility,
    document_visibility,
    scattered_visibility,
)
from w1train.config.rules.attention_limits import AttentionCase, VisibilityKind

# By name: (kind of the case, document ids and a size -> visibility).
VARIANTS: dict[str, tuple[VisibilityKind, Callable[[Tensor, int], Visibility]]] = {
    "documents": ("documents", lambda documents, _size: document_visibility(documents)),
    "causal": ("causal", lambda documents, _size: causal_visibility(documents)),
    "extent": ("extent", lambda documents, size: causal_visibility(documents, extent=size)),
    "blocks": ("blocks", lambda documents, size: block_diffusion_visibility(documents, size, "document")),
    "blocks of the sample": ("blocks", lambda documents, size: block_diffusion_visibility(documents, size, "sample")),
    "blocks, clean causal": ("blocks", lambda documents, size: block_diffusion_visibility(documents, size, "document", "token_causal")),
    "blocks, both causal": (
        "blocks",
        lambda documents, size: block_diffusion_visibility(documents, size, "document", "token_causal", "causal"),
    ),
    # What no objective draws but context parallelism can make: rows in any order, more keys than rows.
    "any intervals": ("blocks", lambda documents, size: _any_intervals(documents, size)),
    "scattered": (
        "scattered",
        lambda documents, size: scattered_visibility(documents, 1 / (1 + size), 0, torch.arange(len(documents))),
    ),
}


def _any_intervals(documents: Tensor, size: int) -> Visibility:
    num_samples, length = documents.shape
    generator = torch.Generator().manual_seed(size)
    endpoints = torch.randint(0, length + size + 1, (5, num_samples, length), generator=generator, dtype=torch.int32).sort(dim=0).values
    return Visibility(endpoints * (documents >= 0), length + size)


@st.composite
def visibilities(draw: st.DrawFn, *, kinds: tuple[str, ...] = tuple(VARIANTS)) -> tuple[VisibilityKind, Visibility]:
    """(kind, visibility) of a random pack, padding rows and samples of padding alone included."""
    kind, make = VARIANTS[draw(st.sampled_from(kinds))]
    return kind, make(draw(packs()), draw(st.integers(1, 45)))


def long_pack(length: int, kind: str, *, seed: int = 0, block_size: int = 32, padding: int = 40) -> Visibility:
    """Two samples of unaligned documents, the first with padding at its end."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.zeros((2, length), dtype=torch.int32)
    starts[:, torch.randint(1, length, (6,), generator=generator)] = 1
    starts[1, torch.randint(1, length, (3,), generator=generator)] = 1
    documents = starts.cumsum(1).int()
    if padding:
        documents[0, -padding:] = -1
    return VARIANTS[kind][1](documents, block_size)


def inputs_of(visibility: Visibility, case: AttentionCase, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Random query, key and value, [b, n or g, rows or keys, d], that ask for gradients."""
    _, num_samples, num_rows = visibility.endpoints.shape
    shapes = [(case.num_heads, num_rows), (case.num_groups, visibility.num_keys), (case.num_groups, visibility.num_keys)]
    tensors = (torch.randn((num_samples, *shape, case.channels), dtype=dtype, device=device) for shape in shapes)
    return [tensor.requires_grad_() for tensor in tensors]


def to_device(visibility: Visibility, device: str) -> Visibility:
    """The same there."""
    scattered = None if visibility.scattered is None else visibility.scattered.to(device)
    return Visibility(visibility.endpoints.to(device), visibility.num_keys, scattered)
