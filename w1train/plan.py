"""The command that plans a run without a GPU: its memory, traffic and speed.

    w1train plan recipe=w1_4b gpus=512
    w1train plan recipe=w1_4b gpus=512 parallel.tensor=4 parallel.sequence=true --device h200 --json
    w1train plan recipe=llada_8b gpus=256 --search

The numbers come from closed forms (w1train/planning). The ranks of the layout are then built on meta tensors.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import json
import warnings
from functools import partial
from typing import TYPE_CHECKING

from w1train.config.errors import ConfigurationError, raise_if_any
from w1train.config.rules.validate import validate
from w1train.planning.arguments import PROGRAM, Request, parse
from w1train.registered_names import NAME_RULES
from w1train.runtime.command import command

if TYPE_CHECKING:
    from rich.console import Console

NUM_SHOWN = 15


@command("w1train plan")
def main(arguments: list[str]) -> int:
    """Run the command. Return the exit status: 0, 1 if the layout does not fit or cannot be built, 2 for bad input."""
    try:
        request = parse(arguments, NAME_RULES)
        return search(request) if request.search else plan(request)
    except ConfigurationError as error:
        print(f"{PROGRAM}: {error}\n\n'{PROGRAM} --help' explains the command line.", file=sys.stderr)
        return 2


def plan(request: Request) -> int:
    """Plan and build the layout of the request. Return the exit status."""
    raise_if_any(validate(request.config, request.num_gpus))
    # torch and megatron-core take seconds to import, which bad input and --help should not wait for.
    from w1train.planning.as_json import plan_as_dict
    from w1train.planning.meta_build import LayoutError, build_ranks
    from w1train.planning.plan_prediction import predict
    from w1train.planning.plan_tables import print_plan

    planned = predict(request.config, request.num_gpus, request.device, request.assumptions, request.document_length)
    try:
        build = build_ranks(request.config, request.num_gpus)
    except LayoutError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    if request.json:
        print(json.dumps(plan_as_dict(planned, build)))
    else:
        print_plan(console(), planned, build)
    return 0 if planned.fits else 1


def search(request: Request) -> int:
    """Rank the layouts that fit. Return the exit status."""
    from rich.console import Console

    from w1train.planning.as_json import search_as_dict
    from w1train.planning.plan_tables import print_search
    from w1train.planning.search import search_layouts
    from w1train.planning.search_progress import with_progress

    watched = partial(with_progress, console=Console(stderr=True))
    result = search_layouts(request.config, request.num_gpus, request.device, request.assumptions, request.document_length, watched)
    if request.json:
        print(json.dumps(search_as_dict(result, NUM_SHOWN)))
    else:
        print_search(console(), result, NUM_SHOWN, request.num_gpus)
    return 0 if result.plans else 1


def console() -> Console:
    """Return a console as wide as the terminal, or with 120 columns if the output is not a terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


if __name__ == "__main__":
    # GPUs of this machine must not be used, and the plan must be the same on every machine.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The user can do nothing about deprecations inside the libraries.
    warnings.filterwarnings("ignore", module=r"(torch|megatron)\b.*")
    sys.exit(main(sys.argv[1:]))
