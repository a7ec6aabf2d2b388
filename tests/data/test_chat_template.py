"""Chat templates: how they are found, and what a hostile template may not do."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from w1train.config.errors import UserError
from w1train.data.conversations import chat_template
from w1train.data.conversations.chat_template import DEFAULT_TEMPLATE, ChatTemplate, TemplateSource
from w1train.data.conversations.messages import ConversationError
from w1train.data.conversations.template_tokens import check_template

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
NOW = datetime(2026, 1, 31)


def render(text: str, messages=MESSAGES, **values) -> str:
    return ChatTemplate(TemplateSource(text, "a.jinja", {"eos_token": "<eos>"}, NOW)).render(messages, False, values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{ messages | length }}\n{% if true %}\n  x\n{% endif %}\n", "2\n  x\n"),
        ("   {% if true %}x{% endif %}", "x"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "a"}'),
        ("{{ '<\u00ef>' | tojson }}", '"<\u00ef>"'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}", "a"),
        ("{{ strftime_now('%d %b %Y') }}", "31 Jan 2026"),
        ("{% if tools %}x{% endif %}{{ tools is defined }}{{ tools | default('y') }}{% for t in tools %}z{% endfor %}", "Falsey"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        ("{% macro f(x) %}{{ x }}{% endmacro %}{{ f('y') * 3 }}", "yyy"),
        ("a{% generation %}b{% endgeneration %}", "a\ufdd2b\ufdd3"),
    ],
)
def test_templates_are_rendered_as_their_publishers_mean_them(text, expected):
    assert render(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ '{0.__class__}'.format('x') }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999999) %}{% endfor %}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9**9**9 }}",
        "{{ [1] * 10**9 }}",
        "{% for i in range(900) %}{{ 'a' * 1000000 }}{% endfor %}",
        "{{ lacking }}",
        "{{ messages[0].lacking }}",
        "{{ lacking.more }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_hostile_templates_end_with_an_error(text, monkeypatch):
    monkeypatch.setattr(chat_template, "_MOST_ROUNDS", 1000)
    monkeypatch.setattr(chat_template, "_LARGEST_RENDERING", 10_000_000)
    before = json.dumps(MESSAGES)
    with pytest.raises(ConversationError, match=r"the chat template a\.jinja does not take these messages: ") as found:
        render(text)
    assert found.value.reason == "template"
    assert len(str(found.value)) < 500
    assert json.dumps(MESSAGES) == before


def test_the_rounds_of_each_rendering_count_alone(monkeypatch):
    monkeypatch.setattr(chat_template, "_MOST_ROUNDS", 1000)
    template = ChatTemplate(TemplateSource("{% for i in range(60) %}{% for j in range(9) %}{% endfor %}{% endfor %}", "a.jinja"))
    assert [template.render(MESSAGES, False, {}) for _ in range(2)] == ["", ""]


@pytest.mark.parametrize(
    ("text", "line"), [("a\n{% for %}", 2), ("{% generation %}", 1), ("{{ x | nonesuch }}", 1), ("{% if x %}\n{% endfor %}", 2)]
)
def test_what_is_no_template(text, line):
    with pytest.raises(UserError, match=f"a.jinja:{line} is no chat template"):
        render(text)


def write(path, **content):
    path.write_text(json.dumps(content))


def test_templates_of_hugging_face_directories(tmp_path):
    config = {"bos_token": {"content": "<bos>"}, "eos_token": "<|end|>", "pad_token": None, "other": 3}
    write(tmp_path / "tokenizer_config.json", chat_template="in config", **config)
    variables = {"bos_token": "<bos>", "eos_token": "<|end|>", "pad_token": ""}
    for path in (tmp_path, tmp_path / "tokenizer_config.json"):
        source = TemplateSource.read(path, NOW)
        assert (source.text, source.origin, source.variables) == ("in config", str(tmp_path / "tokenizer_config.json"), variables)
    (tmp_path / "chat_template.jinja").write_text("in file")
    for path in (tmp_path, tmp_path / "chat_template.jinja"):
        assert TemplateSource.read(path, NOW).text == "in file"
        assert TemplateSource.read(path, NOW).variables == variables
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    write(tmp_path / "tokenizer_config.json", chat_template=named)
    assert TemplateSource.read(tmp_path / "tokenizer_config.json", NOW).text == "y"
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "a.jinja").write_text("alone")
    assert TemplateSource.read(tmp_path / "alone" / "a.jinja", NOW).variables == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
    }


def test_the_hash_depends_on_all_that_is_rendered():
    sources = [TemplateSource("a", "x", {"eos_token": "b"}), TemplateSource("b", "x", {"eos_token": "b"}), TemplateSource("a", "x", {})]
    assert len({source.sha256 for source in sources}) == 3
    assert TemplateSource("a", "y", {"eos_token": "b"}).sha256 == sources[0].sha256


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"chat_template": 3}', b'{"chat_template": [{"name": "x"}]}', b"{}"])
def test_what_is_no_config(tmp_path, content):
    path = tmp_path / "tokenizer_config.json"
    if content is not None:
        path.write_bytes(content)
    for name in (path, tmp_path):
        with pytest.raises(UserError, match=str(tmp_path)):
            TemplateSource.read(name, NOW)


def test_what_is_no_text(tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff")
    (tmp_path / "b.jinja").write_bytes(b"a" * (2 << 20))
    for name in ("a.jinja", "b.jinja", "nonesuch.jinja"):
        with pytest.raises(UserError, match=name):
            TemplateSource.read(tmp_path / name, NOW)


def test_the_built_in_template_is_fixed():
    """Datasets and the prompts of trained models depend on it."""
    assert render(DEFAULT_TEMPLATE, [{"role": "user", "content": " a\n"}, MESSAGES[1]]) == "user:\na<eos>assistant:\nb<eos>"
    assert TemplateSource.default(NOW).sha256 == "d85b3bdf92c01561fef47902ad6e4df485df8e43e45ac41fc5d0702ab4eab9b4"


TURNS = "{% for m in messages %}<|h|>{{ m.role }}\n{{ m.content }}<|e|>{% endfor %}"


@pytest.mark.parametrize("tail", ["<|h|>assistant\n", "assistant:"])
def test_a_template_that_always_begins_a_reply_is_refused(tail):
    """The beginning would be learned as the end of every reply."""
    with pytest.raises(UserError, match=r"a\.jinja writes .* after every message, also after a reply"):
        check_template(ChatTemplate(TemplateSource(TURNS + tail, "a.jinja", {}, NOW)), {"<|h|>", "<|e|>"})


@pytest.mark.parametrize(
    "text",
    [
        TURNS + "{% if add_generation_prompt %}<|h|>assistant\n{% endif %}",
        TURNS,
        "{% for m in messages %}{{ m.content }}\n### end\n{% endfor %}{% if add_generation_prompt %}reply:{% endif %}",
        "{{ raise_exception('no such messages') }}",
        DEFAULT_TEMPLATE,
    ],
)
def test_other_templates_are_not_refused(text):
    source = TemplateSource(text, "a.jinja", {"eos_token": "<|e|>"}, NOW)
    check_template(ChatTemplate(source), {"<|h|>", "<|e|>"})
