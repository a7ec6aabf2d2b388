"""The command that tokenizes a corpus: w1train data tokenize --input PATH --tokenizer tokenizer.json --output PREFIX

A part of the documents can go to a validation dataset in the same run. A hash of a document's text decides to which dataset the document
goes, so the rest of the corpus has no influence, and equal documents never go to different datasets. If a corpus has so few documents that
one side would be empty, its last lines are held out instead.

The corpus is read in units (data_tools/units.py), which workers tokenize. The results are written in the order of the corpus, so that the
output depends neither on the number of workers nor on interruptions.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

import tokenizers

from data_tools.command_runner import run_command
from data_tools.corpus import LeftOut, TextCorpus
from data_tools.corpus_options import add_corpus_options, corpus_from, input_path, output_prefix, positive
from data_tools.duplicates import SeenHashes
from data_tools.encode import Encoding, TokenizedUnit, UnitTokenizer
from data_tools.outputs import OutputOptions, Outputs, output_paths, progress_paths
from data_tools.progress import ByteProgress
from data_tools.split import HashSplit, TailSplit, choose_split
from data_tools.units import UNIT_BYTES, Unit
from data_tools.workers import ordered_workers
from w1train.config.argument_parser import ArgumentParser
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.command import command
from w1train.runtime.output_files import require_writable
from w1train.runtime.version import __version__

logger = logging.getLogger(__name__)

_UNITS_WORTH_A_WORKER = 8


@command("w1train data tokenize")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="w1train data tokenize",
        description="Tokenize a corpus into PREFIX.bin and PREFIX.idx (Megatron's format) with a manifest PREFIX.json. Every document ends "
        "with <eos>. The dataset gets its name only when it is complete. The same command resumes a run that was killed, and the result "
        "is the same to the byte.",
    )
    add_corpus_options(parser)
    parser.add_argument(
        "--tokenizer", type=input_path, required=True, metavar="FILE", help="a tokenizer.json that w1train data train-tokenizer wrote"
    )
    parser.add_argument("--output", type=output_prefix, required=True, metavar="PREFIX", help="the dataset to write")
    parser.add_argument(
        "--validation-output",
        type=output_prefix,
        metavar="PREFIX",
        help="a second dataset, which gets --validation-fraction of the documents",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        help="share of the documents, chosen by a hash; of a corpus with very few documents, the last lines (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files, but never an input")
    parser.add_argument(
        "--deduplicate",
        action="store_true",
        help="keep only the first of several documents of equal text, found by a hash of 128 bits (takes 16 bytes of memory "
        "per document, and up to 48 for a moment)",
    )
    parser.add_argument(
        "--shard-size",
        type=positive,
        metavar="TOKENS",
        help="write shards PREFIX_00000, PREFIX_00001, ..., each of which ends with the document that brings it to this number of tokens "
        "(default: one dataset)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="number of workers, which are threads, or processes if more than 8 (default: the number of cores)",
    )
    parser.add_argument(
        "--record-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds between records of progress on the disk, from which a killed run resumes (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.validation_fraction < 1:
        parser.error(f"--validation-fraction must be in [0, 1), not {options.validation_fraction}")
    if bool(options.validation_output) != (options.validation_fraction > 0):
        parser.error("--validation-output and a --validation-fraction above 0 must be given together")
    if options.validation_output and os.path.realpath(options.validation_output) == os.path.realpath(options.output):
        parser.error(f"--output {options.output} and --validation-output {options.validation_output} are the same dataset")
    return run_command(lambda: _tokenize(options))


def _tokenize(options: argparse.Namespace) -> None:
    prefixes = [prefix for prefix in (options.output, options.validation_output) if prefix]
    corpus = corpus_from(options)
    _refuse_inputs(options, prefixes, corpus)
    tokenizer = Tokenizer.load(options.tokenizer)
    logger.info("tokenizing %s", corpus.summary())
    corpus_options = {
        **dataclasses.asdict(corpus.rules),
        "deduplicate": options.deduplicate,
        "validation_fraction": options.validation_fraction,
        "shard_tokens": options.shard_size,
    }
    run = _fingerprint(corpus, tokenizer, corpus_options)
    output_options = OutputOptions(options.shard_size, options.overwrite, options.record_seconds)
    with Outputs(prefixes, tokenizer, run, output_options) as outputs:
        if not outputs.record.is_complete:
            split = _split(corpus, options.validation_fraction)
            encoding = Encoding(corpus.rules, tokenizer.serialized, split, options.deduplicate)
            _write(corpus, encoding, outputs, _num_workers(options.workers, corpus, encoding))
        for prefix, manifest in outputs.publish(corpus.facts(corpus_options, outputs.record.counts)):
            logger.info(
                "wrote %s: %d documents, %d tokens, %.3f bytes a token, %.4f bits a byte as a unigram model",
                prefix,
                manifest.num_documents,
                manifest.num_tokens,
                manifest.num_bytes / manifest.num_tokens,
                manifest.unigram_bits_per_byte,
            )


def _refuse_inputs(options: argparse.Namespace, prefixes: Sequence[str], corpus: TextCorpus) -> None:
    """Refuse outputs that are inputs. Whether an output exists is decided later: after a kill it may be this run's own."""
    paths = [path for prefix in prefixes for path in output_paths(prefix, options.shard_size is not None)]
    require_writable(paths, [*corpus.inputs, options.tokenizer], overwrite=True, also_written=progress_paths(prefixes[0]))


