"""The ranks of one machine: start, signals, and how they end. The ranks are small programs in place of w1train.pretrain."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from w1train import local_ranks
from w1train.local_ranks import SETTINGS, Outcome, run_local_ranks
from w1train.runtime.exit_status import ExitStatus

REPOSITORY = Path(__file__).resolve().parents[1]
START = "import json, os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
# Ranks that write down each signal until they have had `enough` of them.
LISTEN = """\
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _frame: got.append(signal.Signals(number).name))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
open(f"ready_{rank}", "w").close()
while not got:
    time.sleep(0.02)
time.sleep(0.3)  # a second delivery would come by then
with open(f"got_{rank}.partial", "w") as file:
    json.dump(got, file)
os.rename(f"got_{rank}.partial", f"got_{rank}")
sys.exit(75)
"""


def run(code: str, logs: Path, num_ranks: int = 2) -> Outcome:
    return run_local_ranks(["-c", START + code], num_ranks, logs)


def by_rank(*ends: str) -> str:
    return f"exec({list(ends)}[rank])"


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (["sys.exit(0)", "sys.exit(0)"], ExitStatus.FINISHED),
        (["sys.exit(75)", "sys.exit(75)"], ExitStatus.STOPPED),
        (["sys.exit(2)", "sys.exit(2)"], ExitStatus.MISTAKE),
        (["sys.exit(1)", "sys.exit(2)"], ExitStatus.MISTAKE),
        (["sys.exit(1)", "sys.exit(0)"], ExitStatus.FAILED),
        (["sys.exit(139)", "sys.exit(75)"], ExitStatus.FAILED),
        (["sys.exit(1)", "sys.exit(130)"], ExitStatus.INTERRUPTED),
        (["sys.exit(130)", "sys.exit(130)"], ExitStatus.INTERRUPTED),
        (["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(1)"], ExitStatus.FAILED),
    ],
    ids=str,
)
def test_exit_statuses(tmp_path, ends, status):
    assert run(by_rank(*ends), tmp_path).status == status


def test_rank_0_has_the_terminal_and_the_others_have_files(tmp_path, capfd):
    assert run("print('out of', rank); print('error of', rank, file=sys.stderr)", tmp_path) == Outcome(ExitStatus.FINISHED, "")
    assert capfd.readouterr() == ("out of 0\n", "error of 0\n")
    assert sorted((tmp_path / "rank_00001.log").read_text().splitlines()) == ["error of 1", "out of 1"]


def test_the_rank_that_is_the_cause_is_named(tmp_path):
    """Whichever ends first: rank 0 has only lost its connection, and has said it."""
    outcome = run(by_rank("sys.exit(1)", "print('the disk of rank 1 is full'); time.sleep(0.2); sys.exit(2)"), tmp_path)
    assert outcome.message == f"rank 1 ended with status 2; its output is in {tmp_path}/rank_00001.log\nthe disk of rank 1 is full"
    assert run(by_rank("sys.exit(2)", "sys.exit(1)"), tmp_path).message == ""
    outcome = run(by_rank("time.sleep(0.4); sys.exit(1)", "sys.exit('no memory is left')"), tmp_path)
    assert outcome.message == f"rank 1 ended with status 1; its output is in {tmp_path}/rank_00001.log\nno memory is left"
    assert run(by_rank("time.sleep(0.4); sys.exit(1)", "sys.exit(1)"), tmp_path).message == "", "an error of all ranks"
    killed = run(by_rank("time.sleep(0.2); sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"), tmp_path)
    assert killed.message.startswith("rank 1 was ended by SIGKILL, perhaps because the machine has no memory left")
    assert run(by_rank("os.kill(os.getpid(), signal.SIGSEGV)", "sys.exit(1)"), tmp_path).message == "rank 0 was ended by SIGSEGV"


def test_a_rank_that_dies_ends_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ranks, "_LAST_SECONDS", 0.1)
    outcome = run(by_rank("time.sleep(600)", "sys.exit(1)"), tmp_path)
    assert outcome == Outcome(ExitStatus.FAILED, f"rank 1 ended with status 1; its output is in {tmp_path}/rank_00001.log")


@pytest.mark.parametrize("status", [0, 75, 130])
def test_rank_0_may_end_later(tmp_path, monkeypatch, status):
    """It writes the records of a run that has ended well."""
    monkeypatch.setattr(local_ranks, "_LAST_SECONDS", 0.1)
    monkeypatch.setattr(local_ranks, "_POLL_SECONDS", 0.1)
    assert run(by_rank(f"time.sleep(1); sys.exit({status})", f"sys.exit({status})"), tmp_path).status == status


def test_the_variables_of_a_rank(tmp_path, monkeypatch, capfd):
    """They are those of torchrun and of launch/settings.sh, unless the user has set them; and modules of the caller's directory do not hide
    Python's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "json.py").write_text("raise SystemExit('a module of the caller')")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run("import w1train.cli; print(json.dumps([os.getcwd(), dict(os.environ)]), flush=True)", tmp_path, 1).status == 0
    directory, variables = json.loads(capfd.readouterr().out)
    assert directory == str(tmp_path)
    expected = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert expected.items() <= variables.items()
    assert 1024 < int(variables["MASTER_PORT"]) < 32768
    assert (variables["NCCL_DEBUG"], variables["OMP_NUM_THREADS"]) == ("INFO", "1")
    assert variables["PYTHONPATH"].split(os.pathsep)[0] == str(REPOSITORY), "the ranks run the code of their launcher"
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == f"{tmp_path}/nccl_trace_rank_"


