"""The benchmark of data_tools.tokenize beside the tokenizer library alone, and of its memory on a small and a large corpus.

Speed: two ways tokenize the same texts in turns. (a) The library loads the tokenizer's file and runs ``encode_batch_fast`` on texts that
are in memory already. It drops the tokens, and has as many threads as the command has workers. (b) The whole command reads JSONL from the
disk and writes token files, hashes and manifest. It runs in this process. Its imports are therefore not measured, but the rest of its
start is measured. CPU seconds are added up over this process and its children. On a shared machine they are more reliable than wall time.

Memory: the largest sum of the resident sizes of the command's process and its children that was seen when they were sampled.

    python -m benchmarks.data.tokenize --report
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import argparse
import json
import random
import resource
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import psutil

from benchmarks.common.results_page import Table, environment, spread, write_report
from data_tools import python_corpus, tokenize
from w1train.config.argument_parser import ArgumentParser
from w1train.data.tokenizer import Tokenizer, train_tokenizer

_BATCH_BYTES = 1 << 19
_SAMPLE_SECONDS = 0.02


def make_texts(num_bytes: int) -> list[str]:
    """Return pieces of the standard library's sources, of log-normal lengths (median 1.8 kB), in random order."""
    generator = random.Random(0)
    pieces = []
    for _, text in python_corpus.collect(Path(os.__file__).parent, num_bytes):
        start = 0
        while start < len(text):
            stop = start + 1 + int(generator.lognormvariate(7.5, 1))
            pieces.append(text[start:stop])
            start = stop
    generator.shuffle(pieces)
    return pieces


def write_jsonl(path: Path, texts: Sequence[str], num_bytes: int) -> int:
    """Write texts again and again, each time with another end, up to a size. Return the bytes of text."""
    written = size = number = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < num_bytes:
            text = f"{texts[number % len(texts)]}\n# {number}"
            size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            written += len(text.encode())
            number += 1
    return written


def measure_speed(directory: Path, tokenizer_path: Path, texts: Sequence[str], options: argparse.Namespace) -> Table:
    """Return the table of MB per second of both ways, by the clock and by CPU time, and their ratio."""
    corpus = directory / "speed.jsonl"
    num_bytes = write_jsonl(corpus, texts, options.speed_mb * 10**6)
    with open(corpus, encoding="utf-8") as lines:
        content = [json.loads(line)["text"] for line in lines]
    rows = []
    for workers in options.workers:
        command = ["--input", str(corpus), "--tokenizer", str(tokenizer_path), "--output", str(directory / "speed"), "--overwrite"]
        ways: list[Callable[[], object]] = [
            lambda: _library_alone(tokenizer_path, content),
            partial(tokenize.main, [*command, "--workers", str(workers)]),
        ]
        # The library reads this at each call: it uses one thread, or as many as main() has made it start.
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if workers == 1 else "true"
        times: list[list[tuple[float, float]]] = [[], []]
        for number in range(options.rounds):
            for side in (0, 1) if number % 2 == 0 else (1, 0):
                times[side].append(_timed(ways[side]))
        for kind, name in enumerate(("clock", "CPU")):
            speeds = [[num_bytes / 1e6 / seconds[kind] for seconds in way] for way in times]
            ratio = statistics.median(ours / alone for alone, ours in zip(*speeds, strict=True))
            rows.append((f"{workers}, {name}", *(spread(speed, "{:.2f}") for speed in speeds), f"{ratio:.3f}"))
    return Table("MB of text a second: median (quartiles)", ("workers, time", "library alone", "tokenize", "median ratio of a round"), rows)


def _library_alone(tokenizer_path: Path, texts: Sequence[str]) -> None:
    # The tokenizer is loaded each time: one that has run has cached the words that it has seen, and would be faster.
    tokenizer = Tokenizer.load(tokenizer_path)
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            tokenizer._backend.encode_batch_fast(batch, add_special_tokens=False)
            batch, size = [], 0
    tokenizer._backend.encode_batch_fast(batch, add_special_tokens=False)


def _timed(way: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds by the clock and the CPU seconds, with those of children."""
    begun, cpu_begun = time.perf_counter(), _cpu_seconds()
    way()
    return time.perf_counter() - begun, _cpu_seconds() - cpu_begun


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure_memory(directory: Path, tokenizer_path: Path, texts: Sequence[str], options: argparse.Namespace) -> Table:
    """Return the table of the peak memory of the process tree for corpora of several sizes."""
    rows, peaks = [], []
    for megabytes in options.memory_mb:
        corpus = directory / f"{megabytes}.jsonl"
        write_jsonl(corpus, texts, megabytes * 10**6)
        command = [sys.executable, "-m", "data_tools.tokenize", "--input", str(corpus), "--tokenizer", str(tokenizer_path)]
        command += ["--output", str(directory / "memory"), "--overwrite", "--workers", str(options.memory_workers)]
        peaks.append(_peak_memory(command))
        rows.append((f"{megabytes} MB", f"{peaks[-1] / 2**20:.0f}", f"{peaks[-1] / peaks[0]:.3f}"))
        corpus.unlink()
    title = f"Peak memory of the process tree, {options.memory_workers} workers"
    return Table(title, ("JSONL corpus", "MiB", "of the first"), rows)


def _peak_memory(command: Sequence[str]) -> int:
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    tree = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        size = 0
        for member in [tree, *_children(tree)]:
            try:
                size += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, size)
        time.sleep(_SAMPLE_SECONDS)
    assert process.returncode == 0, command
    return peak


def _children(tree: psutil.Process) -> list[psutil.Process]:
    try:
        return tree.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark, and with ``--report`` write benchmarks/results/YYYY-MM-DD-tokenize.md. Return the exit status."""
    parser = ArgumentParser(prog="benchmarks.data.tokenize", description="Compare data_tools.tokenize with the tokenizer library alone.")
    parser.add_argument("--speed-mb", type=int, default=40, help="megabytes of the corpus for the speed (default: 40)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way runs (default: 5)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of workers (default: 1 2)")
    parser.add_argument(
        "--memory-mb", type=int, nargs="*", default=[10, 500], help="megabytes of the corpora for the memory (default: 10 500)"
    )
    parser.add_argument("--memory-workers", type=int, default=2, help="workers for the memory (default: 2)")
    parser.add_argument("--vocab-size", type=int, default=16000, help="ids of the tokenizer (default: 16000)")
    parser.add_argument("--report", action="store_true", help="write the dated report to benchmarks/results")
    options = parser.parse_args(arguments)
    if len({1, *options.workers}) > 2:
        parser.error("--workers accepts one number other than 1, because the library starts its threads once for a process")
    # The library reads this when it first uses several threads, which is when it trains the tokenizer.
    os.environ["RAYON_NUM_THREADS"] = str(max(options.workers))
    texts = make_texts(10**7)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer_path = directory / "tokenizer.json"
        train_tokenizer(texts, options.vocab_size).save(tokenizer_path)
        tables = []
        if options.rounds:
            tables.append(measure_speed(directory, tokenizer_path, texts, options))
            tables[-1].print()
        if options.memory_mb:
            tables.append(measure_memory(directory, tokenizer_path, texts, options))
            tables[-1].print()
    if options.report:
        assert __doc__ is not None
        tables.append(environment(shlex.join(["python", "-m", "benchmarks.data.tokenize", *arguments])))
        title, notes = "Tokenizing against the tokenizer library alone", __doc__.partition("    python")[0]
        print(f"wrote {write_report('tokenize', title, tables, notes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
