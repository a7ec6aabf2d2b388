"""The command that examines a machine: what is installed, what works and how fast it is, and under torchrun or srun, whether all ranks can
communicate.

    w1train doctor
    w1train doctor --quick
    torchrun --standalone --nproc-per-node 8 -m w1train.doctor --json
    srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --gpu-bind=none python -m w1train.doctor

The exit status is 1 if something does not work, and otherwise 0. What is only absent or slow is reported, and does not change the status.
--quick is for health checks: it imports packages and queries devices, and runs nothing on a GPU that may be training.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError, first_line
from w1train.diagnosis.collectives import collective_section, initialize
from w1train.diagnosis.devices import device_section, driver_version
from w1train.diagnosis.findings import Finding, Section, as_dict, failures, show
from w1train.diagnosis.host import host_section
from w1train.diagnosis.kernel_findings import kernel_section
from w1train.diagnosis.packages import installed_version, package_section
from w1train.runtime.cluster import discover_ranks
from w1train.runtime.command import command
from w1train.runtime.device import device_name, select_device

_SAME_EVERYWHERE = ("torch", "megatron-core", "triton", "transformer-engine", "nvidia-cudnn-frontend")


@command("w1train doctor")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, 1 if something does not work, 2 if the command was started wrongly."""
    args = _parse(arguments)
    logging.basicConfig(format="%(message)s", level=logging.ERROR, stream=sys.stderr)
    try:
        discover_ranks()
        sections = examine(args.runs_dir, quick=args.quick, seconds=args.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        if args.json:
            print(json.dumps(as_dict(sections)))
        else:
            show(sections, Console(highlight=False))
    return 1 if any(failures(sections)) else 0


def examine(runs_dir: Path, *, quick: bool, seconds: float) -> list[Section]:
    """Return all findings. Under torchrun every rank tries its kernels and the collectives. Rank 0 alone examines the rest, last, so that
    its timings and the other ranks' work do not disturb each other."""
    if quick:
        return [package_section(quick=True), device_section(torch.device("cpu"), quick=True), host_section(runs_dir, quick=True)]
    device = select_device()
    kernels = kernel_section(device)
    together = [] if os.environ.get("WORLD_SIZE", "1") == "1" else [_together(device, seconds, runs_dir, kernels)]
    if os.environ.get("RANK", "0") != "0":
        return [kernels, *together]
    return [package_section(quick=False), device_section(device, quick=False), kernels, host_section(runs_dir, quick=False), *together]


def _together(device: torch.device, seconds: float, runs_dir: Path, kernels: Section) -> Section:
    """Return the findings about the ranks together. If a rank has died or does not come, the other ranks report it."""
    same = {name: installed_version(name) or "absent" for name in _SAME_EVERYWHERE}
    same |= {"device": device_name(device), "driver": driver_version()}
    failed = [finding.name for finding in failures([kernels])]
    # Rank 0 reports its own host in full elsewhere.
    looks = os.environ.get("LOCAL_RANK", "0") == "0" and os.environ["RANK"] != "0"
    findings = host_section(runs_dir, quick=True).findings if looks else []
    warned = [f"{finding.name} {finding.value}" for finding in findings if finding.status == "warning"]
    try:
        initialize(device)
        section = collective_section(device, seconds, same, failed, warned)
        dist.destroy_process_group()
    except RuntimeError as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        finding = Finding("collectives", f"failed on rank {os.environ['RANK']}", "failed", reason)
        return Section(f"{os.environ['WORLD_SIZE']} ranks on {device.type}", [finding])
    return section


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(prog="w1train doctor", description="Report what works on this machine, and how fast.")
    parser.add_argument(
        "--quick", action="store_true", help="only import packages and query devices, for health checks; nothing runs on a GPU"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), metavar="PATH", help="directory whose disk is timed (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="seconds to measure collectives for, under torchrun (default: %(default)s)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
