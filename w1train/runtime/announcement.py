"""The first line of a run, before anything is read or imported that takes seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence

from w1train.runtime.version import __version__

_PRINTING = ("--cfg", "--help", "--list", "-h")
"""Flags of commands that print something and train nothing."""
ANNOUNCED = "W1TRAIN_ANNOUNCED"
"""The variable by which a launcher tells its ranks that it has printed the line."""


def announce(arguments: Sequence[str], num_ranks: int | None = None) -> None:
    """Print what is about to be trained, once for a run: on rank 0, or in the launcher.

    Args:
        arguments: the command line without the program's name.
        num_ranks: the number of ranks that a launcher starts; None = as many as the environment says.
    """
    flags = {word.partition("=")[0] for word in arguments if word.startswith("-")}
    if os.environ.get("RANK", "0") != "0" or ANNOUNCED in os.environ or flags & set(_PRINTING):
        return
    print(f"w1train {__version__}: {_describe(arguments)}, {_ranks(num_ranks)}; loading PyTorch and megatron-core", flush=True)


def _describe(arguments: Sequence[str]) -> str:
    recipes = [word.partition("=")[2] for word in arguments if word.startswith("recipe=")]
    return f"recipe {recipes[-1]}" if recipes else "no recipe"


def _ranks(num_ranks: int | None) -> str:
    number = str(num_ranks or os.environ.get("WORLD_SIZE", "1"))
    return "1 rank" if number == "1" else f"{number} ranks"
