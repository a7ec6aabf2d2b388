"""The command that gives a model's own tokenizer the special tokens for training.

w1train data import-tokenizer --input tokenizer.json --eos TOKEN --output FILE
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

from tokenizers import pre_tokenizers

from data_tools.command_runner import run_command
from data_tools.corpus_options import input_path, output_file
from data_tools.tokenizer_manifest import require_writable_tokenizer, write_tokenizer_manifest
from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import listing
from w1train.config.reading import shorten
from w1train.data.tokenizer import (
    EOS_TOKEN,
    MASK_TOKEN,
    MAX_VOCAB_SIZE,
    PAD_TOKEN,
    Tokenizer,
    TokenizerError,
    parse_tokenizer_json,
    read_tokenizer_file,
)
from w1train.runtime.command import command

logger = logging.getLogger(__name__)
_PROBES = ("{}", " {}", "a {} b", "a\n{}\nb", "a{}b", "1{}1")
"""Texts in which the name of a special token may be a piece of its own, which some models look up as it is (``ignore_merges``)."""


@command("w1train data import-tokenizer")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    parser = ArgumentParser(
        prog="w1train data import-tokenizer",
        description="Make a tokenizer.json for w1train from that of a Hugging Face model: its end-of-text token becomes <eos> with the "
        "same id, and <pad> and <mask> get free ids. No other id changes, so the tokenizer still fits the model's embeddings.",
    )
    parser.add_argument(
        "--input", type=input_path, required=True, metavar="PATH", help="the model's tokenizer.json, or the directory that contains it"
    )
    parser.add_argument("--output", type=output_file, required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files, but never an input")
    parser.add_argument("--eos", required=True, metavar="TOKEN", help="the token that ends a document, such as '<|endoftext|>'")
    parser.add_argument(
        "--mask-token-id", type=int, metavar="ID", help="id of <mask>, which has no token yet (default: after the last token)"
    )
    parser.add_argument("--mask", metavar="TOKEN", help="an unused special token, which becomes <mask> with the same id")
    parser.add_argument("--pad", metavar="TOKEN", help="an unused special token, which becomes <pad> (default: a new token)")
    options = parser.parse_args(arguments)
    if options.mask and options.mask_token_id is not None:
        parser.error("--mask names a token that has an id: --mask-token-id must not be given as well")
    return run_command(lambda: _import(options))


def _import(options: argparse.Namespace) -> None:
    source = Path(options.input)
    source = source / "tokenizer.json" if source.is_dir() else source
    require_writable_tokenizer(Path(options.output), [source], options.overwrite)
    serialized = read_tokenizer_file(source)
    content = parse_tokenizer_json(serialized, f"tokenizer {source}")
    wanted = [(options.eos, EOS_TOKEN), (options.mask, MASK_TOKEN), (options.pad, PAD_TOKEN)]
    renamed = {text: name for text, name in wanted if text}
    if len(renamed) < sum(bool(text) for text, _ in wanted):
        raise TokenizerError("--eos, --mask and --pad must be different tokens")
    converted = with_special_tokens(content, renamed, options.mask_token_id, str(source))
    tokenizer = Tokenizer(json.dumps(converted, ensure_ascii=False).encode(), origin=str(source))
    _require_ids(tokenizer, stated_ids(converted, str(source)), str(source))
    _check_texts(content, converted, tokenizer, str(source))
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output)
    origin = {"source": str(source), "source_sha256": hashlib.sha256(serialized).hexdigest(), "renamed": renamed}
    write_tokenizer_manifest(output, tokenizer, "data_tools.import_tokenizer", origin)
    logger.info(
        "wrote %s: %d tokens, <eos> %d, <mask> %d (diffusion.mask_token_id), <pad> %d; model.vocab_size must be at least %d",
        *(output, len(tokenizer.ids_by_token()), tokenizer.eos_token_id, tokenizer.mask_token_id, tokenizer.pad_token_id),
        tokenizer.vocab_size,
    )


def with_special_tokens(content: dict[str, Any], renamed: dict[str, str], mask_token_id: int | None, origin: str) -> dict[str, Any]:
    """Return the tokenizer.json with special tokens under new names, and add <mask> and <pad>, unless a token has this name or was
    renamed to it.

    Args:
        renamed: the new names of special tokens, by their names in the file.

    Raises:
        TokenizerError: if a token to rename is not among the added tokens, the mask cannot have ``mask_token_id``, or texts may contain
            the token that would become <eos>, <mask> or <pad>.
    """
    ids = stated_ids(content, origin)
    added = content.get("added_tokens") or []
    special = [token["content"] for token in added]
    if missing := [text for text in renamed if text not in special]:
        raise TokenizerError(f"tokenizer {origin} has no special token {missing[0]}; it has: {', '.join(special) or 'no special tokens'}")
    renamed = _with_own_names(renamed, ids, special, origin)
    model = _renamed_model(content["model"], renamed, origin)
    new = _new_ids(ids, renamed, mask_token_id, origin)
    tokens = [{**token, "content": renamed[token["content"]], "special": True} if token["content"] in renamed else token for token in added]
    return {
        **content,
        **_placed(model, [*tokens, *(_special_token(number, name) for name, number in new.items())]),
        # These parts contain old names. Documents get their EOS from the writer.
        "post_processor": _without_tokens(content),
        "padding": None,
        "truncation": None,
    }


def stated_ids(content: dict[str, Any], origin: str) -> dict[str, int]:
    """Return the id that the file states for each token of its vocabulary and its added tokens.

    Raises:
        TokenizerError: if the ids are places in a list (Unigram), or the file states two ids for a token.
    """
    vocabulary = content["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        raise TokenizerError(f"tokenizer {origin} has no vocabulary of tokens and ids, but a list: Unigram models cannot be imported")
    ids = dict(vocabulary)
    for token in content.get("added_tokens") or []:
        text, number = token["content"], token["id"]
        if ids.setdefault(text, number) != number:
            raise TokenizerError(f"tokenizer {origin} states the ids {ids[text]} and {number} for the token {shorten(text)}")
    return ids


def _with_own_names(renamed: dict[str, str], ids: dict[str, int], special: Sequence[str], origin: str) -> dict[str, str]:
    """Return ``renamed`` with the special tokens that have w1train's names in the file already."""
    complete = dict(renamed)
    for name, option in ((EOS_TOKEN, "--eos"), (MASK_TOKEN, "--mask"), (PAD_TOKEN, "--pad")):
        if name not in ids or name in renamed:
            continue
        if name in renamed.values():
            raise TokenizerError(f"tokenizer {origin} already has a token {name} (id {ids[name]}): give {option} {name}")
        if name not in special:
            raise TokenizerError(f"{name} is an ordinary token (id {ids[name]}) of tokenizer {origin}, which texts may contain")
        logger.info("%s is the token of this name in %s, with the id %d", name, origin, ids[name])
        complete[name] = name
    return complete


