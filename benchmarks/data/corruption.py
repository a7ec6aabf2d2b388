"""The benchmark of reading, packing and corrupting on one core, in tokens per second, without a model.

    python -m benchmarks.data.corruption --report
    python -m benchmarks.data.corruption --length 256 --micro-batch-size 8 --timestep-per document

The data are random tokens in documents of log-normal length. The loader works in the measured thread, and torch and NumPy have one thread
each, so that wall and processor time are those of one core. Packing (tokens, document ids, positions) and corruption (timesteps, cut to
random length, masks) are also timed on their own.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import argparse
import itertools
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.common.results_page import Table, environment, spread, write_report
from benchmarks.common.synthetic import make_tokenizer, write_dataset
from w1train.config.argument_parser import ArgumentParser
from w1train.config.schema import DiffusionConfig
from w1train.data.batch import PackedBatch
from w1train.data.dataset import TokenDataset
from w1train.data.loader import BatchLoader
from w1train.data.packed.packing import PackedDataset
from w1train.diffusion.corruption import NoisyBatch, corrupt

_VOCAB_SIZE = 4096
_SEED = 1234


def open_loader(directory: Path, options: argparse.Namespace) -> BatchLoader:
    """Return a loader of synthetic documents, which are too many for the processor's caches."""
    tokenizer = make_tokenizer(_VOCAB_SIZE, DiffusionConfig().mask_token_id)
    num_tokens = max(options.num_tokens, options.length)
    write_dataset(directory / "data", tokenizer, num_tokens=num_tokens, median_document_length=options.document_length)
    packed = PackedDataset(TokenDataset.open(directory / "data", tokenizer, _VOCAB_SIZE), options.length, _SEED)
    return BatchLoader(packed, micro_batch_size=options.micro_batch_size, num_workers=0)


def noisy_batches(batches: Iterator[PackedBatch], config: DiffusionConfig) -> Iterator[NoisyBatch]:
    """Return the batches that the training loop reads."""
    return (corrupt(batch, config, _SEED) for batch in batches)


def seconds_per_batch(next_batch: Callable[[], object], num_batches: int) -> list[tuple[float, float]]:
    """Return wall and processor seconds of each of ``num_batches`` calls, after a tenth as many calls to warm up."""
    for _ in range(max(2, num_batches // 10)):
        next_batch()
    times = []
    for _ in range(num_batches):
        wall, cpu = time.perf_counter(), time.process_time()
        next_batch()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def measure(loader: BatchLoader, config: DiffusionConfig, options: argparse.Namespace) -> Table:
    """Return the table of million tokens per second, for the whole data path and for its two halves."""
    tokens = options.length * options.micro_batch_size
    ready = itertools.cycle(list(itertools.islice(loader.micro_batches(), 16)))
    sources = {
        "loader and corruption": noisy_batches(loader.micro_batches(), config),
        "loader alone": loader.micro_batches(),
        "corruption alone": noisy_batches(ready, config),
    }
    rows = []
    for name, source in sources.items():
        walls, cpus = zip(*seconds_per_batch(source.__next__, options.batches), strict=True)
        speeds = [spread([tokens / second / 1e6 for second in seconds], "{:.2f}") for seconds in (walls, cpus)]
        rows.append((name, *speeds))
    columns = ("one core", "wall time", "processor time")
    return Table("Million tokens a second: median (quartiles)", columns, rows)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write benchmarks/results/YYYY-MM-DD-corruption.md. Return the exit status."""
    parser = ArgumentParser(prog="benchmarks.data.corruption", description="Measure loader and corruption on one core.")
    parser.add_argument("--length", type=int, default=4096, help="sequence length (default: 4096)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples of a micro-batch (default: 4)")
    parser.add_argument("--document-length", type=int, default=600, help="median tokens of a document (default: 600)")
    parser.add_argument(
        "--timestep-per", choices=("sequence", "document"), default="sequence", help="what shares a timestep (default: sequence)"
    )
    parser.add_argument("--num-tokens", type=int, default=1 << 24, help="size of the dataset (default: 2^24)")
    parser.add_argument("--batches", type=int, default=300, help="micro-batches measured (default: 300)")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = DiffusionConfig(timestep_per=options.timestep_per)
    with tempfile.TemporaryDirectory() as directory, open_loader(Path(directory), options) as loader:
        table = measure(loader, config, options)
    table.print()
    if options.report:
        notes = (
            f"Samples of {options.length} tokens in micro-batches of {options.micro_batch_size}, documents of {options.document_length} "
            f"tokens at the median, one timestep per {options.timestep_per}; {options.batches} micro-batches, one thread."
        )
        tables = [table, environment(shlex.join(["python", "-m", "benchmarks.data.corruption", *arguments]))]
        print(f"wrote {write_report('corruption', 'Speed of loader and corruption', tables, notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
