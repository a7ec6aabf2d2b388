"""The records of conversations, and the messages in them.

A format is known by the keys of a record: the public datasets have no other sign. ``FORMATS`` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from w1train.config.errors import listing
from w1train.config.reading import shorten
from w1train.data.text.file_names import CorpusError

ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot", "chatgpt"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""The roles that may follow a role; "" is the start."""
_FOR_TEMPLATES = ("tools", "documents")
"""Keys of a record that chat templates read beside the messages."""

type Message = dict[str, Any]


class ConversationError(CorpusError):
    """The error of a record that is no conversation to train on."""

    def __init__(self, reason: str, message: str) -> None:
        """Accept the reason by which the command counts the record, and the message about it."""
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, the last of which is a reply."""

    messages: list[Message]
    for_template: Mapping[str, Any] = field(default_factory=dict)
    """Further values for the template, such as the tools."""

    @property
    def replies(self) -> list[int]:
        """Return the places of the replies among the messages."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two conversations that differ in their last reply alone."""

    chosen: Conversation
    rejected: Conversation


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A conversation that was tokenized before."""

    ids: list[int]
    is_reply: list[bool]


type Row = Conversation | Preference | TokenRow


class Format(NamedTuple):
    """A format of records."""

    keys: tuple[tuple[str, ...], ...]
    """The keys of a record. Of the names in one tuple, the record has at least one."""
    parse: Callable[[dict[str, Any]], Row]

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Tell whether a record has the keys of the format."""
        return all(any(record.get(name) is not None for name in names) for names in self.keys)


def row_of(record: object, format_name: str | None = None) -> Row:
    """Return the messages or tokens of a record.

    Args:
        format_name: a key of FORMATS; None = the keys of the record tell it.

    Raises:
        ConversationError: if the record is no conversation to train on.
    """
    if not isinstance(record, dict):
        raise ConversationError("format", f"it is no object but a {type(record).__name__}")
    if format_name is None:
        format_name = next((name for name, each in FORMATS.items() if each.fits(record)), None)
    if format_name is None or not FORMATS[format_name].fits(record):
        found = ", ".join(shorten(str(name))[1:-1] for name in list(record)[:10]) or "no key"
        wanted = "; ".join(_keys_of(name) for name in ([format_name] if format_name else FORMATS))
        raise ConversationError("format", f"it has the keys {found}, but a conversation has {wanted}")
    return FORMATS[format_name].parse(record)


def _keys_of(format_name: str) -> str:
    return f"{', '.join(' or '.join(names) for names in FORMATS[format_name].keys)} ({format_name})"


def _of_messages(record: dict[str, Any]) -> Conversation:
    return _conversation(_messages(record["messages"], "messages"), record)


def _of_sharegpt(record: dict[str, Any]) -> Conversation:
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ConversationError("format", "conversations is no list of objects with from and value")
    messages = []
    for number, turn in enumerate(turns, 1):
        # Some datasets have the keys of messages under the name of ShareGPT.
        name, value = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
            raise ConversationError("roles", f"turn {number} is from {shorten(name)}; known are {listing(_SHAREGPT_ROLES)}")
        messages.append({"role": _SHAREGPT_ROLES[name], "content": value})
    return _conversation(_messages([*system, *messages], "conversations"), record)


def _of_alpaca(record: dict[str, Any]) -> Conversation:
    """Return instruction and input in one message, with a line break between, as LLaMA-Factory reads the format."""
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    pairs = record.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ConversationError("format", "history is no list of pairs of an instruction and an output")
    instruction, more = record["instruction"], record.get("input") or ""
    if not isinstance(instruction, str) or not isinstance(more, str):
        raise ConversationError("format", "instruction and input are not both texts")
    if more:
        instruction = f"{instruction}\n{more}" if instruction else more
    turns = [*pairs, [instruction, record["output"]]]
    roles = ("user", "assistant")
    messages = [{"role": role, "content": text} for pair in turns for role, text in zip(roles, pair, strict=True)]
    return _conversation(_messages([*system, *messages], "alpaca"), record)


def _of_prompt(record: dict[str, Any]) -> Conversation:
    if "label" in record:
        raise ConversationError("format", "it has a label, and single replies with a label are not read: keep the rows of good replies")
    name = "response" if record.get("response") is not None else "completion"
    messages = [*_as_messages(record["prompt"], "user", "prompt"), *_as_messages(record[name], "assistant", name)]
    return _conversation(messages, record)


