"""The files of adapters in the format of PEFT: adapter_config.json and adapter_model.safetensors.

A linear layer that is several tensors in the exported family (queries, keys and values; gate and up) has the same A for each of them, and
each has its rows of B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from w1train.config.errors import UserError, show
from w1train.config.schema import Config
from w1train.config.schema_adapters import LORA_A, LORA_B, AdaptersConfig
from w1train.conversion.pieces import stored_pieces
from w1train.conversion.sources import CheckpointDirectory
from w1train.conversion.tensors import Parameter
from w1train.conversion.writing import Entry, write_file
from w1train.runtime.files import write_text

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
_PREFIX = "base_model.model."
_NAME_IN_LAYER = 3
"""The place of a module's own name behind ``model.layers.N``."""


def write_adapters(
    directory: Path, config: Config, source: CheckpointDirectory, parameters: Sequence[Parameter], *, is_causal: bool
) -> int:
    """Write both files, and return the number of parameters in them.

    Args:
        parameters: the parameters of the base, with the names of the exported family.
        is_causal: the family's class attends causally and generates text, so that PEFT has a task type for it.

    Raises:
        UserError: the run has no adapters, or has trained other parameters too.
    """
    adapters = config.adapters
    if not adapters.rank:
        raise UserError("adapters.rank is 0: this run has no adapters that could be exported alone; export it without --adapters")
    if adapters.train:
        raise UserError(
            f"adapters.train is {show(adapters.train)}: the adapters alone are not what this run has trained; export it without --adapters"
        )
    tensors = dict(_tensors(source, parameters))
    entries = [Entry(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    write_file(directory / WEIGHTS_FILE, entries, iter(tensors.items()))
    modules = {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in tensors}
    described = _description(adapters, modules, config.training.initial_weights, "CAUSAL_LM" if is_causal else None)
    write_text(directory / CONFIG_FILE, json.dumps(described, indent=2) + "\n")
    return sum(tensor.numel() for tensor in tensors.values())


def _tensors(source: CheckpointDirectory, parameters: Sequence[Parameter]) -> Iterator[tuple[str, Tensor]]:
    for parameter in parameters:
        linear = parameter.name.removesuffix(".weight")
        if linear + LORA_A not in source.tensors:
            continue
        first, last = (
            source.read(name, tuple(slice(0, size) for size in source.tensors[name])) for name in (linear + LORA_A, linear + LORA_B)
        )
        for name, rows in stored_pieces(parameter, last):
            module = _PREFIX + name.removesuffix(".weight")
            yield f"{module}.lora_A.weight", first
            yield f"{module}.lora_B.weight", rows


def _description(adapters: AdaptersConfig, modules: set[str], base: str | None, task: str | None) -> dict[str, Any]:
    """Return what adapter_config.json says.

    Args:
        modules: the names of all modules with adapters. PEFT adapts modules whose names end with one of the target's names, and the names
            with that of the parent tell an MLP from the routed experts.
    """
    return {
        "peft_type": "LORA",
        "task_type": task,
        # PEFT opens this directory, so it can only be one of Hugging Face, and not a run.
        "base_model_name_or_path": base if base is not None and (Path(base) / "config.json").is_file() else None,
        "r": adapters.rank,
        "lora_alpha": int(adapters.alpha) if adapters.alpha == int(adapters.alpha) else adapters.alpha,
        "use_rslora": adapters.rank_stabilized,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({".".join(module.split(".")[_NAME_IN_LAYER:]) for module in modules}),
    }
