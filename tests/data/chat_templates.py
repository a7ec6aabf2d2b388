"""Chat templates in the styles of published models, with the special tokens of the small tokenizer."""

from __future__ import annotations

from datetime import datetime

from w1train.data.conversations.chat_template import ChatTemplate, TemplateSource
from w1train.data.conversations.chat_tokens import ChatEncoder
from w1train.data.tokenizer import Tokenizer

START, END = "<reserved_3>", "<reserved_4>"
CHATML = (
    "{%- for message in messages %}\n"
    "    {{- '" + START + "' + message['role'] + '\\n' + message['content'] + '" + END + "' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '" + START + "assistant\\n' }}\n{%- endif %}\n"
)
"""A template in the style of Qwen, which writes a line break after each turn."""
HEADERS = (
    "{{ bos_token }}{% for message in messages %}{% set content = message['content'] | trim %}"
    "{% if loop.first and message['role'] == 'system' %}{{ content.upper() }}{% endif %}"
    "{{ '" + START + "' + message['role'] + '" + END + "\\n\\n' + content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START + "assistant" + END + "\\n\\n' }}{% endif %}"
)
"""A template in the style of LLaDA, which trims and ends each turn with EOS."""
MARKED = (
    "{% for message in messages %}{{ '" + START + "' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '" + END + "' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '" + END + "' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START + "assistant\\n' }}{% endif %}"
)
"""A template that says what the model writes."""


def encoder_of(tokenizer: Tokenizer, text: str, renamed: dict[str, str] | None = None) -> ChatEncoder:
    variables = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return ChatEncoder(tokenizer, ChatTemplate(TemplateSource(text, "a.jinja", variables, datetime(2026, 1, 31))), renamed or {})
