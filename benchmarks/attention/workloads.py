"""The masks that benchmarks.attention measures, the most important first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.attention.cpu import lognormal_documents
from w1train.attention.visibility import Visibility, block_diffusion_visibility, document_visibility
from w1train.config.rules.attention_limits import VisibilityKind

_SEED = 1234
BLOCK_SIZES = (1, 4, 32, 64, 4096)


@dataclass(slots=True, frozen=True)
class Workload:
    """The attention of one sample."""

    name: str
    length: int
    packed: bool
    """This flag tells whether the sample has documents of log-normal lengths instead of one document."""
    block_size: int | None
    """None = one stream (masked diffusion)."""

    @property
    def kind(self) -> VisibilityKind:
        """The kind of visibility that backends must support."""
        return "documents" if self.block_size is None else "blocks"

    def visibility(self, device: torch.device) -> Visibility:
        """Return the visibility, which is made on the device from document ids."""
        documents = self._documents().to(device)
        if self.block_size is None:
            return document_visibility(documents)
        return block_diffusion_visibility(documents, self.block_size, "document")

    def _documents(self) -> Tensor:
        if not self.packed:
            return torch.zeros((1, self.length), dtype=torch.int32)
        # Eight documents in 4096 tokens, whatever the sample's length: longer samples hold more documents, and not longer ones.
        median = min(self.length, 4096) // 8
        return lognormal_documents(self.length, median, torch.Generator().manual_seed(_SEED))


def workload(length: int, block_size: int | None, packed: bool) -> Workload:
    """Return a workload with its name."""
    mask = "masked diffusion" if block_size is None else f"blocks of {block_size}"
    return Workload(f"{mask}, {'packed' if packed else 'one document'}, {length}", length, packed, block_size)


def workloads(lengths: Sequence[int]) -> Iterator[Workload]:
    """Yield blocks of 32 and masked diffusion at the first length, then other block sizes at this length, then the other lengths."""
    first, *others = lengths
    for packed in (False, True):
        yield workload(first, 32, packed)
        yield workload(first, None, packed)
    for block_size in BLOCK_SIZES:
        if block_size != 32 and block_size <= first:
            yield workload(first, block_size, False)
            yield workload(first, block_size, True)
    for length in others:
        for packed in (False, True):
            yield workload(length, 32, packed)
            yield workload(length, None, packed)


def tiny_workloads() -> Iterator[Workload]:
    """Yield a small workload of every kind, for seconds on a CPU."""
    for packed in (False, True):
        yield workload(128, 32, packed)
        yield workload(128, None, packed)
