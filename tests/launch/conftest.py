"""Slurm's commands, for tests that want to see how they are called."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest


class Slurm:
    """Stand-ins for Slurm's commands on PATH, which write down how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls_file = directory / "calls"
        directory.mkdir()

    def command(self, name: str, body: str) -> None:
        """Put a command on PATH; ``body`` is bash."""
        path = self.directory / name
        note = f'{{ printf %s {name}; printf " %q" "$@"; echo; }} >>{self.calls_file}'
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call so far."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [words[1:] for line in lines if (words := shlex.split(line))[0] == name]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """PATH has no other programs than the system's."""
    commands = Slurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{commands.directory}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return commands
