"""The check of the GPUs of this machine, without torch and without a driver: the number of their device files is known at once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from w1train.config.errors import Problem
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config

_VARIABLE = "CUDA_VISIBLE_DEVICES"
_DEVICES = Path("/dev")
_OTHER_GPUS = ("kfd", "dxg")
"""Device files of AMD's GPUs, and of GPUs under Windows. They do not tell how many GPUs there are."""


def device_rule(ranks_here: int) -> Rule:
    """Return the rule that this machine has a GPU for each of its ranks, and a GPU for each option that needs it."""
    return partial(_device_problems, ranks_here)


def num_gpus() -> int | None:
    """Return the number of GPUs that torch will find on this machine; None = not known."""
    if _torch_is_for_cpus():
        return 0
    visible = [name for name in os.environ.get(_VARIABLE, "").split(",") if name.strip() not in ("", "-1")]
    if _VARIABLE in os.environ and not visible:
        return 0
    names = os.listdir(_DEVICES)
    num_files = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in names)
    if any(name.startswith("MIG") for name in visible) or (num_files == 0 and any(name in _OTHER_GPUS for name in names)):
        return None
    return min(num_files, len(visible)) if visible else num_files


def _device_problems(ranks_here: int, config: Config) -> Iterator[Problem]:
    gpus = num_gpus()
    if gpus is None:
        return
    if 0 < gpus < ranks_here:
        visible = f" ({_VARIABLE}={os.environ[_VARIABLE]})" if _VARIABLE in os.environ else ""
        valid = f"at least one GPU for each of the {ranks_here} ranks of this machine"
        yield Problem("the GPUs of this machine", f"{gpus}{visible}", valid, f"start {gpus} ranks, or {_VARIABLE}= to train on the CPU")
    if gpus == 0:
        yield from _options_for_gpus(config)


def _options_for_gpus(config: Config) -> Iterator[Problem]:
    values = {
        "attention.backend": (config.attention.backend, config.attention.backend in ("cudnn", "flex", "te"), "auto"),
        "training.fp8": (config.training.fp8, config.training.fp8 != "none", "none"),
        "parallel.tp_comm_overlap": ("true", config.parallel.tp_comm_overlap, "false"),
    }
    for key, (value, needs_gpu, instead) in values.items():
        if needs_gpu:
            yield Problem(key, f"{value}, and no GPU", "an NVIDIA GPU that torch can use", f"{key}={instead} on the CPU")


def _torch_is_for_cpus() -> bool:
    """Tell whether torch is built without CUDA, by its file of versions: its import would take seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    versions = Path(spec.origin).with_name("version.py")
    return versions.is_file() and re.search(r"^cuda\b[^=]*= None$", versions.read_text(encoding="utf-8"), re.MULTILINE) is not None
