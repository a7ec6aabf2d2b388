"""The samples of a dataset: documents become samples of one length. A sample follows from its global index, so there is no state to save.

Shapes: k = pieces of a sample, l = sequence_length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from w1train.data.batch import Sample, padding_sample
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.order import Stream, permuted, random_words

LongDocuments = Literal["restart", "continue"]
EndOfDocument = Literal["keep", "drop"]


class Pieces(NamedTuple):
    """The parts of documents that a sample consists of."""

    starts: NDArray[np.int64]
    """[k]: first token of each piece in PREFIX.bin."""
    lengths: NDArray[np.int64]
    """[k]: number of tokens of each piece."""
    offsets: NDArray[np.int64]
    """[k]: where each piece begins inside its document."""
    places: NDArray[np.int64]
    """[k]: where each piece begins inside the sample."""


class Fill(NamedTuple):
    """The EOS tokens that follow the end of a document. They belong to the document, may be noised and are learned: the sampler writes
    whole blocks, and without fill a model does not learn what follows the end of a reply.

    A document that does not end with an EOS that may be noised, such as a reply that was cut, gets no fill.
    """

    kind: Literal["block", "batch", "sample"]
    """The place where the fill ends: the next multiple of ``size`` positions, the length of the longest document of each ``size`` samples
    of the order, or the end of the sample."""
    size: int
    token_id: int
    """The id of EOS."""


class SampleSource(ABC):
    """The samples of a dataset, of ``sequence_length`` tokens each, in an order that is a pure function of (seed, epoch).

    The numbers of samples continue from epoch to epoch. Every document ends with its EOS, which belongs to it. A document that is cut
    counts as several documents: each piece has a document id of its own, because no piece sees a piece that is in another sample.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        seed: int,
        *,
        num_samples_per_epoch: int,
        shuffle: bool = True,
        long_documents: LongDocuments = "restart",
        max_position: int | None = None,
        eos: EndOfDocument = "keep",
        fill: Fill | None = None,
    ) -> None:
        """
        Args:
            shuffle: read the samples of each epoch in another random order; otherwise in the order of the dataset.
            long_documents: the positions of a piece that is not the beginning of its document "restart" at 0, as if the text began there,
                or "continue" where the document was cut.
            max_position: bound of the positions that continue; a piece whose positions would reach the bound starts at lower positions.
                None = no bound.
            eos: "drop" leaves out the last token of every document.
            fill: EOS tokens after the end of each document; None = padding.

        Raises:
            ValueError: if ``sequence_length``, ``seed`` or ``max_position`` is out of range.
            DatasetError: if ``eos`` is "drop" and the dataset has no manifest, which alone ensures that documents end with EOS.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2^64), not {seed}")
        if max_position is not None and max_position < sequence_length:
            raise ValueError(f"max_position must be at least the sequence length {sequence_length}, not {max_position}")
        if eos == "drop" and dataset.manifest is None:
            raise DatasetError(
                f"dataset {dataset.prefix} has no manifest, so data.eos=drop is not possible: its documents may not end with EOS"
            )
        self.dataset = dataset
        self.sequence_length = sequence_length
        self.num_samples_per_epoch = num_samples_per_epoch
        self._seed = seed
        self._shuffle = shuffle
        self._continue = long_documents == "continue"
        self._position_period = None if max_position is None else max_position - sequence_length + 1
        self._drop_eos = eos == "drop"
        self._fill = fill

    @abstractmethod
    def _pieces(self, epoch: int, slot: int) -> Pieces:
        """Return the pieces of sample ``slot`` of the packing in an epoch."""

    def sample(self, global_index: int) -> Sample:
        """Return the sample at an index that continues over epochs: index // num_samples_per_epoch is the epoch.

        Several threads and processes may call this method. It takes the same time for every index.

        Raises:
            DatasetError: if a token is outside the vocabulary, or a file was truncated or is damaged.
            OSError: if a file cannot be read.
        """
        pieces = self._pieces(*self._slot(global_index))
        sample = self._assemble(pieces)
        if self._fill is not None:
            self._fill_up(sample, pieces, global_index, self._fill.token_id)
        return sample

    def _slot(self, global_index: int) -> tuple[int, int]:
        """Return the epoch of an index, and its sample of the packing."""
        epoch, slot = divmod(global_index, self.num_samples_per_epoch)
        return epoch, permuted(slot, self.num_samples_per_epoch, self._seed, epoch) if self._shuffle else slot

    def _fill_up(self, sample: Sample, pieces: Pieces, global_index: int, token_id: int) -> None:
        """Write the fill of each piece whose last token is an EOS that may be noised."""
        for number, end in enumerate((pieces.places + pieces.lengths).tolist()):
            filled = slice(end, self._filled_end(global_index, end))
            if sample["may_be_noised"][end - 1] and sample["tokens"][end - 1] == token_id:
                sample["tokens"][filled] = token_id
                sample["may_be_noised"][filled] = True
                sample["document_ids"][filled] = number
                sample["positions"][filled] = sample["positions"][end - 1] + 1 + np.arange(filled.stop - end)

    def _filled_end(self, global_index: int, end: int) -> int:
        """Return the position at which the fill after a piece ends, for a piece that ends at position ``end``."""
        assert self._fill is not None
        return self.sequence_length if self._fill.kind == "sample" else -(-end // self._fill.size) * self._fill.size

    def _assemble(self, pieces: Pieces) -> Sample:
        starts, lengths, offsets, places = pieces
        sample = padding_sample(self.sequence_length)
        if len(starts) == 0:  # the last sample of an epoch held only an EOS, which is left out
            return sample
        numbers = np.arange(len(starts))
        ends = np.cumsum(lengths)
        where: slice | NDArray[np.int64] = slice(0, int(ends[-1]))
        indices = np.arange(int(ends[-1]))
        if places[-1] != ends[-1] - lengths[-1]:  # there are gaps between the pieces
            where = indices = indices + np.repeat(places - (ends - lengths), lengths)
        # Pieces that follow each other both in the file and in the sample are read at once.
        joined = (starts[1:] == starts[:-1] + lengths[:-1]) & (places[1:] == places[:-1] + lengths[:-1])
        firsts = np.flatnonzero(np.concatenate([[True], ~joined]))
        lasts = np.append(firsts[1:], len(starts)) - 1
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            start, stop, place = int(starts[first]), int(starts[last] + lengths[last]), int(places[first])
            sample["tokens"][place : place + stop - start] = self.dataset.read(start, stop)
            sample["may_be_noised"][place : place + stop - start] = self.dataset.read_may_be_noised(start, stop)
        sample["document_ids"][where] = np.repeat(numbers, lengths)
        sample["positions"][where] = indices - np.repeat(places - self._first_positions(offsets), lengths)
        return sample

    def _first_positions(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        if not self._continue:
            return np.zeros_like(offsets)
        return offsets if self._position_period is None else offsets % self._position_period


class PackedDataset(SampleSource):
    """The samples of concatenate-and-cut packing: the dataset is a ring of tokens, cut into samples of exactly ``sequence_length``.

    Each epoch starts to cut at another document, so that other documents are cut, and reads the samples in another order. Padding fills the
    last sample of an epoch, and every token is read exactly once per epoch.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        sequence_length: int,
        seed: int,
        *,
        shuffle: bool = True,
        long_documents: LongDocuments = "restart",
        max_position: int | None = None,
        eos: EndOfDocument = "keep",
    ) -> None:
        """Accept the arguments of ``SampleSource``, and raise its errors."""
        super().__init__(
            dataset,
            sequence_length,
            seed,
            num_samples_per_epoch=-(-dataset.num_tokens // max(sequence_length, 1)),
            shuffle=shuffle,
            long_documents=long_documents,
            max_position=max_position,
            eos=eos,
        )

    def _pieces(self, epoch: int, slot: int) -> Pieces:
        num_tokens, length = self.dataset.num_tokens, self.sequence_length
        begin = slot * length
        num_left = min(length, num_tokens - begin)
        begin = (begin + self._ring_start(epoch)) % num_tokens
        end = begin + num_left
        parts = [self._documents_between(begin, min(end, num_tokens))]
        if end > num_tokens:
            parts.append(self._documents_between(0, end - num_tokens))
        starts, ends, offsets, is_end = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        lengths = ends - starts
        if self._drop_eos:
            lengths = lengths - is_end
        kept = lengths > 0  # a document may have no tokens if other software wrote it, and a piece may consist of its EOS
        lengths = lengths[kept]
        return Pieces(starts[kept], lengths, offsets[kept], np.cumsum(lengths) - lengths)

    def _documents_between(self, begin: int, end: int) -> tuple[NDArray[np.int64], ...]:
        """Return the parts of documents in the tokens [begin, end) of PREFIX.bin.

        Returns:
            For each part: where it begins and ends in PREFIX.bin, where it begins in its document, and whether it is the end of the
            document.
        """
        _, bounds = self.dataset.document_offsets.around(begin, end)
        starts, ends = np.maximum(bounds[:-1], begin), np.minimum(bounds[1:], end)
        return starts, ends, starts - bounds[:-1], (ends == bounds[1:]).astype(np.int64)

    def _ring_start(self, epoch: int) -> int:
        """Return the token at which the epoch starts to cut the ring: the first of a document, so that this cuts no document."""
        if not self._shuffle:
            return 0
        return self.dataset.document_offsets[_ring_document(self._seed, epoch, self.dataset.num_documents)] % self.dataset.num_tokens


@lru_cache(maxsize=256)
def _ring_document(seed: int, epoch: int, num_documents: int) -> int:
    return random_words(seed, epoch, Stream.START, 1)[0] * num_documents >> 64
