"""Prompts as messages of a user: the tokens before the model's reply, and the token that ends it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.data.conversations.chat_template import ChatTemplate, TemplateSource
from w1train.data.conversations.chat_tokens import ChatEncoder
from w1train.data.conversations.messages import Conversation, ConversationError, Message
from w1train.data.conversations.template_tokens import check_template, renamed_tokens
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.files import write_text

BUILT_IN = "built_in"
"""The value of sampling.chat_template for the template that w1train data conversations uses if it is given no other template."""


class ChatPrompts:
    """The encoder of prompts, each of which is a conversation of one message."""

    def __init__(self, tokenizer: Tokenizer, source: TemplateSource, renamed: Mapping[str, str]) -> None:
        """Prepare a chat template for a tokenizer.

        Args:
            renamed: as for :class:`w1train.data.conversations.rendering.SpecialNames`.

        Raises:
            UserError: if the template is not valid, does not fit the tokenizer, or does not take a question and a reply.
        """
        template = ChatTemplate(source)
        check_template(template, {*tokenizer.special_tokens, *renamed})
        self._source, self._encoder = source, ChatEncoder(tokenizer, template, renamed)
        self.end_token_ids: tuple[int, ...] = self._end_of_turn(tokenizer)
        """The special token by which the template ends a reply, if it is not EOS. Before this token, or before EOS, a reply ends."""

    @property
    def template_sha256(self) -> str:
        """The hash of the template, as in the manifest of a dataset of conversations."""
        return self._source.sha256

    @classmethod
    def load(cls, template: str, tokenizer_path: str, tokenizer: Tokenizer) -> ChatPrompts:
        """Read the chat template of a configuration: a path, or BUILT_IN.

        Raises:
            UserError: as the constructor; or if the template cannot be read.
        """
        time = datetime.now()
        source = TemplateSource.default(time) if template == BUILT_IN else TemplateSource.read(Path(template), time)
        return cls(tokenizer, source, renamed_tokens(Path(tokenizer_path), tokenizer))

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens before the reply to each prompt.

        Raises:
            UserError: if a prompt is empty, or the template does not take it.
        """
        encoded = []
        for row, prompt in enumerate(prompts):
            if not prompt.strip():
                raise UserError(f"prompt {row} is empty; with sampling.chat_template, a prompt is the message of a user, which has a text")
            try:
                encoded.append(self._encoder.prompt([_message("user", prompt)], {}))
            except ConversationError as error:
                raise UserError(f"prompt {row}: {error}") from error
        return encoded

    def save(self, path: Path) -> None:
        """Write the template with its special tokens to a file of the form of a tokenizer_config.json, which :meth:`load` reads."""
        write_text(path, json.dumps({"chat_template": self._source.text, **self._source.variables}, indent=2, ensure_ascii=False) + "\n")

    def _end_of_turn(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        conversation = Conversation([_message("user", "A question"), _message("assistant", "An answer")])
        try:
            document = self._encoder.document(conversation, conversation.replies)
        except ConversationError as error:
            raise UserError(str(error)) from error
        ids = tokenizer.ids_by_token()
        before_eos = document.ids[-2]
        return (before_eos,) if before_eos in {ids[name] for name in tokenizer.special_tokens} else ()


def chat_prompts_of(config: Config, tokenizer: Tokenizer) -> ChatPrompts | None:
    """Return the encoder of the prompts of a run; None = prompts are texts that the model continues.

    Raises:
        UserError: as :meth:`ChatPrompts.load`, with the key.
    """
    template = config.sampling.chat_template
    if template is None:
        return None
    try:
        return ChatPrompts.load(template, config.data.tokenizer, tokenizer)
    except UserError as error:
        raise UserError(f"sampling.chat_template: {error}") from error


def _message(role: str, text: str) -> Message:
    return {"role": role, "content": text}
