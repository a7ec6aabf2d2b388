"""The benchmark of reading on one core, in tokens per second: by the data path, and by megatron-core's GPTDataset on the same file.

    python -m benchmarks.data.loader --report
    python -m benchmarks.data.loader --documents 100000000

The first command measures reading, with packing, documents, positions and corruption. Rounds of both data paths take turns in the measured
thread, and torch and NumPy have one thread each. megatron-core's samples have tokens, labels, loss mask and positions, and no corruption;
its training and this benchmark batch them by torch's default collation. The second command also measures a start on the index of
that many documents (a sparse file).
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import argparse
import itertools
import resource
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.common.results_page import Table, environment, spread, write_report
from benchmarks.common.synthetic import make_tokenizer, write_dataset
from w1train.config.argument_parser import ArgumentParser
from w1train.config.schema import DiffusionConfig
from w1train.data.dataset import TokenDataset
from w1train.data.indexed import bin_path, idx_path, write_index
from w1train.data.loader import BatchLoader
from w1train.data.packed.packing import PackedDataset, SampleSource
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing
from w1train.diffusion.corruption import corrupt

_VOCAB_SIZE = 4096
_SEED = 1234


def our_batches(packed: SampleSource, options: argparse.Namespace, *, corrupted: bool) -> Iterator[object]:
    """Return the micro-batches of the training loop."""
    loader = BatchLoader(packed, micro_batch_size=options.micro_batch_size, num_workers=0)
    config = DiffusionConfig()
    return (corrupt(batch, config, _SEED) if corrupted else batch for batch in loader.micro_batches())


def megatron_batches(prefix: Path, directory: Path, num_samples: int, options: argparse.Namespace) -> Iterator[object]:
    """Return megatron-core's micro-batches. Its index is built before the first micro-batch."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Tokenizer:
        """A tokenizer with the attributes that the dataset reads."""

        eod, pad, vocab_size, unique_identifiers = 0, 1, _VOCAB_SIZE, {"class": "synthetic"}

    config = GPTDatasetConfig(
        random_seed=_SEED,
        sequence_length=options.length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(directory / "megatron-cache"),
        tokenizer=Tokenizer(),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(str(prefix))
    documents = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
    dataset = GPTDataset(indexed, str(prefix), documents, num_samples, Split.train, config)
    starts = itertools.cycle(range(0, num_samples - options.micro_batch_size, options.micro_batch_size))
    return (
        torch.utils.data.default_collate([dataset[index] for index in range(start, start + options.micro_batch_size)]) for start in starts
    )


def speeds(sources: dict[str, Iterator[object]], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return million tokens per second of processor time in each round. The sources take turns, so that other work of the machine disturbs
    all of them equally."""
    tokens = options.batches * options.micro_batch_size * options.length
    found: dict[str, list[float]] = {name: [] for name in sources}
    for round_number in range(options.rounds + 1):
        for name, source in sources.items():
            began = time.process_time()
            for _ in range(options.batches):
                next(source)
            if round_number:  # the first round warms up
                found[name].append(tokens / (time.process_time() - began) / 1e6)
    return found


def reading(directory: Path, options: argparse.Namespace) -> Table:
    """Return the table of the speeds of all data paths."""
    prefix = directory / "data"
    tokenizer = make_tokenizer(_VOCAB_SIZE, DiffusionConfig().mask_token_id)
    write_dataset(prefix, tokenizer, num_tokens=options.num_tokens, median_document_length=options.document_length)
    dataset = TokenDataset.open(prefix, tokenizer, _VOCAB_SIZE)
    packing = PackingOptions(sequence_length=options.length)
    ensure_packing(dataset, packing)
    cut, best_fit = PackedDataset(dataset, options.length, _SEED), BestFitDataset(dataset, packing, _SEED)
    num_samples = min((options.rounds + 2) * options.batches * options.micro_batch_size, options.num_tokens // options.length)
    found = speeds(
        {
            "megatron-core GPTDataset": megatron_batches(prefix, directory, num_samples, options),
            "loader (cut)": our_batches(cut, options, corrupted=False),
            "loader (best fit)": our_batches(best_fit, options, corrupted=False),
            "loader (cut) and corruption": our_batches(cut, options, corrupted=True),
            "loader (best fit) and corruption": our_batches(best_fit, options, corrupted=True),
        },
        options,
    )
    base = found["megatron-core GPTDataset"]
    rows = [
        (name, spread(values, "{:.2f}"), f"{statistics.median(ours / theirs for ours, theirs in zip(values, base, strict=True)):.2f}")
        for name, values in found.items()
    ]
    return Table("Million tokens a second of one core: median (quartiles)", ("", "speed", "times megatron-core"), rows)


def start_up(directory: Path, num_documents: int) -> Table:
    """Return the table of seconds and memory for opening a dataset and reading samples anywhere in it."""
    prefix = directory / "large"
    with open(idx_path(prefix), "wb") as file:
        write_index(file, np.dtype("uint16"), np.full(num_documents, 1000, dtype=np.int32))
    with open(bin_path(prefix), "wb") as file:
        file.truncate(2000 * num_documents)
    process = psutil.Process()
    # Writing the index took gigabytes, which the peak of this process would still show. The peak of a fork begins again.
    peak = _in_fork(lambda: _open_and_read(prefix))
    seconds, first_sample, anonymous, resident = peak
    rows = [
        ("opening", f"{seconds:.2f} s"),
        ("8 samples at places up to the 10^9th epoch", f"{first_sample * 1000:.1f} ms"),
        ("more resident memory at its peak", f"{resident:.0f} MB"),
        ("of which private at the end", f"{anonymous:.0f} MB"),
        ("the process before", f"{process.memory_info().rss / 1e6:.0f} MB"),
    ]
    return Table(f"Start on an index of {num_documents:,} documents", ("", ""), rows)


def _open_and_read(prefix: Path) -> tuple[float, float, float, float]:
    process = psutil.Process()
    before, private = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, process.memory_full_info().uss
    began = time.perf_counter()
    packed = PackedDataset(TokenDataset.open(prefix), 4096, _SEED)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    for place in range(8):
        packed.sample(place * packed.num_samples_per_epoch * 10**9 // 7)
    reading_seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, reading_seconds, (process.memory_full_info().uss - private) / 1e6, (peak - before) * 1024 / 1e6


def _in_fork(action: Callable[[], Any]) -> Any:
    import multiprocessing

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(action()))
    process.start()
    process.join()
    return ours.recv()


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write benchmarks/results/YYYY-MM-DD-loader.md. Return the exit status."""
    parser = ArgumentParser(prog="benchmarks.data.loader", description="Measure the data path on one core, and its start.")
    parser.add_argument("--length", type=int, default=4096, help="sequence length (default: 4096)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples of a micro-batch (default: 4)")
    parser.add_argument("--document-length", type=int, default=600, help="median tokens of a document (default: 600)")
    parser.add_argument("--num-tokens", type=int, default=1 << 24, help="size of the dataset (default: 2^24)")
    parser.add_argument("--batches", type=int, default=40, help="micro-batches of a round (default: 40)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each data path (default: 9)")
    parser.add_argument("--documents", type=int, default=0, help="also measure the start on an index of this many documents")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        tables = [start_up(Path(name), options.documents)] if options.documents else []
        tables.insert(0, reading(Path(name), options))
    for table in tables:
        table.print()
    if options.report:
        notes = (
            f"Samples of {options.length} tokens in micro-batches of {options.micro_batch_size}, documents of {options.document_length} "
            f"tokens at the median; {options.rounds} rounds of {options.batches} micro-batches each, in turn. Processor time of one "
            "thread. The last column is the median over rounds of the ratio to megatron-core's round beside it, which has no corruption."
        )
        tables = [*tables, environment(shlex.join(["python", "-m", "benchmarks.data.loader", *arguments]))]
        print(f"wrote {write_report('loader', 'Speed of the data path', tables, notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
