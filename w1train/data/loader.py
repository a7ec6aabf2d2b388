"""The loader of micro-batches, whose workers read packed samples ahead of the training step.

Arithmetic gives the global order: global micro-batch k holds the samples [first + k * b * d, first + (k + 1) * b * d), of which
data-parallel rank r takes the r-th group of b. The order does not depend on the number of workers.

Shapes: b = micro_batch_size, d = data_parallel_size, l = sequence_length.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from w1train.data.batch import PADDING_SAMPLE, PackedBatch, Sample, padding_arrays
from w1train.data.loader_workers import ProcessWorkers, ThreadWorkers, Workers
from w1train.data.packed.packing import SampleSource


class Samples(Protocol):
    """The samples that a loader reads: ``SampleSource`` or ``StagedSamples``."""

    sequence_length: int

    def sample(self, global_index: int) -> Sample: ...


class BatchLoader:
    """The loader of the training batches of one data-parallel rank, which never end.

    Close it, or use it in a ``with`` statement, to stop its workers.
    """

    def __init__(
        self,
        packed: Samples,
        *,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        num_workers: int = 1,
        prefetch: int = 4,
        device: torch.device | str = "cpu",
        workers: Literal["thread", "process"] = "thread",
        read_timeout: float = 300.0,
    ) -> None:
        """
        Args:
            num_workers: number of threads or processes that prepare micro-batches; 0 = the caller's thread prepares them.
            prefetch: number of micro-batches that are ready or in preparation while the caller uses another micro-batch; unused without
                workers.
            read_timeout: seconds to wait for a micro-batch before the caller gets an error; unused without workers.

        Raises:
            ValueError: if a count is out of range.
        """
        _check_counts(micro_batch_size, data_parallel_rank, data_parallel_size)
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"num_workers must be at least 0 and prefetch at least 1, not {num_workers} and {prefetch}")
        self.data_wait_seconds: float = 0.0
        """Time that the caller has spent waiting for micro-batches or, without workers, making them."""
        self._packed = packed
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._num_workers = num_workers
        self._kind = workers
        self._prefetch = prefetch
        self._read_timeout = read_timeout
        self._device = torch.device(device)
        self._closed = False
        self._open_workers: list[Workers] = []

    def micro_batches(self, first_sample: int = 0) -> Iterator[PackedBatch]:
        """Yield micro-batches from global sample ``first_sample`` on, without end. An error in a worker is raised at its place in the
        order.

        Raises:
            ValueError: if ``first_sample`` is negative.
            LoaderError: while iterating, if a worker dies or prepares no micro-batch for ``read_timeout`` seconds.
            RuntimeError: now or while iterating, if the loader is closed.
        """
        self._check_open()
        starts = sample_starts(first_sample, self._micro_batch_size, self._rank, self._size)
        return self._read_inline(starts) if self._num_workers == 0 else self._read_ahead(starts)

    def close(self) -> None:
        """Stop the workers. From now on, iterators of this loader raise RuntimeError."""
        self._closed = True
        for workers in self._open_workers:
            workers.close()
        self._open_workers.clear()

    def _read_inline(self, starts: Iterator[int]) -> Iterator[PackedBatch]:
        for start in starts:
            self._check_open()
            began = time.perf_counter()
            batch = self._load(start)
            self.data_wait_seconds += time.perf_counter() - began
            yield to_device(batch, self._device)

    def _read_ahead(self, starts: Iterator[int]) -> Iterator[PackedBatch]:
        self._check_open()
        workers = self._start_workers()
        try:
            for start in itertools.islice(starts, self._prefetch):
                workers.submit(start)
            while True:
                self._check_open()
                began = time.perf_counter()
                batch = workers.receive()
                self.data_wait_seconds += time.perf_counter() - began
                workers.submit(next(starts))
                yield to_device(batch, self._device)
        finally:
            if workers in self._open_workers:
                self._open_workers.remove(workers)
                workers.close()

    def _start_workers(self) -> Workers:
        workers: Workers
        if self._kind == "process":
            load = partial(collate_run, self._packed, self._micro_batch_size)
            shape = (self._micro_batch_size, self._packed.sequence_length)
            workers = ProcessWorkers(load, self._num_workers, self._prefetch, self._read_timeout, shape)
        else:
            workers = ThreadWorkers(self._load, self._num_workers, self._read_timeout, partial(_enter_device, self._device))
        self._open_workers.append(workers)
        return workers

    def _load(self, start: int) -> PackedBatch:
        batch = collate_run(self._packed, self._micro_batch_size, start)
        return batch.map(torch.Tensor.pin_memory) if self._device.type == "cuda" else batch

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the batch loader is closed")

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def sample_starts(first_sample: int, micro_batch_size: int, rank: int, size: int) -> Iterator[int]:
    """Yield the first sample of each micro-batch of a data-parallel rank, from global sample ``first_sample`` on.

    Raises:
        ValueError: if ``first_sample`` is negative.
    """
    if first_sample < 0:
        raise ValueError(f"first_sample must be at least 0, not {first_sample}")
    return itertools.count(first_sample + rank * micro_batch_size, size * micro_batch_size)


def validation_batches(
    packed: SampleSource,
    num_samples: int,
    micro_batch_size: int,
    data_parallel_rank: int = 0,
    data_parallel_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[PackedBatch]:
    """Yield a rank's part of the first ``num_samples`` samples of epoch 0, or of all samples if there are fewer.

    Over all ranks, each sample comes once. Every rank yields the same number of micro-batches, since each micro-batch is a collective
    operation; samples of padding (see ``PackedBatch``) fill the places that are left over.

    Raises:
        ValueError: if a count is out of range.
    """
    _check_counts(micro_batch_size, data_parallel_rank, data_parallel_size)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    return _validation_batches(packed, num_samples, micro_batch_size, data_parallel_rank, data_parallel_size, torch.device(device))


def _validation_batches(
    packed: SampleSource, num_samples: int, micro_batch_size: int, rank: int, size: int, device: torch.device
) -> Iterator[PackedBatch]:
    num_samples = min(num_samples, packed.num_samples_per_epoch)
    for first in range(0, num_samples, micro_batch_size * size):
        indices = first + rank * micro_batch_size + np.arange(micro_batch_size)
        yield to_device(collate(packed, np.where(indices < num_samples, indices, PADDING_SAMPLE)), device)


def validation_token_counts(packed: SampleSource, num_samples: int, vocab_size: int) -> NDArray[np.int64]:
    """Count how often each id occurs among the tokens that may be noised in the samples of :func:`validation_batches` over all ranks.

    These are the tokens that a validation loss is an average over.

    Returns:
        int64 [vocab_size].
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for index in range(min(num_samples, packed.num_samples_per_epoch)):
        sample = packed.sample(index)
        counts += np.bincount(sample["tokens"][sample["may_be_noised"]], minlength=vocab_size)
    return counts


