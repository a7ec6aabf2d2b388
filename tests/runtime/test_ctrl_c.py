"""Ctrl-C at any moment of a command ends it with one line and status 130: while modules are imported, at work, and at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_project import REPOSITORY
from w1train.runtime.ctrl_c import ctrl_c_raises, ctrl_c_waits, end_at_ctrl_c

PRESS = "os.kill(os.getpid(), signal.SIGINT)"
START = f"""
import atexit, os, runpy, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the tests without Ctrl-C
class Press:
    module = sys.argv[1]
    def find_spec(self, name, path=None, target=None):
        if name == self.module:
            {PRESS}
sys.meta_path.insert(0, Press())
"""


def run(code: str, directory: Path, *words: str) -> tuple[int, str]:
    """Exit status and standard error of a process."""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"} | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-P", "-c", START + code, *words]
    ended = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=240)
    return ended.returncode, ended.stderr


RANK = "runpy.run_module('w1train.pretrain', run_name='__main__', alter_sys=True)"


@pytest.mark.parametrize(
    ("words", "module", "program"),
    [
        (["sampel"], "w1train.config.errors", "w1train"),
        (["sample", "runs/demo"], "w1train.config.schema", "w1train sample"),
        (["plan", "recipe=demo"], "w1train.planning.arguments", "w1train plan"),
        (["data", "tokenize", "--input", "x"], "w1train.data.tokenizer", "w1train data tokenize"),
        (["train", "recipe=demo", "--nproc", "2"], "w1train.local_ranks", "w1train train"),
        (["train", "recipe=demo", "--nproc", "2"], "w1train.preflight.start_rules", "w1train train"),
        (None, "w1train.checkpoints.manifest", "w1train train"),
        (None, "w1train.preflight.start_rules", "w1train train"),
    ],
)
def test_while_a_module_is_imported(tmp_path, words, module, program):
    """``words`` None: a rank, which torchrun or the launcher starts."""
    code = RANK if words is None else f"from w1train.cli import main; main({words})"
    assert run(code, tmp_path, module) == (130, f"{program}: ended by Ctrl-C\n")
    assert list(tmp_path.iterdir()) == []


AT_WORK = f"""
from w1train.runtime.command import command
from w1train.runtime.ctrl_c import end_at_ctrl_c
class Ignored:
    def __del__(self):
        {PRESS}  # Python prints what a finalizer raises, and goes on
@command("w1train sample")
def main():
    try:
        Ignored()
        threading.Event().wait(600)
    finally:
        print("tidied up")
end_at_ctrl_c("w1train sample")
main()
"""


def test_in_a_place_where_python_ignores_exceptions(tmp_path):
    assert run(AT_WORK, tmp_path, "-") == (130, "w1train sample: ended by Ctrl-C\n")


def test_while_python_ends(tmp_path):
    """The command's own work is done, and has nothing to tidy up."""
    code = f"atexit.register(lambda: {PRESS}); from w1train.cli import main; main(['--version'])"
    assert run(code, tmp_path, "-") == (130, "w1train: ended by Ctrl-C\n")


def test_a_rank_does_not_meet_it_before_it_can_answer(tmp_path):
    """Python's own start answers with a traceback."""
    rank = "import os, time; open('ready', 'w').close(); time.sleep(0.5)\n"
    rank += "from w1train.runtime.ctrl_c import end_at_ctrl_c; end_at_ctrl_c('a rank'); time.sleep(600)"
    code = f"from pathlib import Path; from w1train.local_ranks import run_local_ranks; print(run_local_ranks(['-c', {rank!r}], 1, Path()))"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-P", "-c", START + code, "-"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert errors == "a rank: ended by Ctrl-C\n"
    assert "INTERRUPTED" in output


def test_another_program_keeps_its_own_handler():
    """A notebook's, and that of a shell's command in the background, which ignores Ctrl-C."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGINT, handler)
            end_at_ctrl_c("w1train")
            with ctrl_c_raises():
                assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_process_that_starts_without_it_never_gets_it():
    with ctrl_c_waits():
        code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert child.stdout == "True\n"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
