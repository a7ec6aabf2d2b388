"""The command that trains a byte-level BPE tokenizer: w1train data train-tokenizer --input PATH --output tokenizer.json"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.command_runner import run_command
from data_tools.corpus import TextCorpus
from data_tools.corpus_options import add_corpus_options, corpus_from, output_file
from data_tools.progress import ByteProgress
from data_tools.tokenizer_manifest import require_writable_tokenizer, write_tokenizer_manifest
from w1train.config.argument_parser import ArgumentParser
from w1train.data.tokenizer import train_tokenizer
from w1train.runtime.command import command
from w1train.runtime.output_files import OutputError

logger = logging.getLogger(__name__)


@command("w1train data train-tokenizer")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="w1train data train-tokenizer",
        description="Train a byte-level BPE tokenizer. Special tokens come first (<pad> 0, <eos> 1, <bos> 2, reserved ones, <mask>), "
        "then the 256 bytes, then merges. Decoding gives back exactly the text that was encoded.",
    )
    add_corpus_options(parser)
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files, but never an input")
    parser.add_argument("--vocab-size", type=int, default=64512, help="number of ids, special tokens included (default: %(default)s)")
    parser.add_argument(
        "--mask-token-id",
        type=int,
        default=14,
        help="id of <mask>, at least 3; an id that is too high for the special tokens lies among the merges (default: %(default)s)",
    )
    parser.add_argument(
        "--digits",
        choices=["single", "triples", "runs"],
        default="single",
        help="pieces of a number: single digits, up to three digits from the left, or all with a leading space (default: %(default)s)",
    )
    parser.add_argument(
        "--whitespace",
        choices=["runs", "lines"],
        default="runs",
        help="pieces of white space: runs without their last character, or the same but ending at line breaks (default: %(default)s)",
    )
    parser.add_argument(
        "--max-corpus-bytes",
        type=int,
        metavar="N",
        help="train on the first documents, up to this number of bytes (default: on all documents)",
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _train(options))


def _train(options: argparse.Namespace) -> None:
    corpus = corpus_from(options)
    output = Path(options.output)
    require_writable_tokenizer(output, corpus.inputs, options.overwrite)
    if output.suffix.lower() != ".json" and (directory := corpus.reads_later(output)):
        raise OutputError(f"{output} is inside of the input {directory}, and would be read as a text: call it {output.name}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    logger.info("training a tokenizer of %d ids on %s", options.vocab_size, corpus.summary())
    tokenizer = train_tokenizer(
        _texts(corpus, options.max_corpus_bytes), options.vocab_size, options.mask_token_id, options.digits, options.whitespace
    )
    tokenizer.save(output)
    rules = {"digits": options.digits, "whitespace": options.whitespace, "max_corpus_bytes": options.max_corpus_bytes}
    corpus_options = {**dataclasses.asdict(corpus.rules), **rules}
    write_tokenizer_manifest(output, tokenizer, "data_tools.train_tokenizer", {"corpus": corpus.facts(corpus_options, corpus.log.counts)})
    logger.info("wrote %s: %d ids, mask %d, sha256 %s", output, tokenizer.vocab_size, tokenizer.mask_token_id, tokenizer.fingerprint)


def _texts(corpus: TextCorpus, max_bytes: int | None) -> Iterator[str]:
    num_bytes = 0
    with ByteProgress("reading", corpus.num_bytes) as progress:
        for document in corpus.documents(progress.update):
            num_bytes += document.num_bytes
            if max_bytes is not None and num_bytes > max_bytes:
                logger.info("%d bytes of text are enough: the rest of the corpus is not read", num_bytes)
                break
            yield document.text
    logger.info("read %d documents; merging pairs", corpus.log.counts.num_documents)


if __name__ == "__main__":
    sys.exit(main())
