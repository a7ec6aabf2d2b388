"""The copy of stored weights into the parameters of this rank's stages, slice by slice.

Shapes: r = rows of a parameter on this rank, h = hidden size.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.config.errors import UserError, listing, raise_if_any
from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import is_adapter
from w1train.conversion.model_fit import model_problems
from w1train.conversion.sources import TensorSource
from w1train.conversion.tensors import EMBEDDING, HEAD, Parameter
from w1train.model.initialization import EXPERTS, Slice, global_named_biases, global_named_parameters

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 8192
_MOST_NAMES = 8
_LAYER = re.compile(r"model\.layers\.(\d+)\..*")


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Stored weights, and the parameters of the model that will take them."""

    origin: str
    """Name of the file or directory, for messages."""
    model: ModelConfig
    """The model that the weights belong to."""
    source: TensorSource
    parameters: tuple[Parameter, ...]
    """Parameters of the model that will be filled, with the names of their parts in the source."""


def require_fit(stored: StoredModel, model: ModelConfig) -> None:
    """Check that stored weights fit a model, without reading weights.

    Raises:
        ConfigurationError: the configured model is not the stored model; every key that differs is named with the value that would fit.
        UserError: tensors are missing, unexpected or of another shape than the stored model's configuration says.
    """
    raise_if_any(model_problems(model, stored.model, stored.origin))
    expected: dict[str, tuple[int, ...]] = {}
    for parameter in stored.parameters:
        if parameter.is_conditioning and stored.model.conditioning == "none":
            continue
        for part in parameter.parts:
            rows = stored.model.vocab_size if parameter.is_vocabulary else part.num_rows
            start = expected[part.tensor][0] if part.tensor in expected else 0
            expected[part.tensor] = (start + rows, *parameter.shape[1:])
    found = stored.source.tensors
    predictors = {name for name in found.keys() - expected.keys() if _is_of_predictor(name, found, stored.model)}
    if predictors:
        logger.info("%s: left out %s (layers that predict further tokens)", stored.origin, _some(predictors))
    found = {name: shape for name, shape in found.items() if name not in predictors}
    ignored = {name for name in found.keys() - expected.keys() if _is_superfluous(name, model)}
    if ignored:
        logger.info("%s: left out %s (values that are computed, or a copy of the embedding)", stored.origin, _some(ignored))
    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing: {_some(missing)}")
    if unexpected := found.keys() - expected.keys() - ignored:
        problems.append(f"unexpected: {_some(unexpected)}")
    wrong = [name for name, shape in expected.items() if found.get(name, shape) != shape]
    problems += [f"{name} is {list(found[name])}, not {list(expected[name])} as its configuration says" for name in wrong[:_MOST_NAMES]]
    if problems:
        raise UserError(f"the tensors of {stored.origin} are not those of its configuration: {'; '.join(problems)}")


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return listing(names[:_MOST_NAMES]) + more


def _is_superfluous(name: str, model: ModelConfig) -> bool:
    """Tell whether a stored tensor is not needed: old files hold the rotary table of every layer, and some hold a tied head as well as the
    embedding."""
    return name.endswith("rotary_emb.inv_freq") or (model.tie_embeddings and name == "lm_head.weight")


def _is_of_predictor(name: str, found: Mapping[str, object], model: ModelConfig) -> bool:
    """Tell whether a tensor belongs to a layer behind the last layer that predicts further tokens (Ling's multi-token prediction)."""
    layer = _LAYER.fullmatch(name)
    return layer is not None and int(layer.group(1)) >= model.num_layers and f"model.layers.{layer.group(1)}.eh_proj.weight" in found


@dataclass(frozen=True, slots=True)
class RankSlices:
    """The parts of parameters that a rank has."""

    tensor: Slice
    """This rank's part of the matrices that tensor-parallel ranks share."""
    expert_tensor: Slice
    """This rank's part of each expert's matrices."""
    first_expert: int
    """The number of the first expert of the rank."""


@torch.no_grad()
def fill(stored: StoredModel, stages: Sequence[torch.nn.Module], model: ModelConfig, slices: RankSlices) -> None:
    """Write every parameter of this rank's stages once. Before the call, parameters hold their initial values.

    Besides the parameters, one slice is in memory at a time. Parameters of adaLN keep their initial values if the source has no adaLN.
    New rows of the vocabulary are made from the source's rows (``_fill_new_rows``).

    Raises:
        OSError, UserError: a file cannot be read.
    """
    by_name = {parameter.name: parameter for parameter in stored.parameters}
    for stage in stages:
        written: set[str] = set()
        for name, target, dimension, part in _targets(stage, slices):
            assert name not in written, f"{name} is twice in one stage"
            written.add(name)
            if is_adapter(name) and name not in by_name:
                continue  # the source has no adapters, and those of the model begin as zero
            parameter = by_name[name]
            if parameter.is_conditioning and stored.model.conditioning == "none":
                continue
            if parameter.is_vocabulary:
                assert dimension == 0
                _fill_vocabulary(target, parameter, stored, model, part.rank)
            else:
                _fill_one(target, parameter, stored.source, dimension, part)


