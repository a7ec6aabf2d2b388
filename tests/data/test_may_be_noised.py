"""The tokens that may be noised: from PREFIX.may_be_noised through every packing and loader to the batch, or one clear error."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import tempfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_tools import inspect, verify
from tests.data.test_packing import best_fit, document_lengths, epoch_samples, numbered_dataset
from tests.data.test_sharded_dataset import RANKS
from tests.tiny import tiny_config
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.dataset_manifest import DatasetManifest
from w1train.data.loader import BatchLoader, validation_batches, validation_token_counts
from w1train.data.packed.packing import PackedDataset
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing
from w1train.data.packed.staged import StagedSamples, StageText, stretches
from w1train.data.remote import localize
from w1train.data.sharded_dataset import open_dataset, shard_notes
from w1train.data.writer import DatasetWriter, publish
from w1train.training.training_data import TrainingData, identity

LENGTH = 8
SOURCES = [
    PackedDataset,
    best_fit,
    lambda dataset, length, seed: best_fit(dataset, length, seed, align=4),
    lambda dataset, length, seed: PackedDataset(dataset, length, seed, shuffle=False, long_documents="continue"),
]


def flagged_dataset(directory, lengths, flags) -> TokenDataset:
    """Documents of the lengths given, whose tokens are 0, 1, 2, ...; ``flags`` [n] says which of them may be noised."""
    prefix = numbered_dataset(directory, lengths).prefix
    Path(f"{prefix}.may_be_noised").write_bytes(bytes(flags))
    return TokenDataset.open(prefix)


def reference(sample, flags):
    """What the sample must say, by its tokens, each of which is its own number."""
    return [document >= 0 and bool(flags[token]) for token, document in zip(sample["tokens"], sample["document_ids"], strict=True)]


@given(document_lengths, st.sampled_from([4, 8, 16]), st.integers(0, 2), st.sampled_from(SOURCES), st.randoms())
def test_every_packing_carries_what_the_dataset_says(lengths, sequence_length, epoch, packing, random):
    flags = [random.random() < 0.5 for _ in range(sum(lengths))]
    with tempfile.TemporaryDirectory() as directory:
        samples = epoch_samples(packing(flagged_dataset(directory, lengths, flags), sequence_length, 5), epoch)
    assert [sample["may_be_noised"].tolist() for sample in samples] == [reference(sample, flags) for sample in samples]
    assert sum(int(sample["may_be_noised"].sum()) for sample in samples) == sum(flags), "each token once an epoch"


@pytest.mark.parametrize("packing", SOURCES)
def test_one_byte_of_the_file_is_one_token_of_the_samples(tmp_path, packing):
    lengths = [5, 11, 3, 20, 1, 9]
    flags = [True] * sum(lengths)
    before = epoch_samples(packing(flagged_dataset(tmp_path, lengths, flags), LENGTH, 5))
    for token in (0, 4, 5, 23, 48):
        flags[token] = False
        after = epoch_samples(packing(flagged_dataset(tmp_path, lengths, flags), LENGTH, 5))
        flags[token] = True
        for one, other in zip(before, after, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in ("tokens", "document_ids", "positions"))
            changed = (one["tokens"] == token) & (one["document_ids"] >= 0)
            assert np.array_equal(one["may_be_noised"] != other["may_be_noised"], changed)


@pytest.fixture(scope="module")
def flagged(tokenizer, tmp_path_factory):
    """A dataset whose documents begin with a prompt of a third of their tokens, which may not be noised; and all its values."""
    return write_flagged(tmp_path_factory.mktemp("flagged") / "x", tokenizer)


def write_flagged(prefix, tokenizer, num_documents=40, **options):
    flags = []
    with DatasetWriter(prefix, tokenizer, overwrite=True, limits_noise=True, **options) as writer:
        for i in range(num_documents):
            tokens = [20 + (7 * i + k) % 200 for k in range(3 + 5 * i % 17)]
            of_document = [k >= len(tokens) // 3 for k in range(len(tokens) + 1)]
            writer.add_document(tokens, len(tokens), of_document)
            flags += of_document
        writer.finalize()
    return TokenDataset.open(prefix), np.array(flags)


def test_the_writer_writes_what_it_is_given(flagged):
    dataset, flags = flagged
    assert dataset.limits_noise
    assert dataset.read_may_be_noised(0, dataset.num_tokens).tolist() == flags.tolist()
    assert dataset.read_may_be_noised(7, 7).tolist() == []
    assert Path(f"{dataset.prefix}.may_be_noised").read_bytes() == flags.astype(np.uint8).tobytes()
    assert dataset.manifest.may_be_noised_num_bytes == dataset.num_tokens
    dataset.verify_hashes()


def test_datasets_without_the_file_may_be_noised_and_have_no_word_of_it(make_dataset, tmp_path):
    dataset = make_dataset(tmp_path / "x", [[20] * 5, [21] * 3])
    assert not dataset.limits_noise
    assert dataset.read_may_be_noised(2, 9).tolist() == [True] * 7
    assert "noised" not in Path(f"{dataset.prefix}.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]
    assert dataset.manifest.content_sha256 == dataset.manifest.bin_sha256


@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_the_flag_of_an_eos_goes_with_it(flagged, tokenizer, packing):
    """With data.eos=drop the other tokens keep theirs."""
    dataset, flags = flagged
    tokens = dataset.read(0, dataset.num_tokens)
    expected = sorted(zip(tokens[tokens != tokenizer.eos_token_id].tolist(), flags[tokens != tokenizer.eos_token_id].tolist(), strict=True))
    if packing == "cut":
        source = PackedDataset(dataset, LENGTH, 1, eos="drop")
    else:
        options = PackingOptions(sequence_length=LENGTH, eos="drop")
        ensure_packing(dataset, options)
        source = BestFitDataset(dataset, options, 1)
    found = []
    for sample in epoch_samples(source):
        real = sample["document_ids"] >= 0
        found += zip(sample["tokens"][real].tolist(), sample["may_be_noised"][real].tolist(), strict=True)
    assert sorted(found) == expected


def test_a_blend_carries_what_each_corpus_says(tmp_path):
    """One corpus with the file, one without; over stages, with partners, and in the batches of every kind of worker."""
    lengths = [5, 11, 3, 20, 1, 9]
    flags = [token % 3 == 0 for token in range(sum(lengths))]
    with_file = PackedDataset(flagged_dataset(tmp_path / "a", lengths, flags), LENGTH, 1)
    without = best_fit(numbered_dataset(tmp_path / "b", lengths), LENGTH, 1)
    stages = [StageText(0, {"a": 0.5, "b": 0.5}), StageText(10, {"a": 1.0}, repeats=2), StageText(18, {"b": 0.7, "a": 0.3})]
    samples = StagedSamples(stretches(stages, 30), {"a": with_file, "b": without})
    expected = []
    for index in range(30):
        sample = samples.sample(index)
        allowed = flags if samples.locate(index)[0] == "a" else [True] * len(flags)
        assert sample["may_be_noised"].tolist() == reference(sample, allowed)
        expected.append(sample["may_be_noised"].tolist())
    assert samples.sample(10)["may_be_noised"].tolist() == samples.sample(11)["may_be_noised"].tolist()
    for workers, num_workers in (("thread", 0), ("thread", 2), ("process", 2)):
        with BatchLoader(samples, micro_batch_size=3, num_workers=num_workers, workers=workers) as loader:
            batches = list(itertools.islice(loader.micro_batches(0), 10))
        assert torch.cat([batch.may_be_noised for batch in batches]).tolist() == expected
        assert {batch.may_be_noised.dtype for batch in batches} == {torch.bool}


def test_validation_scores_and_counts_the_tokens_that_may_be_noised(flagged):
    dataset, flags = flagged
    packed = PackedDataset(dataset, LENGTH, 1, shuffle=False)
    batches = list(validation_batches(packed, 1000, 3, 0, 1))
    found = torch.cat([batch.may_be_noised.flatten() for batch in batches])
    assert found[: len(flags)].tolist() == flags.tolist()
    assert not found[len(flags) :].any(), "padding"
    tokens = dataset.read(0, dataset.num_tokens)
    assert validation_token_counts(packed, 1000, 300).tolist() == np.bincount(tokens[flags], minlength=300).tolist()


def test_another_process_reads_the_same(flagged):
    again = pickle.loads(pickle.dumps(flagged[0]))
    assert again.read_may_be_noised(0, again.num_tokens).tolist() == flagged[1].tolist()


# --- shards ---


def write_shards(prefix, tokenizer, dataset, flags, ends, without=()):
    """The dataset in shards that end with the documents ``ends``; the shards ``without`` get no file."""
    manifests, offsets, first = [], dataset.document_offsets[:], 0
    for number, end in enumerate(ends):
        with DatasetWriter(f"{prefix}_{number:05d}", tokenizer, limits_noise=number not in without) as writer:
            start, stop = int(offsets[first]), int(offsets[end])
            part = None if number in without else flags[start:stop]
            writer.add_documents(dataset.read(start, stop), np.diff(offsets[first : end + 1]), stop - start, part)
            manifests.append(writer.seal())
            writer.keep()
        first = end
    for number, (manifest, note) in enumerate(zip(manifests, shard_notes(manifests), strict=True)):
        publish(f"{prefix}_{number:05d}", dataclasses.replace(manifest, shard=note))
    return open_dataset(prefix)


@pytest.mark.parametrize("without", [(), (1,)])
def test_shards_say_what_the_whole_says(flagged, tokenizer, tmp_path, without):
    dataset, flags = flagged
    sharded = write_shards(tmp_path / "s", tokenizer, dataset, flags, [13, 20, 40], without)
    expected = flags.copy()
    if without:
        offsets = dataset.document_offsets[:]
        expected[offsets[13] : offsets[20]] = True
    assert sharded.limits_noise
    sharded.verify_hashes()
    for start, stop in itertools.combinations([0, 1, 50, 150, dataset.num_tokens], 2):
        assert sharded.read_may_be_noised(start, stop).tolist() == expected[start:stop].tolist()
    assert sharded.read_may_be_noised(50, 50).tolist() == []
    if not without:
        for packing in SOURCES:
            pairs = zip(epoch_samples(packing(dataset, 16, 3)), epoch_samples(packing(sharded, 16, 3)), strict=True)
            assert all(np.array_equal(one[name], other[name]) for one, other in pairs for name in one)


def test_a_shard_with_other_flags_belongs_to_another_run(flagged, tokenizer, tmp_path):
    dataset, flags = flagged
    write_shards(tmp_path / "s", tokenizer, dataset, flags, [20, 40])
    write_shards(tmp_path / "t", tokenizer, dataset, ~flags, [20, 40])
    for suffix in ("bin", "idx", "json", "may_be_noised"):
        os.replace(tmp_path / f"t_00001.{suffix}", tmp_path / f"s_00001.{suffix}")
    with pytest.raises(DatasetError, match="does not belong with the others"):
        open_dataset(tmp_path / "s")


# --- object storage ---


def test_a_copy_of_object_storage_has_the_file_and_follows_its_changes(flagged, make_dataset, tokenizer, tmp_path):
    storage, url, cache = fsspec.filesystem("memory"), f"memory://bucket/{tmp_path.name}/x", str(tmp_path / "cache")

    def put(prefix):
        for suffix in ("bin", "idx", "json", "may_be_noised"):
            if storage.exists(path := f"/bucket/{tmp_path.name}/x.{suffix}"):
                storage.rm(path)
            if Path(f"{prefix}.{suffix}").exists():
                storage.pipe_file(path, Path(f"{prefix}.{suffix}").read_bytes())

    put(flagged[0].prefix)
    copy = TokenDataset.open(localize(url, cache))
    copy.verify_hashes()
    assert copy.read_may_be_noised(0, copy.num_tokens).tolist() == flagged[1].tolist()
    storage.rm(f"/bucket/{tmp_path.name}/x.may_be_noised")
    with pytest.raises(DatasetError, match=r"x\.may_be_noised does not exist in memory://"):
        localize(url, cache)
    put(make_dataset(tmp_path / "plain", [[20] * 9] * 4).prefix)
    assert not TokenDataset.open(localize(url, cache)).limits_noise
    assert not list(Path(cache).rglob("*.may_be_noised")), "the copy of what was there before is gone"
    put(flagged[0].prefix)
    storage.rm(f"/bucket/{tmp_path.name}/x.json")
    foreign = TokenDataset.open(localize(url, cache))
    assert foreign.manifest is None
    assert foreign.read_may_be_noised(0, foreign.num_tokens).tolist() == flagged[1].tolist()


def test_nothing_asks_a_storage_for_a_file_that_the_manifest_does_not_list(make_dataset, tmp_path, monkeypatch):
    """A storage may answer such a question with a refusal."""
    asked = []
    local = make_dataset(tmp_path / "x", [[20] * 9] * 4)
    file_system = type(fsspec.filesystem("file"))
    info = file_system.info
    monkeypatch.setattr(file_system, "info", lambda self, path, **options: asked.append(path) or info(self, path, **options))
    localize(f"file://{local.prefix}", str(tmp_path / "cache"))
    assert any(path.endswith("x.bin") for path in asked)
    assert not any("may_be_noised" in path for path in asked)


# --- a run ---


def training_data(directory, prefix, tokenizer, **data):
    tokenizer.save(directory / "tokenizer.json")
    settings = {"train": str(prefix), "tokenizer": str(directory / "tokenizer.json"), "num_workers": 0, "sequence_length": LENGTH}
    config = tiny_config(model={"vocab_size": 300}, data={**settings, **data})
    config.diffusion.mask_token_id = 14
    return TrainingData(config, RANKS)


def test_the_fingerprint_covers_the_file_and_is_the_tokens_without_it(flagged, tokenizer, tmp_path):
    dataset, flags = flagged
    with DatasetWriter(tmp_path / "plain", tokenizer) as writer:
        writer.add_documents(dataset.read(0, dataset.num_tokens), np.diff(dataset.document_offsets[:]), 7)
        writer.finalize()
    plain = TokenDataset.open(tmp_path / "plain")
    assert training_data(tmp_path, plain.prefix, tokenizer).fingerprint(8) == plain.manifest.bin_sha256 == dataset.manifest.bin_sha256
    found = {training_data(tmp_path, prefix, tokenizer).fingerprint(8) for prefix in (plain.prefix, dataset.prefix)}
    for number, other in enumerate((~flags, flags)):
        sharded = write_shards(tmp_path / f"s{number}", tokenizer, dataset, other, [20, 40])
        found.add(training_data(tmp_path, sharded.prefix, tokenizer).fingerprint(8))
    assert len(found) == 4
    assert identity(plain) == identity(dataset), "the same text, which is not to be validated on"


def test_a_run_gets_the_flags_in_its_batches(flagged, tokenizer, tmp_path):
    data = training_data(tmp_path, flagged[0].prefix, tokenizer)
    batches = list(itertools.islice(data.loader.micro_batches(0), data.samples.sources[flagged[0].prefix].num_samples_per_epoch // 2))
    may_be_noised, documents = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("may_be_noised", "document_ids"))
    assert 0 < int(may_be_noised.sum()) < int((documents >= 0).sum())
    data.loader.close()


def test_the_commands_show_it(flagged, capsys, caplog):
    dataset, flags = flagged
    assert inspect.main([dataset.prefix]) == 0
    out = capsys.readouterr().out
    assert f"the tokens that may be noised are known: {flags.sum()}, {flags.mean():.1%} of all" in out
    assert "may be noised" in out.split("made by")[1].splitlines()[1]
    with caplog.at_level("INFO"):
        assert verify.main([dataset.prefix]) == 0
    assert ".may_be_noised file included" in caplog.text


def test_the_manifest_reads_what_it_writes(flagged, tmp_path):
    flagged[0].manifest.write(tmp_path / "x.json")
    assert DatasetManifest.read(tmp_path / "x.json") == flagged[0].manifest
