"""What is written beside a tokenizer.json: where it comes from, of what software, with hashes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from w1train.data.tokenizers.tokenizer import Tokenizer
from w1train.runtime.files import write_bytes
from w1train.runtime.version import __version__


def tokenizer_manifest_path(output: Path) -> Path:
    """tokenizer.manifest.json beside tokenizer.json."""
    return output.with_suffix(".manifest.json")


def write_tokenizer_manifest(output: Path, tokenizer: Tokenizer, command: str, source: dict[str, Any]) -> None:
    """After the tokenizer itself: a manifest whose hash is not the file's is of an earlier one.

    Args:
        command: which of the data tools made it.
        source: what it was made from.
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
    write_bytes(tokenizer_manifest_path(output), (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
