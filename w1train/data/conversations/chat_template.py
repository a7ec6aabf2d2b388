"""Chat templates: the jinja text by which a model's publisher lays out messages as one text.

They are rendered as the transformers library renders them, in a sandbox, because a template is a program of somebody else. The sandbox
keeps a template from Python's objects, and a limit on its loops keeps it from running without end. Two rules are stricter here: a value
that is not there may be tested, but not printed, and the time is that of the command's start, so that all rows have the same date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from w1train.config.errors import UserError, first_line
from w1train.config.reading import FileContentError, read_bounded, read_json_object, shorten
from w1train.data.conversations.messages import ConversationError, Message
from w1train.data.tokenizer import BOS_TOKEN, EOS_TOKEN, PAD_TOKEN

REPLY_START, REPLY_END = "\ufdd2", "\ufdd3"
"""The characters around a reply in a rendering. Unicode reserves them for the inside of programs, and the messages may not have them."""
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ':\\n' }}{{ message.content | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
"""The template of tokenizers that come without a template: each message is its role, its text and <eos>. Text that is trimmed cannot join
the line break before it in one token."""
_LARGEST_TEMPLATE = 1 << 20
_LARGEST_RENDERING = 1 << 27
_MOST_ROUNDS = 100_000
"""The most rounds of all loops, and calls of all macros, of one rendering."""
_LARGEST_PRODUCT = 1 << 20
"""The most elements of a text or list that a template may make by multiplication, and the most bits of a number."""
_OWN_TOKENS = {"bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN}
"""The tokens that a template means for which no tokenizer_config.json says it."""
_SPECIAL_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """The text of a chat template, and all else that its rendering depends on."""

    text: str
    origin: str
    """The file, for messages."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """The special tokens by the names that templates use, such as eos_token."""
    time: datetime = field(default_factory=datetime.now)
    """The time that strftime_now formats."""

    @property
    def sha256(self) -> str:
        """The hash of the text and of the special tokens."""
        return hashlib.sha256(json.dumps([self.text, dict(self.variables)], sort_keys=True).encode()).hexdigest()

    @property
    def reads_time(self) -> bool:
        """This flag tells whether the text may depend on the time."""
        return "strftime_now" in self.text

    @classmethod
    def default(cls, time: datetime) -> TemplateSource:
        """Return the template for tokenizers without a template."""
        return cls(DEFAULT_TEMPLATE, "the built-in template", {"eos_token": EOS_TOKEN}, time)

    @classmethod
    def read(cls, path: Path, time: datetime) -> TemplateSource:
        """Read a template: a jinja file, a tokenizer_config.json, or the directory of a Hugging Face model with either.

        Raises:
            UserError: if there is no template, or it is no text of UTF-8.
        """
        config, source = _files_of(path)
        content = _config_of(config) if config is not None else _OWN_TOKENS
        if source is None:
            return cls(_text_in(content, str(config)), str(config), _variables_of(content), time)
        try:
            text = read_bounded(source, _LARGEST_TEMPLATE).decode("utf-8")
        except (OSError, FileContentError, UnicodeDecodeError) as error:
            raise UserError(f"chat template {source} cannot be read: {error}") from error
        return cls(text, str(source), _variables_of(content), time)


def _files_of(path: Path) -> tuple[Path | None, Path | None]:
    """Return the tokenizer_config.json, and the file of the template unless it is in the former."""
    if path.suffix == ".json":
        return path, None
    folder = path if path.is_dir() else path.parent
    config = folder / "tokenizer_config.json"
    source = folder / "chat_template.jinja" if path.is_dir() else path
    if path.is_dir() and not source.exists():
        if not config.exists():
            raise UserError(f"directory {path} has neither chat_template.jinja nor tokenizer_config.json: name the file of the template")
        return config, None
    return (config if config.exists() else None), source


def _config_of(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, "tokenizer_config.json")
    except (OSError, FileContentError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _text_in(content: Mapping[str, Any], origin: str) -> str:
    template = content.get("chat_template")
    if isinstance(template, list):  # several templates, each with its name
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise UserError(f"{origin} has no chat_template: name the file of the template")
    return template


def _variables_of(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens of a tokenizer_config.json. A token that is null there is an empty text, as it has no place in a text."""
    values = {name: content[name] for name in _SPECIAL_VARIABLES if name in content}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: value if isinstance(value, str) else "" for name, value in texts.items()}


