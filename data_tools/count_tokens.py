"""The command that counts how often each token id occurs in datasets: w1train data count-tokens PREFIX... --vocab-size N --output FILE

Masked diffusion by information (diffusion.objective=per_id_masked) reads the file.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data_tools.command_runner import run_command
from data_tools.progress import ByteProgress
from w1train.config.argument_parser import ArgumentParser
from w1train.data.dataset import TokenDataset
from w1train.data.dataset_manifest import dataset_paths
from w1train.data.sharded_dataset import open_dataset
from w1train.runtime.command import command
from w1train.runtime.files import replace_file
from w1train.runtime.output_files import require_writable

logger = logging.getLogger(__name__)

_TOKENS_AT_ONCE = 1 << 20


@command("w1train data count-tokens")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="w1train data count-tokens",
        description="Count how often each token id occurs in datasets, and write the counts as a NumPy file. The option "
        "diffusion.token_counts of a run takes this file.",
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="a dataset that w1train data tokenize wrote")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="number of ids to count: model.vocab_size of the run")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write, *.npy")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file, but never an input")
    options = parser.parse_args(arguments)
    return run_command(lambda: _write(options))


def _write(options: argparse.Namespace) -> None:
    datasets = [open_dataset(prefix, vocab_size=options.vocab_size) for prefix in options.prefixes]
    inputs = [path for dataset in datasets for part in dataset.parts for path in dataset_paths(part.prefix)]
    require_writable([options.output], inputs, overwrite=options.overwrite)
    counts = sum((count(dataset, options.vocab_size) for dataset in datasets), start=np.zeros(options.vocab_size, np.int64))
    with replace_file(options.output) as file:
        np.save(file, counts, allow_pickle=False)
    used = int((counts > 0).sum())
    logger.info("%s has the counts of %s tokens; %s of %s ids occur", options.output, f"{counts.sum():,}", f"{used:,}", f"{len(counts):,}")


def count(dataset: TokenDataset, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each id occurs in a dataset, int64 [vocab_size].

    Raises:
        DatasetError: the dataset has an id of vocab_size or above.
    """
    counts = np.zeros(vocab_size, np.int64)
    with ByteProgress("counting", dataset.num_tokens) as progress:
        for start in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
            stop = min(start + _TOKENS_AT_ONCE, dataset.num_tokens)
            counts += np.bincount(dataset.read(start, stop), minlength=vocab_size)
            progress.update(stop)
    return counts


if __name__ == "__main__":
    sys.exit(main())
