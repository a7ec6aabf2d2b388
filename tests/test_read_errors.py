"""Errors of reads: each has the path of the file. A link to /proc/self/mem opens, and its first read fails with EIO."""

from __future__ import annotations

import bz2
import errno
import io
import os
from pathlib import Path

import pytest

from data_tools import table_rows
from data_tools.corpus_files import Limits
from data_tools.own_files import own_file
from data_tools.table_rows import TableError, read_pieces
from w1train.config import recipe_files
from w1train.config.reading import read_bounded
from w1train.conversion import sources
from w1train.data.text.decompress import ContentReader
from w1train.runtime.files import copy_if_different, open_in_place
from w1train.runtime.record_files import MetricsLog, read_metrics


@pytest.fixture
def bad_file(tmp_path):
    """A function that makes a file of a name that can be opened and not be read."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.symlink_to("/proc/self/mem")
        return path

    return make


def require_named(error: pytest.ExceptionInfo[OSError], path: Path) -> None:
    assert error.value.errno == errno.EIO
    assert str(path) in str(error.value)


def test_reads_name_their_file(bad_file):
    reads = {
        "bounded.json": lambda path: read_bounded(path, 10),
        "own.json": lambda path: own_file(str(path)),
        "model.safetensors": sources._require_small_header,
        "metrics.jsonl": read_metrics,
        "copied": lambda path: copy_if_different(path, path.with_name("target")),
        "demo.yaml": lambda path: recipe_files._lines([path.parent.parent], path.parent.name, "demo"),
    }
    for name, read in reads.items():
        path = bad_file(name)
        with pytest.raises(OSError, match="Input/output") as error:
            read(path)
        require_named(error, path)


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "txt.gz", "txt.xz", "txt.bz2", "txt.zst"])
def test_reads_of_a_corpus_name_their_file(bad_file, suffix):
    path = bad_file(f"corpus.{suffix}")
    with ContentReader(str(path)) as stream, pytest.raises(OSError, match="Input/output") as error:
        list(stream.chunks())
    require_named(error, path)


def fail_reads_after(num_bytes):
    """Let reads behind the first bytes of a file fail, as on a disk that is damaged there."""

    class File(io.FileIO):
        def readinto(self, buffer):
            if self.tell() >= num_bytes:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(memoryview(buffer)[: num_bytes - self.tell()])

    return lambda path, _mode: io.BufferedReader(File(path, "rb"))


def test_a_read_in_the_middle_of_a_compressed_file_names_it(tmp_path, monkeypatch):
    path = tmp_path / "corpus.txt.bz2"
    path.write_bytes(bz2.compress(os.urandom(100_000)))
    monkeypatch.setattr("builtins.open", fail_reads_after(50_000))
    with ContentReader(str(path)) as stream, pytest.raises(OSError, match="Input/output") as error:
        list(stream.chunks())
    require_named(error, path)


def test_a_log_names_its_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"step": 1})
        path.rename(tmp_path / "kept")
        path.symlink_to("/proc/self/mem")
        monkeypatch.setattr("w1train.runtime.record_files._last_line", lambda file: (0, file.read(1)))
        with pytest.raises(OSError, match="Input/output") as error:
            log.newest()
    require_named(error, path)


@pytest.mark.parametrize("num_bytes", [-1, 1])
def test_files_that_are_changed_in_place_name_themselves(tmp_path, monkeypatch, num_bytes):
    """The kernel refuses to read a file that is open for writing only; Python asks it in ``readinto`` and ``readall``."""
    path = tmp_path / "lock"
    path.write_text("content")
    with open_in_place(path, "r+b") as file:
        descriptor = os.open(path, os.O_WRONLY)
        os.dup2(descriptor, file.fileno())
        os.close(descriptor)
        with pytest.raises(OSError, match="lock") as error:
            file.read(num_bytes)
    assert error.value.errno == errno.EBADF


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_fault_of_the_disk_is_no_damage_of_a_table(tmp_path, monkeypatch, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [os.urandom(500).hex() for _ in range(100)]})
    path = tmp_path / f"table.{kind}"
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=10)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    size = path.stat().st_size

    def pieces():
        return list(read_pieces(str(path), kind, ["text"], 0, 1000, Limits()))

    assert pieces()

    class File(io.FileIO):
        """A file whose middle cannot be read."""

        def readinto(self, buffer):
            if size // 3 < self.tell() < size // 2:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().readinto(buffer)

    monkeypatch.setattr(table_rows, "open", lambda name, mode: io.BufferedReader(File(name), 512), raising=False)
    with pytest.raises(OSError, match="table") as error:
        pieces()
    assert error.value.errno == errno.ESTALE

    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(TableError, match="cannot be read after row 0"):
        pieces()


def test_a_table_that_gives_a_negative_offset_is_damaged():
    for code, is_of_the_disk in ((None, False), (errno.EINVAL, False), (errno.EIO, True), (errno.ESTALE, True)):
        error = OSError("damaged") if code is None else OSError(code, os.strerror(code))
        assert table_rows._is_of_the_disk(error) is is_of_the_disk
