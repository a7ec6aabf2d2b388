"""Process groups (those of torch.distributed from torchrun's environment, and those of megatron-core for the layout), and errors that all
ranks share."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist

from w1train.config.errors import first_line
from w1train.config.schema import ParallelConfig
from w1train.runtime.device import select_device
from w1train.runtime.megatron_on_cpu import redirect_cuda_to_cpu
from w1train.runtime.rendezvous import store_of_this_start

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


@dataclass(slots=True, frozen=True)
class Ranks:
    """The place of this process in the layout."""

    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Tell whether this is rank 0, which writes configuration, summary, report and the console."""
        return self.rank == 0


@contextmanager
def distributed(
    parallel: ParallelConfig, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT, device: torch.device | None = None
) -> Iterator[Ranks]:
    """Make the process groups of the run, and tear them down if the block ends without an error. ``timeout`` is how long a collective waits
    for another rank, and ``device`` the device of this process (None = by its local rank).

    The caller has validated that the world size fits the layout. After an error the groups stay until the process ends: other ranks may be
    in a collective, and NCCL's teardown would wait for them. They see the error when the sockets of this process close.
    """
    redirect_cuda_to_cpu()
    device = device or select_device()
    initialize_process_group(device, timeout)
    initialize_model_parallel(parallel, timeout)
    yield current_ranks(device)
    destroy()


def initialize_process_group(device: torch.device, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Make the default group: NCCL for CUDA tensors and gloo for CPU tensors, or only gloo without CUDA.

    Raises:
        ConnectionError: the ranks have not met within the timeout.
    """
    if dist.is_initialized():
        return
    if "RANK" not in os.environ:
        # A plain `w1train train`: a world of one rank, which needs no port (another run could hold it).
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    options: dict[str, Any] = {"timeout": timeout, "device_id": device if device.type == "cuda" else None}
    try:
        if (start := store_of_this_start(timeout)) is not None:
            options.update(zip(("store", "rank", "world_size"), start, strict=True))
        dist.init_process_group(backend, **options)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(
            f"rank {os.environ['RANK']} could not meet the other ranks at {place} ({first_line(error)}). Check that rank 0 runs and can be "
            "reached there"
        ) from error


def initialize_model_parallel(parallel: ParallelConfig, timeout: datetime.timedelta = COLLECTIVE_TIMEOUT) -> None:
    """Make megatron-core's groups for the layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, int(timeout.total_seconds() // 60)),
    )
    # w1train draws nothing from this state (there is no dropout, and noise is counter-based), but sequence parallelism forks it.
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def current_ranks(device: torch.device) -> Ranks:
    """Read this process's place from megatron-core's groups."""
    from megatron.core import parallel_state

    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        device=device,
    )


def destroy() -> None:
    """Tear down the groups. Otherwise NCCL would warn at exit, and a second layout in this process would be refused."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # parallel_state keeps some of its groups. They would be freed when the next layout replaces them, and in a forked process, whose copy
    # of a group has no threads to join, that would take for ever.
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


# The words of gloo when the other side ends during an exchange or has ended before it, of NCCL, and of the store.
_LOST_CONNECTION = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "connectFullMesh failed"),
    *("remote process exited", "Did the remote server shutdown"),
)


def is_lost_connection(error: RuntimeError) -> bool:
    """Tell whether a collective failed because another rank has ended. Libraries show this only in the text of the error. NCCL often raises
    no error. The remaining ranks then wait until the launcher or their watchdog ends them."""
    return any(words in str(error) for words in _LOST_CONNECTION)


# Errors that all ranks raise when one rank meets them: mistakes of users, of files, of checkpoints.
_SHARED_ERRORS = (ValueError, OSError, RuntimeError)


def agreed[Error: BaseException](error: Error) -> Error:
    """Mark an error that all ranks raise alike, which rank 0 alone prints. An error without the mark is printed by the rank that met it."""
    error.__dict__["agreed"] = True
    return error


def is_agreed(error: BaseException) -> bool:
    """Return whether all ranks raise this error."""
    return error.__dict__.get("agreed", False)


def on_main_rank[Result](action: Callable[[], Result]) -> Result:
    """Do ``action`` on rank 0 alone, and return its result, or raise its exception (marked as agreed), on every rank.

    A mistake that only rank 0 can see (a run directory in use) then ends all ranks instead of leaving them waiting.
    """
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except _SHARED_ERRORS as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], BaseException):
        raise agreed(outcome[1])
    return cast(Result, outcome[0])


def all_or_none[Result](action: Callable[[], Result]) -> Result:
    """Do ``action``, which must not wait for other ranks, on every rank. Each rank gets its own result; or, if any rank meets an error, all
    raise the error of the lowest of these ranks (marked as agreed; a note names the ranks unless all met an error)."""
    result: Result | None = None
    failure: BaseException | None = None
    try:
        result = action()
    except _SHARED_ERRORS as error:
        failure = error
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    failed = [rank for rank, error in enumerate(failures) if error is not None]
    if failed:
        first = agreed(failures[failed[0]])
        if len(failed) < len(failures):
            first.add_note(f"met by rank {', '.join(map(str, failed))} of {len(failures)} ranks")
        raise first
    return cast(Result, result)


def on_every_rank[Result](action: Callable[[], Result]) -> list[Result]:
    """Do ``action`` as :func:`all_or_none` does, and return the results of all ranks, by rank."""
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, all_or_none(action))
    return results
