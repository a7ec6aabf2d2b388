"""Names that w1train will write to, at which somebody else has put a link, a FIFO or a second name of another file."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_project import REPOSITORY, python_files
from w1train.data.writer import open_exclusively
from w1train.runtime import files
from w1train.runtime.files import UnsafeFileError, open_in_place, open_new, replace_by_library, replace_file, write_text
from w1train.runtime.locks import exclusive
from w1train.runtime.record_files import MetricsLog
from w1train.runtime.run_directory import RunDirectory, RunDirectoryError
from w1train.runtime.status import Heartbeat, write_heartbeat, write_json

VICTIM = b"kept\n"


def link(victim: Path, path: Path) -> None:
    path.symlink_to(victim)


def dangling(victim: Path, path: Path) -> None:
    path.symlink_to(victim.with_name("made by the link"))


def second_name(victim: Path, path: Path) -> None:
    os.link(victim, path)


def fifo(victim: Path, path: Path) -> None:
    os.mkfifo(path)


PLANTS = [link, dangling, second_name, fifo]


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that somebody else's link leads to; it must be what it was."""
    folder = tmp_path / "private"
    folder.mkdir()
    path = folder / "victim"
    path.write_bytes(VICTIM)
    yield path
    assert path.read_bytes() == VICTIM
    assert list(folder.iterdir()) == [path]


def claim(path: Path) -> None:
    RunDirectory(path.parent).claim()


def hold(path: Path) -> None:
    with exclusive(path.with_name(path.name.removeprefix(".").removesuffix(".lock"))):
        pass


def append_record(path: Path) -> None:
    with MetricsLog(path) as log:
        log.append({"step": 1})


def cut_back(path: Path) -> None:
    with MetricsLog(path) as log:
        log.truncate_after(0)


REFUSED: dict[str, Callable[[Path], object]] = {
    ".lock": claim,
    ".packing.lock": hold,
    "metrics.jsonl": append_record,
    "samples.jsonl": cut_back,
    "corpus.hashes.partial": open_exclusively,
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_our_file_is_refused_where_a_file_is_kept(name, plant, tmp_path, victim):
    path = tmp_path / name
    plant(victim, path)
    with pytest.raises((UnsafeFileError, RunDirectoryError), match=r"link|regular") as caught:
        REFUSED[name](path)
    assert str(path) in str(caught.value)
    assert "remove it" in str(caught.value)


def replace(path: Path) -> None:
    with replace_file(path.with_suffix("")) as file:
        file.write(b"new")


def export(path: Path) -> None:
    with replace_by_library(path) as written:
        written.write_bytes(b"new")


REPLACED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "summary.json.partial": ("summary.json", replace),
    ".status.json.MainThread.partial": ("status.json", lambda path: write_json(path.with_name("status.json"), {})),
    "summary.json": ("summary.json", lambda path: write_text(path, "new")),
    "step_1.json.gz": ("step_1.json.gz", export),
}


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", REPLACED)
def test_what_is_not_our_file_goes_where_a_file_is_replaced(name, plant, tmp_path, victim):
    plant(victim, tmp_path / name)
    written, write = REPLACED[name]
    write(tmp_path / name)
    assert (tmp_path / written).is_file()
    assert not (tmp_path / written).is_symlink()
    assert (tmp_path / written).stat().st_nlink == 1


def test_a_heartbeat_replaces_a_link(tmp_path, victim):
    (tmp_path / "heartbeats").mkdir()
    link(victim, tmp_path / "heartbeats" / ".rank_00000.json.MainThread.partial")
    write_heartbeat(tmp_path, Heartbeat(0, "host", 1, 1, "training", 0.0, 0.0, "here"))
    assert not (tmp_path / "heartbeats" / "rank_00000.json").is_symlink()


