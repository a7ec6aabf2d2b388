"""The list of a batch's fields: everything that handles a batch takes the fields from the list, a field that tests add included."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tests.tiny import packed_batch
from w1train.data import loader_workers
from w1train.data.batch import PADDING_SAMPLE, BatchField, PackedBatch, padding_arrays, padding_sample
from w1train.data.dali import _Source
from w1train.data.loader import BatchLoader, collate, to_device


def test_every_field_is_listed_with_its_type_and_padding():
    batch = packed_batch([0, 1, 2], length=8)
    assert [field.name for field in PackedBatch.fields()] == [entry.name for entry in dataclasses.fields(PackedBatch)]
    for field in PackedBatch.fields():
        values = getattr(batch, field.name)
        assert tuple(values.shape) == field.shape(3, 8), field.name
        assert values.numpy().dtype == field.dtype, field.name


def test_all_tokens_of_documents_may_be_noised_by_default():
    batch = packed_batch(range(6))
    assert (batch.document_ids < 0).any()
    assert torch.equal(batch.may_be_noised, batch.document_ids >= 0)


def test_a_change_reaches_every_field_and_only_once():
    batch = packed_batch([3, 4])
    seen = []
    changed = batch.map(lambda tensor: seen.append(tensor.dtype) or tensor[:1])
    assert seen == [getattr(batch, field.name).dtype for field in PackedBatch.fields()]
    for field in PackedBatch.fields():
        assert torch.equal(getattr(changed, field.name), getattr(batch, field.name)[:1]), field.name
    assert to_device(batch, torch.device("cpu")) is batch


def test_a_batch_of_padding_is_like_the_other_batch():
    batch = packed_batch([0, 1])
    padding = batch.padding_like()
    for field in PackedBatch.fields():
        one, other = getattr(batch, field.name), getattr(padding, field.name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert (other == field.padding).all(), field.name
    assert set(padding.sample_indices.tolist()) == {PADDING_SAMPLE}
    assert not padding.may_be_noised.any()


def test_padding_for_a_loader_has_the_types_of_a_batch():
    arrays, sample = padding_arrays(2, 5), padding_sample(5)
    assert [(name, array.dtype, array.shape) for name, array in arrays.items()] == [
        (field.name, field.dtype, field.shape(2, 5)) for field in PackedBatch.fields()
    ]
    assert {name: (array.dtype, array.shape) for name, array in sample.items()} == {
        field.name: (field.dtype, (5,)) for field in PackedBatch.fields() if field.per == "token"
    }
    assert all((arrays[name][0] == values).all() for name, values in sample.items())


@dataclasses.dataclass(slots=True)
class LargerBatch(PackedBatch):
    """A batch with one more field, as a later change may define it."""

    extra: torch.Tensor = None

    @staticmethod
    def fields():
        return (*PackedBatch.fields(), BatchField("extra", "token", np.dtype("float32"), 7))


class Sampled:
    """Samples whose tokens are their index."""

    sequence_length = 6

    def sample(self, index):
        sample = padding_sample(self.sequence_length)
        sample["tokens"][:] = index
        sample["extra"][:] = index / 2
        return sample


@pytest.fixture
def larger(monkeypatch):
    """The whole data path with a field that only data/batch.py and the place that computes the field know of."""
    for module in ("batch", "loader", "loader_workers", "dali"):
        monkeypatch.setattr(f"w1train.data.{module}.PackedBatch", LargerBatch)
    return Sampled()


@pytest.mark.parametrize(("workers", "num_workers"), [("thread", 0), ("thread", 2), ("process", 2)])
def test_another_field_needs_no_other_edit(larger, workers, num_workers):
    with BatchLoader(larger, micro_batch_size=2, num_workers=num_workers, workers=workers) as loader:
        batches = list(itertools.islice(loader.micro_batches(3), 4))
    assert [batch.extra[:, 0].tolist() for batch in batches] == [[1.5, 2.0], [2.5, 3.0], [3.5, 4.0], [4.5, 5.0]]
    assert {batch.extra.dtype for batch in batches} == {torch.float32}
    assert (batches[0].padding_like().extra == 7).all()
    assert (batches[0].map(lambda tensor: tensor + 1).extra[0] == 2.5).all()
    assert (collate(larger, np.array([PADDING_SAMPLE])).extra == 7).all()
    arrays = _Source(larger, 2, 4, 2)(1)
    assert [array.dtype for array in arrays] == [field.dtype for field in LargerBatch.fields()]
    assert arrays[-1][:, 0].tolist() == [3.0, 3.5]


def test_a_slot_of_shared_memory_gives_copies():
    slot = loader_workers._Slot.allocate(2, 8)
    first, second = packed_batch([0, 1], length=8), packed_batch([2, 5], length=8)
    slot.write(first)
    found = slot.read()
    slot.write(second)
    for field in PackedBatch.fields():
        assert torch.equal(getattr(found, field.name), getattr(first, field.name)), field.name
        assert torch.equal(getattr(slot.read(), field.name), getattr(second, field.name)), field.name
