"""The manifest of a tokenizer, which records its source, the software that made it, and hashes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from data_tools.own_files import own_file
from w1train.data.conversations.template_tokens import tokenizer_manifest_path
from w1train.data.tokenizer import Tokenizer
from w1train.runtime.files import write_text
from w1train.runtime.output_files import require_writable
from w1train.runtime.version import __version__


def require_writable_tokenizer(output: Path, inputs: Iterable[str | Path], overwrite: bool) -> None:
    """Refuse to write a tokenizer over an input or, without ``overwrite``, over a file that exists. The manifest of a tokenizer that was
    removed may be replaced.

    Raises:
        OutputError: if the tokenizer may not be written.
    """
    manifest = tokenizer_manifest_path(output)
    is_remains = not output.exists() and own_file(str(manifest)) is not None
    outputs, remains = ([output], [manifest]) if is_remains else ([output, manifest], [])
    require_writable(outputs, inputs, overwrite=overwrite, also_written=remains)


def write_tokenizer_manifest(output: Path, tokenizer: Tokenizer, command: str, source: dict[str, Any]) -> None:
    """Write the manifest of a tokenizer. It is written after the tokenizer: a manifest with another hash belongs to an earlier file.

    Args:
        command: the data tool that made the tokenizer.
        source: a description of what the tokenizer was made from.
    """
    content = {
        "created_by": f"{command} of w1train {__version__}",
        "versions": {"tokenizers": tokenizers.__version__},
        "sha256": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "mask_token_id": tokenizer.mask_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **source,
    }
    write_text(tokenizer_manifest_path(output), json.dumps(content, indent=2, ensure_ascii=False) + "\n")
