"""Prompts as messages: their tokens are those before the reply in a document, and a copy of the template gives the same tokens."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from types import SimpleNamespace

import pytest

from tests.data.chat_templates import CHATML, END, HEADERS, MARKED, START, encoder_of
from tests.tiny import tiny_config
from w1train.config.errors import UserError
from w1train.data.conversations.chat_prompts import BUILT_IN, ChatPrompts, chat_prompts_of
from w1train.data.conversations.chat_template import DEFAULT_TEMPLATE, TemplateSource
from w1train.data.conversations.messages import Conversation
from w1train.runtime.run_directory import RunDirectory
from w1train.training.text_inputs import keep_text_inputs

PROMPTS = ["def f(value):", " <eos> 42\n", "\u00ef\U0001f600"]


def prompts_of(tokenizer, template: str, renamed: dict[str, str] | None = None) -> ChatPrompts:
    variables = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return ChatPrompts(tokenizer, TemplateSource(template, "a.jinja", variables, datetime(2026, 1, 31)), renamed or {})


@pytest.mark.parametrize(
    ("template", "ends"), [(DEFAULT_TEMPLATE, []), (CHATML, [END]), (MARKED, [END]), (HEADERS, []), (CHATML.replace(END, "###"), [])]
)
def test_a_prompt_has_the_tokens_before_a_reply_in_training(tokenizer, template, ends):
    """The reply ends in training with EOS, and before it with the token that ends a turn, if the template has such a token."""
    chat = prompts_of(tokenizer, template)
    for prompt, ids in zip(PROMPTS, chat.encode(PROMPTS), strict=True):
        conversation = Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": "return"}])
        document = encoder_of(tokenizer, template).document(conversation, [1])
        assert ids == document.ids[: document.prompt_length]
    assert chat.end_token_ids == tuple(tokenizer.ids_by_token()[name] for name in ends)


def test_the_copy_in_the_run_directory_gives_the_same_tokens(tokenizer, tmp_path):
    """Also with a published template, whose special tokens have other names in the tokenizer of the run."""
    template = CHATML.replace(END, "<|im_end|>").replace(START, "{{ bos_token }}")
    (tmp_path / "model").mkdir()
    settings = {"chat_template": template, "bos_token": "<|bos|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer.save(tmp_path / "tokenizer.json")
    manifest = {"sha256": tokenizer.fingerprint, "renamed": {"<|im_end|>": END, "<|bos|>": "<bos>"}}
    (tmp_path / "tokenizer.manifest.json").write_text(json.dumps(manifest))
    config = tiny_config(data={"tokenizer": str(tmp_path / "tokenizer.json")}, sampling={"chat_template": str(tmp_path / "model")})
    chat = chat_prompts_of(config, tokenizer)
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    keep_text_inputs(config, run, chat)
    for path in (tmp_path / "model" / "tokenizer_config.json", tmp_path / "tokenizer.manifest.json", tmp_path / "tokenizer.json"):
        path.unlink()
    copy = ChatPrompts.load(str(run.chat_template), str(run.tokenizer), tokenizer)
    assert copy.end_token_ids == chat.end_token_ids == (tokenizer.ids_by_token()[END],)
    assert copy.encode(PROMPTS) == chat.encode(PROMPTS)
    assert copy.template_sha256 == chat.template_sha256


def test_the_built_in_template_is_that_of_datasets_without_a_template(tokenizer, tmp_path):
    chat = ChatPrompts.load(BUILT_IN, str(tmp_path / "tokenizer.json"), tokenizer)
    assert tokenizer.decode(*chat.encode([" a "])) == "user:\na<eos>assistant:\n"
    chat.save(tmp_path / "copy.json")
    assert (
        ChatPrompts.load(str(tmp_path / "copy.json"), "tokenizer.json", tokenizer).template_sha256
        == TemplateSource.default(datetime.now()).sha256
    )


def test_prompts_and_templates_that_do_not_work_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"prompt 1 is empty; with sampling\.chat_template"):
        prompts_of(tokenizer, CHATML).encode(["a", " \n"])
    picky = "{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"prompt 1: the chat template a\.jinja does not take these messages: .*no x"):
        prompts_of(tokenizer, picky).encode(["a", "x"])
    with pytest.raises(UserError, match="bos_token, which is <s>"):
        ChatPrompts(tokenizer, TemplateSource("{{ bos_token }}", "a.jinja", {"bos_token": "<s>"}), {})
    config = tiny_config(sampling={"chat_template": str(tmp_path / "absent.jinja")})
    with pytest.raises(UserError, match=r"^sampling\.chat_template: chat template .*absent\.jinja cannot be read"):
        chat_prompts_of(config, tokenizer)
    assert chat_prompts_of(tiny_config(), tokenizer) is None


def test_a_template_that_is_not_that_of_the_dataset_is_logged(tokenizer, tmp_path, caplog, monkeypatch):
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "train.json").touch()
    config = tiny_config(data={"tokenizer": str(tmp_path / "tokenizer.json"), "train": str(tmp_path / "train")})
    chat = prompts_of(tokenizer, CHATML)
    for conversations in ({}, {"template_sha256": chat.template_sha256}, {"template_sha256": "other", "template": "b.jinja"}):
        assert not caplog.records
        manifest = SimpleNamespace(conversations=conversations)
        monkeypatch.setattr("w1train.training.text_inputs.DatasetManifest.read", lambda _path, manifest=manifest: manifest)
        with caplog.at_level(logging.WARNING):
            keep_text_inputs(config, RunDirectory(tmp_path), chat)
    assert "made with another template (b.jinja)" in caplog.text