def test_a_run_may_lie_behind_a_link(tmp_path):
    """People keep runs on a scratch disk: only the last part of a name is looked at."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    run = RunDirectory(tmp_path / "runs" / "name")
    run.claim()
    append_record(run.metrics)
    with pytest.raises(RunDirectoryError, match="in use"):
        RunDirectory(run.path).claim()
    run.release()
    assert (tmp_path / "scratch" / "name" / "metrics.jsonl").read_bytes() == b'{"step":1}\n'


def test_a_lock_is_not_emptied_before_it_is_held(tmp_path):
    path = tmp_path / ".f.lock"
    path.write_bytes(VICTIM)
    with exclusive(tmp_path / "f"):
        assert path.read_bytes() == VICTIM


def test_what_is_put_in_the_way_after_the_removal_is_refused(tmp_path, victim, monkeypatch):
    path = tmp_path / "f"
    monkeypatch.setattr(files.Path, "unlink", lambda self, missing_ok: link(victim, path))
    with pytest.raises(FileExistsError):
        open_new(path)


def test_modes_and_permissions_are_those_of_open(tmp_path):
    with open(tmp_path / "plain", "wb"), open_new(tmp_path / "new") as new, open_in_place(tmp_path / "kept", "a+b") as kept:
        new.write(b"one")
        new.seek(0)
        assert new.read() == b"one"
        kept.write(b"two")
    with open_in_place(tmp_path / "kept", "r+b") as kept:
        assert kept.read() == b"two"
    assert {(tmp_path / name).stat().st_mode for name in ("plain", "new", "kept")} == {(tmp_path / "plain").stat().st_mode}
    with pytest.raises(FileNotFoundError):
        open_in_place(tmp_path / "missing", "r+b")


def test_a_library_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def write_half():
        with replace_by_library(path) as written:
            written.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


# No way around: what opens a file for writing is found in the sources.

ALLOWED = {
    "w1train/runtime/files.py": "the place that all others use",
    "w1train/config/schema_reference.py": "a file of this repository, named by who writes its documentation",
    "w1train/runtime/command.py": "/dev/null alone",
    "w1train/conversion/export.py": "in a directory that the same export has just made",
}
WRITING_METHODS = {"write_text", "write_bytes", "touch", "tofile", "copyfile", "copy", "copy2", "truncate", "mkfifo", "FileHandler"}
LIBRARIES = {"os", "shutil", "np", "logging"}


def writes(call: ast.Call) -> bool:
    """Tell whether a call opens a file by its name for writing, as far as the call's text shows this."""
    function = call.func
    name = function.id if isinstance(function, ast.Name) else function.attr if isinstance(function, ast.Attribute) else ""
    if name == "open":
        texts = [node.value for argument in [*call.args, *call.keywords] for node in ast.walk(argument) if isinstance(node, ast.Constant)]
        flags = {node.attr for argument in call.args for node in ast.walk(argument) if isinstance(node, ast.Attribute)}
        is_mode = any(
            isinstance(text, str) and 0 < len(text) <= 3 and set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts
        )
        return is_mode or bool(flags & {"O_CREAT", "O_WRONLY", "O_RDWR"})
    if not isinstance(function, ast.Attribute) or not isinstance(function.value, ast.Name | ast.Attribute | ast.Call | ast.BinOp):
        return False
    is_library = isinstance(function.value, ast.Name) and function.value.id in LIBRARIES
    by_name = name in {"write_text", "write_bytes", "touch", "tofile"} or (is_library and name in WRITING_METHODS)
    saves_by_name = is_library and name in {"save", "savez"} and not (isinstance(call.args[0], ast.Name) and call.args[0].id == "file")
    return by_name or saves_by_name


def test_the_sources_open_files_for_writing_in_one_place():
    found: dict[str, list[int]] = {}
    for path in python_files("w1train", "data_tools", "launch"):
        lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and writes(node)]
        if lines:
            found[str(path.relative_to(REPOSITORY))] = lines
    others = {name: lines for name, lines in found.items() if name not in ALLOWED}
    assert not others, f"open these through w1train/runtime/files.py: {others}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("open(path, 'w')", True),
        ("path.open('ab')", True),
        ("open(path, mode='r+b')", True),
        ("open(path, 'r+b' if resume else 'w+b')", True),
        ("os.open(path, os.O_RDWR | os.O_CREAT)", True),
        ("(folder / 'f').write_text(text)", True),
        ("np.savez(path.with_suffix('.npz'))", True),
        ("open(path)", False),
        ("path.open('rb')", False),
        ("os.open(folder, os.O_RDONLY)", False),
        ("write_text(path, text)", False),
        ("np.savez(file)", False),
        ("open_new(path)", False),
    ],
)
def test_the_search_itself(source, expected):
    call = ast.parse(source).body[0].value
    assert writes(call) is expected
