"""The trainings of `make processes`, several of them side by side, each on one rank.

    python -m benchmarks.processes.train runs/processes --data runs/processes-data --at-once 2

A training that was interrupted resumes. The output of each is in RUNS/NAME.log. Arguments after RUNS are overrides of the recipe, for all
trainings.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

import subprocess
import time
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.processes.trainings import NUM_EPOCHS, PROCESSES, Training, num_tokens, repeated, small_corpus
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.data.sharded_dataset import open_dataset
from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import DatasetWriter
from w1train.runtime.command import command

_PIECE = 2048
"""Tokens that the small corpus takes of a document."""
_LINES_OF_A_FAILURE = 30


def write_small_corpus(data: Path, num_tokens: int) -> None:
    """Write the dataset of the small corpus, unless it exists: the first tokens of documents of the training dataset that are evenly
    spaced."""
    output = small_corpus(data)
    if output.with_suffix(".json").exists():
        return
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    dataset = open_dataset(data / "train")
    step = max(1, dataset.num_documents * _PIECE // num_tokens)
    # Some documents are shorter than a piece: then others follow, between those that were taken.
    order = (document for first in range(step) for document in range(first, dataset.num_documents, step))
    with DatasetWriter(output, tokenizer, overwrite=True) as writer:
        for document in order:
            piece = dataset.document_tokens(document)[:-1][: min(_PIECE, num_tokens)].tolist()  # the writer adds the end of the document
            writer.add_document(piece, num_text_bytes=len(tokenizer.decode(piece, skip_special=True).encode()))
            num_tokens -= len(piece)
            if num_tokens <= 0:
                break
        writer.finalize()


def settings(runs: Path, data: Path, overrides: Sequence[str], training: Training) -> list[str]:
    """Return the recipe of a training and all overrides of it. The training's own overrides come last."""
    places = [f"runs_dir={runs}", f"data.train={data / 'train'}", f"data.validation={data / 'validation'}"]
    tokenizer = f"data.tokenizer={data / 'tokenizer.json'}"
    return ["recipe=processes", f"name={training.name}", *places, tokenizer, *overrides, *training.overrides]


def run_side_by_side(runs: Path, data: Path, trainings: Iterable[Training], overrides: Sequence[str], at_once: int) -> list[str]:
    """Train, at most ``at_once`` runs at a time, in the given order. Return the names of the trainings that failed."""
    with ThreadPoolExecutor(at_once) as pool:
        trainings = list(trainings)
        statuses = pool.map(partial(_train, runs, data, overrides), trainings)
        return [training.name for training, status in zip(trainings, statuses, strict=True) if status != 0]


def _train(runs: Path, data: Path, overrides: Sequence[str], training: Training) -> int:
    """Train one run in a process of its own, and return its exit status."""
    log, begin = runs / f"{training.name}.log", time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        words = [sys.executable, "-m", "w1train", "train", *settings(runs, data, overrides, training)]
        status = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT).returncode
    print(f"{training.name}: {'done' if status == 0 else f'failed with status {status}'}, {time.monotonic() - begin:.0f} s", flush=True)
    if status != 0:
        with log.open(encoding="utf-8", errors="replace") as lines:
            print("".join(deque(lines, _LINES_OF_A_FAILURE)), f"The whole output is in {log}.", flush=True)
    return status


@command("benchmarks.processes.train")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 1 if a training failed, or 2 for bad input."""
    parser = ArgumentParser(prog="python -m benchmarks.processes.train", description="Train the same model with every noise process.")
    parser.add_argument("runs", type=Path, metavar="RUNS", help="the directory of the run directories, such as runs/processes")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of the recipe, for all trainings")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the directory of the tokenizer and the datasets")
    parser.add_argument("--at-once", type=int, default=2, metavar="N", help="trainings side by side (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="train only these runs (default: all)")
    options = parser.parse_args(arguments)
    try:
        trainings = (*PROCESSES, *repeated(options.data, options.overrides))
        names = [training.name for training in trainings]
        if unknown := set(options.only or ()) - set(names):
            raise UserError(f"there is no training {min(unknown)}; the trainings are {', '.join(names)}")
        write_small_corpus(options.data, num_tokens(options.overrides) // NUM_EPOCHS)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.runs.mkdir(parents=True, exist_ok=True)
    chosen = [training for training in trainings if training.name in (options.only or names)]
    failed = run_side_by_side(options.runs, options.data, chosen, options.overrides, options.at_once)
    if failed:
        print(f"error: these trainings failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
