"""The options that commands share: those that describe a corpus, and the types of paths and sizes."""

from __future__ import annotations

import argparse
import os
import re

from data_tools.corpus import TextCorpus
from data_tools.corpus_files import Limits
from data_tools.unit_reader import BLANK_LINES, Rules
from w1train.data.text.file_names import KINDS, CorpusError

_EMPTY = "the path is empty (an unset variable?)"
_NO_NAMES = ("", os.curdir, os.pardir)


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`corpus_from` reads."""
    group = parser.add_argument_group("corpus")
    _add_file_options(group)
    _add_document_options(group)
    add_error_options(group)


def add_input_option(group: argparse._ArgumentGroup, files: str) -> None:
    """Add the option of the input; ``files`` says which files it takes."""
    group.add_argument("--input", type=input_path, nargs="+", action="extend", required=True, metavar="PATH", help=files)


def _add_file_options(group: argparse._ArgumentGroup) -> None:
    add_input_option(
        group,
        "text files (one document each), .jsonl, .jsonlines or .ndjson files (one document per line), .json files (lines, or one "
        "array of documents), .parquet or .arrow files (one document per row); text and JSON also compressed as .gz, .zst, .xz or .bz2; "
        "directories of such files, searched recursively in sorted order without hidden entries; or datasets that Hugging Face's "
        "save_to_disk wrote",
    )
    group.add_argument(
        "--extensions",
        nargs="+",
        action="extend",
        default=[],
        metavar=".EXT",
        help="take only files with these endings from directories (default: all)",
    )
    group.add_argument("--format", choices=KINDS, help="what all files hold (default: what their names tell, otherwise text)")


def _add_document_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--text-field",
        default="text",
        metavar="NAME",
        help="key or column of the text; a.b is b inside of a (default: %(default)s)",
    )
    group.add_argument(
        "--filter",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=REGEX",
        help="take only records whose field matches the regular expression somewhere ('^en$' = as a whole); with several filters, only "
        "records that match all of them",
    )
    group.add_argument("--min-bytes", type=int, default=0, metavar="N", help="leave out shorter documents (UTF-8; default: %(default)s)")
    group.add_argument("--max-bytes", type=int, metavar="N", help="leave out longer documents (default: no limit)")
    group.add_argument(
        "--split-on",
        metavar="REGEX",
        help=f"cut texts into documents: a new document begins at each match of the regular expression (multi-line mode; WikiText: "
        f"'^ = [^=].* = $'); or '{BLANK_LINES}' = cut at blank lines and drop them (default: no cutting)",
    )


def add_error_options(group: argparse._ArgumentGroup) -> None:
    """Add the options about input that cannot be read."""
    group.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="the answer to files, lines or rows that are not UTF-8 text or JSON, or are over one of the next two limits: stop, or leave "
        "them out, log them and count them (default: %(default)s)",
    )
    group.add_argument(
        "--max-document-size",
        type=size,
        default="32M",
        metavar="SIZE",
        help="most bytes of a document, decompressed: a text file (with --split-on, a piece of one), a line of JSONL or a cell of a table; "
        "K, M or G after the number multiply by 1024, 1024^2 or 1024^3 (default: %(default)s)",
    )
    group.add_argument(
        "--max-row-group-size",
        type=size,
        default="2G",
        metavar="SIZE",
        help="most bytes of a record batch of Arrow or, in the columns that are read, of a row group of Parquet, decoded, and of a text "
        "file with --split-on (default: %(default)s)",
    )


def size(text: str) -> int:
    """Parse an option that is a number of bytes, such as 500000, 64M or 2G."""
    if not (found := re.fullmatch(r"([0-9]{1,15})([KMG]?)", text)) or not (number := int(found[1])):
        raise argparse.ArgumentTypeError(f"must be a whole number of bytes, at least 1, such as 500000, 64M or 2G, not {text[:80]!r}")
    return number << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]]


def positive(text: str) -> int:
    """Parse an option that is a whole number, at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, not {text[:80]!r}")
    return number


def input_path(text: str) -> str:
    """Accept an option that names an input. An empty text, which an unset variable of the shell gives, is refused, because Python would
    read the current directory."""
    if not text:
        raise argparse.ArgumentTypeError(_EMPTY)
    return text


def output_file(text: str) -> str:
    """Accept an option that names the file to write. A wrong name is refused before the work, not after it."""
    if os.path.basename(text) in _NO_NAMES or os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} names a directory: the name of a file is needed" if text else _EMPTY)
    return text


def output_prefix(text: str) -> str:
    """Accept an option that names the dataset to write. If PREFIX were a directory, PREFIX/.bin would be a hidden file inside of it."""
    if os.path.basename(text) in _NO_NAMES:
        example = os.path.join(os.path.dirname(text), "train")
        raise argparse.ArgumentTypeError(f"{text!r} names a directory: add the name of a dataset, such as {example}" if text else _EMPTY)
    return text


def corpus_from(options: argparse.Namespace) -> TextCorpus:
    """Return the corpus that the options of :func:`add_corpus_options` describe."""
    if bad := [text for text in options.filter if not text.partition("=")[0] or "=" not in text]:
        raise CorpusError(f"--filter {bad[0]} is not FIELD=REGEX")
    rules = Rules(
        text_field=options.text_field,
        split_on=options.split_on,
        filters=tuple((field, pattern) for field, _, pattern in (text.partition("=") for text in options.filter)),
        min_bytes=options.min_bytes,
        max_bytes=options.max_bytes,
        on_error=options.on_error,
        limits=Limits(options.max_document_size, options.max_row_group_size),
    )
    return TextCorpus(options.input, rules, extensions=options.extensions, kind=options.format)