def _renamed_model(model: dict[str, Any], renamed: dict[str, str], origin: str) -> dict[str, Any]:
    """Return the model with tokens renamed in its vocabulary.

    Raises:
        TokenizerError: if unknown characters would become a renamed token, which is then not a token of its own.
    """
    vocabulary, unknown = model["vocab"], model.get("unk_token")
    new_unknown = renamed.get(unknown) if isinstance(unknown, str) else None
    if new_unknown is not None and not vocabulary.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        raise TokenizerError(f"{unknown} stands for unknown characters in tokenizer {origin}, so texts contain it: choose another token")
    return {
        **model,
        "vocab": {renamed.get(text, text): number for text, number in vocabulary.items()},
        **({} if new_unknown is None else {"unk_token": new_unknown}),
    }


def _new_ids(ids: dict[str, int], renamed: dict[str, str], mask_token_id: int | None, origin: str) -> dict[str, int]:
    """Return the ids of <mask> and <pad>, if they are new tokens."""
    used = {number: text for text, number in ids.items()}
    first_free = max(used, default=-1) + 1
    names = {name: text for text, name in renamed.items()}
    if MASK_TOKEN in names:
        mask = ids[names[MASK_TOKEN]]
        if mask_token_id not in (None, mask):
            raise TokenizerError(f"--mask-token-id {mask_token_id} cannot be kept: {MASK_TOKEN} of {origin} has the id {mask}")
    else:
        mask = first_free if mask_token_id is None else mask_token_id
        if mask in used:
            raise TokenizerError(f"--mask-token-id {mask} is {used[mask]!r} in {origin}; the first free id is {first_free}")
        if not 0 <= mask < MAX_VOCAB_SIZE:
            raise TokenizerError(f"--mask-token-id {mask} is not an id: ids are numbers from 0 to {MAX_VOCAB_SIZE - 1}")
    new = {MASK_TOKEN: mask, PAD_TOKEN: first_free + (mask == first_free)}
    return {name: number for name, number in new.items() if name not in names}


