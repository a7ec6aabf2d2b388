"""The command that shows and checks a dataset: w1train data inspect PREFIX --tokenizer tokenizer.json

It prints counts, a histogram of the documents' lengths and some documents as text. It checks that the index is whole, that the files have
their hashes, that every token is in the vocabulary and not the mask, and that every document ends with EOS.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.command_runner import run_command
from data_tools.document_view import STYLE, DocumentView, draw_views, legend, page_legend
from data_tools.histogram import Histogram
from data_tools.progress import ByteProgress
from w1train.config.argument_parser import ArgumentParser
from w1train.config.reading import shorten
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.dataset_manifest import dataset_paths
from w1train.data.sharded_dataset import open_dataset
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.command import command
from w1train.runtime.files import write_text
from w1train.runtime.output_files import require_writable

_TOKENS_AT_ONCE = 1 << 20
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True, slots=True)
class Check:
    """The result of a check of a dataset."""

    name: str
    problem: str = ""
    """The fault that the check found; empty if it found no fault."""

    def __str__(self) -> str:
        return f"FAILED  {self.name}: {self.problem}" if self.problem else f"ok      {self.name}"


@command("w1train data inspect")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status, which is 1 if a check failed."""
    parser = ArgumentParser(
        prog="w1train data inspect",
        description="Print counts, lengths and documents of a dataset, and check it. The exit status is 1 if a check fails.",
    )
    parser.add_argument("prefix", metavar="PREFIX", help="a dataset, as w1train data tokenize or Megatron-LM writes it")
    parser.add_argument("--tokenizer", metavar="FILE", help="the dataset's tokenizer.json, to decode documents and to check the vocabulary")
    parser.add_argument(
        "--samples", type=int, default=3, metavar="N", help="number of documents to decode, which --seed draws (default: %(default)s)"
    )
    parser.add_argument(
        "--characters", type=int, default=300, metavar="N", help="the most characters of each document (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed that draws the documents (default: %(default)s)")
    parser.add_argument("--no-scan", action="store_true", help="do not read the tokens, and check neither hashes nor the vocabulary")
    parser.add_argument("--svg", metavar="FILE", help="write the histogram as an SVG picture")
    parser.add_argument("--html", metavar="FILE", help="write all of it as an HTML page")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files, but never an input")
    options = parser.parse_args(arguments)
    return run_command(lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> None:
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    dataset = open_dataset(options.prefix, tokenizer)
    inputs = [path for part in dataset.parts for path in dataset_paths(part.prefix)]
    inputs += [Path(options.tokenizer)] if options.tokenizer else []
    require_writable([path for path in (options.svg, options.html) if path], inputs, overwrite=options.overwrite)
    lengths = np.diff(dataset.document_offsets)
    counts = count(dataset, lengths)
    histogram = Histogram.of(lengths)
    views = draw_views(dataset, tokenizer, options.samples, options.characters, options.seed) if tokenizer else []
    checks = [Check("the index is whole, and the files have the sizes that it implies")]
    if not options.no_scan:
        checks += [check_hashes(dataset), check_tokens(dataset, tokenizer)]
        checks += [check_may_be_noised(dataset)] if dataset.limits_noise else []
    width = max(len(name) for name, _ in counts)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in counts), histogram.text(), sep="\n\n", end="\n\n")
    has_colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if line := legend(views, has_colors):
        print(line, end="\n\n")
    for view in views:
        print(view.for_terminal(has_colors))
    print("\n".join(map(str, checks)))
    if options.svg:
        write_text(options.svg, histogram.svg())
    if options.html:
        write_text(options.html, _page(options.prefix, counts, histogram, views, checks))
    if failed := [check for check in checks if check.problem]:
        raise DatasetError(f"dataset {options.prefix} failed a check: {failed[0].problem}")


def count(dataset: TokenDataset, lengths: NDArray[np.int64]) -> list[tuple[str, str]]:
    """Return pairs of a name and a value that describe a dataset; ``lengths`` [n] are the numbers of tokens of its documents."""
    rows = [("documents", f"{dataset.num_documents:,}"), ("tokens", f"{dataset.num_tokens:,}")]
    manifest = dataset.manifest
    if manifest is not None:
        rows += [
            ("bytes of text", f"{manifest.num_bytes:,}"),
            ("bytes a token", f"{manifest.num_bytes / manifest.num_tokens:.3f}"),
            ("unigram bits a byte", f"{manifest.unigram_bits_per_byte:.4f}"),
            ("token type", f"{manifest.dtype}, ids up to {manifest.max_token_id}"),
            ("tokenizer", f"{manifest.tokenizer_vocab_size} ids, sha256 {manifest.tokenizer_fingerprint[:16]}..."),
            ("made by", ", ".join([manifest.created_by, *(f"{name} {version}" for name, version in manifest.versions.items())])),
        ]
        kinds = ("bad", "too_large", "empty", "filtered", "duplicates")
        left_out = [f"{manifest.corpus.get(f'num_{kind}', 0):,} {kind.replace('_', ' ')}" for kind in kinds]
        is_of_texts = manifest.corpus and not manifest.conversations
        rows += [("left out of the corpus", ", ".join(left_out))] if is_of_texts else _conversation_rows(manifest.conversations)
    if dataset.limits_noise:
        rows.append(("may be noised", "only the tokens that the .may_be_noised file allows"))
    quantiles = np.quantile(lengths, _QUANTILES, method="inverted_cdf")
    rows.append(("tokens a document", f"mean {lengths.mean():,.1f}, least {lengths.min():,}, most {lengths.max():,}"))
    rows.append(("   quantiles", ", ".join(f"{share:.0%} {value:,}" for share, value in zip(_QUANTILES, quantiles, strict=True))))
    return rows


