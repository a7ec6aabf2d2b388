"""The log: short lines for a person, full lines for a file, and no warning of a library that is not known by name."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings

import pytest

from w1train.runtime.logs import logged_to, set_up_logging
from w1train.runtime.masking import remember_passwords
from w1train.runtime.status import StatusFile


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def root():
    """The root logger, which gets its levels back."""
    logger = logging.getLogger()
    level, of_megatron = logger.level, logging.getLogger("megatron").level
    with warnings.catch_warnings():
        yield logger
    logger.setLevel(level)
    logging.getLogger("megatron").setLevel(of_megatron)


def log_everything(monkeypatch, stream: io.StringIO, rank: str) -> list[str]:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of pytest
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    set_up_logging()
    for name in ("w1train.checkpoints.saver", "w1train.runtime.kernel_choices"):
        logging.getLogger(name).info("a fact of %s", name)
        logging.getLogger(name).warning("a warning")
    return stream.getvalue().splitlines()


def test_a_person_reads_neither_dates_nor_names_of_modules(root, monkeypatch):
    lines = log_everything(monkeypatch, Terminal(), "0")
    assert lines == ["a fact of w1train.checkpoints.saver", "warning: a warning", "warning: a warning"]


def test_another_rank_names_itself(root, monkeypatch):
    assert log_everything(monkeypatch, Terminal(), "3") == ["rank 3: warning: a warning"] * 2


def test_a_file_has_everything(root, monkeypatch):
    lines = log_everything(monkeypatch, io.StringIO(), "0")
    assert len(lines) == 4
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:,]+ INFO w1train.checkpoints.saver: a fact of w1train.checkpoints.saver", lines[0])


def test_warnings_of_libraries_are_left_out_by_name_only(root, monkeypatch):
    set_up_logging()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="something else")
        warnings.warn("The argument order of load has been changed, and so on", UserWarning, stacklevel=1)
        warnings.warn_explicit("something else is deprecated", FutureWarning, "torch/x.py", 1, module="torch.x")
    assert [str(item.message) for item in caught] == ["something else is deprecated"]


def test_the_log_is_kept_in_the_run_with_dates_and_without_passwords(root, tmp_path):
    root.setLevel(logging.INFO)
    remember_passwords(["s3://user:correct-horse-1@host/x"])
    status = StatusFile(tmp_path, 1, active=True)
    for number in (1, 2):
        with logged_to(tmp_path / "run.log", status, active=True):
            logging.getLogger("w1train.a").info("start %d with correct-horse-1", number)
    logging.getLogger("w1train.a").info("after")
    with logged_to(tmp_path / "run.log", status, active=False):
        logging.getLogger("w1train.a").info("another rank")
    lines = (tmp_path / "run.log").read_text().splitlines()
    assert [line.partition(" INFO w1train.a: ")[2] for line in lines] == ["start 1 with ***", "start 2 with ***"]


def test_a_start_that_finds_nothing_to_do_writes_nothing(root, tmp_path):
    root.setLevel(logging.INFO)
    StatusFile(tmp_path, 1, active=True).update("finished")
    status = StatusFile(tmp_path, 1, active=True)
    with logged_to(tmp_path / "run.log", status, active=True):
        logging.getLogger("w1train.a").info("first")
        assert not (tmp_path / "run.log").exists()
        status.update("running")
        logging.getLogger("w1train.a").info("second")
    assert [line.rpartition(" ")[2] for line in (tmp_path / "run.log").read_text().splitlines()] == ["first", "second"]


def test_a_log_that_cannot_be_written_is_one_warning(root, tmp_path, caplog):
    (tmp_path / "run.log").symlink_to(tmp_path / "elsewhere")
    with logged_to(tmp_path / "run.log", StatusFile(tmp_path, 1, active=True), active=True):
        for _ in range(2):
            logging.getLogger("w1train.a").warning("a line")
    assert [record.getMessage()[:24] for record in caplog.records] == ["a line", "cannot write the log to ", "a line"]
    assert not (tmp_path / "elsewhere").exists()
