"""launch/torchrun.sh with a stand-in for torchrun that writes down how it was called, and launch.nsys with one for nsys."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import check
from launch.rendezvous_port import choose_port
from tests.made_data import make_data
from tests.test_readme import check_torchrun
from w1train.config.errors import UserError
from w1train.config.schema import HealthConfig
from w1train.runtime.cluster import rendezvous_port

REPOSITORY = Path(__file__).resolve().parents[2]
# Everything but the arithmetic of ranks is real: first_host, and the check of the recipe, unless the test is about what comes after it.
PYTHON = f"""\
case "$2" in
  w1train.status) exit "${{RUN_STATUS:-0}}" ;;
  launch.elastic) shift 2; exec torchrun "$@" ;;
  launch.check) if [ -n "$CHECKED" ]; then echo "$CHECKED"; exit; fi ;;
  *cuda*) echo 2; exit ;;
esac
exec {sys.executable} "$@"
"""


class Torchrun:
    """Calls of the script, in an environment whose torchrun is a stand-in."""

    def __init__(self, stand_in, directory: Path) -> None:
        self.stand_in = stand_in
        self.runs_dir = directory / "runs"
        self.seen = directory / "seen"
        (directory / "venv").mkdir()
        (directory / "venv/bin").symlink_to(stand_in.directory)
        self.variables = {"VENV": str(directory / "venv"), "CHECKED": self.checked}
        stand_in.command("python", PYTHON)
        self.ends("exit 0")

    @property
    def checked(self) -> str:
        """What launch.check answers for the recipe of these tests. The real one takes seconds."""
        return f"{self.runs_dir}/demo\n{HealthConfig().stop_timeout}"

    @property
    def status_file(self) -> Path:
        """Of the run."""
        return self.runs_dir / "demo/status.json"

    @property
    def says_status(self) -> str:
        """What a stand-in does in place of ranks that say how they ended."""
        return f"date +%s%N >{self.status_file}"

    def ends(self, body: str) -> None:
        """What the stand-in does."""
        self.stand_in.command("torchrun", body)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = [str(REPOSITORY / "launch/torchrun.sh"), *arguments, "recipe=demo", f"runs_dir={self.runs_dir}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | self.variables | variables
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        # A group of its own, as a terminal gives it, with Ctrl-C as it is where nobody has said to ignore it.
        return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_hear_ctrl_c, **pipes)

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        return process.wait(60), process.communicate()[0]

    @property
    def options(self) -> list[str]:
        """Of the one start of torchrun."""
        (words,) = self.stand_in.calls("torchrun")
        return words

    def option(self, name: str) -> str:
        return self.options[self.options.index(name) + 1]


def _hear_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo-data")
    make_data(directory)
    return directory


@pytest.fixture
def torchrun(stand_in, tmp_path, demo_data):
    """The caller's directory has the data of recipe=demo."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo-data").symlink_to(demo_data)
    return Torchrun(stand_in, tmp_path)


REAL_CHECK = {"CHECKED": ""}


def test_the_answer_of_the_check_is_the_real_one(torchrun, capsys):
    assert check.main(["--ranks", "2", "--", "recipe=demo", f"runs_dir={torchrun.runs_dir}"]) == 0
    assert capsys.readouterr().out == f"{torchrun.checked}\n"


def test_one_node(torchrun):
    status, output = torchrun.run("training.seed=7", **REAL_CHECK)
    assert status == 0, output
    check_torchrun(torchrun.options)  # torchrun takes the options, and the run its layout
    assert "--standalone" in torchrun.options
    assert torchrun.option("--nproc-per-node") == "2"  # the stand-in's GPUs
    assert torchrun.options[-5:-3] == ["-m", "w1train.pretrain"]
    logs = Path(torchrun.option("--log-dir"))
    assert logs.parent == torchrun.runs_dir / "demo/logs"
    assert logs.is_dir()


def test_many_nodes(torchrun):
    status, output = torchrun.run(NNODES="2", NODE_RANK="1", NPROC="1", MASTER_ADDR="gpu1")
    assert status == 0, output
    check_torchrun(torchrun.options)
    port = choose_port(str(torchrun.runs_dir / "demo"), {}, os.getuid())
    assert torchrun.option("--rdzv-endpoint") == f"gpu1:{port}"
    assert torchrun.option("--rdzv-conf").startswith("is_host=false,")
    assert "2 ranks, 1 on this node" in output
    assert f"node 1 of 2; the nodes meet at gpu1:{port}" in output


def slurm_step(node: int, **others: str) -> dict[str, str]:
    names = {"SLURM_JOB_ID": "12", "SLURM_NODEID": str(node), "SLURM_STEP_NODELIST": "gpu[007-008]"}
    return names | {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "NPROC": "1"} | others


@pytest.mark.parametrize("node", [0, 1])
def test_nodes_from_slurm(torchrun, node):
    status, output = torchrun.run(**slurm_step(node))
    assert status == 0, output
    assert torchrun.option("--nnodes") == "2"
    port = rendezvous_port({"SLURM_JOB_ID": "12"})
    assert torchrun.option("--rdzv-endpoint") == f"gpu007:{port}"
    assert torchrun.option("--rdzv-id") == f"12_{port}"
    assert torchrun.option("--rdzv-conf").startswith(f"is_host={'true' if node == 0 else 'false'},")


