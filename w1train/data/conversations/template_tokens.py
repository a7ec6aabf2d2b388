"""The special tokens that a chat template writes, and those of the tokenizer."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from w1train.config.errors import UserError
from w1train.config.reading import FileContentError, read_json_object
from w1train.data.conversations.chat_template import ChatTemplate
from w1train.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def tokenizer_manifest_path(tokenizer: Path) -> Path:
    """Return the path of a tokenizer's manifest, tokenizer.manifest.json for tokenizer.json."""
    return tokenizer.with_suffix(".manifest.json")


def renamed_tokens(path: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the new name of each token that w1train data import-tokenizer renamed, by the name that the model's template has for it.

    Args:
        path: the tokenizer's file. A manifest beside it that belongs to another tokenizer is not used.
    """
    try:
        content = read_json_object(tokenizer_manifest_path(path), "manifest of a tokenizer")
    except (OSError, FileContentError):
        return {}
    renamed = content.get("renamed")
    if content.get("sha256") != tokenizer.fingerprint or not isinstance(renamed, dict):
        return {}
    return {old: new for old, new in renamed.items() if new in tokenizer.special_tokens and old not in tokenizer.special_tokens}


def check_template(template: ChatTemplate, names: set[str]) -> None:
    """Refuse a template that writes special tokens which the tokenizer does not have, and warn of texts that look like such tokens.

    Raises:
        UserError: if a variable such as bos_token, which the template reads, is not a special token.
    """
    source = template.source
    for name in sorted(template.variables & source.variables.keys()):
        if (value := source.variables[name]) and value not in names:
            raise UserError(
                f"the chat template {source.origin} writes {name}, which is {value}, and the tokenizer has no special token of this name: "
                "give the tokenizer that was imported from the same model"
            )
    looks = {found for text in template.literals for found in re.findall(r"<\|[^|<>\s]{1,60}\|>", text)}
    if unknown := sorted(looks - names):
        logger.warning(
            "the chat template %s writes %s, which is no special token of the tokenizer: it is encoded as text", source.origin, unknown[0]
        )