def _conversation_rows(conversations: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines about a dataset of conversations, whose manifest may have been changed by hand."""
    if not conversations:
        return []
    counts = [
        f"{value:,} {shorten(name.removeprefix('num_').replace('_', ' '))[1:-1]}"
        for name, value in conversations.items()
        if name.startswith("num_")
    ]
    return [
        (
            "conversations",
            f"{conversations['kind']}, replies: {conversations['replies']}, template: {shorten(conversations.get('template'))}",
        ),
        ("counts", ", ".join(counts)),
    ]


def check_hashes(dataset: TokenDataset) -> Check:
    """Check that the files have the hashes of the manifest."""
    name = "the files have the hashes of the manifest"
    if dataset.manifest is None:
        return Check(f"{name} (not checked: the dataset has no manifest)")
    try:
        dataset.verify_hashes()
    except DatasetError as error:
        return Check(name, str(error))
    return Check(name)


def check_tokens(dataset: TokenDataset, tokenizer: Tokenizer | None) -> Check:
    """Check that all tokens are in the vocabulary, that no token is the mask, and that EOS ends the documents."""
    facts = tokenizer or dataset.manifest
    if facts is None:
        return Check("every token is in the vocabulary (not checked: this needs --tokenizer)")
    vocab_size = facts.vocab_size if isinstance(facts, Tokenizer) else facts.tokenizer_vocab_size
    # The documents of a dataset that other software wrote need not end with EOS.
    ends_matter = dataset.manifest is not None
    num_cut = dataset.manifest.conversations.get("num_cut", 0) if dataset.manifest is not None else 0
    name = f"every token is in the vocabulary of {vocab_size} ids, and no token is the mask"
    name += ", and every document ends with EOS" if ends_matter else ""
    name += f" but at most {num_cut} that were cut" if num_cut else ""
    ends = dataset.document_offsets[1:][np.diff(dataset.document_offsets) > 0] - 1
    with ByteProgress("reading", dataset.num_tokens * dataset.document_tokens(0, 0, 0).itemsize) as progress:
        for start, tokens in _chunks(dataset):
            if problem := _token_problem(tokens, start, vocab_size, facts.mask_token_id):
                return Check(name, problem)
            inside = ends[np.searchsorted(ends, start) : np.searchsorted(ends, start + len(tokens))]
            open_ends = inside[tokens[inside - start] != facts.eos_token_id]
            num_cut -= len(open_ends)
            if ends_matter and num_cut < 0:
                return Check(name, f"token {open_ends[0]} is the last of its document, but not EOS")
            progress.update((start + len(tokens)) * tokens.itemsize)
    return Check(name)


def check_may_be_noised(dataset: TokenDataset) -> Check:
    """Count the tokens that may be noised, and check that the file says 0 or 1 for each token."""
    num_noised = 0
    try:
        for start in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
            num_noised += int(dataset.read_may_be_noised(start, min(start + _TOKENS_AT_ONCE, dataset.num_tokens)).sum())
    except DatasetError as error:
        return Check("the tokens that may be noised are known", str(error))
    return Check(f"the tokens that may be noised are known: {num_noised:,}, {num_noised / dataset.num_tokens:.1%} of all")


def _token_problem(tokens: NDArray[np.integer], start: int, vocab_size: int, mask_token_id: int) -> str:
    bad = (tokens < 0) | (tokens >= vocab_size)
    if bad.any():
        place = int(bad.argmax())
        return f"token {start + place} is {tokens[place]}, outside the vocabulary of {vocab_size} ids"
    masks = tokens == mask_token_id
    return f"token {start + int(masks.argmax())} is the mask" if masks.any() else ""


def _chunks(dataset: TokenDataset) -> Iterator[tuple[int, NDArray[np.integer]]]:
    """Yield the first token's place and the tokens of each piece of the token file. A memory map would count as memory of the process."""
    for start in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
        yield start, dataset.read(start, min(start + _TOKENS_AT_ONCE, dataset.num_tokens))


def _page(
    prefix: str, counts: Sequence[tuple[str, str]], histogram: Histogram, views: Sequence[DocumentView], checks: Sequence[Check]
) -> str:
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in counts)
    texts = page_legend(views) + "".join(view.for_page() for view in views)
    results = html.escape("\n".join(map(str, checks)))
    title = html.escape(Path(prefix).name)
    style = "body{font-family:sans-serif;max-width:760px;margin:2em auto}th{text-align:left;padding-right:1em}pre{white-space:pre-wrap}"
    style += STYLE
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style><h1>{title}</h1>'
        f"<table>{rows}</table>{histogram.svg()}{texts}<h3>checks</h3><pre>{results}</pre></html>\n"
    )


if __name__ == "__main__":
    sys.exit(main())