def test_a_port_that_is_taken_is_a_mistake_where_the_others_connect_to(torchrun):
    with socket.create_server(("", 0)) as other:
        port = str(other.getsockname()[1])
        status, output = torchrun.run(NNODES="2", NPROC="1", MASTER_ADDR="gpu1", MASTER_PORT=port)
        assert status == 2, output
        assert f"the nodes cannot meet at port {port} of this machine (Address already in use): set MASTER_PORT" in output
        assert torchrun.stand_in.calls("torchrun") == []
        assert torchrun.run(NNODES="2", NODE_RANK="1", NPROC="1", MASTER_ADDR="gpu1", MASTER_PORT=port)[0] == 0
    assert torchrun.option("--rdzv-endpoint") == f"gpu1:{port}"


def test_runs_that_share_a_node_have_ports_of_their_own(monkeypatch):
    """Jobs and steps of Slurm, and runs and users where a step is of one node: salloc's shell is such a step."""
    steps = [{"SLURM_JOB_ID": job, "SLURM_STEP_ID": step, "SLURM_STEP_NUM_NODES": "2"} for job in ("7", "8") for step in ("0", "1")]
    ports = {choose_port("runs/a", step, 0) for step in steps}
    assert len(ports) == len(steps)
    alone = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "1"}
    by_hand = {choose_port(run, environment, user) for run in ("runs/a", "runs/b") for user in (0, 1) for environment in ({}, alone)}
    assert len(by_hand) == 4
    assert all(1024 < port < 32768 for port in ports | by_hand)
    assert choose_port("runs/a", {"MASTER_PORT": "400"}, 0) == 400
    assert choose_port("runs/a", {}, 0) == choose_port(os.path.abspath("runs/a"), {}, 0), "nodes may spell one directory in two ways"
    here = choose_port("runs/a", {}, 0)
    monkeypatch.chdir("/")
    assert choose_port("runs/a", {}, 0) != here, "two directories may each have a run of one name"


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1"])
def test_a_port_that_is_none_is_a_mistake(port):
    with pytest.raises(UserError, match=f"MASTER_PORT={port}: a port is a number from 1 to 65535"):
        choose_port("runs/a", {"MASTER_PORT": port}, 0)


