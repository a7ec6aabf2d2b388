"""megatron-core on machines without CUDA.

megatron-core names CUDA literally in many places (``device='cuda'``, ``torch.cuda.current_device()``, streams, type
strings). Its layers, schedules, optimizer and checkpoints run unchanged over gloo on the CPU once those names are
redirected, so that the code that is tested on a laptop is the code that runs on a cluster. All redirections are in this
file, and they are made only where there is no CUDA.

``redirect_cuda_to_cpu`` must run before megatron-core is used. It imports megatron-core first, because names that a module of megatron-core
imports from torch must be torch's own. A command keeps the redirections until its process ends. In a process that belongs to somebody else,
``redirected_cuda`` takes them back.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._device

logger = logging.getLogger(__name__)

# The functions themselves are wrapped. A TorchFunctionMode would not be active inside activation recomputation, where
# torch.ones(..., device="cuda") would still ask for CUDA.
_FACTORIES = (
    "ones", "zeros", "empty", "full", "tensor", "arange", "rand", "randn", "randint", "linspace",
    "ones_like", "zeros_like", "empty_like", "full_like", "rand_like", "randn_like", "as_tensor",
)  # fmt: skip

# Beginnings of the warnings of megatron-core's import about optional packages, of which the run itself says which it uses, and about
# megatron-core's own modules.
_ABOUT_ABSENT_PACKAGES = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "The following imports from `dynamic_context.py` will be removed",
)

_redirected = False
_originals: list[tuple[Any, str, Any]] = []
"""Owner, name and value of each attribute that was replaced, in order."""


class _NullStream:
    """A substitute for a CUDA stream or event. The CPU runs in order, and there is nothing to wait for."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def _nothing(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    wait_stream = wait_event = record = synchronize = wait = _nothing

    def record_event(self, *_args: Any) -> _NullStream:
        return self

    def query(self) -> bool:
        return True


def redirect_cuda_to_cpu() -> None:
    """Redirect the CUDA names that megatron-core uses to the CPU. Where there is CUDA, and in a second call, nothing is done."""
    global _redirected
    if _redirected or torch.cuda.is_available():
        return
    megatron_random = import_megatron().tensor_parallel.random
    _redirected = True
    # ``with torch.device("meta")`` recognises factory functions by identity, from a list that is made at its first use. The list is made
    # now, of torch's own functions, which the wrappers call.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        _replace(torch, name, _on_cpu(getattr(torch, name)))
    _redirect_tensor_methods()
    _redirect_cuda_module()
    _redirect_rng_tracker(megatron_random)
    _redirect_experts()
    _skip_collectives_of_one()
    _say_where_it_runs()


@functools.cache
def _say_where_it_runs() -> None:
    logger.info("no CUDA: megatron-core runs on the CPU")


@contextlib.contextmanager
def redirected_cuda() -> Iterator[None]:
    """Redirect CUDA's names inside the block, and take the redirections back at its end, unless they were made before it."""
    global _redirected
    was_redirected = _redirected
    redirect_cuda_to_cpu()
    try:
        yield
    finally:
        while _originals and not was_redirected:
            setattr(*_originals.pop())
        _redirected = was_redirected


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def import_megatron() -> Any:
    """Import megatron.core, without the warnings that the import prints where transformer-engine, apex and CUDA are absent."""
    extensions = logging.getLogger("torch.utils.cpp_extension")
    extensions.addFilter(_is_not_about_cuda)
    with warnings.catch_warnings(), contextlib.nullcontext() if torch.cuda.is_available() else _nothing_compiled():
        for beginning in _ABOUT_ABSENT_PACKAGES:
            warnings.filterwarnings("ignore", message=re.escape(beginning))
        import megatron.core
        import megatron.core.models.common.language_module.language_module
        import megatron.core.optimizer
    extensions.removeFilter(_is_not_about_cuda)
    return megatron.core


