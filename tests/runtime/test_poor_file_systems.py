"""Directories that cannot be synced and files that cannot be locked: a warning. Disks that fail: an error that names the file."""

from __future__ import annotations

import errno
import multiprocessing
import os
import socket
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from tests.poor_file_systems import NO_DIRECTORY_SYNC, NO_LOCKS, error_of, lock_nothing, make_read_only, sync_no_directory
from w1train.checkpoints.checkpoint_names import UNDONE
from w1train.checkpoints.commit import set_aside
from w1train.runtime import files
from w1train.runtime.command import command, describe_error
from w1train.runtime.files import open_in_place, open_new, replace_file, sync_directory, sync_file, write_text
from w1train.runtime.locks import exclusive, lock_file
from w1train.runtime.record_files import MetricsLog
from w1train.runtime.run_directory import RunDirectory, RunDirectoryError


@pytest.fixture(autouse=True)
def nothing_was_warned_of(monkeypatch):
    monkeypatch.setattr(files, "_WITHOUT_DIRECTORY_SYNC", set())


@pytest.mark.parametrize("code", NO_DIRECTORY_SYNC)
def test_a_directory_that_cannot_be_synced_is_one_warning(tmp_path, monkeypatch, caplog, code):
    sync_no_directory(monkeypatch, code)
    (tmp_path / "step_0000000001").mkdir()
    for number in range(3):
        write_text(tmp_path / "step_0000000001" / f"f{number}", "text")
    assert set_aside(tmp_path / "step_0000000001", UNDONE).is_dir()
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"step": 1})
        log.sync()
        log.truncate_after(0)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{tmp_path}/step_0000000001: this file system cannot sync directories ({os.strerror(code)})" in record.message


def test_a_directory_that_cannot_be_read_is_no_failure(tmp_path, monkeypatch, caplog):
    """A shared folder for uploads may be written to, and not be listed."""
    monkeypatch.setattr(os, "open", lambda path, *_: (_ for _ in ()).throw(error_of(errno.EACCES, path)))
    sync_directory(tmp_path)
    assert "Permission denied" in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_directory_whose_disk_fails_is_an_error_that_names_it(tmp_path, monkeypatch, code):
    sync_no_directory(monkeypatch, code)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        write_text(tmp_path / "f", "text")
    assert caught.value.filename == str(tmp_path)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO, errno.ENOSPC])
def test_a_file_that_cannot_be_synced_is_an_error_that_names_it(tmp_path, monkeypatch, code):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(error_of(code)))
    with open_new(tmp_path / "f") as file, pytest.raises(OSError, match=os.strerror(code)) as caught:
        sync_file(file)
    assert caught.value.filename == str(tmp_path / "f")


@pytest.mark.parametrize("mode", ["new", "ab", "a+b", "r+b"])
def test_an_error_of_a_write_names_the_file(tmp_path, mode):
    """/dev/full would be refused, so the file is made as large as this process may make one."""
    import resource

    from tests.distributed import run_distributed

    def body(rank: int, size: int) -> tuple[str, str]:
        path = tmp_path / "f"
        path.write_bytes(b"")
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        file = open_new(path) if mode == "new" else open_in_place(path, mode)
        try:
            file.write(b"x" * 100_000)
            file.flush()
        except OSError as error:
            return error.filename, describe_error(error)
        return "", ""

    name, text = run_distributed(body, 1, process_group=False)[0]
    assert name == str(tmp_path / "f")
    assert text == f"[Errno 27] File too large: '{name}': allow larger files (ulimit -f), and run the same command again"


@pytest.mark.parametrize("code", NO_LOCKS)
def test_a_run_directory_without_locks_is_used_with_a_warning(tmp_path, monkeypatch, caplog, code):
    before = RunDirectory(tmp_path / "run")
    before.claim()
    before.release()
    lock_nothing(monkeypatch, code)
    run = RunDirectory(tmp_path / "run")
    run.claim()
    assert f"run directory {run.path} is not locked ({os.strerror(code)})" in caplog.text
    assert f"The last process that began was process {os.getpid()} on " in caplog.text
    assert "mount the file system with locks (Lustre: flock)" in caplog.text
    run.release()


def test_a_lock_that_fails_for_another_reason_is_an_error(tmp_path, monkeypatch):
    lock_nothing(monkeypatch, errno.EIO)
    with pytest.raises(RunDirectoryError, match=r"cannot lock run directory .*run: .*Input/output error: '.*/run/\.lock'; set runs_dir"):
        RunDirectory(tmp_path / "run").claim()
    with pytest.raises(OSError, match="Input/output error"), exclusive(tmp_path / "f"):
        pass


def test_a_lock_is_taken_once(tmp_path):
    with open_in_place(tmp_path / "f", "ab") as one, open_in_place(tmp_path / "f", "ab") as other:
        assert lock_file(one, wait=False) is None
        with pytest.raises(BlockingIOError):
            lock_file(other, wait=False)


def _hold(path: Path, local: Path, held: Event, go_on: Event) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lock_nothing(patch, but_in=local)
        patch.setattr(tempfile, "tempdir", str(local))
        with exclusive(path):
            held.set()
            go_on.wait(60)
            path.write_text("made")


def test_without_locks_the_processes_of_a_machine_still_wait_for_each_other(tmp_path, monkeypatch, caplog):
    """Two ranks that pack a dataset at once would each take the memory for it."""
    (tmp_path / "local").mkdir()
    context = multiprocessing.get_context("fork")
    held, go_on = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "f", tmp_path / "local", held, go_on))
    other.start()
    assert held.wait(60)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "local"))
    lock_nothing(monkeypatch, but_in=tmp_path / "local")
    context.Process(target=lambda: (time.sleep(0.3), go_on.set())).start()
    with exclusive(tmp_path / "f"):
        assert (tmp_path / "f").read_text() == "made"
    other.join(60)
    assert "this file system has no locks, and the processes of this machine use " in caplog.text
    assert str(tmp_path / "local") in caplog.text


def test_without_any_locks_each_process_writes_a_file_of_its_own(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with exclusive(tmp_path / "f") as writer:
        assert writer == f".{socket.gethostname()}"
    lock_nothing(monkeypatch)
    with exclusive(tmp_path / "f") as writer, replace_file(tmp_path / "f", writer) as file:
        assert file.name == str(tmp_path / f"f.{socket.gethostname()}.{os.getpid()}.partial")
        with exclusive(tmp_path / "f"):
            file.write(b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert "several processes may do the same work at the same time" in caplog.text


def test_errors_of_files_end_a_command_with_one_message(tmp_path, monkeypatch, capsys):
    make_read_only(monkeypatch, tmp_path)

    @command("w1train.some")
    def main() -> None:
        write_text(tmp_path / "f", "text")

    with pytest.raises(SystemExit):
        main()
    expected = f"[Errno 30] Read-only file system: '{tmp_path}/f.partial': choose a directory that can be written to"
    assert capsys.readouterr().err == f"w1train.some: {expected}\n"


def test_advice_is_for_files_alone():
    """A refused connection or signal has no path that could be looked at."""
    assert describe_error(error_of(errno.EACCES)) == "[Errno 13] Permission denied"
    assert describe_error(error_of(errno.EACCES, "f")).startswith("[Errno 13] Permission denied: 'f': get the permission (ls -ld")
    assert describe_error(error_of(errno.ENOSPC)).endswith(": make space on this disk, and run the same command again")
    assert describe_error(RuntimeError("x")) == "x"
