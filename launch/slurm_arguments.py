"""The command line of launch.slurm: options for Slurm before `--`, and arguments of w1train.pretrain after it. The mistakes of both are
reported together."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.check import checked_config, nsys_problems
from launch.slurm_script import Job, RunPlace, warning_seconds
from w1train.config.argument_parser import ArgumentParser
from w1train.config.credentials import mask_urls
from w1train.config.errors import ConfigurationError, Problem, closest, listing, raise_if_any
from w1train.config.schema import Config
from w1train.preflight.start_rules import machine_problems

PROGRAM = "launch.slurm"
DESCRIPTION = """Submit a run to Slurm. Each rank is a task. The job saves before its time limit and is requeued until the run ends.

  python -m launch.slurm --nodes 8 --partition gpu --time 24:00:00 -- recipe=w1_4b
  python -m launch.slurm --nodes 8 --container-image w1train.sqsh --dry-run -- recipe=w1_4b

The arguments of w1train.pretrain come after --. They are checked, for the number of ranks too, before anything is submitted. The submitted
script is kept as logs/job.sh in the run directory."""
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
_TIME_FORMS = "MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or DAYS-HOURS:MINUTES:SECONDS"
# Directives that launch.slurm writes itself, and the options that change them.
_OWN_DIRECTIVES = {
    "--job-name": "--job-name",
    "--nodes": "--nodes",
    "--ntasks": "--nodes and --ranks-per-node",
    "--ntasks-per-node": "--ranks-per-node",
    "--gpus-per-node": "--gpus-per-node",
    "--cpus-per-task": "--cpus-per-rank",
    "--partition": "--partition",
    "--account": "--account",
    "--qos": "--qos",
    "--time": "--time",
    "--signal": "health.stop_timeout, from which it follows",
    "--requeue": "nothing: it is the default",
    "--no-requeue": "--no-requeue",
    "--output": "runs_dir and name: logs are in the run directory",
    "--error": "runs_dir and name: logs are in the run directory",
    "--open-mode": "nothing: a requeued job appends",
    "--chdir": "the directory in which launch.slurm is called",
    "--dependency": "--chain",
    "--array": "nothing: one job is one run",
}


@dataclass(slots=True, frozen=True)
class Submission:
    """The job and the run that a command line describes."""

    job: Job
    run: RunPlace
    arguments: list[str]
    """Arguments of w1train.pretrain."""
    dry_run: bool
    missing: tuple[Problem, ...]
    """The problems of this machine: files, disks and GPUs that the run needs. The nodes of the job may have them."""


def parse(words: Sequence[str], directory: Path, code: Path | None = None) -> Submission:
    """Parse the command line. Does not return for --help.

    Args:
        directory: the directory that relative paths begin at.
        code: the checkout whose code the ranks run; None = the code that is installed in their environment.

    Raises:
        ConfigurationError: the options, the recipe, the overrides or the layout on the nodes have problems; it has all of them.
    """
    before, arguments = _split(words)
    known, unknown = _parser().parse_known_args(before)
    problems = [_unknown(word) for word in unknown] + [_with_password(word) for word in words if mask_urls(word) != word]
    job = _job(known, directory, problems)
    try:
        config: Config | None = checked_config(arguments, job.num_ranks if job.num_ranks > 0 else None)
    except ConfigurationError as error:
        problems += error.problems
        config = None
    if config is not None and (seconds := _seconds(job.time)) is not None and seconds <= warning_seconds(config.health.stop_timeout):
        valid = f"more than the {warning_seconds(config.health.stop_timeout)} s before its end at which the ranks begin to save"
        problems.append(Problem("--time", str(job.time), valid, "health.stop_timeout=30, for a small model"))
    if config is not None and known.nsys is not None and _is_ranks(known.nsys):
        problems += nsys_problems(known.nsys, config)
    raise_if_any(problems)
    assert config is not None
    run_directory = directory / config.runs_dir / config.name
    place = RunPlace(config.name, run_directory, directory, config.health.stop_timeout, code)
    return Submission(job, place, arguments, known.dry_run, tuple(machine_problems(config)))


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    return words[:end], words[end + 1 :]


def _with_password(word: str) -> Problem:
    """Return the problem of a word that has the password of a URL. Others may read the script, and Slurm keeps a copy of it; variables of
    launch.slurm's environment reach the job without being written into the script."""
    valid = "a command line without passwords of URLs, which would be in the job's script"
    key = word.partition("=")[0]
    return Problem(key, word, valid, f"export VARIABLE=URL in this shell, and after -- {key}='${{oc.env:VARIABLE}}', if it is a key")


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the options. All values are texts, so that wrong values are reported together later."""
    parser = ArgumentParser(prog=f"python -m {PROGRAM}", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", default="1")
    size.add_argument("--gpus-per-node", default="8", help="number of GPUs of each node; 0 for a run on CPUs (default: 8)")
    size.add_argument("--ranks-per-node", help="number of ranks on each node (default: one for each GPU, or 1)")
    size.add_argument("--cpus-per-rank", help="number of CPUs of each rank (default: the cluster's)")
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--qos")
    slurm.add_argument("--time", help=f"time limit of a job: {_TIME_FORMS}")
    slurm.add_argument("--job-name", help="name of the job (default: the run's name)")
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, such as --sbatch=--exclusive; may be repeated",
    )
    slurm.add_argument(
        "--srun",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option of srun for the ranks, such as --srun=--cpu-bind=cores; may be repeated",
    )
    _add_restart_options(parser)
    _add_job_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    return parser


def _add_restart_options(parser: argparse.ArgumentParser) -> None:
    again = parser.add_argument_group("restarts")
    again.add_argument(
        "--chain", default="1", metavar="N", help="submit N jobs, each of which waits for the job before it, instead of requeueing one job"
    )
    again.add_argument("--no-requeue", action="store_true", help="do not requeue the job, for clusters that do not allow it")
    again.add_argument(
        "--max-failures", default="3", metavar="N", help="give up after N attempts in a row without a new checkpoint (default: 3)"
    )


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    inside = parser.add_argument_group("in the job")
    inside.add_argument("--container-image", help="run the ranks in this image, with pyxis and enroot: a .sqsh file or REGISTRY#IMAGE:TAG")
    inside.add_argument(
        "--container-mounts",
        action="append",
        default=[],
        metavar="FROM:TO[:FLAGS]",
        help="another mount beside the code and the run directory; may be repeated",
    )
    inside.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="variable of the job's environment; may be repeated"
    )
    inside.add_argument(
        "--setup",
        action="append",
        default=[],
        metavar="LINE",
        help="shell line that runs before the ranks, such as 'module load cuda'; may be repeated",
    )
    inside.add_argument("--python", help="Python in the job (default: the Python that runs this command; in a container, python)")
    inside.add_argument("--nsys", nargs="?", const="0", metavar="RANKS", help="profile these ranks with Nsight Systems (default: rank 0)")


def _job(known: argparse.Namespace, directory: Path, problems: list[Problem]) -> Job:
    gpus = _count("--gpus-per-node", known.gpus_per_node, problems, least=0)
    in_container = known.container_image is not None
    if known.container_mounts and not in_container:
        problems.append(Problem("--container-mounts", listing(known.container_mounts), "only with --container-image"))
    problems += _problems_of_texts(known)
    return Job(
        nodes=_count("--nodes", known.nodes, problems),
        gpus_per_node=gpus,
        ranks_per_node=gpus or 1 if known.ranks_per_node is None else _count("--ranks-per-node", known.ranks_per_node, problems),
        cpus_per_rank=None if known.cpus_per_rank is None else _count("--cpus-per-rank", known.cpus_per_rank, problems),
        python=known.python or ("python" if in_container else sys.executable),
        job_name=known.job_name,
        partition=known.partition,
        account=known.account,
        qos=known.qos,
        time=known.time,
        container_image=_image(known.container_image, directory),
        container_mounts=tuple(known.container_mounts),
        environment=tuple(known.env),
        setup=tuple(known.setup),
        sbatch=tuple(known.sbatch),
        srun=tuple(known.srun),
        chain=_count("--chain", known.chain, problems),
        requeue=not known.no_requeue,
        max_failures=_count("--max-failures", known.max_failures, problems),
        nsys=known.nsys,
    )


def _count(option: str, text: str, problems: list[Problem], least: int = 1) -> int:
    if text.isdecimal() and int(text) >= least:
        return int(text)
    problems.append(Problem(option, text, f"a whole number >= {least}"))
    return 0


def _problems_of_texts(known: argparse.Namespace) -> list[Problem]:
    problems = []
    if known.time is not None and _seconds(known.time) is None:
        problems.append(Problem("--time", known.time, _TIME_FORMS, "24:00:00"))
    if known.nsys is not None and not _is_ranks(known.nsys):
        problems.append(Problem("--nsys", known.nsys, "ranks separated by commas, or all", "--nsys=0,8"))
    for text in known.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", text, re.DOTALL):
            problems.append(Problem("--env", text, "NAME=VALUE", "--env NCCL_DEBUG=INFO"))
    for text in known.container_mounts:
        if not re.fullmatch(r"[^:,]+:/[^:,]*(:[^:,]+)?", text):
            problems.append(
                Problem("--container-mounts", text, "FROM:TO or FROM:TO:FLAGS; one mount each, the option repeated", "/data:/data:ro")
            )
    for program, option in [*(("sbatch", option) for option in known.sbatch), *(("srun", option) for option in known.srun)]:
        name = option.partition("=")[0]
        if not name.startswith("--") or " " in name:
            problems.append(Problem(f"--{program}", option, f"one long option of {program}", f"--{program}=--exclusive"))
        elif program == "sbatch" and name in _OWN_DIRECTIVES:
            problems.append(Problem("--sbatch", option, f"an option that {PROGRAM} does not write itself", f"use {_OWN_DIRECTIVES[name]}"))
    return problems


def _is_ranks(text: str) -> bool:
    return re.fullmatch(r"all|\d+(,\d+)*", text) is not None


def _image(name: str | None, directory: Path) -> str | None:
    """Return the image as pyxis needs it. pyxis takes only names that begin with a slash or a dot for files, and would pull
    ``w1train.sqsh`` from Docker's registry."""
    if name is None or "#" in name or not name.endswith((".sqsh", ".sqfs", ".squashfs")):
        return name
    return str(directory / name)


def _unknown(word: str) -> Problem:
    if not word.startswith("-"):
        return Problem(
            word, "an argument before --", "options before --, and the recipe and overrides after it", f"python -m {PROGRAM} ... -- {word}"
        )
    options = [option for action in _parser()._actions for option in action.option_strings]
    match = closest(word.partition("=")[0], options)
    suggestion = f"did you mean {match}?" if match else f"--sbatch={word}, if it is an option of sbatch"
    return Problem(word, "an unknown option", "those that --help lists", suggestion)


def _seconds(time: str | None) -> int | None:
    """Return the seconds of a time in one of Slurm's forms, or None if it has no such form. Without days, one number means minutes, and two
    numbers mean minutes and seconds."""
    match = _TIME.fullmatch(time or "")
    if match is None:
        return None
    numbers = [int(number) for number in match["rest"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = numbers + [0] * (3 - len(numbers))
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    return (hours * 60 + minutes) * 60 + seconds
