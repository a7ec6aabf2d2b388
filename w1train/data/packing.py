"""Concatenate-and-cut packing: a sample is arithmetic on its global index; there is no state to save.

Shapes: n = documents, m = samples of an epoch, l = sequence_length.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from w1train.data.dataset import DatasetError, TokenDataset

_DOCUMENT_STREAM, _SAMPLE_STREAM = 0, 1
_NUM_EPOCHS_KEPT = 2


@dataclass(frozen=True, slots=True)
class _EpochOrder:
    documents: NDArray[np.int64]
    """[n]: the documents in the order of the epoch's concatenation."""
    starts: NDArray[np.int64]
    """[n + 1]: where each begins in the concatenation, in tokens; the last entry is its length."""
    slots: NDArray[np.int64] | None
    """[m]: the stretch of the concatenation that each sample of the epoch is; None = in order."""


class PackedDataset:
    """Samples of exactly ``sequence_length`` tokens, cut from the concatenation of an epoch's shuffled documents.

    A document that is longer than what is left of a sample is cut, and the piece in the next sample counts as a document of
    its own: it gets its own document id and its positions restart at 0, as if the text began there. Every document ends with
    its EOS, which belongs to it.

    The order is a pure function of (seed, epoch). It is drawn from the raw output of a counter-based generator (Philox),
    which NumPy keeps the same on every platform and in every version, as it does not for its shuffles.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        seed: int,
        shuffle: bool = True,
        shuffle_samples: bool = False,
        drop_last: bool = True,
    ) -> None:
        """
        Args:
            shuffle: shuffle the documents of every epoch; otherwise they come in the dataset's order.
            shuffle_samples: also shuffle the samples after cutting (as Megatron's GPTDataset does), so that the pieces of a long
                document do not follow each other into the same batch.
            drop_last: leave out the last, shorter sample of an epoch (training: other tokens fall into it in each epoch).
                Otherwise it is padded (validation: every token counts).

        Raises:
            DatasetError: if the dataset has fewer tokens than one sample, and ``drop_last`` is set.
            ValueError: if ``sequence_length`` or ``seed`` is out of range.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), not {seed}")
        self.dataset = dataset
        self.sequence_length = sequence_length
        num_tokens = dataset.num_tokens
        self.num_samples_per_epoch: int = num_tokens // sequence_length if drop_last else -(-num_tokens // sequence_length)
        if self.num_samples_per_epoch == 0:
            raise DatasetError(f"dataset {dataset.prefix} has {num_tokens} tokens, fewer than one sample of {sequence_length}")
        self._seed = seed
        self._shuffle = shuffle
        self._shuffle_samples = shuffle_samples
        self._lengths: NDArray[np.int64] = np.diff(dataset.document_offsets)
        self._orders: dict[int, _EpochOrder] = {}
        self._lock = threading.Lock()

    def sample(self, global_index: int) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
        """The sample at an index that runs on over epochs: index // num_samples_per_epoch is the epoch.

        Safe to call from several threads. Takes O(log n) steps to find, apart from the first sample of an epoch, which draws
        its order in O(n log n).

        Returns:
            tokens int64 [l] (0 on padding), document_ids int32 [l] (from 0 in each sample; -1 on padding, a suffix), positions
            int32 [l] (0 on padding).

        Raises:
            DatasetError: if a token is outside the vocabulary.
        """
        epoch, index = divmod(global_index, self.num_samples_per_epoch)
        order = self._epoch_order(epoch)
        slot = index if order.slots is None else int(order.slots[index])
        begin = slot * self.sequence_length
        pieces = self._pieces(order, begin, min(begin + self.sequence_length, self.dataset.num_tokens))

        lengths = np.array([len(piece) for piece in pieces])
        num_tokens = int(lengths.sum())
        tokens = np.zeros(self.sequence_length, dtype=np.int64)
        document_ids = np.full(self.sequence_length, -1, dtype=np.int32)
        positions = np.zeros(self.sequence_length, dtype=np.int32)
        tokens[:num_tokens] = np.concatenate(pieces)
        document_ids[:num_tokens] = np.repeat(np.arange(len(pieces)), lengths)
        positions[:num_tokens] = np.arange(num_tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return tokens, document_ids, positions

    def _pieces(self, order: _EpochOrder, begin: int, end: int) -> list[NDArray[np.integer]]:
        """The stretches of documents that make up tokens [begin, end) of the concatenation."""
        first = int(np.searchsorted(order.starts, begin, side="right")) - 1
        last = int(np.searchsorted(order.starts, end, side="left"))
        pieces = []
        for document, start, stop in zip(order.documents[first:last], order.starts[first:last], order.starts[first + 1 :], strict=False):
            if start < stop:  # a foreign dataset may have documents without tokens
                pieces.append(self.dataset.document_tokens(document, max(begin - start, 0), min(end, stop) - start))
        return pieces

    def _epoch_order(self, epoch: int) -> _EpochOrder:
        """The order of an epoch; the two last used are kept, since prefetching straddles the end of an epoch."""
        if not (self._shuffle or self._shuffle_samples):
            epoch = 0
        with self._lock:
            order = self._orders.pop(epoch, None) or self._draw_order(epoch)
            self._orders[epoch] = order
            if len(self._orders) > _NUM_EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            return order

    def _draw_order(self, epoch: int) -> _EpochOrder:
        num_documents = self.dataset.num_documents
        if self._shuffle:
            documents = permutation(num_documents, self._seed, epoch, _DOCUMENT_STREAM)
        else:
            documents = np.arange(num_documents)
        starts = np.zeros(num_documents + 1, dtype=np.int64)
        np.cumsum(self._lengths[documents], out=starts[1:])
        slots = permutation(self.num_samples_per_epoch, self._seed, epoch, _SAMPLE_STREAM) if self._shuffle_samples else None
        return _EpochOrder(documents, starts, slots)


def permutation(num_items: int, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """A uniform permutation of range(num_items), int64 [num_items], that depends on the arguments alone.

    Items are sorted by 64-bit random keys: Philox 4x64 with key (seed, epoch), its counter's top word being ``stream``.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64), counter=np.array([0, 0, 0, stream], dtype=np.uint64))
    return np.argsort(generator.random_raw(num_items), kind="stable")
