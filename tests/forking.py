"""What forked ranks start from: their environment, and what their parent does once so that none of them has to."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from functools import cache
from typing import Any

from tests.huge_pages import use_huge_pages


@cache
def prepare_to_fork() -> None:
    """Do in this process what each rank would: 30 ms of imports and of looking for plugins, of a second that most ranks take."""
    if "torch.distributed" in sys.modules:
        # The first process group looks through all installed packages for a backend of its name.
        distributed = importlib.import_module("torch.distributed.distributed_c10d")
        distributed.BackendConfig(distributed.Backend("gloo"))
        _share_gloo_device(distributed)
    if "megatron.core.optimizer" in sys.modules:
        with warnings.catch_warnings(action="ignore"):  # of being experimental: nobody here uses it
            importlib.import_module("megatron.core.models.mimo.optimizer")  # imported by whoever builds an optimizer
    use_huge_pages()


def _share_gloo_device(distributed: Any) -> None:
    """One thread of a rank for the sockets of all its groups. By itself gloo starts one for each of the twenty that megatron-core makes:
    with these, a layout of eight ranks took 4.6 to 4.9 s of CPU, without 3.8 to 4.4 (three pairs, on two cores)."""
    plugin = distributed.Backend._plugins.get("GLOO")
    if plugin is None:
        return  # an older torch has no hook for it

    @cache
    def device(_process: int) -> Any:
        return distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")

    def create(group: Any, _backend_options: Any) -> Any:
        options = distributed.ProcessGroupGloo._Options()
        options._devices, options._timeout = [device(os.getpid())], group.timeout
        options.global_ranks_in_group = group.global_ranks_in_group
        return distributed.ProcessGroupGloo(group.store, group.group_rank, group.group_size, options)

    distributed.Backend._plugins["GLOO"] = plugin._replace(creator_fn=create)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # gloo otherwise looks up the host's name, which need not resolve.
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        # The record of the last collectives has the Python stack of each, and below a test that is deep.
        "TORCH_FR_BUFFER_SIZE": "0",
    }
