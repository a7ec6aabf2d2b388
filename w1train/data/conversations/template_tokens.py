"""The special tokens that a chat template writes, and those of the tokenizer."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from w1train.config.errors import UserError
from w1train.config.reading import FileContentError, read_json_object
from w1train.data.conversations.chat_template import REPLY_START, ChatTemplate
from w1train.data.conversations.messages import ConversationError
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
        UserError: if a variable such as bos_token, which the template reads, is not a special token, or the template writes the
            beginning of a reply after each reply.
    """
    source = template.source
    for name in sorted(template.variables & source.variables.keys()):
        if (value := source.variables[name]) and value not in names:
            raise UserError(
                f"the chat template {source.origin} writes {name}, which is {value}, and the tokenizer has no special token of this name: "
                "give the tokenizer that was imported from the same model"
            )
    _refuse_open_end(template, names)
    looks = {found for text in template.literals for found in re.findall(r"<\|[^|<>\s]{1,60}\|>", text)}
    if unknown := sorted(looks - names):
        logger.warning(
            "the chat template %s writes %s, which is no special token of the tokenizer: it is encoded as text", source.origin, unknown[0]
        )


def _refuse_open_end(template: ChatTemplate, names: set[str]) -> None:
    """Refuse a template that always writes the beginning of the next reply, whatever add_generation_prompt is: the beginning would be
    learned as the end of the reply before it. The template of LLaDA-8B-Instruct is an example.
    """
    question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    try:
        asked, opened, answered = (
            template.render(messages, flag, {}) for messages, flag in (([question], False), ([question], True), ([question, answer], False))
        )
    except ConversationError:
        return  # The template wants other messages than these. Each row is checked by itself.
    if "question" not in asked or "answer" not in answered:
        return
    after_question, after_answer = asked.rpartition("question")[2], answered.rpartition("answer")[2]
    words = re.sub("|".join(map(re.escape, sorted(names, key=len, reverse=True))), "", after_answer) if names else after_answer
    if asked == opened and after_question == after_answer and words.strip() and REPLY_START not in answered:
        raise UserError(
            f"the chat template {template.source.origin} writes {after_answer.strip()!r} after every message, also after a reply, where it "
            "would be learned: give a copy of the template in which the beginning of a reply is under {% if add_generation_prompt %}"
        )
