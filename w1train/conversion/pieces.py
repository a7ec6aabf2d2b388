"""The division of a parameter into the tensors that a file stores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from w1train.conversion.tensors import Parameter


def stored_pieces(parameter: Parameter, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors that a parameter is made of, from its rows.

    Args:
        rows: [rows of the parameter, ...]: the parameter, or something else that has its rows, such as B of an adapter.
    """
    grouped = rows.view(parameter.num_groups, -1, *rows.shape[1:])
    pieces = iter(grouped.split([part.num_rows // parameter.num_groups for part in parameter.parts], dim=1))
    for name, parts in itertools.groupby(parameter.parts, key=lambda part: part.tensor):
        yield name, torch.cat([next(pieces).reshape(part.num_rows, *rows.shape[1:]) for part in parts])
