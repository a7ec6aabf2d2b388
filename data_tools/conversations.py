"""The command that makes a dataset of conversations: w1train data conversations --input PATH --tokenizer tokenizer.json --output PREFIX

A record becomes messages, a chat template lays them out as one text, and the tokenizer makes tokens of it. PREFIX.may_be_noised allows
noise on the replies alone. So a run learns the replies, and sees the prompts unchanged.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.command_runner import run_command
from data_tools.corpus import LeftOut, TextCorpus
from data_tools.corpus_files import Limits
from data_tools.corpus_options import add_error_options, add_input_option, input_path, output_prefix, positive
from data_tools.encode_conversations import ChatEncoding, ConversationReader, EncodedUnit, Kind
from data_tools.progress import ByteProgress
from data_tools.unit_reader import Counts, Rules, UnitReader, UnitText
from data_tools.units import UNIT_BYTES
from data_tools.workers import ordered_workers
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.data.conversations.chat_template import ChatTemplate, TemplateSource
from w1train.data.conversations.messages import FORMATS
from w1train.data.conversations.template_tokens import check_template, renamed_tokens
from w1train.data.dataset_manifest import REPLIES, DatasetManifest, dataset_paths
from w1train.data.text.file_names import CorpusError
from w1train.data.tokenizer import Tokenizer
from w1train.data.writer import DatasetWriter, publish
from w1train.runtime.command import command
from w1train.runtime.output_files import require_writable

logger = logging.getLogger(__name__)

_UNITS_WORTH_A_WORKER = 2
_FILE_FORMATS = ("jsonl", "json")
_MEANINGS = {
    "num_cut": "cut documents whose reply was too long, which have no end token",
    "num_too_long": "left out documents that are too long",
    "num_prompt_too_long": "left out documents whose prompt alone is too long",
    "num_without_other_side": "left out replies of pairs whose other reply was left out",
}
"""Sentences of the log about each count of rows that are not bad."""


@command("w1train data conversations")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="w1train data conversations",
        description="Make a dataset of conversations or of pairs of replies: PREFIX.bin, PREFIX.idx, PREFIX.may_be_noised, and the "
        "manifest PREFIX.json. The prompts stay clean in training, and the replies with the tokens that end them are learned. The dataset "
        "gets its name only when it is complete.",
    )
    _add_corpus_options(parser)
    _add_chat_options(parser)
    _add_output_options(parser)
    options = parser.parse_args(arguments)
    if not 0 <= options.validation_fraction < 1:
        parser.error(f"--validation-fraction must be in [0, 1), not {options.validation_fraction}")
    if bool(options.validation_output) != (options.validation_fraction > 0):
        parser.error("--validation-output and a --validation-fraction above 0 must be given together")
    if options.max_length == 1:
        parser.error(f"--max-length must be at least 2, not {options.max_length}: a prompt and a reply have a token each")
    return run_command(lambda: _encode(options))


def _add_corpus_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("corpus")
    add_input_option(
        group,
        ".jsonl files (one conversation per line) or .json files (lines, or one array), also compressed as .gz, .zst, .xz or .bz2, "
        "and directories of such files",
    )
    group.add_argument(
        "--extensions", nargs="+", action="extend", default=[], metavar=".EXT", help="take only these files from directories (default: all)"
    )
    group.add_argument("--file-format", choices=_FILE_FORMATS, help="what all files hold (default: what their names tell)")
    group.add_argument("--format", choices=[*FORMATS], help="the format of the records (default: the keys of each record tell it)")
    add_error_options(group)


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    group.add_argument("--tokenizer", type=input_path, required=True, metavar="FILE", help="a tokenizer.json of w1train")
    group.add_argument(
        "--template",
        type=input_path,
        metavar="PATH",
        help="a chat template: a jinja file, a tokenizer_config.json, or a directory of a Hugging Face model (default: a small template "
        "that every tokenizer can encode)",
    )
    group.add_argument("--date", type=_day, metavar="YYYY-MM-DD", help="the date for templates that write the date (default: today)")
    group.add_argument(
        "--replies",
        choices=REPLIES,
        default="last",
        help="the replies to learn: the last of a conversation, all of them in one document, which only a model may learn that does not "
        "see later blocks, or each in a document of its own (default: %(default)s)",
    )
    group.add_argument(
        "--max-length", type=positive, metavar="TOKENS", help="the most tokens of a document, its end included (default: no limit)"
    )
    group.add_argument(
        "--too-long",
        choices=["drop", "cut"],
        default="drop",
        help="the answer to longer documents: leave them out, or cut the reply, which then has no end token (default: %(default)s)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=output_prefix, required=True, metavar="PREFIX", help="the dataset to write")
    parser.add_argument(
        "--validation-output", type=output_prefix, metavar="PREFIX", help="a second dataset, which gets --validation-fraction of the rows"
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        help="share of the rows, chosen by a hash of the first prompt, so that rows of one prompt stay together (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing files, but never an input")
    parser.add_argument("--workers", type=positive, metavar="N", help="number of workers (default: as many as the corpus keeps busy)")


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a date such as 2026-01-31, not {text[:80]!r}") from None


def _encode(options: argparse.Namespace) -> None:
    rules = Rules(on_error=options.on_error, limits=Limits(options.max_document_size, options.max_row_group_size))
    corpus = TextCorpus(options.input, rules, extensions=options.extensions, kind=options.file_format)
    if other := [file for file in corpus.files if file not in corpus.broken and corpus.kind_of(file) not in _FILE_FORMATS]:
        raise CorpusError(f"{other[0]} is no JSON by its name: give --file-format jsonl, or write the rows of a table as lines of JSON")
    prefixes = [prefix for prefix in (options.output, options.validation_output) if prefix]
    inputs = [*corpus.inputs, options.tokenizer, *([options.template] if options.template else [])]
    require_writable([path for prefix in prefixes for path in dataset_paths(prefix)], inputs, overwrite=options.overwrite)
    tokenizer = Tokenizer.load(options.tokenizer)
    kind = _kind_of_format(options.format) if options.format else _kind_of(corpus, rules)
    if kind == "preferences" and options.replies != "last":
        raise UserError(f"--replies {options.replies} is for conversations: of a pair of replies, the last reply alone is compared")
    if kind == "preferences" and options.too_long == "cut":
        raise UserError("--too-long cut is for conversations: cut replies have other likelihoods, and both may be equal; use drop")
    encoding = _encoding(options, rules, tokenizer, kind)
    logger.info("encoding %s as %s, by %s", corpus.summary(), encoding.kind, encoding.template.origin)
    with ExitStack() as stack:
        writers = [stack.enter_context(DatasetWriter(prefix, tokenizer, options.overwrite, limits_noise=True)) for prefix in prefixes]
        left_out, counts, longest = _write(corpus, encoding, writers, options.workers)
        facts = corpus.facts({"validation_fraction": options.validation_fraction}, left_out)
        manifests = [
            dataclasses.replace(writer.seal(), corpus=facts, conversations=_description(encoding, counts, length))
            for writer, length in zip(writers, longest, strict=True)
        ]
        for prefix, writer, manifest in zip(prefixes, writers, manifests, strict=True):
            publish(prefix, manifest)
            writer.keep()
            _log(prefix, manifest)


def _encoding(options: argparse.Namespace, rules: Rules, tokenizer: Tokenizer, kind: Kind) -> ChatEncoding:
    """Return the settings of the workers, with a template that has been checked."""
    time = datetime.now() if options.date is None else datetime.combine(options.date, datetime.min.time())
    source = TemplateSource.read(Path(options.template), time) if options.template else TemplateSource.default(time)
    renamed = renamed_tokens(Path(options.tokenizer), tokenizer)
    check_template(ChatTemplate(source), {*tokenizer.special_tokens, *renamed})
    return ChatEncoding(
        rules=rules,
        tokenizer=tokenizer.serialized,
        renamed=renamed,
        template=source,
        format=options.format,
        kind=kind,
        replies=options.replies,
        max_length=options.max_length,
        too_long=options.too_long,
        validation_fraction=options.validation_fraction,
    )


class _FirstKind(UnitReader):
    """The reader that finds out whether the first record is a pair of replies."""

    kind: Kind | None = None

    def add_record(self, result: UnitText, record: object, origin: str, kind: str) -> None:
        """Look at a record, until one has the keys of a format."""
        fitting = [name for name, each in FORMATS.items() if isinstance(record, dict) and each.fits(record)]
        if self.kind is None and fitting:
            self.kind = _kind_of_format(fitting[0])


def _kind_of_format(name: str) -> Kind:
    return "preferences" if name == "preferences" else "conversations"


def _kind_of(corpus: TextCorpus, rules: Rules) -> Kind:
    """Return whether the first record that has the keys of a format is a pair of replies."""
    reader = _FirstKind(rules)
    for unit in corpus.units():
        reader.read(unit)
        if reader.kind is not None:
            return reader.kind
    return "conversations"


def _write(
    corpus: TextCorpus, encoding: ChatEncoding, writers: Sequence[DatasetWriter], num_workers: int | None
) -> tuple[Counts, Counter[str], list[int]]:
    """Encode every row into the datasets.

    Returns:
        The counts of input that cannot be read, the counts of rows, and the number of tokens of the longest document of each dataset.

    Raises:
        CorpusError: if a record is bad, unless bad records are left out; or if a dataset would have no document.
    """
    left_out, counts, longest = LeftOut(wanted="conversations"), Counter[str](), [0] * len(writers)
    most = max(1, min(len(os.sched_getaffinity(0)), corpus.num_bytes // (_UNITS_WORTH_A_WORKER * UNIT_BYTES)))
    with (
        ordered_workers(num_workers or most, ConversationReader, encoding) as encode,
        ByteProgress("encoding", corpus.num_bytes) as progress,
    ):
        encoded: EncodedUnit
        for unit, encoded in encode(corpus.units()):
            counts += encoded.counts
            left_out.add(encoded.text)
            for side, writer in enumerate(writers):
                chosen = encoded.held_out == bool(side)
                of_tokens = np.repeat(chosen, encoded.lengths)
                lengths = encoded.lengths[chosen]
                writer.add_documents(
                    encoded.tokens[of_tokens], lengths, int(encoded.num_bytes[chosen].sum()), encoded.may_be_noised[of_tokens]
                )
                longest[side] = max(longest[side], int(lengths.max(initial=0)))
            progress.update(unit.num_bytes_done, encoded.text.num_bytes_decoded)
    _log_counts(counts)
    left_out.finish(len(corpus.files))
    if 0 in longest:
        empty = "validation" if longest[0] else "training"
        raise CorpusError(f"no row is left for the {empty} dataset: change --validation-fraction {encoding.validation_fraction}")
    return left_out.counts, counts, longest


def _description(encoding: ChatEncoding, counts: Counter[str], longest: int) -> dict[str, Any]:
    """Return what the manifest says about the conversations."""
    return {
        "kind": encoding.kind,
        "replies": encoding.replies,
        "template": encoding.template.origin,
        "template_sha256": encoding.template.sha256,
        "longest": longest,
        "max_length": encoding.max_length,
        "too_long": encoding.too_long,
        **({"date": encoding.template.time.date().isoformat()} if encoding.template.reads_time else {}),
        **dict(sorted(counts.items())),
    }


def _log_counts(counts: Counter[str]) -> None:
    """Log how many rows were read, and how many were left out or cut for which reason."""
    logger.info("read %d rows", counts["num_rows"])
    for name, number in sorted(counts.items()):
        if name in _MEANINGS:
            logger.info("%s: %d", _MEANINGS[name], number)
        elif name.startswith("num_bad_"):
            logger.info("left out rows that are bad (%s): %d", name.removeprefix("num_bad_").replace("_", " "), number)


def _log(prefix: str, manifest: DatasetManifest) -> None:
    number = manifest.num_documents
    what = f"{number // 2} pairs" if manifest.conversations["kind"] == "preferences" else f"{number} documents"
    logger.info(
        "wrote %s: %s, %d tokens, the longest document has %d", prefix, what, manifest.num_tokens, manifest.conversations["longest"]
    )


if __name__ == "__main__":
    sys.exit(main())
