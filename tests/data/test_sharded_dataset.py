"""Shards of tokenize --shard-size under one prefix: the same dataset as without them, all of them or an error."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_tools import inspect, pack_report, tokenize, verify
from tests.data.conftest import TEXTS
from tests.data.test_packing import best_fit, epoch_samples
from tests.tiny import tiny_config
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.packed.packing import PackedDataset
from w1train.data.remote import localize
from w1train.data.sharded_dataset import open_dataset
from w1train.runtime.distributed import Ranks
from w1train.training.training_data import TrainingData, identity


@pytest.fixture(scope="module")
def directory(tokenizer, tmp_path_factory):
    """data/x whole, data/s in shards, from the same corpus of 200 documents."""
    directory = tmp_path_factory.mktemp("shards")
    texts = [TEXTS[i % 50] * (1 + i * 7 % 5) + str(i) for i in range(200)]
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save(directory / "tokenizer.json")
    command = ["--input", str(directory / "corpus.jsonl"), "--tokenizer", str(directory / "tokenizer.json"), "--workers", "1"]
    assert tokenize.main([*command, "--output", str(directory / "data/x")]) == 0
    assert tokenize.main([*command, "--output", str(directory / "data/s"), "--shard-size", "5000"]) == 0
    return directory


@pytest.fixture
def copy(directory, tmp_path):
    """Shards that a test may damage."""
    shutil.copytree(directory / "data", tmp_path / "data")
    return tmp_path / "data" / "s"


@pytest.fixture(scope="module")
def pair(directory):
    whole, sharded = open_dataset(directory / "data/x"), open_dataset(directory / "data/s")
    assert len(whole.parts) == 1 < 3 <= len(sharded.parts)
    return whole, sharded


def test_counts_and_manifest_are_those_of_the_whole(pair):
    whole, sharded = pair
    sharded.verify_hashes()
    assert (sharded.num_documents, sharded.num_tokens) == (whole.num_documents, whole.num_tokens)
    for name in ("num_documents", "num_tokens", "num_bytes", "max_token_id", "bin_num_bytes", "tokenizer_fingerprint"):
        assert getattr(sharded.manifest, name) == getattr(whole.manifest, name), name
    assert whole.manifest.shard == {}


def test_samples_are_those_of_the_whole(pair):
    for packing in (PackedDataset, best_fit):
        one, other = (packing(dataset, 64, 7) for dataset in pair)
        assert one.num_samples_per_epoch == other.num_samples_per_epoch
        for epoch in (0, 3):
            for expected, found in zip(epoch_samples(one, epoch), epoch_samples(other, epoch), strict=True):
                assert expected.keys() == found.keys()
                assert all(np.array_equal(expected[name], found[name]) for name in expected)


@given(st.data())
def test_every_range_and_document_is_that_of_the_whole(pair, data):
    whole, sharded = pair
    start = data.draw(st.integers(0, whole.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, whole.num_tokens))
    assert np.array_equal(sharded.read(start, stop), whole.read(start, stop))
    assert len(sharded.read(start, start)) == 0
    one, other = (dataset.document_offsets for dataset in (whole, sharded))
    (first, bounds), (its_first, its_bounds) = one.around(start, stop), other.around(start, stop)
    assert (its_first, its_bounds.tolist()) == (first, bounds.tolist())
    assert other.document_of(start) == one.document_of(start)
    part = slice(data.draw(st.integers(0, 201)), data.draw(st.integers(0, 201)), data.draw(st.integers(1, 3)))
    assert other[part].tolist() == one[part].tolist()
    documents = data.draw(st.lists(st.integers(0, 199), min_size=1, max_size=5))
    assert other.bounds(documents).tolist() == one.bounds(documents).tolist()
    document = documents[0]
    assert other[document + 1] == one[document + 1]
    assert np.array_equal(sharded.document_tokens(document), whole.document_tokens(document))


def test_another_process_opens_them_again(pair):
    again = pickle.loads(pickle.dumps(pair[1]))
    assert np.array_equal(again.read(0, again.num_tokens), pair[0].read(0, again.num_tokens))


@pytest.mark.parametrize("lost", ["first", "middle", "last"])
def test_a_missing_shard_is_an_error(copy, lost):
    names = sorted(copy.parent.glob("s_*.json"))
    names[{"first": 0, "middle": 1, "last": -1}[lost]].unlink()
    with pytest.raises(DatasetError, match=rf"has {len(names) - 1} shards, .* says that it had {len(names)}"):
        open_dataset(copy)


def test_a_shard_of_another_run_is_an_error(copy, directory):
    count = len(list(copy.parent.glob("s_*.json")))
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{copy}_00000.{suffix}", f"{copy}_00001.{suffix}")
    with pytest.raises(DatasetError, match=r"shard .*s_00000 does not belong with the others"):
        open_dataset(copy)
    assert count == len(open_dataset(directory / "data/s").parts)
    path = Path(f"{copy}_00001.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shard": {}}))
    with pytest.raises(DatasetError, match=r"does not say which shard"):
        open_dataset(copy)


def test_a_whole_dataset_of_the_name_comes_first_and_none_is_none(copy):
    for suffix in ("bin", "idx", "json"):
        shutil.copy(copy.with_name(f"x.{suffix}"), f"{copy}.{suffix}")
    assert type(open_dataset(copy)) is TokenDataset
    with pytest.raises(DatasetError, match="dataset nowhere/x is not there"):
        open_dataset("nowhere/x")


def test_the_commands_take_them(copy, directory, capsys):
    assert verify.main([str(copy)]) == 0
    assert inspect.main([str(copy), "--tokenizer", str(directory / "tokenizer.json")]) == 0
    assert capsys.readouterr().out.count("ok      ") == 3
    assert pack_report.main([str(copy), "--sequence-length", "64"]) == 0
    path = Path(f"{copy}_00001.bin")
    content = bytearray(path.read_bytes())
    content[10:12] = (14).to_bytes(2, "little")
    path.write_bytes(content)
    assert verify.main([str(copy)]) == 1
    assert inspect.main([str(copy)]) == 1
    assert "is the mask" in capsys.readouterr().out


def test_they_come_from_object_storage(directory, tmp_path, caplog):
    storage = fsspec.filesystem("memory")
    for path in (directory / "data").glob("s_*"):
        storage.pipe_file(f"/bucket/shards/{path.name}", path.read_bytes())
    cache = str(tmp_path / "cache")
    local = localize("memory://bucket/shards/s", cache)
    open_dataset(local).verify_hashes()
    caplog.clear()  # of the first copies, which are in it where an earlier test left the root logger at INFO
    with caplog.at_level(logging.INFO):
        localize("memory://bucket/shards/s", cache)
    assert "copied" not in caplog.text
    # Replaced by a dataset without shards, and by shards again.
    for suffix in ("bin", "idx", "json"):
        storage.pipe_file(f"/bucket/shards/s.{suffix}", (directory / f"data/x.{suffix}").read_bytes())
    assert type(open_dataset(localize("memory://bucket/shards/s", cache))) is TokenDataset
    assert not list(Path(local).parent.glob("s_*.json"))
    for suffix in ("bin", "idx", "json"):
        storage.rm(f"/bucket/shards/s.{suffix}")
    assert len(open_dataset(localize("memory://bucket/shards/s", cache)).parts) > 1


def training_config(directory, **data):
    config = tiny_config(model={"vocab_size": 300}, data={"tokenizer": str(directory / "tokenizer.json"), "num_workers": 0, **data})
    config.diffusion.mask_token_id = 14
    return config


RANKS = Ranks(rank=0, world_size=1, data_parallel_rank=0, data_parallel_size=1, device=torch.device("cpu"))


def test_a_run_trains_on_them_and_not_on_one_that_it_validates_on(directory):
    data = TrainingData(training_config(directory, train=str(directory / "data/s")), RANKS)
    assert data.num_tokens == open_dataset(directory / "data/x").num_tokens
    assert len({identity(part) for part in open_dataset(directory / "data/s").parts}) > 1
    config = training_config(directory, train=str(directory / "data/s"), validation=str(directory / "data/s_00001"))
    with pytest.raises(DatasetError, match=r"validation dataset .*s_00001 is training dataset .*s_00001"):
        TrainingData(config, RANKS)


def test_validation_shows_documents_as_training_does(directory, tokenizer):
    """EOS, and positions of cut documents: a model that never saw an EOS would be scored on it."""
    settings = {"train": str(directory / "data/s"), "validation": str(directory / "data/x")}
    for eos, long_documents in (("keep", "restart"), ("drop", "continue")):
        data = TrainingData(training_config(directory, **settings, eos=eos, long_documents=long_documents), RANKS)
        batches = list(data.validation.batches())
        assert any((batch.tokens == tokenizer.eos_token_id).any() for batch in batches) == (eos == "keep")
        assert any((batch.positions >= 32).any() for batch in batches) == (long_documents == "continue")
