"""The files that w1train itself writes: tokenizers, datasets and packings. Inside of a corpus they are not text to train on."""

from __future__ import annotations

import os
import re

from w1train.data.indexed import MAGIC, PACKING_SUFFIX
from w1train.runtime.files import PARTIAL_SUFFIX, errors_named

_OF_DATASETS = (".bin", ".may_be_noised")
_UNFINISHED = (".bin", ".idx", ".may_be_noised", ".progress", ".hashes", PACKING_SUFFIX)
"""The names, with PARTIAL_SUFFIX behind them, of a dataset's files while they are written."""
_HEAD_BYTES = 4096
_PACKING = re.compile(rb'\{"format_version": [0-9]+, "idx_sha256": ')
_JSON = {
    "a tokenizer": re.compile(
        rb'\s*\{\s*(?:"version"\s*:\s*"[0-9.]+"\s*,\s*"truncation"\s*:|"added_tokens"\s*:\s*\[\s*\{\s*"content"\s*:)'
    ),
    "the manifest of a tokenizer": re.compile(rb'\s*\{\s*"created_by"\s*:\s*"data_tools\.\w+ of w1train '),
    "the manifest of a dataset": re.compile(rb'\s*\{\s*"format_version"\s*:\s*[0-9]+\s*,\s*"created_by"\s*:\s*"w1train '),
}


def own_file(path: str) -> str | None:
    """Say what a file is that w1train writes, such as "a tokenizer"; return None for all other files.

    The content decides, since a corpus may have a foreign tokenizer.json or data.bin; tokenizers in the format of Hugging Face count,
    whoever wrote them. The names in _UNFINISHED alone decide, since a file that is still being written may have any content.

    Raises:
        OSError: if the file cannot be opened or read; the error has its path.
    """
    whole = path
    while whole.endswith(PARTIAL_SUFFIX):  # The record of progress has the ending twice while it is written.
        whole = whole.removesuffix(PARTIAL_SUFFIX)
    is_partial = whole != path
    if is_partial and whole.endswith(_UNFINISHED):
        return "a file that is still being written"
    stem, suffix = os.path.splitext(whole)
    suffix = suffix.lower()
    if suffix == ".json":
        head = _head(path)
        return next((what for what, pattern in _JSON.items() if pattern.match(head)), None)
    if suffix == ".idx" and _head(path).startswith(MAGIC):
        return "the index of a dataset"
    # While a dataset gets its name, its index still has the partial name.
    if suffix in _OF_DATASETS and any(_head(f"{stem}.idx{end}").startswith(MAGIC) for end in ("", PARTIAL_SUFFIX)):
        return "a file of a dataset"
    # A packing that several processes write has the writer's name before PARTIAL_SUFFIX.
    if (suffix == PACKING_SUFFIX or is_partial) and _PACKING.match(_head(path)):
        return "a packing of a dataset"
    return None


def _head(path: str) -> bytes:
    """Return the first bytes of a file; no bytes if there is no regular file of this name."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file, errors_named(path):
        return file.read(_HEAD_BYTES)