def _of_tokens(record: dict[str, Any]) -> TokenRow:
    ids = _integers(record["input_ids"], "input_ids")
    if record.get("prompt_lengths") is not None:
        length = record["prompt_lengths"]
        length = length[0] if isinstance(length, list) and len(length) == 1 else length
        if type(length) is not int or not 0 < length < len(ids):
            raise ConversationError(
                "no_reply", f"prompt_lengths is {shorten(length)}, of {len(ids)} tokens: it must leave a prompt and a reply"
            )
        return TokenRow(ids, [place >= length for place in range(len(ids))])
    name = "labels" if record.get("labels") is not None else "loss_mask"
    values = _integers(record[name], name)
    if len(values) != len(ids):
        raise ConversationError("format", f"input_ids has {len(ids)} numbers, and {name} has {len(values)}")
    if name == "loss_mask" and not set(values) <= {0, 1}:
        raise ConversationError("format", "loss_mask has numbers other than 0 and 1")
    is_reply = [value != -100 for value in values] if name == "labels" else [value == 1 for value in values]
    if name == "labels" and (other := [i for i, value in enumerate(values) if is_reply[i] and value != ids[i]]):
        place = other[0]
        raise ConversationError(
            "format", f"label {place} is {values[place]}, and the token is {ids[place]}: labels must be the tokens, unshifted, or -100"
        )
    if not any(is_reply) or is_reply[0]:
        raise ConversationError("no_reply", f"{name} leaves no {'prompt' if any(is_reply) else 'reply'}")
    return TokenRow(ids, is_reply)


def _of_preferences(record: dict[str, Any]) -> Preference:
    sides = [_side(record, name) for name in ("chosen", "rejected")]
    prompts = [side.messages[:-1] for side in sides]
    if prompts[0] != prompts[1]:
        raise ConversationError("prompts_differ", "chosen and rejected have different prompts: they may differ in the last reply alone")
    if sides[0].messages[-1] == sides[1].messages[-1]:
        raise ConversationError("equal_pair", "chosen and rejected are equal")
    return Preference(*sides)


def _side(record: dict[str, Any], name: str) -> Conversation:
    """Return the conversation of one side, which is a reply to ``prompt`` or has the prompt in it."""
    prompt, reply = record.get("prompt"), _as_messages(record[name], "assistant", name)
    if reply[0]["role"] == "assistant":
        if prompt is None:
            raise ConversationError("format", f"{name} begins with a reply, and there is no prompt")
        reply = [*_as_messages(prompt, "user", "prompt"), *reply]
    elif prompt is not None:
        before = _as_messages(prompt, "user", "prompt")
        # A prompt that is a text may be one of several messages before the reply.
        is_there = before[0] in reply[:-1] if isinstance(prompt, str) else reply[: len(before)] == before
        if not is_there:
            raise ConversationError("prompts_differ", f"{name} does not have the messages of prompt")
    return _conversation(reply, record)


def _integers(values: object, name: str) -> list[int]:
    if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
        raise ConversationError("format", f"{name} is no list of whole numbers")
    return [int(value) for value in values]


def _as_messages(value: object, role: str, name: str) -> list[Message]:
    """Return the messages of a value that is a text of one role, or a list of messages."""
    return _messages([{"role": role, "content": value}] if isinstance(value, str) else value, name)


def _messages(values: object, name: str) -> list[Message]:
    """Return messages whose roles are known and whose contents are texts."""
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ConversationError("format", f"{name} is no list of messages with role and content")
    if not values:
        raise ConversationError("no_reply", f"{name} has no message")
    messages = []
    for number, message in enumerate(values, 1):
        role = "system" if message.get("role") == "developer" else message.get("role")
        if role not in ROLES:
            raise ConversationError("roles", f"message {number} has the role {shorten(role)}; known are {listing(ROLES)}")
        # A table has all keys in each row, with null for those that a row lacks.
        present = {key: value for key, value in message.items() if value is not None}
        messages.append({**present, "role": role, "content": _content(message, role, number)})
    return messages


def _content(message: Mapping[str, Any], role: str, number: int) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if role == "assistant" and message.get("tool_calls") and not content:
        return ""
    if not isinstance(content, str):
        raise ConversationError("empty", f"message {number} ({role}) has no text: its content is {shorten(content)}")
    if not content.strip():
        raise ConversationError("empty", f"message {number} ({role}) is empty")
    return content


def _conversation(messages: Sequence[Message], record: Mapping[str, Any]) -> Conversation:
    """Return a conversation whose roles are in order.

    Raises:
        ConversationError: if a role may not be at its place, or the last message is not a reply.
    """
    before = ""
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            place = f"after {before}" if before else "at the start"
            raise ConversationError("roles", f"message {number} is from {role}, {place}: here {' or '.join(_MAY_FOLLOW[before])} is valid")
        before = role
    if before != "assistant":
        raise ConversationError("no_reply", f"the last of {len(messages)} messages is from {before}: end the conversation with a reply")
    return Conversation(list(messages), {name: record[name] for name in _FOR_TEMPLATES if record.get(name) is not None})


FORMATS: dict[str, Format] = {
    "preferences": Format((("chosen",), ("rejected",)), _of_preferences),
    "pretokenised": Format((("input_ids",), ("prompt_lengths", "labels", "loss_mask")), _of_tokens),
    "messages": Format((("messages",),), _of_messages),
    "sharegpt": Format((("conversations",),), _of_sharegpt),
    "alpaca": Format((("instruction",), ("output",)), _of_alpaca),
    "prompt": Format((("prompt",), ("response", "completion")), _of_prompt),
}
"""The formats by name. The first whose keys a record has is taken."""
