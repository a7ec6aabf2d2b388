"""The command that creates the W&B workspace with this framework's charts, or prints its definition: w1train dashboard."""

from __future__ import annotations

import os
import sys

if not __package__ and not sys.flags.safe_path:
    # The script was started by its path. Python then looks for modules in its folder first, where some have the names of Python's own.
    sys.path[0] = os.path.realpath(f"{__file__}/../..")

import json

from w1train.config.argument_parser import ArgumentParser
from w1train.config.errors import UserError
from w1train.config.schema_operation import LoggingConfig
from w1train.reports.live_dashboard import definition, workspace
from w1train.runtime.command import command


@command("w1train dashboard")
def main() -> None:
    """Run the command."""
    parser = ArgumentParser(prog="w1train dashboard", description="Create a W&B workspace with this framework's charts.")
    parser.add_argument("--project", default=LoggingConfig().wandb_project, help="the runs' logging.wandb_project (default: %(default)s)")
    parser.add_argument("--entity", help="user or team that owns the project (default: the key's default entity)")
    parser.add_argument("--print", action="store_true", help="print the definition as JSON and create nothing")
    arguments = parser.parse_args()
    if arguments.print:
        print(json.dumps(definition(arguments.project), indent=2))
        return
    try:
        print(create(arguments.entity, arguments.project))
    except UserError as error:
        sys.exit(f"w1train dashboard: {error}")


def create(entity: str | None, project: str) -> str:
    """Create the workspace and return its URL.

    Raises:
        UserError: there is no key or no entity, wandb-workspaces is not installed, or W&B cannot be reached or refuses, or an
            environment variable of W&B cannot be used.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise UserError("WANDB_API_KEY is not set, and W&B stores workspaces only on its servers; --print shows what would be created")
    import wandb

    from w1train.records.wandb_log import reason_of

    try:
        owner = entity or wandb.Api().default_entity
        if owner is None:
            raise UserError("the key has no default entity: name one with --entity")
        made = workspace(owner, project)
        made.save()
    except ImportError as error:
        raise UserError(f"{error}: pip install 'w1train[dashboard]'") from error
    except UserError:
        raise
    except (wandb.Error, OSError, ValueError) as error:  # wandb raises ValueError for an environment variable that it cannot use
        raise UserError(f"W&B did not create the workspace: {reason_of(error)}") from error
    return str(made.url)


if __name__ == "__main__":
    main()
