"""The command that builds a dataset's best-fit packing ahead of a run; otherwise the run builds it at its start.

w1train data build-packing data/train --sequence-length 4096
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import logging
from collections.abc import Sequence

from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.runtime.command import command, describe_error

_PROGRAM = "w1train data build-packing"


@command("w1train data build-packing")
def main(arguments: Sequence[str]) -> int:
    """Run the command.

    Returns:
        The exit status: 0 if the packing exists now, 1 if the file cannot be written, 2 if the dataset or an option is wrong.
    """
    parser = ArgumentParser(prog=_PROGRAM, description="Pack the documents of a dataset into samples by best fit.")
    parser.add_argument("prefix", help="the dataset: PREFIX.bin, PREFIX.idx")
    parser.add_argument("--sequence-length", type=int, required=True, help="data.sequence_length")
    parser.add_argument("--align", type=int, default=1, help="data.align (default: 1)")
    parser.add_argument("--eos", choices=("keep", "drop"), default="keep", help="data.eos (default: keep)")
    parser.add_argument("--seed", type=int, default=0, help="data.packing_seed (default: 0)")
    parser.add_argument(
        "--directory", default=None, help="data.cache_directory, if the run has one (default: the directory of the dataset)"
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**63:
        parser.error(f"--seed must be in [0, 2^63), not {options.seed}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # These modules import torch, which takes seconds, and for which --help and a wrong option should not wait.
    from w1train.data.packed.packing_index import PackingOptions, ensure_packing
    from w1train.data.sharded_dataset import open_dataset

    packing = PackingOptions(sequence_length=options.sequence_length, align=options.align, eos=options.eos, seed=options.seed)
    try:
        print(ensure_packing(open_dataset(options.prefix), packing, options.directory))
    except (UserError, ValueError) as error:
        print(f"{_PROGRAM}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        other = "" if options.directory is not None else "; --directory names another directory, for runs with this data.cache_directory"
        print(f"{_PROGRAM}: {describe_error(error)}{other}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
