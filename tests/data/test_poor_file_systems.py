"""Datasets where directories cannot be synced or written to, where there are no locks, and where a process may have few files open."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import run_distributed
from tests.poor_file_systems import lock_nothing, make_read_only, sync_no_directory
from tests.tiny import tiny_config
from w1train.data import build_packing, file_reader
from w1train.data.dataset import DatasetError, TokenDataset
from w1train.data.dataset_manifest import manifest_path
from w1train.data.file_reader import FileReader
from w1train.data.loader import BatchLoader
from w1train.data.packed.packing import PackedDataset
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing
from w1train.data.sharded_dataset import open_dataset, shard_notes
from w1train.data.writer import DatasetWriter
from w1train.training.training_data import open_source, prepare_data

LENGTH = 16
NUM_SHARDS = 200


def documents(seed: int, count: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(20, 250, random.integers(3, 12)).tolist() for _ in range(count)]


def test_a_dataset_is_written_without_syncs_of_directories_and_without_locks(tokenizer, tmp_path, monkeypatch, caplog):
    sync_no_directory(monkeypatch)
    lock_nothing(monkeypatch)
    with DatasetWriter(tmp_path / "x", tokenizer) as writer:
        writer.add_document([20, 21], num_text_bytes=2)
        writer.finalize()
    TokenDataset.open(tmp_path / "x").verify_hashes()
    assert "so that a second process with this output would damage it" in caplog.text


@pytest.fixture
def config(make_dataset, tmp_path):
    """A run whose training data are in a directory of their own."""
    (tmp_path / "data").mkdir()
    make_dataset(tmp_path / "data/x", documents(1, 60))
    return tiny_config(data={"train": str(tmp_path / "data/x"), "packing": "best_fit", "sequence_length": LENGTH})


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_the_packing_of_a_read_only_dataset_is_in_the_run_directory(config, make_dataset, tmp_path, monkeypatch, caplog, code):
    """Under a name that no other dataset of the run has."""
    prefix = config.data.train
    config.runs_dir = str(tmp_path / "runs")
    expected = ensure_packing(open_dataset(prefix), PackingOptions(sequence_length=LENGTH), str(tmp_path / "elsewhere")).read_bytes()
    make_read_only(monkeypatch, tmp_path / "data", code)
    prepare_data(config)
    (path,) = (tmp_path / "runs/tiny/packings").glob("*.pack")
    assert path.read_bytes() == expected
    assert f"the packing of {prefix} is written to {path}, because its directory cannot be written to: " in caplog.text
    caplog.clear()
    prepare_data(config)
    assert caplog.text == ""
    assert open_source(open_dataset(prefix), config).index.path == path
    (tmp_path / "more").mkdir()
    make_dataset(tmp_path / "more/x", documents(2, 60))
    make_read_only(monkeypatch, tmp_path / "more", code)
    prepare_data(replace(config, data=replace(config.data, train=str(tmp_path / "more/x"))))
    assert len(list((tmp_path / "runs/tiny/packings").glob("*.pack"))) == 2
    assert open_source(open_dataset(prefix), config).index.path == path


def test_a_packing_beside_a_read_only_dataset_is_used(config, tmp_path, monkeypatch, caplog):
    prepare_data(config)
    make_read_only(monkeypatch, tmp_path / "data")
    prepare_data(config)
    assert open_source(open_dataset(config.data.train), config).index.path.parent == tmp_path / "data"
    assert caplog.text == ""


def test_faults_of_the_dataset_s_disk_are_errors(config, tmp_path, monkeypatch):
    config.runs_dir = str(tmp_path / "runs")
    make_read_only(monkeypatch, tmp_path / "data", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        prepare_data(config)
    assert not (tmp_path / "runs").exists()


def test_the_command_that_packs_says_what_to_do(config, tmp_path, monkeypatch, capsys):
    make_read_only(monkeypatch, tmp_path / "data")
    assert build_packing.main([config.data.train, "--sequence-length", str(LENGTH)]) == 1
    message = capsys.readouterr().err
    assert "Read-only file system: " in message
    assert "choose a directory that can be written to; --directory names another directory" in message


@pytest.fixture(scope="module")
def shards(tokenizer, tmp_path_factory):
    """A dataset in 200 shards of two documents."""
    prefix = tmp_path_factory.mktemp("shards") / "s"
    manifests = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them take a minute on a busy disk
        for number in range(NUM_SHARDS):
            with DatasetWriter(f"{prefix}_{number:05d}", tokenizer) as writer:
                for ids in documents(number, 2):
                    writer.add_document(ids, num_text_bytes=len(ids))
                manifests.append(writer.finalize())
        for number, (manifest, note) in enumerate(zip(manifests, shard_notes(manifests), strict=True)):
            replace(manifest, shard=note).write(manifest_path(f"{prefix}_{number:05d}"))
    return prefix


def with_limit(limit: int, body: Callable[[], object]) -> object:
    """The result of ``body`` in a process that may have so many files open."""

    def limited(rank: int, size: int) -> object:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        return body()

    return run_distributed(limited, 1, process_group=False)[0]


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def read_everything(prefix: Path, workers: str) -> tuple[list[np.ndarray], int]:
    """The tokens of two epochs, read by four workers, and the number of files that are open then."""
    packed = PackedDataset(open_dataset(prefix), LENGTH, seed=3)
    with BatchLoader(packed, micro_batch_size=4, num_workers=4, prefetch=8, workers=workers, read_timeout=60.0) as loader:
        batches = loader.micro_batches()
        found = [next(batches).tokens.numpy().copy() for _ in range(packed.num_samples_per_epoch // 2)]
        return found, num_open()


@pytest.mark.parametrize("workers", ["thread", "process"])
def test_200_shards_with_few_files_change_no_sample(shards, workers):
    expected, _ = with_limit(4096, lambda: read_everything(shards, workers))
    found, num_files = with_limit(200, lambda: read_everything(shards, workers))
    assert num_files < 200
    assert all(np.array_equal(one, other) for one, other in zip(expected, found, strict=True))


def test_200_shards_take_no_more_files_than_their_share(shards):
    """With 600 for the process, and two datasets: a sharded one is also read document by document."""

    def body() -> tuple[int, int, list[int]]:
        file_reader._OPEN = file_reader._OpenFiles()  # else files of earlier tests, which count too, would be closed meanwhile
        before = num_open()
        datasets = [open_dataset(shards) for _ in range(2)]
        lengths = [len(datasets[0].document_tokens(document)) for document in range(datasets[0].num_documents)]
        opened = num_open() - before
        packed = BestFitDataset(datasets[1], options, 1, directory=str(shards.parent))
        packed.sample(0)
        del datasets, packed
        return opened, num_open() - before, lengths

    options = PackingOptions(sequence_length=LENGTH)
    ensure_packing(open_dataset(shards), options, str(shards.parent))
    opened, left, lengths = with_limit(600, body)
    assert 16 < opened <= 150
    assert left == 0
    assert lengths == [len(ids) + 1 for number in range(NUM_SHARDS) for ids in documents(number, 2)]


def few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two, and the files of other tests, which may still be open, do not count."""
    monkeypatch.setattr(file_reader, "_most_open", lambda: 2)
    monkeypatch.setattr(file_reader, "_OPEN", file_reader._OpenFiles())


