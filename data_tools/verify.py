"""The command that compares datasets with the hashes in their manifests: w1train data verify PREFIX..."""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import logging
from collections.abc import Sequence
from pathlib import Path

from data_tools.command_runner import run_command
from w1train.config.argument_parser import ArgumentParser
from w1train.data.indexed import PACKING_SUFFIX, bin_path
from w1train.runtime.command import command

logger = logging.getLogger(__name__)


@command("w1train data verify")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status, which is 1 if a dataset is damaged."""
    parser = ArgumentParser(
        prog="w1train data verify",
        description="Read the files of datasets and compare them with the hashes in their manifests, and compare the best-fit packings in "
        "the same directory with the hashes that they contain. Training does this by itself for files of up to 4 GiB.",
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="a dataset that w1train data tokenize wrote, or one packing, *.pack")
    options = parser.parse_args(arguments)
    return run_command(lambda: _verify(options.prefixes))


def _verify(prefixes: Sequence[str]) -> None:
    # These modules import torch, which takes seconds, and for which --help and a wrong option should not wait.
    from w1train.data.packed.packing_index import packings_of, verify_packing_file
    from w1train.data.sharded_dataset import open_dataset

    for prefix in prefixes:
        packings = [Path(prefix)]
        if not prefix.endswith(PACKING_SUFFIX) or bin_path(prefix).exists():
            dataset = open_dataset(prefix)
            dataset.verify_hashes()
            logger.info("%s is as it was written%s", prefix, ", its .may_be_noised file included" if dataset.limits_noise else "")
            packings = packings_of(prefix)
        for packing in packings:
            verify_packing_file(packing)
            logger.info("%s is as it was written", packing)


if __name__ == "__main__":
    sys.exit(main())
