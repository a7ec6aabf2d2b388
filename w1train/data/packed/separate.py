"""Samples of one document each, as conversations and pairs of replies are trained if they are not packed.

Shapes: l = sequence_length.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.order import permuted
from w1train.data.packed.packing import EndOfDocument, Fill, Pieces, SampleSource
from w1train.data.packed.packing_index import document_lengths


class SeparateDataset(SampleSource):
    """The samples of a dataset whose documents are samples: each begins at the first position, and padding follows it.

    Each epoch has its own order of the documents. The documents of a preference dataset come in pairs (document 2p is the chosen reply of
    pair p, and document 2p + 1 the rejected reply), and then the pairs have a random order, and the two replies follow each other.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        seed: int,
        *,
        shuffle: bool = True,
        pairs: bool = False,
        eos: EndOfDocument = "keep",
        fill: Fill | None = None,
    ) -> None:
        """Accept the arguments of ``SampleSource``.

        Args:
            pairs: the dataset is a preference dataset.

        Raises:
            DatasetError: a document is longer than a sample or has no tokens, or a document has no pair.
        """
        super().__init__(dataset, sequence_length, seed, num_samples_per_epoch=dataset.num_documents, shuffle=shuffle, eos=eos, fill=fill)
        self._per_item = 2 if pairs else 1
        check_lengths(dataset, sequence_length, eos)
        if dataset.num_documents % self._per_item:
            raise DatasetError(
                f"dataset {dataset.prefix} has {dataset.num_documents} documents, and preferences need pairs of documents: the chosen and "
                "the rejected reply of each pair; `w1train data conversations` writes such a dataset"
            )
        self._longest_of_group = lru_cache(maxsize=64)(self._longest)

    def __reduce__(self) -> tuple[object, ...]:
        """Let another process open the dataset again: a cache cannot be pickled."""
        options = {"shuffle": self._shuffle, "pairs": self._per_item == 2, "eos": "drop" if self._drop_eos else "keep", "fill": self._fill}
        return _reopen, (self.dataset, self.sequence_length, self._seed, options)

    def _slot(self, global_index: int) -> tuple[int, int]:
        epoch, place = divmod(global_index, self.num_samples_per_epoch)
        if not self._shuffle:
            return epoch, place
        item, side = divmod(place, self._per_item)
        return epoch, permuted(item, self.num_samples_per_epoch // self._per_item, self._seed, epoch) * self._per_item + side

    def _pieces(self, epoch: int, slot: int) -> Pieces:
        start, length = self._bounds(slot)
        return Pieces(*(np.array([value], dtype=np.int64) for value in (start, length, 0, 0)))

    def _filled_end(self, global_index: int, end: int) -> int:
        if self._fill is None or self._fill.kind != "batch":
            return super()._filled_end(global_index, end)
        return max(end, self._longest_of_group(global_index // self._fill.size))

    def _longest(self, group: int) -> int:
        """Return the tokens of the longest document of a group of samples that follow each other in the order."""
        assert self._fill is not None
        first = group * self._fill.size
        return max(self._bounds(self._slot(index)[1])[1] for index in range(first, first + self._fill.size))

    def _bounds(self, document: int) -> tuple[int, int]:
        """Return the first token of a document in PREFIX.bin, and its number of tokens."""
        start, stop = self.dataset.document_offsets.bounds([document])[0].tolist()
        return start, stop - start - self._drop_eos


def _reopen(dataset: TokenDataset, sequence_length: int, seed: int, options: dict[str, object]) -> SeparateDataset:
    return SeparateDataset(dataset, sequence_length, seed, **options)  # type: ignore[arg-type]


def check_lengths(dataset: TokenDataset, sequence_length: int, eos: EndOfDocument) -> None:
    """Raise DatasetError if a document of a dataset is longer than a sample, or has no tokens."""
    lengths = document_lengths(dataset, eos)
    if (too_long := np.flatnonzero(lengths > sequence_length)).size:
        raise DatasetError(
            f"{too_long.size} documents of {dataset.prefix} are longer than data.sequence_length ({sequence_length}): document "
            f"{too_long[0]} has {lengths[too_long[0]]} tokens. Raise data.sequence_length, or write the dataset again with --max-length "
            f"{sequence_length}; for plain text set data.packing=best_fit"
        )
    if lengths.size == 0 or lengths.min() < 1:
        raise DatasetError(f"document {int(lengths.argmin()) if lengths.size else 0} of {dataset.prefix} has no tokens")
