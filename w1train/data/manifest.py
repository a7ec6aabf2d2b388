"""PREFIX.json: what a dataset holds, and the sign that it is complete (it is written last)."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from w1train.data.indexed import DatasetError
from w1train.runtime.files import write_bytes

FORMAT_VERSION = 1


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.json."""
    return Path(f"{prefix}.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetManifest:
    """Counts, hashes and origin of a dataset."""

    format_version: int = FORMAT_VERSION
    """Version of this file's layout."""
    created_by: str
    """Name and version of the software."""
    num_documents: int
    """Documents, none of them empty."""
    num_tokens: int
    """Tokens, one EOS a document included."""
    num_bytes: int
    """UTF-8 bytes of the documents' text."""
    dtype: str
    """NumPy name of the type of a token in PREFIX.bin."""
    max_token_id: int
    """Largest id that occurs."""
    unigram_bits_per_byte: float
    """Order-0 entropy: sum over tokens (EOS included) of -log2 p(token) / num_bytes, p the frequencies in this dataset."""
    tokenizer_fingerprint: str
    """sha256 of the tokenizer's file."""
    tokenizer_vocab_size: int
    """Ids of the tokenizer."""
    eos_token_id: int
    """Ends every document."""
    mask_token_id: int
    """Never occurs."""
    bin_num_bytes: int
    """Size of PREFIX.bin."""
    bin_sha256: str
    """Hash of PREFIX.bin."""
    idx_num_bytes: int
    """Size of PREFIX.idx."""
    idx_sha256: str
    """Hash of PREFIX.idx."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Of the software that the tokens depend on, by name; absent from datasets made by version 0.1.0."""
    corpus: dict[str, Any] = field(default_factory=dict)
    """What data_tools.tokenize read: the options, files, bytes and a hash of their list, and what was left out, by reason."""

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        write_bytes(path, (json.dumps(asdict(self), indent=2) + "\n").encode("utf-8"))

    @classmethod
    def read(cls, path: Path) -> DatasetManifest:
        """Read the file.

        Raises:
            DatasetError: if it is not JSON, has another format version, or a key is missing, unknown or of another type.
        """
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            raise DatasetError(f"{path} is no dataset manifest: {error}") from error
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            found = content.get("format_version") if isinstance(content, dict) else None
            raise DatasetError(f"{path} is no dataset manifest of format version {FORMAT_VERSION} (found {found!r})")
        _check_keys(path, content)
        return cls(**content)


def _check_keys(path: Path, content: dict[str, Any]) -> None:
    types = {"int": int, "float": (int, float), "str": str, "dict[str, Any]": dict}
    expected = {field.name: types[str(field.type)] for field in fields(DatasetManifest)}
    optional = {field.name for field in fields(DatasetManifest) if field.default_factory is not MISSING}
    for name in sorted((expected.keys() ^ content.keys()) - optional):
        raise DatasetError(f"{path} is damaged: key {name!r} is {'missing' if name in expected else 'unknown'}")
    for name, value in content.items():
        if not isinstance(value, expected[name]) or isinstance(value, bool):  # type: ignore[arg-type]
            raise DatasetError(f"{path} is damaged: {name} is {value!r}")
