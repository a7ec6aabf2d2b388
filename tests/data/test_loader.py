"""One global order, whatever the number of ranks, workers and restarts; errors and threads end as they should."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch

from w1train.data.batch import PackedBatch
from w1train.data.dataset import DatasetError
from w1train.data.loader import BatchLoader, validation_batches
from w1train.data.packed.packing import PackedDataset

LENGTH = 16


@pytest.fixture(scope="module")
def packed(make_dataset, tmp_path_factory):
    documents = [[20 + i % 300] * (5 + 7 * i % 40) for i in range(60)]
    dataset = make_dataset(tmp_path_factory.mktemp("loader") / "x", documents)
    return PackedDataset(dataset, LENGTH, seed=3)


def take(packed, num_batches, first_sample=0, **options) -> list[PackedBatch]:
    with BatchLoader(packed, micro_batch_size=options.pop("micro_batch_size", 2), **options) as loader:
        return list(itertools.islice(loader.micro_batches(first_sample), num_batches))


def rows(batches):
    """Every sample of the batches as one tuple: the index, and each field that has a value for each token."""
    names = [field.name for field in PackedBatch.fields() if field.per == "token"]
    return [
        (int(batch.sample_indices[i]), *(tuple(getattr(batch, name)[i].tolist()) for name in names))
        for batch in batches
        for i in range(len(batch.sample_indices))
    ]


def test_batches_are_the_samples_of_the_packed_dataset(packed):
    batch = take(packed, 1, first_sample=7)[0]
    assert batch.sample_indices.tolist() == [7, 8]
    for row, index in enumerate((7, 8)):
        for name, expected in packed.sample(index).items():
            assert np.array_equal(getattr(batch, name)[row], expected)
    dtypes = {field.name: getattr(batch, field.name).dtype for field in PackedBatch.fields()}
    assert dtypes == {
        "tokens": torch.int64,
        "document_ids": torch.int32,
        "positions": torch.int32,
        "sample_indices": torch.int64,
        "may_be_noised": torch.bool,
    }


@pytest.mark.parametrize("size", [2, 4, 7])
def test_ranks_share_one_global_order(packed, size):
    """Over the end of the epoch: 56 micro-batches of 2 samples, 112 samples, in an epoch of fewer."""
    num_batches = 56 // size
    alone = rows(take(packed, 56))
    assert packed.num_samples_per_epoch < 112
    ranks = [take(packed, num_batches, data_parallel_rank=rank, data_parallel_size=size) for rank in range(size)]
    together = rows(ranks[rank][k] for k in range(num_batches) for rank in range(size))
    assert together == alone
    assert [row[0] for row in alone] == list(range(112))


@pytest.mark.parametrize("first_sample", [1, 2, 50, 95])
def test_resuming_goes_on_where_the_run_stopped(packed, first_sample):
    straight = rows(take(packed, 60))
    assert rows(take(packed, 5, first_sample)) == straight[first_sample : first_sample + 10]


def test_another_micro_batch_size_keeps_the_order(packed):
    assert rows(take(packed, 4, micro_batch_size=6)) == rows(take(packed, 12))


@pytest.mark.parametrize("workers", ["thread", "process"])
@pytest.mark.parametrize(("num_workers", "prefetch"), [(1, 1), (1, 4), (4, 2), (3, 16)])
def test_workers_change_nothing(packed, workers, num_workers, prefetch):
    expected = rows(take(packed, 30, num_workers=0))
    assert rows(take(packed, 30, workers=workers, num_workers=num_workers, prefetch=prefetch)) == expected


class FailingDataset(PackedDataset):
    """Sample 5 cannot be read."""

    def sample(self, global_index):
        if global_index == 5:
            raise DatasetError("x.bin: token 3 of document 1 is 70000")
        return super().sample(global_index)


@pytest.mark.parametrize("workers", ["thread", "process"])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_an_error_reaches_the_caller_at_its_place(packed, workers, num_workers):
    failing = FailingDataset(packed.dataset, LENGTH, seed=3)
    with BatchLoader(failing, micro_batch_size=2, workers=workers, num_workers=num_workers) as loader:
        batches = loader.micro_batches(0)
        assert rows(itertools.islice(batches, 2)) == rows(take(packed, 2))
        with pytest.raises(DatasetError, match="token 3 of document 1 is 70000"):
            next(batches)


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("w1train-data")]


def test_closing_stops_the_threads(packed):
    loader = BatchLoader(packed, micro_batch_size=2, num_workers=3)
    batches = loader.micro_batches(0)
    next(batches)
    assert data_threads()
    loader.close()
    assert not data_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.micro_batches(0))


def test_reading_ahead_is_bounded(packed):
    """While the caller uses one micro-batch, ``prefetch`` more get ready without being asked for, and no further ones."""
    read = []

    class RecordingDataset(PackedDataset):
        def sample(self, global_index):
            read.append(global_index)
            return super().sample(global_index)

    recording = RecordingDataset(packed.dataset, LENGTH, seed=3)
    with BatchLoader(recording, micro_batch_size=1, num_workers=4, prefetch=4) as loader:
        next(loader_batches := loader.micro_batches(0))
        deadline = time.monotonic() + 30
        while len(read) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert sorted(read) == [0, 1, 2, 3, 4]
        next(loader_batches)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_waiting_is_measured(packed, num_workers):
    class SlowDataset(PackedDataset):
        def sample(self, global_index):
            time.sleep(0.02)
            return super().sample(global_index)

    slow = SlowDataset(packed.dataset, LENGTH, seed=3)
    with BatchLoader(slow, micro_batch_size=1, num_workers=num_workers, prefetch=1) as loader:
        assert loader.data_wait_seconds == 0
        list(itertools.islice(loader.micro_batches(0), 3))
        assert loader.data_wait_seconds > 0.01


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [1, 7, 24, 10_000])
def test_validation_takes_each_sample_once(packed, size, num_samples):
    whole = PackedDataset(packed.dataset, LENGTH, seed=3, shuffle=False)
    ranks = [list(validation_batches(whole, num_samples, 3, rank, size)) for rank in range(size)]
    assert len({len(batches) for batches in ranks}) == 1, "a rank with fewer micro-batches would hang the others"
    samples = [row for batches in ranks for row in rows(batches)]
    expected = min(num_samples, whole.num_samples_per_epoch)
    assert sorted(row[0] for row in samples if row[0] >= 0) == list(range(expected))
    for index, tokens, document_ids, positions, may_be_noised in samples:
        assert may_be_noised == tuple(document_id >= 0 for document_id in document_ids)
        if index < 0:
            assert (set(tokens), set(document_ids), set(positions)) == ({0}, {-1}, {0})
    if num_samples > whole.num_samples_per_epoch:
        num_tokens = sum(document_id >= 0 for row in samples for document_id in row[2])
        assert num_tokens == packed.dataset.num_tokens, "the last, padded sample counts too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size"),
        ({"data_parallel_rank": 2, "data_parallel_size": 2}, r"data_parallel_rank must be in \[0, 2\)"),
        ({"num_workers": -1}, "num_workers"),
        ({"prefetch": 0}, "prefetch"),
        ({"first_sample": -1}, "first_sample"),
    ],
)
def test_arguments_out_of_range(packed, options, message):
    with pytest.raises(ValueError, match=message):
        take(packed, 1, **options)
