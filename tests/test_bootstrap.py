"""launch/bootstrap.sh against machines of every kind, made of small stand-ins for Python and uv on a PATH of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "env", "sh", "dirname", "mkdir", "cat", "cksum", "cp", "ls", "rm", "grep", "flock")

# Answers the script's version probe, and plays `-m venv` and `-m pip`; every other call is in the log.
PYTHON = """#!/bin/sh
case "$1 $2" in
  "-c "*) echo "ok {base}" ;;
  "-m venv") {venv} && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip") echo "pip $*" >>{log}; case "$*" in *uv) exit {uv_from_pip};; esac ;;
esac
"""
UV = """#!/bin/sh
case "$1" in
  --version) exit 0 ;;
  python) echo {found} ;;
  venv) echo "uv venv" >>{log}; mkdir -p "$5/bin"; cp "$4" "$5/bin/python" ;;
  pip) echo "uv $*" >>{log}; exit $(cat {status}) ;;
esac
"""


class Machine:
    """A PATH with the usual tools and what a test puts there, a home and a pyenv root, all empty at first."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bin = directory / "bin"
        self.venv = directory / "venv"
        self.log = directory / "log"
        self.uv_status = directory / "uv-status"
        self.bin.mkdir()
        self.log.touch()
        self.uv_status.write_text("0")
        for tool in TOOLS:
            if path := shutil.which(tool):
                (self.bin / tool).symlink_to(path)

    def script(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def python(self, path: Path, base: str = "", *, has_venv: bool = True, uv_from_pip: bool = True) -> Path:
        text = PYTHON.format(base=base or path, venv=str(has_venv).lower(), log=self.log, uv_from_pip=int(not uv_from_pip))
        return self.script(path, text)

    def old_python(self, name: str) -> None:
        self.script(self.bin / name, "#!/bin/sh\necho is Python 3.11.7\n")

    def uv(self, found: str = "") -> None:
        self.script(self.bin / "uv", UV.format(found=found, log=self.log, status=self.uv_status))

    def bootstrap(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": str(self.bin),
            "HOME": str(self.directory),
            "PYENV_ROOT": str(self.directory / "pyenv"),
            "VENV": str(self.venv),
            **variables,
        }
        command = [str(REPOSITORY / "launch" / "bootstrap.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    def chosen_python(self, **variables: str) -> str:
        result = self.bootstrap("--print-python", **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def calls(self) -> list[str]:
        """What was installed or created since the last look."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_python_on_path_is_found_in_order_of_preference(machine):
    machine.python(machine.bin / "python3", "/base/python3")
    assert machine.chosen_python() == "/base/python3"
    machine.python(machine.bin / "python3.13", "/base/python3.13")
    assert machine.chosen_python() == "/base/python3.13"
    machine.python(machine.bin / "python3.12", "/base/python3.12")
    assert machine.chosen_python() == "/base/python3.12"


def test_shims_that_fail_and_old_pythons_are_passed_over_for_pyenv(machine):
    machine.script(machine.bin / "python3.12", "#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    machine.old_python("python3")
    for version in ("3.11.7", "3.12.1", "3.13.0"):
        machine.python(machine.directory / "pyenv" / "versions" / version / "bin" / "python3", f"/pyenv/{version}")
    assert machine.chosen_python() == "/pyenv/3.12.1"


def test_python_that_only_uv_knows_is_found(machine):
    machine.old_python("python3")
    machine.uv(found=str(machine.python(machine.directory / "uv" / "python3.12")))
    assert machine.chosen_python() == str(machine.directory / "uv" / "python3.12")


def test_the_pythons_of_this_machine_are_followed_to_their_base(machine):
    """An activated .venv must not become the base of itself."""
    (machine.bin / "python3").symlink_to(sys.executable)
    assert machine.chosen_python() == os.path.realpath(sys._base_executable)


def test_nothing_found_lists_all_that_was_tried(machine):
    machine.script(machine.bin / "python3.12", "#!/bin/sh\nexit 127\n")
    machine.old_python("python3")
    result = machine.bootstrap("--print-python")
    assert result.returncode == 1
    assert result.stdout == ""
    for line in ("python3.12: is there but does not run", "python3: is Python 3.11.7", "python: not found", "PYTHON=/path/to"):
        assert line in result.stderr


def test_a_python_that_is_named_is_taken_or_refused(machine):
    machine.python(machine.bin / "python3.12")
    named = machine.python(machine.directory / "named")
    assert machine.chosen_python(PYTHON=str(named)) == str(named)
    machine.old_python("python3.11")
    result = machine.bootstrap("--print-python", PYTHON="python3.11")
    assert result.returncode == 1
    assert "PYTHON=python3.11 is Python 3.11.7; w1train needs Python >= 3.12" in result.stderr


def test_second_call_installs_nothing_until_something_changes(machine):
    machine.python(machine.bin / "python3.12", "/base/python3.12")
    machine.uv()
    machine.python(machine.venv / "bin" / "python", "/base/python3.12")
    editable = f"uv pip install --compile-bytecode --python {machine.venv}/bin/python --editable {REPOSITORY}"
    assert machine.bootstrap().returncode == 0
    assert machine.calls() == [f"{editable}[dev]"]
    again = machine.bootstrap()
    assert (again.returncode, again.stderr, machine.calls()) == (0, "", [])
    assert machine.bootstrap(EXTRAS="dev,hf").returncode == 0
    assert machine.calls() == [f"{editable}[dev,hf]"]


def test_an_installation_that_failed_is_taken_up_again(machine):
    machine.uv()
    machine.python(machine.venv / "bin" / "python")
    machine.uv_status.write_text("3")
    assert machine.bootstrap().returncode == 3
    machine.uv_status.write_text("0")
    machine.calls()
    assert machine.bootstrap().returncode == 0
    assert len(machine.calls()) == 1


def test_without_uv_pip_brings_it_or_does_all_itself(machine):
    base = machine.python(machine.bin / "python3.12", uv_from_pip=False)
    assert base.exists()
    result = machine.bootstrap()
    assert result.returncode == 0, result.stderr
    assert machine.calls() == [
        "pip -m pip --version",
        "pip -m pip install --quiet uv",
        f"pip -m pip install --editable {REPOSITORY}[dev]",
    ]


def test_python_without_venv_is_explained_and_leaves_nothing_behind(machine):
    machine.python(machine.bin / "python3.12", has_venv=False)
    result = machine.bootstrap()
    assert result.returncode == 1
    assert "python3-venv" in result.stderr
    assert not machine.venv.exists()


def test_an_environment_whose_python_is_gone_is_built_anew(machine):
    machine.python(machine.bin / "python3.12")
    machine.uv()
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "pyvenv.cfg").touch()
    (machine.venv / "bin" / "python").symlink_to("/gone/python3.12")
    result = machine.bootstrap()
    assert result.returncode == 0, result.stderr
    assert "no working Python any more" in result.stderr
    assert machine.calls()[0] == "uv venv"


def test_a_folder_that_is_no_environment_is_left_alone(machine):
    machine.python(machine.bin / "python3.12")
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").write_text("years of work")
    result = machine.bootstrap()
    assert result.returncode == 1
    assert "is no virtual environment" in result.stderr
    assert (machine.venv / "thesis.txt").read_text() == "years of work"


def test_an_environment_of_another_python_is_refused(machine):
    machine.python(machine.venv / "bin" / "python", "/base/python3.12")
    named = machine.python(machine.directory / "named", "/base/python3.13")
    result = machine.bootstrap(PYTHON=str(named))
    assert result.returncode == 1
    assert "is built on /base/python3.12, not on" in result.stderr
    machine.script(machine.venv / "bin" / "python", "#!/bin/sh\necho is Python 3.11.7\n")
    result = machine.bootstrap()
    assert result.returncode == 1
    assert "is Python 3.11.7, too old" in result.stderr


def test_unknown_arguments_are_refused(machine):
    result = machine.bootstrap("--dry-run")
    assert result.returncode == 1
    assert "unknown argument '--dry-run'" in result.stderr
