"""A best-fit packing whose pieces are others than were written, all of them in bounds: no sample shows it, its hash does."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_tools import verify
from tests.tiny import LENGTH, tiny_config
from w1train.config.schema import CorpusConfig
from w1train.data.dataset import DatasetError
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing
from w1train.runtime.distributed import Ranks
from w1train.training.training_data import TrainingData, prepare_data

RANKS = Ranks(rank=0, world_size=2, data_parallel_rank=0, data_parallel_size=2, device=torch.device("cpu"))
DAMAGED = (
    r"x\.best_fit_\d+\.pack is damaged: its sha256 is \w{64}, it was written with \w{64}; remove the file, and the next run builds it again"
)


@pytest.fixture
def dataset(make_dataset, tmp_path):
    """Documents of one length, of which any may stand for any other."""
    return make_dataset(tmp_path / "x", [[20 + i] * (LENGTH // 2 - 1) for i in range(40)])


@pytest.fixture
def config(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    data = {"tokenizer": str(tmp_path / "tokenizer.json"), "train": str(tmp_path / "x"), "packing": "best_fit", "num_workers": 0}
    config = tiny_config(model={"vocab_size": 300}, data=data)
    config.diffusion.mask_token_id = 14
    return config


def spoil(path, num_pieces):
    """The first document in the place of every other."""
    content = bytearray(path.read_bytes())
    content[-8 * num_pieces : -4 * num_pieces] = np.zeros(num_pieces, dtype="<u4").tobytes()
    path.write_bytes(content)


def test_a_run_does_not_start_on_it_and_builds_another_when_it_is_gone(dataset, config, monkeypatch):
    monkeypatch.setattr("w1train.data.packed.packing_index._HASH_AT_ONCE", 100)
    prepare_data(config)
    options = PackingOptions(sequence_length=LENGTH)
    path = ensure_packing(dataset, options)
    whole = path.read_bytes()
    spoil(path, dataset.num_documents)
    packed = BestFitDataset(dataset, options, 1)
    samples = [packed.sample(index)["tokens"] for index in range(packed.num_samples_per_epoch)]
    assert {int(token) for sample in samples for token in sample} == {1, 20}, "other text, and nothing to be seen"
    prepare_data(config)
    with pytest.raises(DatasetError, match=DAMAGED):
        TrainingData(config, RANKS)
    path.unlink()
    prepare_data(config)
    assert path.read_bytes() == whole
    TrainingData(config, RANKS)


def test_each_corpus_of_a_blend_is_compared(dataset, config, make_dataset, tmp_path):
    other = make_dataset(tmp_path / "y", [[60 + i] * (LENGTH // 2 - 1) for i in range(40)])
    config.data.train = None
    config.data.blend = {name: CorpusConfig(prefix=str(tmp_path / name), weight=0.5) for name in ("x", "y")}
    prepare_data(config)
    spoil(ensure_packing(other, PackingOptions(sequence_length=LENGTH)), other.num_documents)
    with pytest.raises(DatasetError, match=DAMAGED.replace("x", "y", 1)):
        TrainingData(config, RANKS)


def test_one_rank_reads_it_and_one_of_each_machine_if_it_may_be_the_machines_own(dataset, config, monkeypatch, tmp_path):
    other = replace(RANKS, rank=1)
    prepare_data(config)
    spoil(ensure_packing(dataset, PackingOptions(sequence_length=LENGTH)), dataset.num_documents)
    TrainingData(config, other)
    config.data.cache_directory = str(tmp_path / "cache")
    prepare_data(config)
    spoil(ensure_packing(dataset, PackingOptions(sequence_length=LENGTH), config.data.cache_directory), dataset.num_documents)
    monkeypatch.setenv("LOCAL_RANK", "1")
    TrainingData(config, other)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DatasetError, match=DAMAGED):
        TrainingData(config, other)


def test_a_large_one_is_named(dataset, config, monkeypatch, caplog):
    prepare_data(config)
    path = ensure_packing(dataset, PackingOptions(sequence_length=LENGTH))
    spoil(path, dataset.num_documents)
    monkeypatch.setattr("w1train.training.training_data.MAX_VERIFIED_BYTES", 1000)
    TrainingData(config, RANKS)
    assert f"{path} has 0.0 GB: not compared with the hash in it; `w1train data verify {path}` compares it" in caplog.text


def test_verify_reads_those_beside_a_dataset_and_others_by_name(dataset, tmp_path, caplog):
    beside, elsewhere = (ensure_packing(dataset, PackingOptions(sequence_length=LENGTH), name) for name in (None, str(tmp_path / "cache")))
    names = [dataset.prefix, str(elsewhere)]
    assert verify.main(names) == 0
    for path, name in zip((beside, elsewhere), names, strict=True):
        spoil(path, dataset.num_documents)
        caplog.clear()
        assert verify.main([name]) == 1
        assert f"{path} is damaged: its sha256" in caplog.text
        assert "remove the file, and the next run builds it again" in caplog.text


def test_names_that_mislead(make_dataset, tmp_path, caplog):
    """A dataset may be called like a packing, or like a pattern."""
    for name in ("x.pack", "x[1]"):
        dataset = make_dataset(tmp_path / name, [[20 + i] * (LENGTH // 2 - 1) for i in range(40)])
        path = ensure_packing(dataset, PackingOptions(sequence_length=LENGTH))
        assert verify.main([dataset.prefix]) == 0
        spoil(path, dataset.num_documents)
        assert verify.main([dataset.prefix]) == 1
        assert f"{path} is damaged" in caplog.text


def test_one_of_an_older_version_is_built_again(dataset, caplog):
    options = PackingOptions(sequence_length=LENGTH)
    path = ensure_packing(dataset, options)
    whole = path.read_bytes()
    header = json.loads(whole[:4040]) | {"format_version": 1}
    path.write_bytes(json.dumps(header).encode().ljust(4071) + b"\n" + whole[4072:])
    assert verify.main([dataset.prefix]) == 0, "it is not used"
    assert verify.main([str(path)]) == 1
    assert "is not a packing of this version" in caplog.text
    assert ensure_packing(dataset, options).read_bytes() == whole
    assert verify.main([f"{path}.pack"]) == 1
    assert "does not exist" in caplog.text