def _targets(stage: torch.nn.Module, slices: RankSlices) -> Iterator[tuple[str, Tensor, int | None, Slice]]:
    """Yield what is written: the name, the tensor, the dimension that ranks share (None = each rank has all) and this rank's part. Each
    expert's matrices are written alone, so that a rank reads those of its experts and no others."""
    for name, target in [*global_named_parameters(stage), *global_named_biases(stage)]:
        if EXPERTS not in name:
            yield name, target, target.partition_dim if getattr(target, "tensor_model_parallel", False) else None, slices.tensor
            continue
        for index, matrix in enumerate(target):
            is_gated = matrix.dim() == 3
            own_name = name.replace(EXPERTS, f"{EXPERTS}{slices.first_expert + index}.")
            yield own_name, matrix.flatten(0, -2), 0 if is_gated else 1, slices.expert_tensor


def _fill_one(target: Tensor, parameter: Parameter, source: TensorSource, dimension: int | None, part_of_rank: Slice) -> None:
    """Write a parameter by interleaving this rank's rows (or columns) of each part."""
    rank, size = part_of_rank
    splits = size if dimension == 0 else 1
    num_groups = max(1, parameter.num_groups // splits)
    rows = target.view(num_groups, -1, *target.shape[1:])
    filled = 0
    for part in parameter.parts:
        count = part.num_rows // splits
        start = part.start + (rank * count if dimension == 0 else 0)
        box = [slice(start, start + count), *(slice(0, extent) for extent in target.shape[1:])]
        if dimension == 1:
            box[1] = slice(rank * target.shape[1], (rank + 1) * target.shape[1])
        piece = source.read(part.tensor, tuple(box))
        per_group = count // num_groups
        rows[:, filled : filled + per_group].copy_(piece.view(num_groups, per_group, *target.shape[1:]))
        filled += per_group
    assert filled == rows.shape[1], f"{parameter.name}: {filled} of {rows.shape[1]} rows a group are written"


def _fill_vocabulary(target: Tensor, parameter: Parameter, stored: StoredModel, model: ModelConfig, rank: int) -> None:
    """Write this rank's rows [rank * r, (rank + 1) * r): first the rows that the source has, then new rows."""
    (part,) = parameter.parts
    first, num_rows = rank * len(target), len(target)
    num_known = min(max(stored.model.vocab_size - first, 0), num_rows)
    columns = slice(0, target.shape[1])
    if num_known:
        target[:num_known].copy_(stored.source.read(part.tensor, (slice(first, first + num_known), columns)))
    if num_known < num_rows:
        _fill_new_rows(target[num_known:], parameter.name, part.tensor, stored, model)


def _fill_new_rows(rows: Tensor, name: str, tensor: str, stored: StoredModel, model: ModelConfig) -> None:
    """Write rows for tokens that the source does not have. They are the same under every layout.

    Embedding: the mean row plus noise with the standard deviation of the rows, so that a new row has an ordinary norm. The mean row alone
    has a small norm, which RMSNorm scales up, and its gradient explodes (LLaDA2.0 observed this for a mask row near zero). Noise of
    init_std gives a norm that is too small or too large where trained rows have another scale. A tied head shares these rows.
    Head: the mean row, whose logit is the mean logit. By convexity, a new token gets at most an average token's share of the softmax.
    """
    mean, deviation = _row_statistics(stored, tensor, rows.shape[1])
    if name == EMBEDDING:
        # The rows still hold their initial values: standard normal noise times init_std, which is a function of seed and row.
        noise = rows.to(torch.float64) * (deviation / model.init_std)
        rows.copy_(mean.to(rows.device) + noise)
    else:
        assert name == HEAD
        rows.copy_(mean.to(rows.device).expand_as(rows))


def _row_statistics(stored: StoredModel, tensor: str, hidden_size: int) -> tuple[Tensor, float]:
    """Return the mean row, float64 [h], and the root mean square of the elements' distance from it. The table is read in pieces."""
    total, squares, num_rows = torch.zeros(hidden_size, dtype=torch.float64), 0.0, stored.model.vocab_size
    for start in range(0, num_rows, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, num_rows)
        stretch = stored.source.read(tensor, (slice(start, stop), slice(0, hidden_size))).double()
        total += stretch.sum(dim=0)
        squares += float(stretch.square().sum())
    mean = total / num_rows
    variance = squares / (num_rows * hidden_size) - float(mean.square().mean())
    return mean, max(variance, 0.0) ** 0.5