def test_relative_paths_begin_where_the_caller_is(torchrun, tmp_path, monkeypatch):
    """And the code is that of the repository, though the caller's directory has modules of the same names."""
    here = tmp_path / "here"
    (here / "launch").mkdir(parents=True)
    (here / "runs").symlink_to(tmp_path / "runs")
    for name in ("tokenize.py", "launch/__init__.py", "w1train.py"):
        (here / name).write_text("raise SystemExit('a module of the caller')")
    (here / "recipes/recipe").mkdir(parents=True)
    (here / "recipes/recipe/mine.yaml").write_text("# @package _global_\ndefaults: [demo]\nname: mine\n")
    monkeypatch.chdir(here)
    torchrun.ends(f"pwd >{torchrun.seen}; env >>{torchrun.seen}; exec python -c 'import launch, w1train; print(launch.__path__[0])'")
    command = [REPOSITORY / "launch/torchrun.sh", "--config-dir", "recipes", "recipe=mine", "runs_dir=elsewhere"]
    environment = (
        {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | torchrun.variables | REAL_CHECK | {"NPROC": "1"}
    )
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(REPOSITORY / "launch")
    assert torchrun.seen.read_text().splitlines()[0] == str(here)
    assert (here / "elsewhere/mine/logs").is_dir()
    assert torchrun.option("--log-dir").startswith("elsewhere/mine/logs/")


def test_a_task_for_each_gpu_is_a_mistake(torchrun):
    status, output = torchrun.run(**slurm_step(0, SLURM_STEP_NUM_TASKS="16"))
    assert status == 2
    assert "--ntasks-per-node=1" in output


def test_many_nodes_need_a_meeting_place(torchrun):
    status, output = torchrun.run(NNODES="2")
    assert status == 2
    assert "NNODES=2 needs MASTER_ADDR" in output


def test_a_mistake_is_told_once_before_ranks_start(torchrun):
    status, output = torchrun.run("parallel.pipeline=3", **REAL_CHECK)
    assert status == 2
    assert output.count("in a world of 2") == 1
    assert torchrun.stand_in.calls("torchrun") == []


@pytest.mark.parametrize(("run_status", "expected"), [("75", 75), ("2", 2), ("1", 1), ("3", 1), ("0", 1)])
def test_how_the_run_ended_is_asked_of_the_run(torchrun, run_status, expected):
    """torchrun ends with 1 whatever its ranks end with."""
    torchrun.ends(f"{torchrun.says_status}; exit 1")
    status, output = torchrun.run(RUN_STATUS=run_status)
    assert status == expected, output


def test_what_an_earlier_start_said_does_not_count(torchrun):
    """Ranks that never came to write their status would be started again for ever."""
    torchrun.status_file.parent.mkdir(parents=True)
    torchrun.status_file.write_text("stopped, by the start before")
    torchrun.ends("exit 1")
    status, output = torchrun.run(RUN_STATUS="75")
    assert status == 1, output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_go_on_to_torchrun(torchrun, tmp_path, number):
    ready, got = tmp_path / "ready", tmp_path / "got"
    torchrun.ends(f"trap 'touch {got}; {torchrun.says_status}; exit 1' {number.name[3:]}; touch {ready}; while true; do sleep 0.05; done")
    process = torchrun.start(RUN_STATUS="75")
    wait_for(ready)
    process.send_signal(number)
    assert process.wait(30) == 75
    assert got.exists()
    process.communicate()


def test_after_ctrl_c_it_waits_for_the_ranks(torchrun, tmp_path):
    """A terminal sends SIGINT to the script and to torchrun, which does not end at once. The run saves, and is not to be started again."""
    ready, ended = tmp_path / "ready", tmp_path / "ended"
    torchrun.ends(f"trap 'sleep 1; {torchrun.says_status}; touch {ended}; exit 1' INT; touch {ready}; while true; do sleep 0.05; done")
    process = torchrun.start(RUN_STATUS="75")
    wait_for(ready)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    assert ended.exists()
    process.communicate()


@pytest.mark.parametrize("status", [2, 75])
def test_a_final_status_of_the_ranks_is_kept(torchrun, status):
    """A mistake is one after checkpoints, too, and launch.elastic tells it without the run's status."""
    (torchrun.runs_dir / "demo/checkpoints/step_0000000005").mkdir(parents=True)
    torchrun.ends(f"exit {status}")
    assert torchrun.run()[0] == status


def test_a_status_that_is_gone_is_no_mistake(torchrun):
    torchrun.status_file.parent.mkdir(parents=True)
    torchrun.status_file.write_text("of the start before")
    torchrun.ends(f"rm {torchrun.status_file}; exit 1")
    assert torchrun.run(RUN_STATUS="2")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "variables", "ranks"),
    [(["--nsys"], {}, "0"), (["--nsys=0,8"], REAL_CHECK, "0,8"), ([], {"NSYS": "1"}, "0"), ([], {"NSYS": "all"}, "all")],
)
def test_ranks_under_nsys(torchrun, arguments, variables, ranks):
    profiled = ["profiling.tool=nsys", "profiling.steps=[2]", "profiling.ranks=[0,8]"]
    assert torchrun.run(*arguments, *profiled, **variables)[0] == 0
    place = torchrun.options.index("launch.nsys")
    expected = ["--ranks", ranks, "--output", str(torchrun.runs_dir / "demo/nsys"), "--", "-m", "w1train.pretrain", profiled[0]]
    assert torchrun.options[place + 1 : place + 9] == expected


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--nsys"], "profiling.tool=nsys"),
        (["--nsys=1", "profiling.tool=nsys", "profiling.steps=[2]"], "profiling.ranks=[1]"),
        (["--nsys=first"], "ranks separated by commas"),
    ],
)
def test_a_profile_of_nothing_is_a_mistake(torchrun, arguments, complaint):
    status, output = torchrun.run(*arguments, **REAL_CHECK)
    assert status == 2
    assert complaint in output
    assert torchrun.stand_in.calls("torchrun") == []


def test_without_an_environment_it_says_how_to_make_one(torchrun, tmp_path):
    status, output = torchrun.run(VENV=str(tmp_path / "nowhere"))
    assert status == 2
    assert "launch/bootstrap.sh" in output


def run_nsys(rank: str, ranks: str, output: Path) -> subprocess.CompletedProcess[str]:
    """launch.nsys around a Python that prints its arguments and ends with 75."""
    command = [sys.executable, "-m", "launch.nsys", "--ranks", ranks, "--output", str(output), "--"]
    rest = ["-c", "import sys; print(sys.argv[1:]); sys.exit(75)", "recipe=demo", "--list"]
    return subprocess.run([*command, *rest], env=os.environ | {"RANK": rank}, cwd=REPOSITORY, capture_output=True, text=True)


def test_nsys_starts_the_chosen_ranks(stand_in, tmp_path):
    stand_in.command("nsys", 'while [ "$1" != "-c" ]; do last="$1"; shift; done; exec "$last" "$@"')
    for rank in ("0", "8"):
        result = run_nsys(rank, "0,8", tmp_path / "out")
        assert (result.returncode, result.stdout) == (75, "['recipe=demo', '--list']\n"), result.stderr
    calls = stand_in.calls("nsys")
    assert [f"--output={tmp_path}/out/rank_{rank:05d}" in words for rank, words in zip((0, 8), calls, strict=True)] == [True, True]
    result = run_nsys("1", "0,8", tmp_path / "out")
    assert (result.returncode, result.stdout) == (75, "['recipe=demo', '--list']\n")
    assert len(stand_in.calls("nsys")) == 2


def test_without_nsys_it_says_so(stand_in, tmp_path):
    result = run_nsys("0", "all", tmp_path / "out")
    assert result.returncode == 2
    assert "nsys is not on PATH" in result.stderr
