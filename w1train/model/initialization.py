"""Initial weights as a function of (seed, parameter name, element): the same under every parallel layout.

Each rank computes its own slice of each parameter. Runs in parallel layouts therefore start from exactly the weights of the single-process
run, without a broadcast, and replicas of a parameter are equal because their names are equal.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from w1train.config.schema import ModelConfig
from w1train.config.schema_adapters import LORA_A, LORA_B
from w1train.diffusion.philox import Purpose, random_words

# Words that are drawn at a time, so that the int64 intermediates take about 100 MB at most.
_CHUNK_ELEMENTS = 1 << 21
EXPERTS = ".experts."
"""A part of the names of routed experts' parameters."""
_SOFTPLUS_GIVES_1 = math.log(math.e - 1)


class Slice(NamedTuple):
    """The part of a matrix that a rank has: part ``rank`` of ``size`` equal parts."""

    rank: int
    size: int


def initialize_parameters(
    module: torch.nn.Module, model: ModelConfig, seed: int, *, tensor: Slice, expert_tensor: Slice, first_expert: int
) -> None:
    """Fill every parameter: N(0, init_std) for matrices (output projections divided by sqrt(2 num_layers), GPT-2), ones for
    norms, zeros for biases, for B of adapters and, with adaln_init "zero", for modulations; "identity" sets the gates' biases to one. All
    rates of noise are 1.

    Args:
        tensor: this rank's part of the matrices that tensor-parallel ranks share.
        expert_tensor: its part of each expert's matrices.
        first_expert: the number of its first expert. Experts with the same number are equal in every layout.
    """
    with torch.no_grad():
        for name, parameter in global_named_parameters(module):
            if parameter.is_meta:
                continue
            std = _standard_deviation(name, model)
            if "modulation." in name:
                parameter.zero_()
                if name.endswith("bias") and model.adaln_init == "identity" and "final_" not in name:
                    gates = parameter.view(6, model.hidden_size)
                    gates[2].fill_(1.0)
                    gates[5].fill_(1.0)
            elif name.endswith(LORA_B):
                # An adapter begins as zero, so that the model begins as its base (LoRA, arXiv 2106.09685, section 4.1).
                parameter.zero_()
            elif name.startswith("noise_rates."):
                parameter.fill_(_SOFTPLUS_GIVES_1)
            elif parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            elif EXPERTS in name:
                _fill_experts(parameter, name, std, seed, expert_tensor, first_expert)
            else:
                dimension = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
                if name.endswith(LORA_A):
                    std = _lora_a_deviation(parameter.shape[1] * (tensor.size if dimension == 1 else 1))
                _fill_normal(parameter, name, std, seed, dimension, tensor)


def _lora_a_deviation(num_inputs: int) -> float:
    """Return the standard deviation of an adapter's A. The paper says "Gaussian" without a deviation. It is our choice to take that of
    PEFT's default, which is uniform with this deviation."""
    return 1 / math.sqrt(3 * num_inputs)


def _fill_experts(parameter: Tensor, name: str, std: float, seed: int, part: Slice, first_expert: int) -> None:
    """Fill the matrices [E, 2, I, h] or [E, h, I] of a rank's experts, each under its expert's number in the whole layer."""
    for index, matrix in enumerate(parameter):
        own_name = name.replace(EXPERTS, f"{EXPERTS}{first_expert + index}.")
        is_gated = matrix.dim() == 3
        _fill_normal(matrix.flatten(0, -2), own_name, std, seed, 0 if is_gated else 1, part)


def global_named_parameters(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield each parameter with the name that it has in every layout: a layer has its number in the whole model, a tied head is the
    embedding."""
    for name, parameter in module.named_parameters():
        name = _global_name(module, name)
        if name.endswith("output_layer.weight") and getattr(parameter, "shared_embedding", False):
            name = name.replace("output_layer.weight", "embedding.word_embeddings.weight")
        yield name, parameter


def global_named_biases(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the numbers that balance the experts of each layer, float32 [E], with the names that they have in every layout."""
    for name, buffer in module.named_buffers():
        if name.endswith(".expert_bias"):
            yield _global_name(module, name), buffer


def _global_name(module: torch.nn.Module, name: str) -> str:
    match = re.match(r"(.*\blayers\.)(\d+)(\..*)", name)
    if match is None:
        return name
    layer = module.get_submodule(match.group(1) + match.group(2))
    return f"{match.group(1)}{layer.layer_number - 1}{match.group(3)}"


def _standard_deviation(name: str, model: ModelConfig) -> float:
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return model.init_std / math.sqrt(2 * model.num_layers)
    return model.init_std


def _fill_normal(parameter: Tensor, name: str, std: float, seed: int, dimension: int, part: Slice) -> None:
    """Fill a matrix row by row, from the rows' numbers in the whole matrix. A rank with some of the columns draws whole rows and keeps
    these columns.

    Args:
        dimension: the dimension in which ranks share the matrix; -1 = each rank has the whole matrix.
    """
    rows, columns = parameter.shape
    row_ids = torch.arange(rows, dtype=torch.int64, device=parameter.device)
    num_columns, first_column = columns, 0
    if dimension == 0:
        row_ids = _global_rows(row_ids, rows, "linear_fc1" in name, part)
    elif dimension == 1:
        num_columns, first_column = columns * part.size, columns * part.rank
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    step = max(1, _CHUNK_ELEMENTS // num_columns)
    for start in range(0, rows, step):
        words = random_words(key, row_ids[start : start + step], draw=0, purpose=Purpose.WEIGHT, num=num_columns)
        uniform = (words[:, first_column : first_column + columns].double() + 0.5) / 2**32
        normal = torch.erfinv(2 * uniform - 1) * (math.sqrt(2) * std)
        parameter[start : start + step].copy_(normal)


def _global_rows(rows: Tensor, num_rows: int, gated: bool, part: Slice) -> Tensor:
    """Return which rows of the whole matrix this rank has. SwiGLU's first matrix is [gate; up], and each rank has a part of both."""
    if not gated:
        return rows + part.rank * num_rows
    half = num_rows // 2
    return torch.where(rows < half, rows + part.rank * half, rows - half + (part.size + part.rank) * half)
