"""Packed samples to micro-batches, read ahead by threads.

The global order is arithmetic: global micro-batch k holds samples [first + k * b * d, first + (k + 1) * b * d), of which
data-parallel rank r takes the r-th run of b. The number of workers changes nothing about it.

Shapes: b = micro_batch_size, d = data_parallel_size, l = sequence_length.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from w1train.data.batch import PackedBatch
from w1train.data.packing import PackedDataset
from w1train.data.staged import StagedSamples

PADDING_SAMPLE = -1


class BatchLoader:
    """The training batches of one data-parallel rank, without end.

    Close it (or use it in a ``with`` statement) to stop its threads.
    """

    def __init__(
        self,
        packed: PackedDataset | StagedSamples,
        *,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 1,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
    ) -> None:
        """
        Args:
            num_workers: threads that prepare micro-batches; 0 = in the caller's thread.
            prefetch: micro-batches ready or under way while the caller uses one; unused without workers.

        Raises:
            ValueError: if a count is out of range.
        """
        _check_counts(micro_batch_size, data_parallel_rank, data_parallel_size)
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"num_workers must be at least 0 and prefetch at least 1, not {num_workers} and {prefetch}")
        self.data_wait_seconds: float = 0.0
        """Time that the caller has spent waiting for micro-batches (or making them, without workers)."""
        self._packed = packed
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._prefetch = prefetch
        self._device = torch.device(device)
        self._closed = False
        self._executor: ThreadPoolExecutor | None = None
        if num_workers:
            self._executor = ThreadPoolExecutor(num_workers, "w1train-data", initializer=_enter_device, initargs=(self._device,))

    def micro_batches(self, first_sample: int = 0) -> Iterator[PackedBatch]:
        """Micro-batches from global sample ``first_sample`` on, for ever; an error in a worker is raised at its place in the order.

        Raises:
            ValueError: if ``first_sample`` is negative.
            RuntimeError: if the loader is closed, now or while iterating.
        """
        if first_sample < 0:
            raise ValueError(f"first_sample must be at least 0, not {first_sample}")
        starts = itertools.count(first_sample + self._rank * self._micro_batch_size, self._size * self._micro_batch_size)
        return self._read_inline(starts) if self._executor is None else self._read_ahead(self._executor, starts)

    def close(self) -> None:
        """Stop the threads; iterators of this loader raise from now on."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _read_inline(self, starts: Iterator[int]) -> Iterator[PackedBatch]:
        for start in starts:
            self._check_open()
            began = time.perf_counter()
            batch = self._load(start)
            self.data_wait_seconds += time.perf_counter() - began
            yield _to_device(batch, self._device)

    def _read_ahead(self, executor: ThreadPoolExecutor, starts: Iterator[int]) -> Iterator[PackedBatch]:
        self._check_open()
        pending = deque(executor.submit(self._load, start) for start in itertools.islice(starts, self._prefetch))
        try:
            while True:
                self._check_open()
                began = time.perf_counter()
                batch = pending.popleft().result()
                self.data_wait_seconds += time.perf_counter() - began
                pending.append(executor.submit(self._load, next(starts)))
                yield _to_device(batch, self._device)
        finally:
            for future in pending:
                future.cancel()

    def _load(self, start: int) -> PackedBatch:
        batch = _collate(self._packed, np.arange(start, start + self._micro_batch_size))
        return _pin(batch) if self._device.type == "cuda" else batch

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the batch loader is closed")

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def validation_batches(
    packed: PackedDataset,
    num_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[PackedBatch]:
    """The first ``num_samples`` samples of epoch 0 (fewer if the set is smaller), each once over all ranks.

    Every rank yields the same number of micro-batches, since each of them is a collective operation; the places that are
    left over are padding samples: document_ids -1 throughout and sample index -1.

    Raises:
        ValueError: if a count is out of range.
    """
    _check_counts(micro_batch_size, data_parallel_rank, data_parallel_size)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    return _validation_batches(packed, num_samples, micro_batch_size, data_parallel_rank, data_parallel_size, torch.device(device))


def _validation_batches(
    packed: PackedDataset, num_samples: int, micro_batch_size: int, rank: int, size: int, device: torch.device
) -> Iterator[PackedBatch]:
    num_samples = min(num_samples, packed.num_samples_per_epoch)
    for first in range(0, num_samples, micro_batch_size * size):
        indices = first + rank * micro_batch_size + np.arange(micro_batch_size)
        yield _to_device(_collate(packed, np.where(indices < num_samples, indices, PADDING_SAMPLE)), device)


def validation_token_counts(packed: PackedDataset, num_samples: int, vocab_size: int) -> NDArray[np.int64]:
    """How often each id occurs in the samples of :func:`validation_batches` over all ranks, padding left out; int64 [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for index in range(min(num_samples, packed.num_samples_per_epoch)):
        tokens, document_ids, _ = packed.sample(index)
        counts += np.bincount(tokens[document_ids >= 0], minlength=vocab_size)
    return counts


def _collate(packed: PackedDataset | StagedSamples, sample_indices: NDArray[np.int64]) -> PackedBatch:
    """The samples of the indices, int64 [b]; PADDING_SAMPLE stands for one of padding alone."""
    shape = (len(sample_indices), packed.sequence_length)
    tokens = np.zeros(shape, dtype=np.int64)
    document_ids = np.full(shape, -1, dtype=np.int32)
    positions = np.zeros(shape, dtype=np.int32)
    for row, index in enumerate(sample_indices.tolist()):
        if index != PADDING_SAMPLE:
            tokens[row], document_ids[row], positions[row] = packed.sample(index)
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        document_ids=torch.from_numpy(document_ids),
        positions=torch.from_numpy(positions),
        sample_indices=torch.from_numpy(sample_indices),
    )


def _enter_device(device: torch.device) -> None:
    """A thread starts on GPU 0: pinning there would make every rank of a node open a context on that GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _pin(batch: PackedBatch) -> PackedBatch:
    """Page-locked copies, which the GPU can fetch while the CPU goes on."""
    return PackedBatch(
        tokens=batch.tokens.pin_memory(),
        document_ids=batch.document_ids.pin_memory(),
        positions=batch.positions.pin_memory(),
        sample_indices=batch.sample_indices.pin_memory(),
    )


def _to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    if device.type == "cpu":
        return batch
    return PackedBatch(
        tokens=batch.tokens.to(device, non_blocking=True),
        document_ids=batch.document_ids.to(device, non_blocking=True),
        positions=batch.positions.to(device, non_blocking=True),
        sample_indices=batch.sample_indices.to(device, non_blocking=True),
    )


def _check_counts(micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, not {micro_batch_size}")
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(f"data_parallel_rank must be in [0, {data_parallel_size}), not {data_parallel_rank}")
