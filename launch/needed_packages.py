"""The command that prints which pinned packages an image still needs: the packages whose installed versions do not meet w1train's
requirements.

    python needed_packages.py PYPROJECT EXTRAS CONSTRAINTS [PROTECTED ...]

It prints NAME==VERSION lines, or nothing if all requirements are met. Packages of the base image stay wherever they meet the requirements.
Requirements are read only from the metadata of installed packages, so the command is repeated after each installation until it prints
nothing. The Python of the environment runs it, and it needs `packaging`.
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
    """The pins cannot meet a requirement."""


def read_pins(constraints: Path) -> dict[str, str]:
    """Return the versions by canonical name from a file of NAME==VERSION lines."""
    lines = (line.partition("#")[0].strip() for line in constraints.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("==", 1) for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


def project_requirements(pyproject: Path, extras: Sequence[str]) -> list[Requirement]:
    """Return the requirements of the project and of its named extras that apply to this Python."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    requirements = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in requirements if requirement.marker is None or requirement.marker.evaluate()]


def unmet(requirements: Sequence[Requirement]) -> Iterator[tuple[Requirement, str, str | None]]:
    """Yield the requirements that are not met, directly or through installed packages: the requirement, the package that requires it, and
    the installed version or None."""
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
        # NVIDIA's torch has versions such as 2.13.0a0+..., which are pre-releases by their number.
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
    """Return NAME==VERSION for each package that has to be installed.

    Raises:
        PackageError: a protected package of the base image would have to change, or a requirement has no pin that meets it.
    """
    lines = set()
    for requirement, source, installed in unmet(requirements):
        name = canonicalize_name(requirement.name)
        if name in map(canonicalize_name, protected):
            found = installed or "none"
            raise PackageError(f"{source} requires {requirement}, which only the base image may provide; it has {found}: use another image")
        if name not in pins or not requirement.specifier.contains(pins[name], prereleases=True):
            pin = f"is pinned to {pins[name]}" if name in pins else "has no pin"
            raise PackageError(f"{source} requires {requirement}, which {pin}: run docker/compile_constraints.sh")
        lines.add(f"{name}=={pins[name]}")
    return sorted(lines)


def main(arguments: Sequence[str]) -> int:
    """Run the command. Return the exit status: 0, or 1 with the reason on stderr."""
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
