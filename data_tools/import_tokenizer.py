"""The command that gives a model's own tokenizer the special tokens for training.

python -m data_tools.import_tokenizer --input tokenizer.json --eos TOKEN --output FILE
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.command_runner import run_command
from data_tools.corpus_options import input_path, output_file
from data_tools.tokenizer_manifest import write_tokenizer_manifest
from w1train.data.tokenizers.tokenizer import (
    EOS_TOKEN,
    MASK_TOKEN,
    PAD_TOKEN,
    Tokenizer,
    TokenizerError,
    parse_tokenizer_json,
    read_tokenizer_file,
)
from w1train.runtime.command import command

logger = logging.getLogger(__name__)


@command("data_tools.import_tokenizer")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.import_tokenizer",
        description="Make a tokenizer.json for w1train from that of a Hugging Face model: its end-of-text token becomes <eos> with the "
        "same id, and <pad> and <mask> get free ids. No other id changes, so the tokenizer still fits the model's embeddings.",
    )
    parser.add_argument(
        "--input", type=input_path, required=True, metavar="PATH", help="the model's tokenizer.json, or the directory that contains it"
    )
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--eos", required=True, metavar="TOKEN", help="the token that ends a document, such as '<|endoftext|>'")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="id of <mask> (default: the first free id)")
    parser.add_argument("--mask", metavar="TOKEN", help="an unused special token, which becomes <mask> with the same id")
    parser.add_argument("--pad", metavar="TOKEN", help="an unused special token, which becomes <pad> (default: a new token)")
    options = parser.parse_args(arguments)
    if options.mask and options.mask_token_id is not None:
        parser.error("--mask names a token that has an id: --mask-token-id must not be given as well")
    return run_command(lambda: _import(options))


def _import(options: argparse.Namespace) -> None:
    source = Path(options.input)
    source = source / "tokenizer.json" if source.is_dir() else source
    serialized = read_tokenizer_file(source)
    content = parse_tokenizer_json(serialized, f"tokenizer {source}")
    if not isinstance(content["model"]["vocab"], dict):
        raise TokenizerError(f"tokenizer {source} has no vocabulary of tokens and ids")
    wanted = [(options.eos, EOS_TOKEN), (options.mask, MASK_TOKEN), (options.pad, PAD_TOKEN)]
    renamed = {text: name for text, name in wanted if text}
    if len(renamed) < sum(bool(text) for text, _ in wanted):
        raise TokenizerError("--eos, --mask and --pad must be different tokens")
    converted = with_special_tokens(content, renamed, options.mask_token_id, str(source))
    tokenizer = Tokenizer(json.dumps(converted, ensure_ascii=False).encode(), origin=str(source))
    if content.get("normalizer"):
        logger.warning(
            "%s normalises text (%s): decoding does not give back every text that was encoded", source, content["normalizer"].get("type")
        )
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output)
    origin = {"source": str(source), "source_sha256": hashlib.sha256(serialized).hexdigest(), "renamed": renamed}
    write_tokenizer_manifest(output, tokenizer, "data_tools.import_tokenizer", origin)
    logger.info(
        "wrote %s: %d ids, <eos> %d, <mask> %d (diffusion.mask_token_id), <pad> %d; model.vocab_size must be at least %d",
        *(output, tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id),
        max(tokenizer.vocab_size, tokenizer.mask_token_id + 1, tokenizer.pad_token_id + 1),
    )


def with_special_tokens(content: dict[str, Any], renamed: dict[str, str], mask_token_id: int | None, origin: str) -> dict[str, Any]:
    """Return the tokenizer.json with special tokens under new names, and with <mask> and <pad> added unless tokens were renamed to them.

    Raises:
        TokenizerError: if a token to rename is not among the added tokens, or another token has the mask's id.
    """
    added = content.get("added_tokens") or []
    there = {token["content"]: token["id"] for token in added}
    if missing := [text for text in renamed if text not in there]:
        raise TokenizerError(f"tokenizer {origin} has no special token {missing[0]}; it has: {', '.join(there) or 'no special tokens'}")
    used = {number: text for text, number in (content["model"]["vocab"] | there).items()}
    new = [name for name in (MASK_TOKEN, PAD_TOKEN) if name not in renamed.values()]
    first_free = max(used) + 1
    mask = first_free if mask_token_id is None else mask_token_id
    if mask in used:
        raise TokenizerError(f"--mask-token-id {mask} is {used[mask]!r} in {origin}; the first free id is {first_free}")
    if mask > first_free:
        raise TokenizerError(f"--mask-token-id {mask} leaves ids without a token before it; the first free id is {first_free}")
    tokens = [{**token, "content": renamed[token["content"]], "special": True} if token["content"] in renamed else token for token in added]
    # A template that adds special tokens around texts would contain the old names. Documents get their EOS from the writer.
    return {
        **content,
        "added_tokens": [*tokens, *(_special_token(first_free + i, name) for i, name in enumerate(new))],
        "model": {**content["model"], "vocab": {renamed.get(text, text): number for text, number in content["model"]["vocab"].items()}},
        "post_processor": _without_templates(content),
    }


def _special_token(number: int, text: str) -> dict[str, Any]:
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _without_templates(content: dict[str, Any]) -> dict[str, Any] | None:
    processor = content.get("post_processor")
    return None if isinstance(processor, dict) and processor.get("type") in ("TemplateProcessing", "Sequence") else processor


if __name__ == "__main__":
    sys.exit(main())
