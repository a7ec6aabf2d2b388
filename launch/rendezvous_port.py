"""The port at which the nodes of launch/torchrun.sh meet. Each run has its own, so that runs can share a node.

    python -m launch.rendezvous_port runs/w1_4b --host true

All nodes must find the same port. In a step of several nodes of Slurm it follows from the numbers of job and step. Otherwise it follows
from the run directory, as the command line names it, and from the user. MASTER_PORT replaces it.
"""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import argparse
import socket
import zlib
from collections.abc import Mapping, Sequence

from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.runtime.cluster import port_of_number, rendezvous_port
from w1train.runtime.command import command


def choose_port(run: str, environment: Mapping[str, str], user: int) -> int:
    """Return the port at which the nodes of a run meet.

    Args:
        run: the run directory.
        user: the number of the user.

    Raises:
        UserError: MASTER_PORT is not a port.
    """
    if port := environment.get("MASTER_PORT"):
        if not port.isdecimal() or not 0 < int(port) < 1 << 16:
            raise UserError(f"MASTER_PORT={port}: a port is a number from 1 to 65535")
        return int(port)
    if int(environment.get("SLURM_STEP_NUM_NODES", "1")) > 1:
        return rendezvous_port(environment)
    return port_of_number(zlib.crc32(f"{user} {os.path.abspath(run)}".encode("utf-8", "surrogateescape")))


def require_free(port: int) -> None:
    """Raise UserError if another program of this machine has the port. torchrun would show a traceback, in which the port is not named."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"the nodes cannot meet at port {port} of this machine ({reason}): set MASTER_PORT to another port, the same on all nodes"
        ) from error


@command("launch.rendezvous_port")
def main(arguments: Sequence[str]) -> int:
    """Print the port. Return the exit status: 0, or 2 if the port cannot be used."""
    parser = ArgumentParser(
        prog="python -m launch.rendezvous_port", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="the run directory")
    parser.add_argument("--host", choices=("true", "false"), required=True, help="whether the other nodes connect to this machine")
    options = parser.parse_args(arguments)
    try:
        port = choose_port(options.run, os.environ, os.getuid())
        if options.host == "true":
            require_free(port)
    except UserError as error:
        print(f"launch/torchrun.sh: {error}", file=sys.stderr)
        return 2
    print(port)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
