"""A loader that reads through an NVIDIA DALI pipeline (``data.loader=dali``): it gives the batches of ``BatchLoader`` in the same order.

DALI's worker processes make the batches and hand them over in shared memory; the pipeline copies them to the GPU on a stream of its own.
Without a GPU the pipeline does the same except for the copy, and the tests run it that way. DALI comes with the dali extra.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from w1train.config.errors import UserError
from w1train.data.batch import BatchField, PackedBatch
from w1train.data.loader import Samples, collate_run
from w1train.data.loader_workers import LoaderError


class DaliLoader:
    """The loader. Close it, or use it in a ``with`` statement, to stop its processes."""

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
    ) -> None:
        """Accept the arguments of ``BatchLoader``; ``num_workers`` must be at least 1.

        Raises:
            UserError: if DALI is not installed.
        """
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise UserError(f"data.loader=dali needs NVIDIA DALI ({error}): install the dali extra, or set data.loader=torch") from error
        self.data_wait_seconds = 0.0
        self._packed, self._micro_batch_size = packed, micro_batch_size
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._num_workers, self._prefetch = num_workers, prefetch
        self._device = torch.device(device)
        self._pipelines: dict[_Source, Any] = {}
        """The pipeline of each iterator in use. Nothing else refers to a pipeline, so that closing the loader destroys it."""
        self._closed = False

    def micro_batches(self, first_sample: int = 0) -> Iterator[PackedBatch]:
        """Yield the micro-batches as ``BatchLoader.micro_batches`` does."""
        if first_sample < 0:
            raise ValueError(f"first_sample must be at least 0, not {first_sample}")
        self._check_open()
        stride = self._micro_batch_size * self._size
        return self._run(_Source(self._packed, self._micro_batch_size, first_sample + self._rank * self._micro_batch_size, stride))

    def close(self) -> None:
        """Stop the processes."""
        self._closed = True
        # A pipeline ends its processes only when it is destroyed.
        self._pipelines.clear()

    def _run(self, source: _Source) -> Iterator[PackedBatch]:
        self._pipelines[source] = self._build(source)
        try:
            while True:
                self._check_open()
                began = time.perf_counter()
                try:
                    outputs = self._pipelines[source].run()
                except Exception as error:  # DALI reports a worker's exception as a bare Exception whose text is the worker's traceback
                    raise LoaderError(f"the DALI pipeline failed: {error}") from error
                pairs = zip(PackedBatch.fields(), outputs, strict=True)
                batch = PackedBatch(**{field.name: self._tensor(output, field) for field, output in pairs})
                self.data_wait_seconds += time.perf_counter() - began
                yield batch
        finally:
            self._pipelines.pop(source, None)

    def _build(self, source: _Source) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self._device.type == "cuda"
        pipeline = Pipeline(
            batch_size=self._micro_batch_size,
            num_threads=1,
            device_id=(self._device.index or 0) if on_gpu else None,
            py_num_workers=self._num_workers,
            # DALI starts its processes late, when this process has threads of NCCL and CUDA, which a fork would break.
            py_start_method="spawn",
            prefetch_queue_depth=self._prefetch,
        )
        # DALI's names of the types are NumPy's in capitals: INT64, INT32, BOOL.
        dtypes = [getattr(types, field.dtype.name.upper()) for field in PackedBatch.fields()]
        with pipeline:
            outputs = fn.external_source(
                source=source, num_outputs=len(dtypes), batch=True, parallel=True, dtype=dtypes, prefetch_queue_depth=self._prefetch
            )
            pipeline.set_outputs(*(output.gpu() if on_gpu else output for output in outputs))
        pipeline.build()
        return pipeline

    def _tensor(self, output: Any, field: BatchField) -> torch.Tensor:
        dense = output.as_tensor()
        if self._device.type == "cuda":
            # Without the copy DALI would write the next batch into the same memory. DLPack may pass booleans as bytes.
            return torch.from_dlpack(dense).to(torch.from_numpy(np.empty(0, field.dtype)).dtype, copy=True)
        return torch.from_numpy(np.array(dense, dtype=field.dtype))

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the batch loader is closed")

    def __enter__(self) -> DaliLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class _Source:
    """The function that DALI's processes call, and that is sent to them by pickling."""

    def __init__(self, packed: Samples, micro_batch_size: int, first: int, stride: int) -> None:
        self._packed, self._micro_batch_size, self._first, self._stride = packed, micro_batch_size, first, stride

    def __call__(self, iteration: int) -> tuple[NDArray[Any], ...]:
        """Return the arrays of a micro-batch, in the order of ``PackedBatch.fields``."""
        batch = collate_run(self._packed, self._micro_batch_size, self._first + iteration * self._stride)
        return tuple(getattr(batch, field.name).numpy() for field in PackedBatch.fields())