def test_the_settings_are_those_of_the_launchers():
    names = " ".join(SETTINGS)
    command = f'source {REPOSITORY}/launch/settings.sh && for name in {names}; do echo "$name=${{!name}}"; done; compgen -e | sort'
    result = subprocess.run(["bash", "-c", command], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True)
    (*settings,) = result.stdout.splitlines()[: len(SETTINGS)]
    assert dict(line.split("=", 1) for line in settings) == SETTINGS
    assert set(result.stdout.splitlines()[len(SETTINGS) :]) - {"PATH", "PWD", "OLDPWD", "SHLVL", "_"} == SETTINGS.keys()


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """The two ends of a terminal."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


def launch(directory: Path, terminal: tuple[int, int] | None = None) -> subprocess.Popen[bytes]:
    """Start a launcher of two ranks in a process of its own, and wait until both listen."""
    code = f"""\
import sys
from pathlib import Path
from w1train.local_ranks import run_local_ranks
sys.exit(run_local_ranks(["-c", {START + LISTEN!r}], 2, Path("logs")).status)
"""
    (directory / "logs").mkdir()

    def take_terminal() -> None:
        if terminal is not None:
            fcntl.ioctl(terminal[1], termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-P", "-c", code]
    process = subprocess.Popen(command, cwd=directory, env=environment, start_new_session=True, preexec_fn=take_terminal)
    wait_for(directory / "ready_0", directory / "ready_1")
    return process


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def received(directory: Path) -> list[list[str]]:
    files = [directory / f"got_{rank}" for rank in range(2)]
    wait_for(*files)
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals_reach_every_rank_once(tmp_path, number):
    process = launch(tmp_path)
    process.send_signal(number)
    assert process.wait(120) == 75
    assert received(tmp_path) == [[number.name]] * 2


def test_ctrl_c_reaches_every_rank_once(tmp_path, terminal):
    """A terminal sends the signal to the launcher and to the ranks."""
    process = launch(tmp_path, terminal)
    os.write(terminal[0], b"\x03")
    assert process.wait(120) == 75
    assert received(tmp_path) == [["SIGINT"]] * 2


def test_without_the_launcher_the_ranks_are_asked_to_save(tmp_path):
    process = launch(tmp_path)
    process.kill()
    process.wait(120)
    assert received(tmp_path) == [["SIGTERM"]] * 2
