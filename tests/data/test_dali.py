"""The DALI pipeline gives the batches of the project's own loader; without DALI it says what to install."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from w1train.config.errors import UserError
from w1train.data.batch import PackedBatch
from w1train.data.dali import DaliLoader
from w1train.data.loader import BatchLoader
from w1train.data.packed.packing import PackedDataset

HAS_DALI = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


@pytest.fixture(scope="module")
def packed(make_dataset, tmp_path_factory):
    documents = [[20 + i % 200] * (5 + 7 * i % 40) for i in range(60)]
    return PackedDataset(make_dataset(tmp_path_factory.mktemp("dali") / "x", documents), 16, seed=3)


@pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed (the dali extra)")
@pytest.mark.parametrize(("rank", "first_sample"), [(0, 0), (2, 50)])
def test_the_same_batches_in_the_same_order(packed, rank, first_sample):
    options = {"micro_batch_size": 2, "data_parallel_rank": rank, "data_parallel_size": 3, "prefetch": 2}
    with BatchLoader(packed, **options, num_workers=0) as loader, DaliLoader(packed, **options, num_workers=2) as dali:
        pairs = zip(loader.micro_batches(first_sample), dali.micro_batches(first_sample), strict=False)
        for expected, found in itertools.islice(pairs, 20):
            for field in PackedBatch.fields():
                one, other = getattr(expected, field.name), getattr(found, field.name)
                assert one.dtype == other.dtype
                assert torch.equal(one, other), field.name


@pytest.mark.skipif(HAS_DALI, reason="NVIDIA DALI is installed")
def test_without_dali_the_extra_is_named(packed):
    with pytest.raises(UserError, match="install the dali extra"):
        DaliLoader(packed, micro_batch_size=2)
