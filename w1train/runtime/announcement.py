"""The first line of a run, before anything is read or imported that takes seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence

from w1train.runtime.version import __version__

_PRINTING = ("--cfg", "--help", "--list", "-h")
"""Flags of commands that print something and train nothing."""
ANNOUNCED = "W1TRAIN_ANNOUNCED"
"""The variable by which a launcher tells its ranks that it has printed the line."""


def announce(arguments: Sequence[str]) -> None:
    """Print what is about to be trained, once for a run: on rank 0, or in the launcher. ``arguments`` are the command line without the
    program's name. They have not been checked yet."""
    flags = {word.partition("=")[0] for word in arguments if word.startswith("-")}
    if os.environ.get("RANK", "0") != "0" or ANNOUNCED in os.environ or flags & set(_PRINTING):
        return
    print(f"w1train {__version__}: {_describe(arguments)}, {_ranks(arguments)}; loading PyTorch and megatron-core", flush=True)


def _describe(arguments: Sequence[str]) -> str:
    recipes = [word.partition("=")[2] for word in arguments if word.startswith("recipe=")]
    return f"recipe {recipes[-1]}" if recipes else "no recipe"


def _ranks(arguments: Sequence[str]) -> str:
    words = " ".join(arguments).replace("--nproc=", "--nproc ").split()
    number = words[words.index("--nproc") + 1] if "--nproc" in words[:-1] else os.environ.get("WORLD_SIZE", "1")
    return "1 rank" if number == "1" else f"{number} ranks"
