"""A micro-batch of packed samples, and the list of its fields.

Shapes: b = samples of the micro-batch, l = sequence_length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from torch import Tensor, full_like

PADDING_SAMPLE = -1
"""The sample index of a sample that consists of padding."""

Sample = dict[str, NDArray[Any]]
"""One packed sample: the fields of ``PackedBatch`` that have a value for each token, by name, as arrays of shape [l]."""


@dataclass(frozen=True, slots=True)
class BatchField:
    """The description of one field of ``PackedBatch``."""

    name: str
    per: Literal["token", "sample"]
    """The field has a value for each token, with the shape [b, l], or for each sample, with the shape [b]."""
    dtype: np.dtype
    padding: int
    """The value on padding."""

    def shape(self, batch_size: int, length: int) -> tuple[int, ...]:
        """Return the shape of the field in a batch of ``batch_size`` samples of ``length`` tokens."""
        return (batch_size, length) if self.per == "token" else (batch_size,)


def _per_token(dtype: DTypeLike, padding: int) -> dict[str, Any]:
    return {"per": "token", "dtype": np.dtype(dtype), "padding": padding}


def _per_sample(dtype: DTypeLike, padding: int) -> dict[str, Any]:
    return {"per": "sample", "dtype": np.dtype(dtype), "padding": padding}


@dataclass(slots=True)
class PackedBatch:
    """Packed samples before any noise: what the data path hands to the diffusion process.

    This is the only list of a batch's fields. Whatever handles a batch as a whole (collation, worker processes, DALI, copies to a
    device, padding) takes it from :meth:`fields`, so a new field needs an entry here and the code that computes its values.
    """

    tokens: Tensor = field(metadata=_per_token(np.int64, padding=0))
    """int64 [b, l]. Nothing may depend on the values on padding."""
    document_ids: Tensor = field(metadata=_per_token(np.int32, padding=-1))
    """int32 [b, l]: ordinal of the document inside its sample, ascending from 0; -1 on padding, which follows the last document and,
    with data.align, also separates documents."""
    positions: Tensor = field(metadata=_per_token(np.int32, padding=0))
    """int32 [b, l]: position inside the document, which restarts at 0 with each document; 0 on padding."""
    sample_indices: Tensor = field(metadata=_per_sample(np.int64, padding=PADDING_SAMPLE))
    """int64 [b]: index of the sample in the run's global order, which never repeats, not even in a later epoch."""
    may_be_noised: Tensor = field(default=None, metadata=_per_token(np.bool_, padding=False))
    """bool [b, l]: True where the token may be noised, and False on padding. The model sees a token that may not be noised (of a prompt, an
    image or fill) unchanged, and the token does not count in the loss. By default all tokens of documents may be noised."""

    def __post_init__(self) -> None:
        if self.may_be_noised is None:
            self.may_be_noised = self.document_ids >= 0

    @staticmethod
    @cache
    def fields() -> tuple[BatchField, ...]:
        """Return the description of every field, in the order of the constructor's arguments."""
        return tuple(BatchField(entry.name, **entry.metadata) for entry in dataclasses.fields(PackedBatch))

    def map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """Return a batch whose tensors are the results of ``change`` on this batch's tensors."""
        return PackedBatch(**{field.name: change(getattr(self, field.name)) for field in self.fields()})

    def padding_like(self) -> PackedBatch:
        """Return a batch of padding with the shapes, types and device of this batch."""
        return PackedBatch(**{field.name: full_like(getattr(self, field.name), field.padding) for field in self.fields()})


def padding_arrays(batch_size: int, length: int) -> dict[str, NDArray[Any]]:
    """Return an array of padding for each field of a batch, by name."""
    return {field.name: np.full(field.shape(batch_size, length), field.padding, field.dtype) for field in PackedBatch.fields()}


def padding_sample(length: int) -> Sample:
    """Return a sample of ``length`` tokens that consists of padding."""
    return {field.name: np.full(length, field.padding, field.dtype) for field in PackedBatch.fields() if field.per == "token"}
