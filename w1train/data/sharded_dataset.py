"""Shards PREFIX_00000, PREFIX_00001, ... that ``data_tools.tokenize --shard-size`` wrote, opened as one dataset PREFIX.

The documents of one shard follow those of the shard before, so packing, order and epochs are the same as for a dataset that is not in
shards.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from w1train.data.dataset import DatasetError, DocumentOffsets, TokenDataset
from w1train.data.dataset_manifest import DatasetManifest, manifest_path
from w1train.data.indexed import bin_path, idx_path
from w1train.data.tokenizer import Tokenizer

SHARD_PATTERN = "_" + "[0-9]" * 5


def open_dataset(prefix: str | Path, tokenizer: Tokenizer | None = None, vocab_size: int | None = None) -> TokenDataset:
    """Open the dataset of a prefix, in shards or not.

    Raises:
        DatasetError: as ``TokenDataset.open``, or if a shard is missing or belongs to another run.
    """
    names = part_names(prefix)
    if names == [str(prefix)]:
        return TokenDataset.open(prefix, tokenizer, vocab_size)
    shards = [TokenDataset.open(name, tokenizer, vocab_size) for name in names]
    return ShardedDataset(str(prefix), shards, vocab_size)


def part_names(prefix: str | Path) -> list[str]:
    """Return the prefixes of the datasets that a prefix names: its shards, or the prefix itself if it has no shards."""
    is_whole = bin_path(prefix).exists() or idx_path(prefix).exists()
    return (not is_whole and shard_names(prefix)) or [str(prefix)]


def shard_names(prefix: str | Path) -> list[str]:
    """Return the prefixes of the shards that exist, in order."""
    return [path.removesuffix(".json") for path in sorted(glob.glob(str(manifest_path(f"{glob.escape(str(prefix))}{SHARD_PATTERN}"))))]


def shard_notes(manifests: Sequence[DatasetManifest]) -> list[dict[str, Any]]:
    """Return what the manifest of each shard records about all shards, which reveals a missing shard or a shard of another run."""
    together = _joined_hash([manifest.content_sha256 for manifest in manifests])
    return [{"number": number, "count": len(manifests), "bins_sha256": together} for number in range(len(manifests))]


class ShardedDataset(TokenDataset):
    """The dataset that consists of shards."""

    def __init__(self, prefix: str, shards: Sequence[TokenDataset], vocab_size: int | None) -> None:
        """Raises:
        DatasetError: if the shards are not all the shards of one dataset, in order.
        """
        self.prefix = prefix
        self._shards = list(shards)
        self._vocab_size = vocab_size
        manifests = [shard.manifest for shard in shards if shard.manifest is not None]
        assert len(manifests) == len(shards), "a shard is found by its manifest"
        _check_together(prefix, shards, manifests)
        self.manifest = _joined_manifest(manifests)
        offsets = ShardedOffsets([shard.document_offsets for shard in shards], [shard.num_tokens for shard in shards])
        self.document_offsets = offsets
        self._first_tokens = offsets.first_tokens
        self.num_documents = len(offsets) - 1
        self.num_tokens = int(self._first_tokens[-1])

    @property
    def parts(self) -> Sequence[TokenDataset]:
        """Return the shards."""
        return self._shards

    def __reduce__(self) -> tuple[Callable[..., TokenDataset], tuple[object, ...]]:
        """Let another process open the shards again."""
        return open_dataset, (self.prefix, None, self._vocab_size)

    def read(self, start: int, stop: int) -> NDArray[np.integer]:
        """Return what ``TokenDataset.read`` would of one dataset that holds the shards one after the other."""
        return _joined([shard.read(first, end) for shard, first, end in self._shards_of(start, stop)])

    @property
    def limits_noise(self) -> bool:
        """Return whether a shard says which of its tokens may be noised."""
        return any(shard.limits_noise for shard in self._shards)

    def read_may_be_noised(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Return what ``TokenDataset.read_may_be_noised`` would of one dataset that holds the shards one after the other."""
        return _joined([shard.read_may_be_noised(first, end) for shard, first, end in self._shards_of(start, stop)])

    def _shards_of(self, start: int, stop: int) -> list[tuple[TokenDataset, int, int]]:
        """Return (shard, start, stop inside of it) of each shard that tokens [start, stop) are in; one shard for an empty range."""
        parts = _overlaps(self._first_tokens, start, max(stop, start + 1))
        return [(self._shards[shard], first, min(end, first + stop - start)) for shard, first, end in parts]

    def verify_hashes(self) -> None:
        """Compare the files of every shard with the hashes in its manifest, as ``TokenDataset.verify_hashes`` does."""
        for shard in self._shards:
            shard.verify_hashes()


