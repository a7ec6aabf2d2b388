"""Streams of a GPU for work that ends in a copy to the host: on the model's stream it would wait for all that the model has queued."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def side_stream(_name: str, device: torch.device) -> torch.cuda.Stream:
    """One for each name. Of high priority: its small kernels go first wherever the model's large ones leave room."""
    return torch.cuda.Stream(device, priority=-1)


def hand_over(value: Any, stream: torch.cuda.Stream) -> None:
    """Let the current stream read every tensor in ``value``, which was made on ``stream``."""
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    keep_for(current, tensors_in(value))


def keep_for(stream: torch.cuda.Stream, tensors: Iterable[Tensor]) -> None:
    """Their memory belongs to the stream that made them, which would give it to its next tensors as soon as the host forgets these, while
    ``stream`` may not have read them yet."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(stream)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor in an object, whatever it is nested in: some objects are other libraries' own."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
        names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
        for name in names:
            yield from tensors_in(getattr(value, name, None), seen)