def readers(directory: Path, count: int) -> list[FileReader]:
    for number in range(count):
        (directory / str(number)).write_bytes(bytes([number]) * 100)
    return [FileReader(directory / str(number)) for number in range(count)]


def test_the_file_that_was_not_read_for_the_longest_time_is_closed(tmp_path, monkeypatch):
    few_files(monkeypatch)
    before = num_open()
    first, second, third = readers(tmp_path, 3)
    assert num_open() - before == 2
    assert first.read(1, 0) == b"\0"
    assert [reader._descriptor is None for reader in (first, second, third)] == [False, True, False]
    third.read(1, 0)
    second.read(1, 0)
    assert [reader._descriptor is None for reader in (first, second, third)] == [True, False, False]


def test_a_file_is_not_closed_while_another_thread_reads_it(tmp_path, monkeypatch):
    """Its number would become another file's, whose bytes would be read."""
    few_files(monkeypatch)
    first, *others = readers(tmp_path, 5)
    pread, inside, closed = os.pread, threading.Event(), threading.Event()

    def slow(descriptor: int, num_bytes: int, offset: int) -> bytes:
        if threading.current_thread() is thread:
            inside.set()
            assert closed.wait(60)
        return pread(descriptor, num_bytes, offset)

    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(first.read(3, 0)))
    monkeypatch.setattr(os, "pread", slow)
    thread.start()
    assert inside.wait(60)
    for reader in others:
        reader.read(1, 0)
    assert first._descriptor is None
    closed.set()
    thread.join(60)
    assert found == [b"\0\0\0"]


def test_a_forked_worker_does_not_wait_for_a_thread_of_its_parent(tmp_path, monkeypatch):
    """Which may open a file at the moment of the fork, and does not exist in the child."""
    few_files(monkeypatch)
    first, *_ = readers(tmp_path, 3)
    with file_reader._OPEN._lock:
        child = multiprocessing.get_context("fork").Process(target=first.read, args=(1, 0))
        child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_file_that_was_replaced_meanwhile_is_an_error(tmp_path, monkeypatch):
    """Half of an epoch would be of other tokens. A file that was only touched is the same; so is a copy of the same age."""
    few_files(monkeypatch)
    touched, copied, replaced, *_ = readers(tmp_path, 5)
    os.utime(tmp_path / "0", (1, 1))
    assert touched.read(1, 0) == b"\0"
    status = os.stat(tmp_path / "1")
    (tmp_path / "new").write_bytes(b"\1" * 100)
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(tmp_path / "new", tmp_path / "1")
    assert copied.read(1, 0) == b"\1"
    (tmp_path / "new").write_bytes(b"\2" * 100)
    os.utime(tmp_path / "new", (1, 1))
    os.replace(tmp_path / "new", tmp_path / "2")
    with pytest.raises(DatasetError, match=r"/2 was replaced by another file while it was in use"):
        replaced.read(1, 0)
