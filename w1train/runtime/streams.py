"""GPU streams for work that ends in a copy to the host. On the model's stream this work would wait for all that the model has queued."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def side_stream(_name: str, device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a name. It has high priority: its small kernels run first wherever the model's large kernels leave room."""
    return torch.cuda.Stream(device, priority=-1)


def hand_over(value: Any, stream: torch.cuda.Stream) -> None:
    """Let the current stream read every tensor in ``value``, which was made on ``stream``."""
    current = torch.cuda.current_stream()
    current.wait_stream(stream)
    keep_for(current, tensors_in(value))


def keep_for(stream: torch.cuda.Stream, tensors: Iterable[Tensor]) -> None:
    """Keep the memory of tensors until ``stream`` has read them. The memory belongs to the stream that made the tensors, and would
    otherwise be given to that stream's next tensors as soon as the host drops these."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(stream)


def tensors_in(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield every tensor in an object, in its lists, tuples, dictionaries and attributes at any depth: some of the objects are other
    libraries'."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, seen)
    elif hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
        names = [*getattr(value, "__dict__", {}), *getattr(type(value), "__slots__", ())]
        for name in names:
            yield from tensors_in(getattr(value, name, None), seen)
