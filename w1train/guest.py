"""Training and sampling in a process that belongs to somebody else, such as a notebook: a world of one rank, after which the process is as
it was before.

The commands change the state of their process, and then the process ends. Here the state is restored: process groups, megatron-core's
globals, the redirections from CUDA to the CPU, the environment, random numbers, deterministic kernels, the collection of garbage, and the
filters of warnings.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import re
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from w1train.config.errors import UserError
from w1train.config.schema import ParallelConfig
from w1train.runtime.distributed import Ranks, destroy, distributed
from w1train.runtime.megatron_on_cpu import import_megatron, redirected_cuda
from w1train.runtime.pulse import pulse

_MODULES_WITH_GLOBALS = ("megatron.core.parallel_state", "megatron.core.tensor_parallel.random")
_GLOBAL = re.compile("_[A-Z0-9_]+")
_OF_TRANSFORMER_ENGINE = "NVTE_"
"""Begins the variables that megatron-core and w1train/attention/backends/te.py set once, and transformer-engine reads in each pass."""

_lock = threading.RLock()
_open: list[Ranks] = []
"""This process in the world that is open, or nothing."""


@contextlib.contextmanager
def world_of_one(device: str | None = None) -> Iterator[Ranks]:
    """Make this process a world of one rank inside the block, and restore the state of the process at its end.

    One thread at a time is inside. A block inside of another block, as in a function that training calls, uses the world of the outer
    block.

    Args:
        device: "cpu", "cuda" or "cuda:N"; None = a GPU if there is one, and otherwise the CPU.

    Raises:
        UserError: there is no such device, or the caller has a process group of its own.
    """
    with _lock:
        if _open:
            yield _open[0]
            return
        chosen = _device(device)
        _require_no_groups()
        import_megatron()
        with _as_before(), redirected_cuda():
            if chosen is not None:
                torch.cuda.set_device(chosen)
            try:
                with distributed(ParallelConfig(), device=chosen) as ranks:
                    pulse.reset()
                    _open.append(ranks)
                    yield ranks
            finally:
                _open.clear()
                # distributed leaves them after an error. There is no other rank that the teardown would wait for.
                if dist.is_initialized():
                    destroy()


def _device(name: str | None) -> torch.device | None:
    """Return the device of a name; None = the commands' choice."""
    has_gpu = torch.cuda.is_available()
    valid = ["cuda", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))] if has_gpu else ["cpu"]
    if name is None or name in valid:
        return None if name in (None, "cuda") else torch.device(name)
    if name == "cpu":
        reason = "with a GPU in sight, megatron-core computes on it; start Python with CUDA_VISIBLE_DEVICES= (empty) to compute on the CPU"
    else:
        reason = f"this machine has: {', '.join(valid)}"
    raise UserError(f"device is {name!r}; {reason}")


def _require_no_groups() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"this process is one of {os.environ['WORLD_SIZE']} ranks (WORLD_SIZE), and the Python interface of w1train computes in one "
            "process; w1train train --nproc N starts a run on several ranks"
        )
    if dist.is_initialized():
        raise UserError(
            "torch.distributed has process groups in this process already, and w1train needs its own; call "
            "torch.distributed.destroy_process_group() first, or use another process"
        )


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Restore the state of the process at the end of the block."""
    with contextlib.ExitStack() as restored:
        restored.callback(gc.enable if gc.isenabled() else gc.disable)
        restored.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        restored.callback(_restore, os.environ, dict(os.environ))
        # A launcher makes the process a rank of its own world with these variables.
        os.environ.pop("RANK", None)
        os.environ.pop("LOCAL_RANK", None)
        if torch.cuda.is_available():
            restored.callback(torch.cuda.set_device, torch.cuda.current_device())
        for set_state, state in _random_states():
            restored.callback(set_state, state)
        for name in _MODULES_WITH_GLOBALS:
            restored.callback(vars(sys.modules[name]).update, _globals_of(name))
        restored.enter_context(warnings.catch_warnings())
        # The caller can do nothing about deprecations inside the libraries.
        warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
        yield


def _random_states() -> list[tuple[Any, Any]]:
    """Return pairs of the function that sets a state of random numbers, and the state."""
    states: list[tuple[Any, Any]] = [
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
        (torch.set_rng_state, torch.get_rng_state()),
    ]
    if torch.cuda.is_available():
        states.append((torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    return states


def _globals_of(module: str) -> dict[str, Any]:
    return {name: value for name, value in vars(sys.modules[module]).items() if _GLOBAL.fullmatch(name)}


def _restore(environment: MutableMapping[str, str], variables: Mapping[str, str]) -> None:
    for name in environment.keys() - variables.keys():
        if not name.startswith(_OF_TRANSFORMER_ENGINE):
            del environment[name]
    environment.update({name: value for name, value in variables.items() if not name.startswith(_OF_TRANSFORMER_ENGINE)})
