"""Passwords in what a process shows."""

from __future__ import annotations

import io
import logging
import subprocess
import sys

import pytest

from tests.test_project import REPOSITORY
from w1train.runtime import masking
from w1train.runtime.command import command
from w1train.runtime.masking import mask, mask_output, remember_passwords, unmasked
from w1train.runtime.status import StatusFile, read_status


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(masking, "_passwords", set())


def test_a_password_that_is_known_is_masked_wherever_it_is(fresh):
    remember_passwords(["s3://user:hunter2-long@host", "s3://user:abc@host", "s3://user:a%2Fb-longer@host", "nothing"])
    assert mask("Invalid bucket name user:hunter2-long@host (hunter2-long)") == "Invalid bucket name user:***@host (***)"
    assert mask("key='a/b-longer', raw a%2Fb-longer") == "key='***', raw ***"
    # A short one is a part of words.
    assert mask("abcdef user:abc@host abc") == "abcdef user:***@host abc"


def test_a_plain_word_is_masked_only_as_a_password(fresh):
    remember_passwords(["postgres://u:training@db", "postgres://u:Checkpoint@db", "s3://u:correcthorsebattery@h", "s3://u:training1@h"])
    assert mask("training: Checkpoint u:training@db u:Checkpoint@db") == "training: Checkpoint u:***@db u:***@db"
    assert mask("correcthorsebattery training1") == "*** ***"


def test_of_two_passwords_the_longer_is_masked_first(fresh):
    remember_passwords(["s3://user:password1@host", "s3://user:password1-and-more@host"])
    assert mask("password1-and-more") == "***"


def test_stdout_and_stderr_are_masked_once(fresh, monkeypatch):
    streams = {name: io.StringIO() for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(sys, "argv", ["command", "s3://user:from-argv@host"])
    monkeypatch.setenv("HTTPS_PROXY", "http://user:from-environment@host")
    mask_output()
    masked = sys.stdout
    mask_output()
    assert sys.stdout is masked
    print("s3://user:pass@host", "from-argv from-environment", flush=True)
    sys.stdout.writelines(["a from-argv\n", "b\n"])
    logging.StreamHandler().handle(logging.makeLogRecord({"msg": "s3://user:pass@host"}))
    assert streams["stdout"].getvalue() == "s3://user:***@host *** ***\na ***\nb\n"
    assert streams["stderr"].getvalue() == "s3://user:***@host\n"
    assert sys.stdout.write("12345678") == 8
    assert not sys.stdout.isatty()


def test_a_text_passes_unmasked_where_a_command_asks_for_it(fresh, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    mask_output()
    print("s3://user:pass@host", file=unmasked(sys.stdout))
    print("s3://user:pass@host")
    assert stream.getvalue() == "s3://user:pass@host\ns3://user:***@host\n"
    assert unmasked(stream) is stream


def test_the_status_has_no_password(fresh, tmp_path):
    remember_passwords(["s3://user:hunter2-long@host"])
    StatusFile(tmp_path, 1, active=True).update("failed", message="s3://user:other@host: hunter2-long", step=3)
    status = read_status(tmp_path)
    assert (status.message, status.step) == ("s3://user:***@host: ***", 3)


SCRIPT = """
import sys, threading, warnings
from w1train.runtime.masking import mask_output
mask_output()
warnings.warn("s3://user:hunter2@host")
thread = threading.Thread(target=lambda: open("/s3://user:hunter2@host"))
thread.start(); thread.join()
def deepest(url):
    raise RuntimeError(url) from OSError(f"{url}: denied to hunter2-and-more")
deepest("s3://user:hunter2@host")
"""


def test_tracebacks_of_the_interpreter_are_masked():
    """Of all threads, with their causes; warnings too. A line of source that holds a password is in it no more than the exception."""
    command = [sys.executable, "-c", SCRIPT, "https://user:hunter2-and-more@host"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY)
    assert result.returncode == 1
    assert "hunter2" not in result.stderr
    assert result.stderr.count("s3://user:***@host") >= 4
    assert "RuntimeError: s3://user:***@host" in result.stderr
    assert "denied to ***" in result.stderr


def test_a_command_masks_what_it_shows_before_it_does_anything(capsys):
    @command("w1train.some")
    def main() -> None:
        print("s3://user:hunter2@host")

    main()
    assert capsys.readouterr().out == "s3://user:***@host\n"