class ShardedOffsets(DocumentOffsets):
    """The first token of each document, where tokens are counted from the first token of the first shard."""

    def __init__(self, shards: Sequence[DocumentOffsets], num_tokens: Sequence[int]) -> None:
        self._shards = list(shards)
        self.one_sequence_each = True
        self.first_tokens = np.cumsum([0, *num_tokens])
        """[shards + 1]: first token of each shard, and the number of all tokens."""
        self._first_documents = np.cumsum([0, *(len(shard) - 1 for shard in shards)])

    def __len__(self) -> int:
        return int(self._first_documents[-1]) + 1

    @overload
    def __getitem__(self, document: int) -> int: ...

    @overload
    def __getitem__(self, document: slice) -> NDArray[np.int64]: ...

    def __getitem__(self, document: int | slice) -> int | NDArray[np.int64]:
        if isinstance(document, int):
            return int(self[document : document + 1][0])
        start, stop, step = document.indices(len(self))
        parts = [
            self._shards[shard][first:end] + self.first_tokens[shard]
            for shard, first, end in _overlaps(self._first_documents, start, min(stop, len(self) - 1))
        ]
        if stop == len(self) > start:
            parts.append(self.first_tokens[-1:])
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])[::step]

    def around(self, start: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        """Return which documents some tokens belong to, as ``DocumentOffsets.around`` does. No document continues in the next shard."""
        firsts, bounds = [], []
        for shard, first, end in _overlaps(self.first_tokens, start, stop):
            document, inside = self._shards[shard].around(first, end)
            firsts.append(int(self._first_documents[shard]) + document)
            bounds.append(inside + self.first_tokens[shard])
        return firsts[0], np.concatenate([*(part[:-1] for part in bounds[:-1]), bounds[-1]])

    def bounds(self, documents: Iterable[int]) -> NDArray[np.int64]:
        """Return where each document begins and ends, as ``DocumentOffsets.bounds`` does."""
        found = []
        for document in documents:
            shard = int(self._first_documents.searchsorted(document, side="right")) - 1
            found.append(self._shards[shard].bounds([document - int(self._first_documents[shard])])[0] + self.first_tokens[shard])
        return np.array(found)


def _joined[Item: np.generic](parts: Sequence[NDArray[Item]]) -> NDArray[Item]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _overlaps(firsts: NDArray[np.int64], start: int, stop: int) -> list[tuple[int, int, int]]:
    """Return (shard, start, stop) for each shard that the range [start, stop) overlaps, where start and stop count inside the shard.

    ``firsts`` [shards + 1] are the first items of the shards, and the number of all items.
    """
    if stop <= start:
        return []
    low, high = (firsts.searchsorted((start, stop - 1), side="right") - 1).tolist()
    return [
        (shard, max(start - int(firsts[shard]), 0), min(stop, int(firsts[shard + 1])) - int(firsts[shard]))
        for shard in range(low, min(high, len(firsts) - 2) + 1)
    ]


def _check_together(prefix: str, shards: Sequence[TokenDataset], manifests: Sequence[DatasetManifest]) -> None:
    unmarked = [shard.prefix for shard, manifest in zip(shards, manifests, strict=True) if not manifest.shard]
    if unmarked:
        raise DatasetError(f"{manifest_path(unmarked[0])} does not say which shard of {prefix} it is: name it alone, or tokenize again")
    count = manifests[0].shard.get("count")
    if len(shards) != count:
        raise DatasetError(f"dataset {prefix} has {len(shards)} shards, {shards[0].prefix} says that it had {count}")
    for shard, manifest, note in zip(shards, manifests, shard_notes(manifests), strict=True):
        if manifest.shard != note or not shard.prefix.endswith(f"_{note['number']:05d}"):
            raise DatasetError(f"shard {shard.prefix} does not belong with the others of {prefix}: another run wrote it")


def _joined_manifest(manifests: Sequence[DatasetManifest]) -> DatasetManifest:
    """Return a manifest of all shards together.

    Its counts are sums, and its hashes are hashes of the shards' hashes. Its unigram entropy is the mean of the shards' entropies, weighted
    by their text; each shard's entropy is that of the shard's own frequencies.
    """
    sums = {name: sum(getattr(m, name) for m in manifests) for name in ("num_documents", "num_tokens", "num_bytes")}
    sums |= {name: sum(getattr(m, name) for m in manifests) for name in ("bin_num_bytes", "idx_num_bytes", "may_be_noised_num_bytes")}
    hashes_of_flags = [manifest.may_be_noised_sha256 for manifest in manifests]
    return dataclasses.replace(
        manifests[0],
        **sums,
        max_token_id=max(manifest.max_token_id for manifest in manifests),
        unigram_bits_per_byte=sum(m.unigram_bits_per_byte * m.num_bytes for m in manifests) / sums["num_bytes"],
        bin_sha256=_joined_hash([manifest.bin_sha256 for manifest in manifests]),
        idx_sha256=_joined_hash([manifest.idx_sha256 for manifest in manifests]),
        may_be_noised_sha256=_joined_hash(hashes_of_flags) if any(hashes_of_flags) else "",
        shard={},
    )


def _joined_hash(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
