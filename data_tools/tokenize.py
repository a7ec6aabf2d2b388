"""Tokenize a corpus: python -m data_tools.tokenize --input PATH --tokenizer tokenizer.json --output PREFIX

A part of the documents can go to a validation dataset in the same run. Which ones is decided by a hash of their text, so a
document's side depends on nothing else in the corpus, and equal documents never fall on both sides. A corpus of so few
documents that one side would stay empty is cut instead: its last lines are held out.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from data_tools.command import add_corpus_options, corpus_from, run_command
from data_tools.progress import ByteProgress
from data_tools.split import HashSplit, TailSplit, choose_split
from data_tools.text import Document, TextCorpus
from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import DatasetWriter

logger = logging.getLogger(__name__)

_BATCH_BYTES = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.tokenize",
        description="Tokenize a corpus into PREFIX.bin and PREFIX.idx (Megatron's format) with a manifest PREFIX.json. Every document ends "
        "with <eos>. The dataset appears under its name only when it is complete.",
    )
    add_corpus_options(parser)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="tokenizer.json, as data_tools.train_tokenizer writes it")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="the dataset")
    parser.add_argument("--validation-output", metavar="PREFIX", help="a second dataset that gets --validation-fraction of the documents")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        help="share of documents, chosen by hash; of too few documents, the last lines (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing datasets")
    options = parser.parse_args(arguments)
    if not 0 <= options.validation_fraction < 1:
        parser.error(f"--validation-fraction must be in [0, 1), not {options.validation_fraction}")
    if bool(options.validation_output) != (options.validation_fraction > 0):
        parser.error("--validation-output and a --validation-fraction above 0 belong together")
    return run_command(lambda: _tokenize(options))


def _tokenize(options: argparse.Namespace) -> None:
    corpus = corpus_from(options)
    tokenizer = Tokenizer.load(options.tokenizer)
    logger.info("tokenizing %d files, %.1f MB", len(corpus.files), corpus.num_bytes / 1e6)
    split = choose_split(corpus, options.validation_fraction)
    prefixes = [prefix for prefix in (options.output, options.validation_output) if prefix]
    with ExitStack() as stack:
        writers = [stack.enter_context(DatasetWriter(prefix, tokenizer, options.overwrite)) for prefix in prefixes]
        write_documents(corpus, tokenizer, writers, split)
        for prefix, writer in zip(prefixes, writers, strict=True):
            manifest = writer.finalize()
            logger.info(
                "wrote %s: %d documents, %d tokens, %.3f bytes a token, %.4f bits a byte as a unigram model",
                prefix,
                manifest.num_documents,
                manifest.num_tokens,
                manifest.num_bytes / manifest.num_tokens,
                manifest.unigram_bits_per_byte,
            )


def write_documents(corpus: TextCorpus, tokenizer: Tokenizer, writers: Sequence[DatasetWriter], split: HashSplit | TailSplit) -> None:
    """Tokenize every document into ``writers[0]``, or ``writers[1]`` if it is held out."""
    with ByteProgress("tokenizing", corpus.num_bytes) as progress:
        for batch in _batches(corpus):
            pieces = [piece for document in batch for piece in split(document)]
            for (document, held_out), ids in zip(pieces, tokenizer.encode_batch([piece.text for piece, _ in pieces]), strict=True):
                writers[held_out].add_document(ids, document.num_bytes)
            progress.update(corpus.num_bytes_read)


def _batches(corpus: TextCorpus) -> Iterator[list[Document]]:
    """Documents in lists large enough to keep all cores busy, small enough that memory does not grow with the corpus."""
    batch: list[Document] = []
    num_bytes = 0
    for document in corpus:
        batch.append(document)
        num_bytes += document.num_bytes
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


if __name__ == "__main__":
    sys.exit(main())
