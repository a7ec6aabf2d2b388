"""A real Slurm on this machine: munged, slurmctld and slurmd as children of the test, in a directory and on ports of their own.

One node with two CPUs; partitions `low` and `graceful` whose jobs make room for those in `high`: at once, and when their ranks have ended
or a minute is over.
"""

from __future__ import annotations

import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed import free_port

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_CONFIGURATION = """\
ClusterName=w1test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as its credential lives: two minutes, by default; five seconds is the least.
AuthInfo=socket={directory}/munge/socket,cred_expire=5
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
JobRequeue=1
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=graceful Nodes=ALL PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Why there can be no Slurm here, if so."""
    missing = [name for name in _PROGRAMS if _find(name) is None]
    if missing:
        return f"needs {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)"
    if getpass.getuser() != "root":
        return "needs root, as whom Slurm's daemons run"
    try:
        pwd.getpwnam("munge")
    except KeyError:
        return "needs the user munge, which the package brings"
    return None


def _find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class SlurmCluster:
    """Slurm's commands, for the cluster in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf")}

    def run(self, *command: str, variables: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
        """What a command prints; it must end with 0."""
        environment = self.environment | dict(variables or {})
        result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`: JobState, Restarts, ExitCode, ..."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_until(self, condition: Callable[[], bool], what: str, seconds: float = 200.0) -> None:
        """Ask again and again; AssertionError with the daemons' logs after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.directory.glob("*.log")))
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{_answer(self, 'squeue')}\n{logs}")
            time.sleep(0.1)


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start the daemons, cancel in the end what still runs, and stop them. Skips the test, and says why, where there can be no Slurm."""
    if (reason := why_not()) is not None:
        pytest.skip(f"no Slurm here: {reason}")
    # Not pytest's directory: that is for its owner alone, and munged runs as another user.
    directory = Path(tempfile.mkdtemp(prefix="w1-slurm-"))
    directory.chmod(0o755)
    cluster = SlurmCluster(directory)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _configure(directory)
        try:
            _start_all(cluster, daemons)
        except AssertionError as error:
            pytest.skip(f"Slurm is installed and does not start here: {error}")
        yield cluster
        _answer(cluster, "scancel", "--user=root")
        _wait_for_an_empty_queue(cluster)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        shutil.rmtree(directory, ignore_errors=True)


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _configure(directory: Path) -> None:
    for name in ("munge", "state", "spool"):
        (directory / name).mkdir()
    ports = {"controller_port": free_port(), "node_port": free_port()}
    (directory / "slurm.conf").write_text(_CONFIGURATION.format(directory=directory, host=_host(), **ports))
    key = directory / "munge/key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for path in (key.parent, key):
        shutil.chown(path, "munge", "munge")


def _start_all(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    place = cluster.directory / "munge"
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    _start(cluster, daemons, "munged", "--foreground", *(f"--{option}={place / name}" for option, name in files.items()), user="munge")
    cluster.wait_until((place / "socket").exists, "munged has its socket", 20.0)
    _start(cluster, daemons, "slurmctld", "-D")
    _start(cluster, daemons, "slurmd", "-D", "-N", _host())
    cluster.wait_until(lambda: "idle" in _answer(cluster, "sinfo", "--noheader", "--format=%t"), "the node is idle", 60.0)


def _start(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]], name: str, *options: str, user: str | None = None) -> None:
    program = _find(name)
    assert program is not None
    # A session of its own: Ctrl-C in the tests must reach them through the cleanup only, which needs them.
    with (cluster.directory / f"{name}.log").open("w") as log:
        daemons.append(
            subprocess.Popen([program, *options], env=cluster.environment, stdout=log, stderr=log, user=user, start_new_session=True)
        )


def _answer(cluster: SlurmCluster, *command: str) -> str:
    """What a command prints, also while the controller does not answer yet."""
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=60).stdout


def _wait_for_an_empty_queue(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + 20
    while _answer(cluster, "squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(0.1)
