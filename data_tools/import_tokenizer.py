"""Give a model's own tokenizer the special tokens that training needs: python -m data_tools.import_tokenizer --input tokenizer.json ..."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.command import input_path, output_file, run_command
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
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.import_tokenizer",
        description="Make a Hugging Face tokenizer.json one that w1train trains with: its end-of-text token becomes <eos> at the same id, "
        "<pad> and <mask> are added where nothing is. All other ids stay, so the model's embeddings fit.",
    )
    parser.add_argument(
        "--input", type=input_path, required=True, metavar="PATH", help="the model's tokenizer.json, or the directory that it is in"
    )
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="where to write the new one")
    parser.add_argument("--eos", required=True, metavar="TOKEN", help="the token that ends a document, such as '<|endoftext|>'")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="id of <mask>; the first free one if not given")
    parser.add_argument("--mask", metavar="TOKEN", help="a special token that nothing uses, to become <mask> at its id")
    parser.add_argument("--pad", metavar="TOKEN", help="one to become <pad> (default: a new one)")
    options = parser.parse_args(arguments)
    if options.mask and options.mask_token_id is not None:
        parser.error("--mask has an id already: --mask-token-id does not go with it")
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
        logger.warning("%s normalises text (%s): not every text comes back as it went in", source, content["normalizer"].get("type"))
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
    """The tokenizer.json with special tokens under new names (one becomes <eos>), and <mask> and <pad> added unless they are among those.

    Raises:
        TokenizerError: there is no such token among the added ones, or something is already at the mask's id.
    """
    added = content.get("added_tokens") or []
    there = {token["content"]: token["id"] for token in added}
    if missing := [text for text in renamed if text not in there]:
        raise TokenizerError(f"tokenizer {origin} has no special token {missing[0]}; it has: {', '.join(there) or 'none'}")
    used = {number: text for text, number in (content["model"]["vocab"] | there).items()}
    new = [name for name in (MASK_TOKEN, PAD_TOKEN) if name not in renamed.values()]
    first_free = max(used) + 1
    mask = first_free if mask_token_id is None else mask_token_id
    if mask in used:
        raise TokenizerError(f"--mask-token-id {mask} is {used[mask]!r} in {origin}; the first free id is {first_free}")
    if mask > first_free:
        raise TokenizerError(f"--mask-token-id {mask} leaves ids without a token before it; the first free one is {first_free}")
    tokens = [{**token, "content": renamed[token["content"]], "special": True} if token["content"] in renamed else token for token in added]
    # A template that adds special tokens around texts would name the old one; documents get their EOS from the writer.
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
