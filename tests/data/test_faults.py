"""What happens to files and workers while a run reads: an error with a name in seconds, or a retry that is logged; never silence."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.slow import LONGER_THAN_A_TEST
from w1train.data.dataset import DatasetError
from w1train.data.loader import BatchLoader
from w1train.data.loader_workers import LoaderError
from w1train.data.packed.packing import PackedDataset
from w1train.data.packed.packing_index import BestFitDataset, PackingOptions, ensure_packing

LENGTH = 16
KINDS = ["thread", "process"]


@pytest.fixture
def dataset(make_dataset, tmp_path):
    return make_dataset(tmp_path / "x", [[20 + i % 200] * (5 + 7 * i % 40) for i in range(60)])


def open_loader(packed, workers, **options):
    return BatchLoader(
        packed, micro_batch_size=2, workers=workers, **{"num_workers": 2, "prefetch": 2, "read_timeout": LONGER_THAN_A_TEST, **options}
    )


def read(batches, count):
    for _ in range(count):
        next(batches)


def children():
    return {process.pid for process in multiprocessing.active_children() if process.name.startswith("w1train-data")}


def test_a_killed_worker_is_named_in_seconds(dataset):
    packed = PackedDataset(dataset, LENGTH, seed=3)
    with open_loader(packed, "process") as loader:
        batches = loader.micro_batches(0)
        next(batches)
        victim = min(children())
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(LoaderError, match=rf"data worker w1train-data-\d \(process {victim}\) died: signal SIGKILL"):
            read(batches, 4)
    assert not children()


@pytest.mark.parametrize("workers", KINDS)
def test_a_truncated_token_file(dataset, workers):
    packed = PackedDataset(dataset, LENGTH, seed=3)
    with open_loader(packed, workers) as loader:
        batches = loader.micro_batches(0)
        next(batches)
        os.truncate(f"{dataset.prefix}.bin", 40)
        with pytest.raises(DatasetError, match=r"x\.bin was truncated while it was in use"):
            read(batches, packed.num_samples_per_epoch)


@pytest.mark.parametrize("workers", KINDS)
@pytest.mark.parametrize("suffix", [".idx", ".best_fit_16.pack"])
def test_a_truncated_index(dataset, workers, suffix):
    options = PackingOptions(sequence_length=LENGTH)
    ensure_packing(dataset, options)
    with open_loader(BestFitDataset(dataset, options, seed=3), workers) as loader:
        batches = loader.micro_batches(0)
        next(batches)
        os.truncate(f"{dataset.prefix}{suffix}", 0)
        with pytest.raises(DatasetError, match=r"truncated while it was in use"):
            read(batches, 8)


@pytest.mark.parametrize("workers", KINDS)
def test_a_read_that_hangs(dataset, workers, tmp_path, monkeypatch):
    """A pipe that nobody writes to stands for the file system: the read blocks in the kernel."""
    os.mkfifo(tmp_path / "pipe")
    packed = PackedDataset(dataset, LENGTH, seed=3)
    pread = os.pread
    held = threading.Event()

    def hang(descriptor, num_bytes, offset):
        if (not held.is_set() and threading.current_thread() is not threading.main_thread()) or workers == "process":
            with open(tmp_path / "pipe", "rb") as pipe:
                pipe.read()
        return pread(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "pread", hang)
    with (
        open_loader(packed, workers, read_timeout=0.5) as loader,
        pytest.raises(LoaderError, match=r"no micro-batch has come for 0\.5 s.*hangs"),
    ):
        next(loader.micro_batches(0))
    assert not children()
    # Let the threads go that were left behind.
    held.set()
    if workers == "thread":
        with open(tmp_path / "pipe", "wb"):
            time.sleep(0.2)


def forked(action):
    """A process that does ``action``; it may have children of its own."""
    process = multiprocessing.get_context("fork").Process(target=action, daemon=False)
    process.start()
    return process


def test_a_hanging_thread_does_not_keep_the_process_from_ending(dataset):
    def hang():
        os.pread = lambda *arguments: time.sleep(600)
        with open_loader(PackedDataset(dataset, LENGTH, seed=3), "thread", read_timeout=0.2) as loader:
            try:
                next(loader.micro_batches(0))
            except LoaderError:
                raise SystemExit(3) from None

    process = forked(hang)
    process.join(60)
    assert process.exitcode == 3


def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_not_hidden(dataset, monkeypatch, caplog):
    pread, faults = os.pread, [errno.EIO, errno.ESTALE]

    def fail_first(descriptor, num_bytes, offset):
        if faults:
            raise OSError(faults[0], os.strerror(faults.pop(0)))
        return pread(descriptor, num_bytes, offset)

    monkeypatch.setattr("w1train.data.file_reader._RETRY_SECONDS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(os, "pread", fail_first)
    packed = PackedDataset(dataset, LENGTH, seed=3, shuffle=False)
    tokens = packed.sample(0)["tokens"]
    assert np.array_equal(tokens, np.fromfile(f"{dataset.prefix}.bin", dtype=np.uint16, count=LENGTH))
    assert caplog.text.count("trying again") == 2
    faults += [errno.EIO] * 100
    with pytest.raises(OSError, match=r"4 times in a row.*x\.idx"):
        packed.sample(0)
    faults[:] = [errno.EBADF]
    with pytest.raises(OSError, match=r"x\.idx"):
        packed.sample(0)


def test_workers_end_with_their_parent(dataset):
    """A run that is killed leaves no processes behind."""
    ours, theirs = multiprocessing.Pipe()

    def read_and_die():
        loader = open_loader(PackedDataset(dataset, LENGTH, seed=3), "process")
        batches = loader.micro_batches(0)
        next(batches)
        theirs.send(sorted(children()))
        os.kill(os.getpid(), signal.SIGKILL)

    forked(read_and_die).join(60)
    assert ours.poll(0)
    workers = ours.recv()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)


def is_running(process_id):
    """An ended process that nobody has waited for has an empty command line."""
    try:
        return Path(f"/proc/{process_id}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False