def _split(corpus: TextCorpus, fraction: float) -> HashSplit | TailSplit:
    if fraction == 0:
        return HashSplit(0)
    with ByteProgress("choosing what to hold out", corpus.num_bytes) as progress:
        return choose_split(corpus.documents(progress.update), fraction)


def _write(corpus: TextCorpus, encoding: Encoding, outputs: Outputs, num_workers: int) -> None:
    """Tokenize every document from the record on into the outputs, and seal them."""
    left_out = LeftOut(outputs.record.counts)
    seen = SeenHashes() if encoding.deduplicate else None
    if seen is not None:
        seen.add(outputs.old_hashes())
    position = outputs.record.position
    # The cut before the end of the corpus depends on all documents before it. Such a run, of few documents, leaves no record of progress.
    may_record = isinstance(encoding.split, HashSplit)
    with ordered_workers(num_workers, UnitTokenizer, encoding) as tokenize, ByteProgress("tokenizing", corpus.num_bytes) as progress:
        unit: Unit
        tokenized: TokenizedUnit
        for unit, tokenized in tokenize(corpus.units(position)):
            is_new = seen.add(tokenized.hashes) if seen is not None else None
            if is_new is not None:
                num_duplicates = len(is_new) - int(is_new.sum())
                tokenized.text.counts.num_duplicates += num_duplicates
                tokenized.text.counts.num_documents -= num_duplicates
            left_out.add(tokenized.text)
            outputs.add(tokenized, is_new)
            position = unit.end
            progress.update(unit.num_bytes_done, tokenized.text.num_bytes_decoded)
            if may_record and outputs.is_record_due():
                outputs.write_record(position)
    left_out.finish(len(corpus.files))
    outputs.seal(position)


def _num_workers(wanted: int | None, corpus: TextCorpus, encoding: Encoding) -> int:
    """Return the number of workers: as many as there are cores, but no more than the corpus keeps busy, and 1 if other documents decide
    whether a document is held out."""
    if not isinstance(encoding.split, HashSplit):
        return 1
    if wanted is not None:
        return wanted
    return max(1, min(len(os.sched_getaffinity(0)), corpus.num_bytes // (_UNITS_WORTH_A_WORKER * UNIT_BYTES)))


def _fingerprint(corpus: TextCorpus, tokenizer: Tokenizer, options: dict[str, Any]) -> str:
    """Return a hash of all that the datasets depend on. For the input files it uses their sizes and times, not their content."""
    stats = [os.stat(file, follow_symlinks=file not in corpus.broken) for file in corpus.files]
    times = hashlib.sha256(json.dumps([stat.st_mtime_ns for stat in stats]).encode()).hexdigest()
    software = [__version__, tokenizers.__version__]
    parts = [corpus.fingerprint(), times, sorted(corpus.kinds.items()), tokenizer.fingerprint, options, software]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