def collate(packed: Samples, sample_indices: NDArray[np.int64]) -> PackedBatch:
    """Return a batch of the samples with the given indices, int64 [b]; PADDING_SAMPLE stands for a sample of padding."""
    arrays = padding_arrays(len(sample_indices), packed.sequence_length)
    arrays["sample_indices"][:] = sample_indices
    for row, index in enumerate(sample_indices.tolist()):
        if index != PADDING_SAMPLE:
            for name, values in packed.sample(index).items():
                arrays[name][row] = values
    return PackedBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def collate_run(packed: Samples, micro_batch_size: int, start: int) -> PackedBatch:
    """Return the micro-batch that begins at a global sample index."""
    return collate(packed, np.arange(start, start + micro_batch_size))


def _enter_device(device: torch.device) -> None:
    """Set the thread's GPU to the rank's. A thread starts on GPU 0, where pinning memory would make every rank of a node open a context."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """Return the batch on the device. The CPU does not wait for the copy from page-locked memory."""
    if device.type == "cpu":
        return batch
    if not batch.tokens.is_pinned():
        batch = batch.map(torch.Tensor.pin_memory)
    return batch.map(lambda tensor: tensor.to(device, non_blocking=True))


def _check_counts(micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int) -> None:
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size must be at least 1, not {micro_batch_size}")
    if not 0 <= data_parallel_rank < data_parallel_size:
        raise ValueError(f"data_parallel_rank must be in [0, {data_parallel_size}), not {data_parallel_rank}")
