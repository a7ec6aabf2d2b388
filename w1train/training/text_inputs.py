"""The files by which a run reads and writes texts, and their copies in the run directory."""

from __future__ import annotations

import logging
from pathlib import Path

from w1train.config.schema import Config
from w1train.data.conversations.chat_prompts import ChatPrompts
from w1train.data.conversations.template_tokens import tokenizer_manifest_path
from w1train.data.dataset_manifest import DatasetManifest, manifest_path
from w1train.data.remote import is_remote
from w1train.data.sharded_dataset import part_names
from w1train.preflight.input_files import training_datasets
from w1train.runtime.files import copy_if_different
from w1train.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)


def keep_text_inputs(config: Config, run: RunDirectory, chat: ChatPrompts | None) -> None:
    """Copy the tokenizer and the chat template into the run directory, for ``w1train sample``: the originals may be on another machine.

    The manifest of a tokenizer is copied too, because it says which special tokens of a published template were renamed.
    """
    copy_if_different(config.data.tokenizer, run.tokenizer)
    manifest = tokenizer_manifest_path(Path(config.data.tokenizer))
    if manifest.is_file():
        copy_if_different(manifest, tokenizer_manifest_path(run.tokenizer))
    if chat is not None:
        chat.save(run.chat_template)
        _warn_of_other_templates(config, chat)


def _warn_of_other_templates(config: Config, chat: ChatPrompts) -> None:
    """Warn of datasets of conversations that another template has made: the model would be asked in a form that it does not learn."""
    prefixes = [prefix for prefix in training_datasets(config).values() if not is_remote(prefix)]
    for path in [manifest_path(part) for prefix in prefixes for part in part_names(prefix)]:
        conversations = DatasetManifest.read(path).conversations if path.exists() else {}
        if conversations.get("template_sha256", chat.template_sha256) != chat.template_sha256:
            logger.warning(
                "sampling.chat_template is %s, and the conversations of %s were made with another template (%s): the samples may not show "
                "what the model learns",
                config.sampling.chat_template,
                path,
                conversations.get("template"),
            )
