"""Give a model's own tokenizer the special tokens that training needs: python -m data_tools.import_tokenizer --input tokenizer.json ..."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_tools.command import run_command
from w1train.data.tokenizer import EOS_TOKEN, MASK_TOKEN, PAD_TOKEN, Tokenizer, TokenizerError

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_tools.import_tokenizer",
        description="Make a Hugging Face tokenizer.json one that w1train trains with: its end-of-text token becomes <eos> at the same id, "
        "<pad> and <mask> are added where nothing is. All other ids stay, so the model's embeddings fit.",
    )
    parser.add_argument("--input", required=True, metavar="FILE", help="the model's tokenizer.json")
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write the new one")
    parser.add_argument("--eos", required=True, metavar="TOKEN", help="the token that ends a document, such as '<|endoftext|>'")
    parser.add_argument("--mask-token-id", type=int, metavar="ID", help="id of <mask>; the first free one if not given")
    options = parser.parse_args(arguments)
    return run_command(lambda: _import(options))


def _import(options: argparse.Namespace) -> None:
    try:
        content = json.loads(Path(options.input).read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"tokenizer {options.input} is no JSON: {error}") from error
    converted = with_special_tokens(content, options.eos, options.mask_token_id, options.input)
    tokenizer = Tokenizer(json.dumps(converted, ensure_ascii=False).encode(), origin=options.input)
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output)
    logger.info(
        "wrote %s: %d ids, <eos> %d, <mask> %d (diffusion.mask_token_id), <pad> %d; model.vocab_size must be at least %d",
        *(output, tokenizer.vocab_size, tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id),
        max(tokenizer.vocab_size, tokenizer.mask_token_id + 1, tokenizer.pad_token_id + 1),
    )


def with_special_tokens(content: dict[str, Any], eos: str, mask_token_id: int | None, origin: str) -> dict[str, Any]:
    """The tokenizer.json with ``eos`` called <eos>, and <mask> and <pad> added.

    Raises:
        TokenizerError: there is no such token among the added ones, or something is already at the mask's id.
    """
    added = content.get("added_tokens", [])
    ends = [token for token in added if token["content"] == eos]
    if not ends:
        there = ", ".join(token["content"] for token in added) or "none"
        raise TokenizerError(f"tokenizer {origin} has no special token {eos}; it has: {there}")
    used = {token["id"]: token["content"] for token in added} | {number: text for text, number in content["model"]["vocab"].items()}
    first_free = max(used) + 1
    mask = first_free if mask_token_id is None else mask_token_id
    if mask in used:
        raise TokenizerError(f"--mask-token-id {mask} is {used[mask]!r} in {origin}; the first free id is {first_free}")
    if mask > first_free:
        raise TokenizerError(f"--mask-token-id {mask} leaves ids without a token before it; the first free one is {first_free}")
    renamed = [{**token, "content": EOS_TOKEN, "special": True} if token["content"] == eos else token for token in added]
    vocabulary = {EOS_TOKEN if text == eos else text: number for text, number in content["model"]["vocab"].items()}
    new = [_special_token(mask, MASK_TOKEN), _special_token(mask + 1, PAD_TOKEN)]
    # A template that adds special tokens around texts would name the old one; documents get their EOS from the writer.
    return {
        **content,
        "added_tokens": [*renamed, *new],
        "model": {**content["model"], "vocab": vocabulary},
        "post_processor": _without_templates(content),
    }


def _special_token(number: int, text: str) -> dict[str, Any]:
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _without_templates(content: dict[str, Any]) -> dict[str, Any] | None:
    processor = content.get("post_processor")
    return None if processor is None or processor.get("type") in ("TemplateProcessing", "Sequence") else processor


if __name__ == "__main__":
    sys.exit(main())