def _placed(model: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the model and the added tokens of a file in which the library gives each token the stated id.

    The library does not read the ids of added tokens. It looks up a token in the model's vocabulary, and otherwise counts on from the
    number of tokens, which may be another token's id if the vocabulary has holes. Such a vocabulary therefore gets the added tokens too.
    """
    vocabulary = model["vocab"]
    added = sorted(added, key=lambda token: token["id"])
    outside = [token["id"] for token in added if token["content"] not in vocabulary]
    if sorted(vocabulary.values()) + outside != list(range(len(vocabulary) + len(outside))):
        vocabulary = vocabulary | {token["content"]: token["id"] for token in added}
    return {"model": {**model, "vocab": vocabulary}, "added_tokens": added}


def _require_ids(tokenizer: Tokenizer, stated: dict[str, int], origin: str) -> None:
    """Raise TokenizerError unless the library gives each token the id that the file states."""
    used = tokenizer.ids_by_token()
    if wrong := [text for text, number in stated.items() if used.get(text) != number]:
        raise TokenizerError(
            f"tokenizer {origin} states the id {stated[wrong[0]]} for the token {shorten(wrong[0])}, and the tokenizers library gives "
            f"this token the id {used.get(wrong[0])}"
        )


def _check_texts(content: dict[str, Any], converted: dict[str, Any], tokenizer: Tokenizer, origin: str) -> None:
    """Warn of texts that the tokenizer changes, or encodes as a special token.

    Raises:
        TokenizerError: if a text becomes a special token only because the import has put the token into the model's vocabulary.
    """
    if content.get("normalizer"):
        logger.warning(
            "%s normalises text (%s): decoding does not give back every text that was encoded", origin, content["normalizer"].get("type")
        )
    ids = {EOS_TOKEN: tokenizer.eos_token_id, MASK_TOKEN: tokenizer.mask_token_id, PAD_TOKEN: tokenizer.pad_token_id}
    found = [name for name, number in ids.items() if any(number in tokenizer.encode(probe.format(name)) for probe in _PROBES)]
    numbers = content["model"]["vocab"].values()
    if new := [name for name in found if name in converted["model"]["vocab"] and ids[name] not in numbers]:
        raise TokenizerError(
            f"the ids of tokenizer {origin} would have gaps, so {listing(new)} must be in the vocabulary of its model, which "
            "then encodes a text that contains such a name as the special token. It can be imported only without gaps: if the gap is "
            "before --mask-token-id, leave that option out"
        )
    if found:
        logger.warning("%s encodes a text that contains %s as the special token: remove such texts", origin, listing(found))


def _special_token(number: int, text: str) -> dict[str, Any]:
    return {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _without_tokens(content: dict[str, Any]) -> dict[str, Any] | None:
    processor = content.get("post_processor")
    return processor if isinstance(processor, dict) and processor.get("type") == "ByteLevel" else None


if __name__ == "__main__":
    sys.exit(main())