def _is_not_about_cuda(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Make torch.compile return functions as they are. megatron-core's import compiles fusions that only CUDA runs, and loading torch's
    compiler for them would take a third of the seconds in which a process on a CPU starts."""
    compiled = torch.compile
    torch.compile = lambda function=None, **_options: function if function is not None else lambda function: function
    try:
        yield
    finally:
        torch.compile = compiled


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return wrapped


def _redirect_tensor_methods() -> None:
    original_type, original_to = torch.Tensor.type, torch.Tensor.to

    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        # The distributed optimizer compares types with 'torch.cuda.FloatTensor', and refuses other parameters.
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):  # the device is the first argument, or is given by its name
            args = ("cpu", *args[1:])
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return original_to(self, *args, **kwargs)

    def identity(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        return self

    patches: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "type", tensor_type),
        (torch.Tensor, "to", tensor_to),
        (torch.Tensor, "cuda", identity),
        (torch.nn.Module, "cuda", identity),
    ]
    for owner, name, value in patches:
        _replace(owner, name, value)


def _redirect_cuda_module() -> None:
    @contextlib.contextmanager
    def device_context(*_args: Any, **_kwargs: Any) -> Iterator[None]:
        yield

    def returning(value: Any) -> Callable[..., Any]:
        # Each call makes a new function, because torch.compile refuses the same object under two names.
        return lambda *_args, **_kwargs: value

    stream = _NullStream()
    replacements: dict[str, Any] = {
        "current_device": returning(torch.device("cpu")),
        "set_device": returning(None),
        "synchronize": returning(None),
        "empty_cache": returning(None),
        "current_stream": returning(stream),
        "default_stream": returning(stream),
        "stream": device_context,
        "Stream": _NullStream,
        "Event": _NullStream,
        "manual_seed": torch.default_generator.manual_seed,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
    }
    for name, value in replacements.items():
        _replace(torch.cuda, name, value)


def _redirect_rng_tracker(megatron_random: Any) -> None:
    """Make the tracker of per-rank random states (dropout, recomputation) fork and restore the CPU's state."""

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    _replace(megatron_random, "_get_cuda_rng_state", get_state)
    _replace(megatron_random, "_set_cuda_rng_state", set_state)


def _redirect_experts() -> None:
    """Make the dispatchers of a mixture of experts take numbers of rows that are on the CPU already, and gather unequal parts, which gloo
    refuses."""
    from megatron.core.transformer.moe import token_dispatcher

    def on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", on_cpu)
    _replace(torch.distributed, "all_gather", _unequal_parts(torch.distributed.all_gather))


def _unequal_parts(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ``all_gather`` that sends parts of unequal length as parts of the largest length."""

    @functools.wraps(all_gather)
    def wrapped(outputs: list[torch.Tensor], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        longest = max(len(output) for output in outputs) if tensor.dim() else 0
        if all(output.shape == tensor.shape for output in outputs) or kwargs.get("async_op"):
            return all_gather(outputs, tensor, *args, **kwargs)
        padded = [output.new_zeros(longest, *output.shape[1:]) for output in outputs]
        own = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
        work = all_gather(padded, own, *args, **kwargs)
        for output, whole in zip(outputs, padded, strict=True):
            output.copy_(whole[: len(output)])
        return work

    return wrapped


def _skip_collectives_of_one() -> None:
    """Skip collectives over a single rank. NCCL does nothing there. gloo copies the whole buffer of gradients, and then of parameters, and
    wakes two threads for each sum over one rank, three times a micro-batch."""
    from megatron.core.distributed import param_and_grad_buffer

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        _replace(param_and_grad_buffer, name, unless_alone(getattr(param_and_grad_buffer, name)))
    for name in ("all_reduce", "broadcast"):
        _replace(torch.distributed, name, unless_alone_in_place(getattr(torch.distributed, name)))


def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``collective(output, input, group=...)`` that does nothing where the group is one rank and output is input already."""

    @functools.wraps(collective)
    def wrapped(output: torch.Tensor, input_: torch.Tensor, *, group: Any, async_op: bool = False, **kwargs: Any) -> Any:
        # An asynchronous caller waits for what is returned, and gets the real collective.
        if group.size() == 1 and not async_op and output.data_ptr() == input_.data_ptr():
            return None
        return collective(output, input_, group=group, async_op=async_op, **kwargs)

    return wrapped


def unless_alone_in_place(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``collective(tensor, ..., group=...)`` that does nothing in a group of one rank, where the result is the tensor as it is.
    (Wrong arguments are not noticed there.)"""

    @functools.wraps(collective)
    def wrapped(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Group and async_op are the third and fourth argument. A caller that does not give them by name gets the real collective, and so
        # does an asynchronous caller, which waits for what is returned.
        if len(args) < 2 and not kwargs.get("async_op") and _is_alone(kwargs.get("group")):
            return None
        return collective(tensor, *args, **kwargs)

    return wrapped


def _is_alone(group: Any) -> bool:
    """Return whether a group (None = the world) has one rank. The answer is False if this rank is not a member, and before there are
    groups."""
    group = group or torch.distributed.group.WORLD
    return isinstance(group, torch.distributed.ProcessGroup) and group.size() == 1
