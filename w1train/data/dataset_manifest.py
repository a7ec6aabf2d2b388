"""The manifest of a dataset, PREFIX.json. It describes the dataset and is written last, so a dataset with a manifest is complete."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from w1train.config.constraints import LARGEST_INTEGER
from w1train.config.reading import FileContentError, read_json_object, shorten
from w1train.data.indexed import DatasetError, bin_path, idx_path, may_be_noised_path
from w1train.runtime.files import write_bytes

FORMAT_VERSION = 1
CONVERSATION_KINDS = ("conversations", "preferences")
REPLIES = ("last", "all", "split")
"""The replies of a conversation that a dataset can have: its last, all of them in one document, or each in a document of its own."""
_LONGEST_TEXT = 1000


def manifest_path(prefix: str | Path) -> Path:
    """Return the path of the manifest, PREFIX.json."""
    return Path(f"{prefix}.json")


def dataset_paths(prefix: str | Path) -> list[Path]:
    """Return the paths of all files that a dataset may have; the manifest first, without which the others do not count as complete."""
    return [manifest_path(prefix), bin_path(prefix), may_be_noised_path(prefix), idx_path(prefix)]


class DatasetFile(NamedTuple):
    """A file of a dataset as its manifest describes it."""

    path: Path
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetManifest:
    """The counts, hashes and origin of a dataset."""

    format_version: int = FORMAT_VERSION
    """Version of the manifest's layout. :meth:`read` compares the version in the file with this code's version."""
    created_by: str
    """Name and version of the software that wrote the dataset."""
    num_documents: int
    """Number of documents. No document is empty."""
    num_tokens: int
    """Number of tokens, including the EOS of each document."""
    num_bytes: int
    """Length of the documents' text in bytes of UTF-8."""
    dtype: str
    """NumPy's name of the type of a token in PREFIX.bin."""
    max_token_id: int
    """Largest token id in the dataset."""
    unigram_bits_per_byte: float
    """Order-0 entropy: the sum over all tokens, EOS included, of -log2 p(token), divided by num_bytes. p is the frequency in this dataset.
    """
    tokenizer_fingerprint: str
    """SHA-256 of the tokenizer's file."""
    tokenizer_vocab_size: int
    """Number of the tokenizer's ids."""
    eos_token_id: int
    """Id of EOS, which ends every document."""
    mask_token_id: int
    """Id of the mask token, which never occurs in the dataset."""
    bin_num_bytes: int
    """Size of PREFIX.bin."""
    bin_sha256: str
    """SHA-256 of PREFIX.bin."""
    idx_num_bytes: int
    """Size of PREFIX.idx."""
    idx_sha256: str
    """SHA-256 of PREFIX.idx."""
    may_be_noised_num_bytes: int = 0
    """Size of PREFIX.may_be_noised, a byte for each token; 0 for a dataset without the file, whose tokens may all be noised."""
    may_be_noised_sha256: str = ""
    """SHA-256 of PREFIX.may_be_noised; empty for a dataset without the file."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Versions of the software that the tokens depend on, by name. Datasets of w1train 0.1.0 do not have this entry."""
    corpus: dict[str, Any] = field(default_factory=dict)
    """The input of data_tools.tokenize: the options, the numbers of files and bytes, a hash of the list of files, and how many documents
    were left out for which reason."""
    conversations: dict[str, Any] = field(default_factory=dict)
    """Facts about the documents of conversations: their kind ("conversations", or "preferences", whose documents are pairs of a
    chosen and a rejected reply), the replies that may be noised ("last", "all", "split"), the hash of the chat template, the longest
    document, and how many documents were cut or left out for which reason. Empty for other datasets."""
    shard: dict[str, Any] = field(default_factory=dict)
    """For a shard: its number, the number of shards, and a hash of the hashes of all shards' files. Empty for a dataset that is not a
    shard."""

    def files(self, prefix: str | Path) -> list[DatasetFile]:
        """Return the files that the manifest describes, PREFIX.idx last."""
        found = [DatasetFile(bin_path(prefix), self.bin_num_bytes, self.bin_sha256)]
        if self.may_be_noised_sha256:
            found.append(DatasetFile(may_be_noised_path(prefix), self.may_be_noised_num_bytes, self.may_be_noised_sha256))
        return [*found, DatasetFile(idx_path(prefix), self.idx_num_bytes, self.idx_sha256)]

    @property
    def content_sha256(self) -> str:
        """Return the hash of what a run trains on: the tokens and, if the dataset says it, which of them may be noised."""
        if not self.may_be_noised_sha256:
            return self.bin_sha256
        return hashlib.sha256(f"{self.bin_sha256}{self.may_be_noised_sha256}".encode()).hexdigest()

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all. A dataset without PREFIX.may_be_noised, or of other texts than conversations, has no keys
        for them."""
        content = asdict(self)
        if not self.conversations:
            del content["conversations"]
        if not self.may_be_noised_sha256:
            del content["may_be_noised_num_bytes"], content["may_be_noised_sha256"]
        write_bytes(path, (json.dumps(content, indent=2) + "\n").encode("utf-8"))

    @classmethod
    def read(cls, path: Path) -> DatasetManifest:
        """Read the file.

        Raises:
            DatasetError: if the file is not JSON, has another format version, or a key is missing, unknown or of a wrong type.
        """
        try:
            content = read_json_object(path, "dataset manifest")
        except FileContentError as error:
            raise DatasetError(str(error)) from error
        if content.get("format_version") != FORMAT_VERSION:
            found = shorten(content.get("format_version"))
            raise DatasetError(f"{path} is no dataset manifest of format version {FORMAT_VERSION} (found {found})")
        _check_keys(path, content)
        return cls(**content)


def _check_keys(path: Path, content: dict[str, Any]) -> None:
    types = {"int": int, "float": (int, float), "str": str, "dict[str, Any]": dict}
    expected = {field.name: types[str(field.type)] for field in fields(DatasetManifest)}
    optional = {field.name for field in fields(DatasetManifest) if (field.default, field.default_factory) != (MISSING, MISSING)}
    for name in sorted((expected.keys() ^ content.keys()) - optional):
        raise DatasetError(f"{path} is damaged: key {shorten(name)} is {'missing' if name in expected else 'unknown'}")
    for name, value in content.items():
        if not isinstance(value, expected[name]) or isinstance(value, bool) or not _is_possible(value):  # type: ignore[arg-type]
            raise DatasetError(f"{path} is damaged: {name} is {shorten(value)}")
    if 0 in (content["num_documents"], content["num_tokens"], content["num_bytes"]):
        raise DatasetError(f"{path} is damaged: it says that the dataset holds nothing")
    num_flags, digest = content.get("may_be_noised_num_bytes", 0), content.get("may_be_noised_sha256", "")
    if num_flags != (content["num_tokens"] if digest else 0):
        raise DatasetError(f"{path} is damaged: may_be_noised_num_bytes is {num_flags}, for {content['num_tokens']} tokens")
    for key in ("corpus", "conversations"):
        for name, value in content.get(key, {}).items():
            if name.startswith("num_") and not (type(value) is int and _is_possible(value)):
                raise DatasetError(f"{path} is damaged: {key}.{name} is {shorten(value)}")
    _check_conversations(path, content)


def _check_conversations(path: Path, content: dict[str, Any]) -> None:
    """Refuse what a run would read wrongly: prompts that could be noised, and pairs of which a side is missing."""
    conversations = content.get("conversations")
    if not conversations:
        return
    for name, valid in (("kind", CONVERSATION_KINDS), ("replies", REPLIES)):
        if conversations.get(name) not in valid:
            raise DatasetError(f"{path} is damaged: conversations.{name} is {shorten(conversations.get(name))}, not {' or '.join(valid)}")
    if not content.get("may_be_noised_sha256"):
        raise DatasetError(f"{path} is damaged: it is of conversations, and says nothing about which tokens may be noised")
    if conversations["kind"] == "preferences" and content["num_documents"] % 2:
        raise DatasetError(f"{path} is damaged: {content['num_documents']} documents are not pairs of a chosen and a rejected reply")


def _is_possible(value: object) -> bool:
    """Return whether a number can be a count or an entropy, and a text a name or a hash; other values pass."""
    if isinstance(value, int | float):
        return 0 <= value <= LARGEST_INTEGER
    return not isinstance(value, str) or (len(value) <= _LONGEST_TEXT and value.isprintable())
