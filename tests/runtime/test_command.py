"""Commands in poor environments: they run, or say in one message what is missing."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from tests.distributed import run_distributed
from tests.records.recorded_run import recorded_run, started
from tests.reports.fake_run import train_record, write_fake_run
from w1train import dashboard, report, status
from w1train.records.console import ConsoleSink
from w1train.runtime.command import allow_open_files, command, describe_error, is_out_of_files, prepare_streams, text_argument

REPOSITORY = Path(__file__).resolve().parents[2]
NOT_ASCII = "a box ┃, a mask ░, a model that says ä"
POOR = [
    {"COLUMNS": "0", "LINES": "0", "TERM": "dumb"},
    {"COLUMNS": "abc", "TERM": None, "HOME": None},
    {"COLUMNS": "-5", "TERM": "xterm", "HOME": "/proc/1/nowhere", "TMPDIR": "/nowhere"},
]


def ascii_output(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Set standard output as of ``LC_ALL=C``; gives what was written to it."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    return lambda: stream.buffer.getvalue().decode("ascii")


@pytest.mark.parametrize("environment", POOR, ids=str)
def test_commands_run_in_poor_environments(tmp_path, monkeypatch, environment):
    """Those that need no model, in this process."""
    for name, value in environment.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    output = ascii_output(monkeypatch)
    run = write_fake_run(tmp_path / "läuft", num_steps=20)
    monkeypatch.setattr(sys, "argv", ["w1train.report", str(run)])
    report.main()
    assert "report.html" in output()
    assert status.main([str(run)]) == 2
    monkeypatch.setattr(sys, "argv", ["w1train.dashboard", "--print"])
    dashboard.main()
    assert json.loads(output()[output().index('{\n  "name"') :])["name"] == "w1train"


def test_what_the_console_cannot_show_is_replaced(monkeypatch):
    output = ascii_output(monkeypatch)

    @command("a command")
    def main() -> int:
        print(NOT_ASCII)
        Console().print(NOT_ASCII, width=100)
        return 7

    assert main() == 7
    assert output().startswith("a box \\u2503")


def test_a_stream_that_is_closed_takes_everything(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    prepare_streams()
    print(NOT_ASCII)
    print(NOT_ASCII, file=sys.stderr)
    assert sys.stdin.read() == ""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


def in_a_process(body: Callable[[], object]) -> object:
    """The result of ``body``, which changes what belongs to the whole process."""
    return run_distributed(lambda rank, size: body(), 1, process_group=False)[0]


def test_the_soft_limit_on_open_files_is_raised_to_the_hard_one():
    def body() -> tuple[int, int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 300))
        allow_open_files()
        return resource.getrlimit(resource.RLIMIT_NOFILE)

    assert in_a_process(body) == (300, 300)


def test_too_many_open_files_are_one_message_with_the_path_and_the_remedy(capfd, tmp_path):
    def body() -> object:
        @command("w1train.some")
        def main() -> int:
            kept = [open(tmp_path / f"shard-{number}", "w", encoding="utf-8") for number in range(200)]  # noqa: SIM115
            return len(kept)

        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
        try:
            return main()
        except SystemExit as end:
            return end.code

    assert in_a_process(body) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("w1train.some: [Errno 24] Too many open files: ")
    assert "shard-" in line
    assert "100 files open (ulimit -Hn)" in line


def test_which_errors_are_of_too_many_files():
    text = "[enforce fail at gloo/transport/tcp/device.cc:189] rv != -1. -1 vs -1. Too many open files"
    assert is_out_of_files(RuntimeError(text))
    assert describe_error(RuntimeError(text)).startswith("Too many open files: this process may have ")
    assert is_out_of_files(OSError(errno.ENFILE, "of the whole machine"))
    assert not is_out_of_files(RuntimeError("shapes differ"))
    expected = "[Errno 2] no such thing: 'x': look whether the path is right, and its disk mounted"
    assert describe_error(OSError(errno.ENOENT, "no such thing", "x")) == expected


def test_errors_of_our_own_keep_their_traceback():
    @command("w1train.some")
    def main(error: Exception) -> None:
        raise error

    for error in (RuntimeError("a mistake"), FileNotFoundError(2, "a mistake"), BrokenPipeError("of a socket"), ValueError("a mistake")):
        with pytest.raises(type(error), match=r"mistake|socket"):
            main(error)


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("redirection", "expected", "message"), [("| head -1", 141, ""), ("> /dev/full", 1, "No space left"), (">&-", 0, "")]
)
def test_output_that_nobody_takes(tmp_path, unbuffered, redirection, expected, message):
    """A command that needs no torch, with more lines than a pipe holds, in a locale that cannot show them."""
    runs = " ".join(f"{tmp_path}/{number}-nö-run" for number in range(1000))
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from w1train import status; status.main(sys.argv[1:])"
    script = f'set -o pipefail; {sys.executable} -c "{code}" {runs} {redirection}'
    found = subprocess.run(["bash", "-c", script], env=environment, cwd=REPOSITORY, capture_output=True, timeout=60, check=False)
    assert found.returncode == expected
    error = found.stderr.decode()
    assert message in error
    assert len(error.splitlines()) == bool(message)


def test_training_goes_on_without_its_console(caplog):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with started(ConsoleSink(recorded_run(Path("unused"), interval=1), Broken())) as console:
        for step in (1, 2, 3):
            console.record(train_record(step))
    assert caplog.text.count("training continues without it") == 1


def test_a_text_in_a_locale_that_is_not_utf_8():
    code = "import sys; from w1train.runtime.command import text_argument; sys.exit(text_argument(sys.argv[1]) != '\\u00e4')"
    for locale in ("C", "C.UTF-8"):
        environment = {**os.environ, "LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        command_line = [sys.executable, "-c", code, "ä"]
        assert subprocess.run(command_line, env=environment, cwd=REPOSITORY, timeout=60, check=False).returncode == 0
    assert text_argument("ä") == "ä"


def test_ctrl_c_ends_every_command_in_one_line(capsys, monkeypatch):
    handlers: list[object] = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.append((number, handler)))

    @command("a command")
    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err == "a command: ended by Ctrl-C\n"
    assert handlers == [(signal.SIGINT, signal.SIG_DFL)], "a second one, while Python tidies up, prints no traceback"
