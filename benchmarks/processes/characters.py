"""The vocabulary of characters that `make processes` trains on: a tokenizer.json with one id for each printable character of ASCII and for
the line break.

    python -m benchmarks.processes.characters runs/processes-data/tokenizer.json

Published comparisons of noise processes count characters (text8), because uniform noise over many ids that never occur in the text would be
as easy to see as a mask.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../../..")

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

from data_tools.tokenizer_manifest import write_tokenizer_manifest
from w1train.config.argument_parser import ArgumentParser
from w1train.data.tokenizer import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN, Tokenizer

CHARACTERS = "\n" + "".join(map(chr, range(0x20, 0x7F)))
NUM_TEXT_IDS = 1 + len(CHARACTERS)
"""Ids that a text can have, which come first: the end of a document, and the characters."""


def character_tokenizer() -> Tokenizer:
    """Return the tokenizer, whose ids are <eos>, the line break, the printable characters in the order of ASCII, <mask> and <pad>."""
    # The byte-level step writes white space as a visible letter.
    (written,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(CHARACTERS)
    tokens = [EOS_TOKEN, *written[0], MASK_TOKEN, PAD_TOKEN]
    backend = BackendTokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (EOS_TOKEN, MASK_TOKEN, PAD_TOKEN)])
    return Tokenizer(backend.to_str(pretty=True).encode(), origin="the tokenizer of characters")


def main(arguments: Sequence[str]) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.processes.characters", description="Write a tokenizer of ASCII characters.")
    parser.add_argument("output", type=Path, metavar="FILE", help="the tokenizer.json to write")
    output = parser.parse_args(arguments).output
    tokenizer = character_tokenizer()
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output)
    write_tokenizer_manifest(output, tokenizer, "benchmarks.processes.characters", {})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
