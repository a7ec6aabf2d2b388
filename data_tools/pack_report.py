"""The command that shows what packing does to a dataset's documents: w1train data pack-report PREFIX --sequence-length 4096

For each policy of packing it prints which share of the samples is padding, how many documents are cut although they would fit into a
sample, and how many documents a sample holds.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from data_tools.command_runner import run_command
from w1train.config.argument_parser import ArgumentParser
from w1train.data.packed.best_fit import pack_best_fit
from w1train.data.sharded_dataset import open_dataset
from w1train.runtime.command import command

POLICIES = ("cut", "best_fit")
_COLUMNS = ("dataset", "policy", "length", "samples", "waste", "cut, though they fit", "longer than a sample", "documents a sample")


@dataclass(frozen=True, slots=True)
class PackReport:
    """The numbers of one dataset under one policy."""

    num_samples: int
    waste: float
    """Share of the samples' positions that hold no token."""
    num_cut: int
    """Number of documents that would fit into one sample, but are in more than one."""
    num_long: int
    """Number of documents that are longer than a sample, which every policy must cut."""
    mean_documents: float
    """Mean number of documents, or parts of documents, in a sample."""
    max_documents: int


@command("w1train data pack-report")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="w1train data pack-report",
        description="Print the share of padding, the cut documents and the documents per sample, by sequence length and policy of packing.",
    )
    parser.add_argument("prefixes", nargs="+", metavar="PREFIX", help="a dataset, as w1train data tokenize or Megatron-LM writes it")
    parser.add_argument(
        "--sequence-length", type=int, nargs="+", default=[4096], metavar="L", help="number of tokens of a sample (default: 4096)"
    )
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES), help="policies of packing (default: all)")
    parser.add_argument("--align", type=int, default=1, help="best_fit: documents start at multiples of this number (default: %(default)s)")
    options = parser.parse_args(arguments)
    if min(options.sequence_length) < 1 or options.align < 1 or any(length % options.align for length in options.sequence_length):
        parser.error("--sequence-length must be at least 1, and a multiple of --align")
    return run_command(lambda: _report(options))


def _report(options: argparse.Namespace) -> None:
    table = Table(title="Packing")
    for number, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if number > 1 else "left")
    for prefix in options.prefixes:
        lengths = np.diff(open_dataset(prefix).document_offsets)
        lengths = lengths[lengths > 0]
        for sequence_length in options.sequence_length:
            for policy in options.policy:
                cut = policy == "cut"
                report = report_cut(lengths, sequence_length) if cut else report_best_fit(lengths, sequence_length, options.align)
                table.add_row(prefix, policy, str(sequence_length), *_cells(report, len(lengths)))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 200).print(table)


def _cells(report: PackReport, num_documents: int) -> list[str]:
    return [
        f"{report.num_samples:,}",
        f"{report.waste:.3%}",
        f"{report.num_cut:,} ({report.num_cut / num_documents:.1%})",
        f"{report.num_long:,} ({report.num_long / num_documents:.1%})",
        f"{report.mean_documents:.2f}, at most {report.max_documents}",
    ]


def report_cut(lengths: NDArray[np.int64], sequence_length: int) -> PackReport:
    """Report on concatenate-and-cut packing (w1train/data/packed/packing.py), for an epoch that starts to cut at the first document."""
    num_tokens = int(lengths.sum())
    num_samples = -(-num_tokens // sequence_length)
    ends = np.cumsum(lengths)
    first, last = (ends - lengths) // sequence_length, (ends - 1) // sequence_length
    # A sample holds the documents that begin in it and, if its first token is inside a document, that document too.
    per_sample = np.bincount(first, minlength=num_samples)
    per_sample[1:] += ~np.isin(np.arange(1, num_samples) * sequence_length, ends, assume_unique=True)
    fits = lengths <= sequence_length
    return PackReport(
        num_samples=num_samples,
        waste=1 - num_tokens / (num_samples * sequence_length),
        num_cut=int(((first != last) & fits).sum()),
        num_long=int((~fits).sum()),
        mean_documents=float(per_sample.mean()),
        max_documents=int(per_sample.max()),
    )


def report_best_fit(lengths: NDArray[np.int64], sequence_length: int, align: int = 1) -> PackReport:
    """Report on best-fit packing (w1train/data/packed/best_fit.py), which cuts only documents that are longer than a sample."""
    packed = pack_best_fit(lengths, sequence_length, align)
    per_sample = np.bincount(packed.sample_of_piece, minlength=packed.num_samples)
    return PackReport(
        num_samples=packed.num_samples,
        waste=1 - int(lengths.sum()) / (packed.num_samples * sequence_length),
        num_cut=0,
        num_long=int((lengths > sequence_length).sum()),
        mean_documents=float(per_sample.mean()),
        max_documents=int(per_sample.max()),
    )


if __name__ == "__main__":
    sys.exit(main())
