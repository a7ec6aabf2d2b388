"""What the commands share: the options that name a corpus, and how they end on a user's mistake."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable

from data_tools.progress import setup_logging
from data_tools.text import BLANK_LINES, CorpusError, TextCorpus
from w1train.data.indexed import DatasetError
from w1train.data.tokenizer import TokenizerError

logger = logging.getLogger(__name__)


def add_corpus_options(parser: argparse.ArgumentParser) -> None:
    """Options that :func:`corpus_from` reads."""
    group = parser.add_argument_group("corpus")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text files (one document each), .jsonl/.ndjson files (one document a line), or directories of them, searched "
        "recursively in sorted order, hidden entries left out",
    )
    group.add_argument("--extensions", nargs="+", default=[], metavar=".EXT", help="take only such files from directories (default: all)")
    group.add_argument("--text-field", default="text", metavar="NAME", help="JSONL key that holds the text (default: %(default)s)")
    group.add_argument(
        "--split-on",
        metavar="REGEX",
        help=f"cut texts into documents: a new one begins at each match of the regular expression (multi-line mode; WikiText: "
        f"'^ = [^=].* = $'); or '{BLANK_LINES}' = cut at blank lines and drop them (default: no cutting)",
    )
    group.add_argument(
        "--on-error",
        choices=["fail", "skip"],
        default="fail",
        help="files or lines that are not UTF-8 text or JSON: stop, or leave them out, logged and counted (default: %(default)s)",
    )


def corpus_from(options: argparse.Namespace) -> TextCorpus:
    """The corpus that the options of :func:`add_corpus_options` describe."""
    return TextCorpus(
        options.input,
        extensions=options.extensions,
        text_field=options.text_field,
        split_on=options.split_on,
        on_error=options.on_error,
    )


def run_command(command: Callable[[], None]) -> int:
    """Exit status of a command: 0, or 1 after logging what the user or the machine (a full disk, say) got wrong."""
    setup_logging()
    try:
        command()
    except (CorpusError, DatasetError, TokenizerError, OSError) as error:
        logger.error("%s", error)
        return 1
    return 0
