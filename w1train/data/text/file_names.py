"""Names of files, and what they say about the content: the format and the compression."""

from __future__ import annotations

import os
from typing import Literal

Kind = Literal["text", "jsonl", "json", "parquet", "arrow"]
KINDS: tuple[Kind, ...] = ("text", "jsonl", "json", "parquet", "arrow")
_SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".xz": "xz", ".bz2": "bzip2"}
_UNSUPPORTED = {".lz4", ".br", ".lzma", ".7z", ".zip", ".rar", ".tar", ".tgz", ".tbz2", ".txz"}


class CorpusError(ValueError):
    """The error of a corpus that is missing, empty or not text."""


def kind_of(path: str) -> Kind:
    """Return what a file holds by the ending of its name, in upper or lower case, without the ending of a compression; text for all other
    endings."""
    stem, suffix = _split(path)
    if suffix in _COMPRESSIONS:
        suffix = _split(stem)[1]
    return _SUFFIXES.get(suffix, "text")


def compression_of(path: str) -> str | None:
    """Return "gzip", "zstd", "xz" or "bzip2" by the ending of a name; None for a file that is not compressed."""
    return _COMPRESSIONS.get(_split(path)[1])


def unsupported_compression(path: str) -> str | None:
    """Describe the fault of a file whose name says that it is an archive, or compressed in a way that is not supported; None without such
    a fault."""
    stem, suffix = _split(path)
    if suffix in _COMPRESSIONS:
        suffix = _split(stem)[1]
    if suffix not in _UNSUPPORTED:
        return None
    return f"files ending in {suffix} cannot be read: unpack it, or compress its files as {', '.join(_COMPRESSIONS)}"


def _split(path: str) -> tuple[str, str]:
    stem, suffix = os.path.splitext(path)
    return stem, suffix.lower()
