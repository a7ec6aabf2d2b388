"""Which of the pinned packages an image still needs: what w1train requires, and what is installed does not meet.

    python needed_packages.py PYPROJECT EXTRAS CONSTRAINTS [PROTECTED ...]

Prints NAME==VERSION lines, nothing when all requirements are met. What the base image has stays wherever it will do: requirements are
followed through the metadata of installed packages alone, so the command is repeated after each installation until it prints nothing.
Run by the Python of the environment; needs `packaging`.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class PackageError(Exception):
    """What is required cannot be had from the pins."""


def read_pins(constraints: Path) -> dict[str, str]:
    """Versions by canonical name, of NAME==VERSION lines."""
    lines = (line.partition("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==", 1) for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


def project_requirements(pyproject: Path, extras: Sequence[str]) -> list[Requirement]:
    """Of the project and of its named extras, those for this Python."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    requirements = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in requirements if requirement.marker is None or requirement.marker.evaluate()]


def unmet(requirements: Sequence[Requirement]) -> Iterator[tuple[Requirement, str, str | None]]:
    """(requirement, who requires it, installed version or None), through all that is installed."""
    waiting = [(requirement, "w1train") for requirement in requirements]
    seen = set()
    while waiting:
        requirement, source = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        try:
            found = metadata.distribution(requirement.name)
        except metadata.PackageNotFoundError:
            yield requirement, source, None
            continue
        # NVIDIA's torch is 2.13.0a0+...: a pre-release by its number.
        if not requirement.specifier.contains(found.version, prereleases=True):
            yield requirement, source, found.version
            continue
        waiting += [(needed, requirement.name) for needed in _requirements_of(found, requirement.extras)]


def _requirements_of(found: metadata.Distribution, extras: set[str]) -> Iterator[Requirement]:
    for text in found.requires or []:
        needed = Requirement(text)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield needed


def needed(requirements: Sequence[Requirement], pins: dict[str, str], protected: Sequence[str]) -> list[str]:
    """NAME==VERSION of what has to be installed.

    Raises:
        PackageError: a package that must stay as the base image has it is in the way, or there is no pin that will do.
    """
    lines = set()
    for requirement, source, installed in unmet(requirements):
        name = canonicalize_name(requirement.name)
        if name in map(canonicalize_name, protected):
            found = installed or "none"
            raise PackageError(f"{source} requires {requirement}, which the base image alone may bring; it has {found}: take another one")
        if name not in pins or not requirement.specifier.contains(pins[name], prereleases=True):
            pin = f"is pinned to {pins[name]}" if name in pins else "has no pin"
            raise PackageError(f"{source} requires {requirement}, which {pin}: run docker/compile_constraints.sh")
        lines.add(f"{name}=={pins[name]}")
    return sorted(lines)


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0, or 1 with the reason."""
    pyproject, extras, constraints, *protected = arguments
    requirements = project_requirements(Path(pyproject), [extra for extra in extras.split(",") if extra])
    try:
        lines = needed(requirements, read_pins(Path(constraints)), protected)
    except PackageError as error:
        print(f"needed_packages: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