class ChatTemplate:
    """A chat template that is ready to be rendered. Each process has its own."""

    def __init__(self, source: TemplateSource) -> None:
        """Compile a template.

        Raises:
            UserError: if the text is no template of jinja.
        """
        self.source = source
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], undefined=_Absent)
        self._environment.filters["tojson"] = _to_json
        self._environment.globals["raise_exception"] = _raise
        self._environment.globals["strftime_now"] = source.time.strftime
        try:
            tree = self._environment.parse(source.text)
            self.literals: list[str] = [node.data for node in tree.find_all(nodes.TemplateData)]
            """The texts that the template itself writes."""
            self.literals += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
            self.variables: set[str] = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"}
            """The names of variables that the template reads."""
            self.marks_replies: bool = any(_is_generation(node) for node in tree.find_all(nodes.CallBlock))
            """This flag tells whether the template says by {% generation %} what the model writes."""
            code = self._environment.compile(_counted(tree, self._environment))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{source.origin}:{error.lineno} is no chat template: {error.message}") from error
        except (RecursionError, MemoryError, OverflowError) as error:
            raise UserError(f"{source.origin} is no chat template that can be used: {type(error).__name__}: {first_line(error)}") from error
        self._template = self._environment.template_class.from_code(self._environment, code, self._environment.make_globals(None))

    def render(self, messages: list[Message], add_generation_prompt: bool, for_template: Mapping[str, Any]) -> str:
        """Return the text of messages, with REPLY_START and REPLY_END around what the template calls a reply.

        Raises:
            ConversationError: if the template cannot render the messages: it refuses them, prints what they lack, or does not end.
        """
        values = {**self.source.variables, **for_template, "messages": messages, "add_generation_prompt": add_generation_prompt}
        self._environment.num_rounds = 0
        try:
            return "".join(_bounded(self._template.generate(values)))
        except Exception as error:  # a template may raise whatever Python's operators and methods raise
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            message = f"the chat template {self.source.origin} does not take these messages: {kind}{first_line(error)}"
            raise ConversationError("template", message) from error


def _bounded(parts: Iterable[str]) -> Iterable[str]:
    num_characters = 0
    for part in parts:
        num_characters += len(part)
        if num_characters > _LARGEST_RENDERING:
            raise SecurityError(f"it prints more than {_LARGEST_RENDERING} characters")
        yield part


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of chat templates, with limits on rounds and on products."""

    intercepted_binops = frozenset({"*", "**"})
    num_rounds = 0

    def count_round(self) -> None:
        """Count a round of a loop or a call of a macro, and end a rendering that has too many."""
        self.num_rounds += 1
        if self.num_rounds > _MOST_ROUNDS:
            raise SecurityError(f"its loops have more than {_MOST_ROUNDS} rounds")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiply, unless the result would be too large. jinja calls this method for the operators of ``intercepted_binops``."""
        size = _size(left) * (right if operator == "**" and isinstance(right, int) else _size(right) if operator == "*" else 1)
        if size > _LARGEST_PRODUCT:
            raise SecurityError(f"the result of {operator} is too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    """Return the most by which a value lengthens a product."""
    if isinstance(value, str | bytes | list | tuple):
        return max(len(value), 1)
    return max(abs(value), 1) if isinstance(value, int) else 1


class _Absent(jinja2.Undefined):
    """A value that is not there. It may be tested, but not printed: jinja would print nothing, and the model would train on that."""

    __str__ = jinja2.Undefined._fail_with_undefined_error


class _Generation(Extension):
    """The block {% generation %} ... {% endgeneration %}, which says what the model writes."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable[[], str]) -> str:
        """Return the text of the block between its marks."""
        return f"{REPLY_START}{caller()}{REPLY_END}"


def _is_generation(block: nodes.CallBlock) -> bool:
    called = block.call.node
    return isinstance(called, nodes.ExtensionAttribute) and called.identifier == _Generation.identifier


def _counted(tree: nodes.Template, environment: jinja2.Environment) -> nodes.Template:
    """Add a call of ``count_round`` to each loop and each macro."""
    places = [(node.body, node.lineno) for node in tree.find_all(nodes.For)]
    places += [(node.body, node.lineno) for node in tree.find_all(nodes.Macro)]
    for body, line in places:
        call = nodes.Call(nodes.EnvironmentAttribute("count_round"), [], [], None, None)
        body.insert(0, nodes.ExprStmt(call).set_lineno(line))
    tree.set_environment(environment)
    return tree


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return JSON as transformers writes it: jinja's own filter changes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(shorten(message))
