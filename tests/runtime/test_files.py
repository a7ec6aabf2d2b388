"""Files that are the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from w1train.runtime import files
from w1train.runtime.files import replace_file, write_text


def test_replace_file_keeps_the_old_one_on_failure(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def write_and_die():
        with replace_file(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_die()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_no_space_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_text(path, "old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_name_comes_after_the_bytes_and_is_synced_itself(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append(f"{source.name} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", record_sync)
    monkeypatch.setattr(files.os, "replace", record_rename)
    write_text(tmp_path / "f", "text")
    assert events == ["f.partial", "f.partial -> f", tmp_path.name]


def test_what_a_kill_left_is_overwritten(tmp_path):
    (tmp_path / "f.partial").write_text("half of something longer than what comes next")
    write_text(tmp_path / "f", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f": "new"}


def test_any_string_can_be_written(tmp_path):
    write_text(tmp_path / "f", "a \ud800 b \u00e9")
    assert (tmp_path / "f").read_text(encoding="utf-8") == "a \\ud800 b \u00e9"
