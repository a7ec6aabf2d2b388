"""The scripts that the images' RUN lines call, outside Docker: into temporary folders, without a network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import packaging
import pytest

from tests.docker.fake_packages import install, write_wheel

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = REPOSITORY / "docker" / "steps"


def step(name: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [str(STEPS / name), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get (Debian, Ubuntu)")
def test_system_packages_dry_run():
    result = step("system_packages.sh", "coreutils", DRY_RUN="1")
    if "Unable to locate package" in result.stderr:
        pytest.skip("this machine's package lists are empty")
    assert result.returncode == 0, result.stderr
    assert "coreutils" in result.stdout
    assert step("system_packages.sh").returncode == 1


@pytest.fixture
def root(tmp_path):
    """A file system with root alone in it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    (tmp_path / "etc" / "group").write_text("root:x:0:\n")
    for name in ("shadow", "gshadow"):
        (tmp_path / "etc" / name).write_text("root:*::\n" if name == "gshadow" else "root:*:19000:0:99999:7:::\n")
    return tmp_path


needs_root = pytest.mark.skipif(os.getuid() != 0 or shutil.which("useradd") is None, reason="needs root and useradd, as in the images")


@needs_root
def test_a_user_of_its_own(root):
    result = step("create_user.sh", "w1train", 1234, 2345, ROOT=str(root))
    assert result.returncode == 0, result.stderr
    assert "w1train:x:1234:2345:" in (root / "etc" / "passwd").read_text()
    assert "w1train:x:2345:" in (root / "etc" / "group").read_text()
    for folder in ("workspace/runs", "workspace/data", "home/w1train"):
        status = (root / folder).stat()
        assert (status.st_uid, status.st_gid) == (1234, 2345), folder


@needs_root
def test_an_id_that_is_taken_keeps_its_user(root):
    with (root / "etc" / "passwd").open("a") as file:
        file.write("ubuntu:x:1000:1000::/home/ubuntu:/bin/bash\n")
    with (root / "etc" / "group").open("a") as file:
        file.write("ubuntu:x:1000:\n")
    result = step("create_user.sh", "w1train", 1000, 1000, ROOT=str(root))
    assert (result.returncode, result.stdout) == (0, "create_user: 1000 is ubuntu already\n")
    assert "w1train" not in (root / "etc" / "passwd").read_text()
    assert (root / "workspace").stat().st_uid == 1000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["w1", "0", "1"], "not root's 0"),
        (["w1", "1", "0x1"], "ids are numbers"),
        (["-rf", "1", "1"], "not a user name"),
        (["w1"], "numeric"),
    ],
)
def test_users_that_are_refused(tmp_path, arguments, complaint):
    result = step("create_user.sh", *arguments, ROOT=str(tmp_path))
    assert result.returncode == 1
    assert complaint in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def uv():
    for candidate in (shutil.which("uv"), Path(sys.executable).with_name("uv")):
        if candidate and subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return str(candidate)
    pytest.skip("needs uv")


@pytest.fixture
def wheels(tmp_path, uv):
    """What docker/constraints-build.txt pins, as wheels; uv's is a door to this machine's."""
    folder = tmp_path / "wheels"
    for line in (REPOSITORY / "docker" / "constraints-build.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if version:
            script = f'#!/bin/sh\nexec "{uv}" "$@"\n' if name == "uv" else None
            # The walk over the requirements really needs this one.
            package = Path(packaging.__path__[0]) if name == "packaging" else None
            write_wheel(folder, name, version, script=script, package=package)
    return folder


@pytest.mark.slow
def test_an_environment_over_a_base_image(tmp_path, wheels):
    """create_environment.sh and install_packages.sh: the base's torch stays, what is too old is shadowed, what is absent comes, and what
    that requires too."""
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheels), "UV_NO_CACHE": "1"}
    prefix, base = tmp_path / "environment", tmp_path / "base"
    created = step("create_environment.sh", prefix, BASE_PYTHON=sys.executable, SYSTEM_SITE_PACKAGES="1", **offline)
    assert created.returncode == 0, created.stderr
    assert "include-system-site-packages = true" in (prefix / "pyvenv.cfg").read_text()
    assert f'exec "{prefix}/bin/python" -m torch.distributed.run "$@"' in (prefix / "bin" / "torchrun").read_text()

    site = next((prefix / "lib").glob("python3*")) / "site-packages"
    (site / "base.pth").write_text(f"{base}\n")
    install(base, "torch", "2.13.0a0+nv")
    install(base, "too-old", "1.0")
    write_wheel(wheels, "too-old", "2.5", ["torch"])
    write_wheel(wheels, "absent", "1.1", ["one-more>=3"])
    write_wheel(wheels, "one-more", "3.2")
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2.11", "too-old>=2", "absent"]\noptional-dependencies = {}\n'
    )
    (tmp_path / "pins.txt").write_text("absent==1.1\none-more==3.2\ntoo-old==2.5\n")

    arguments = (prefix, tmp_path / "pyproject.toml", tmp_path / "pins.txt", "", "torch")
    installed = step("install_packages.sh", *arguments, **offline)
    assert installed.returncode == 0, installed.stderr
    assert "all requirements are met after 2 rounds" in installed.stdout
    assert {path.name for path in site.glob("*.dist-info")} >= {"too_old-2.5.dist-info", "absent-1.1.dist-info", "one_more-3.2.dist-info"}
    assert not list(site.glob("torch*"))
    assert (base / "too_old-1.0.dist-info").is_dir(), "the base image is not written to"

    shutil.rmtree(base / "torch-2.13.0a0+nv.dist-info")
    refused = step("install_packages.sh", *arguments, **offline)
    assert refused.returncode == 1
    assert "which only the base image may provide; it has none" in refused.stderr

    # The CPU image's torch comes from an index of its own, where versions end in +cpu.
    write_wheel(tmp_path / "index" / "torch", "torch", "2.15.0+cpu")
    (tmp_path / "index" / "torch" / "index.html").write_text('<a href="torch-2.15.0+cpu-py3-none-any.whl">torch</a>')
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2.11"]\n')
    (tmp_path / "pins.txt").write_text("torch==2.15.0\n")
    from_index = step("install_packages.sh", *arguments[:4], TORCH_INDEX=f"file://{tmp_path}/index", UV_NO_CACHE="1")
    assert from_index.returncode == 0, from_index.stderr
    assert "after 0 rounds" in from_index.stdout
    assert (site / "torch-2.15.0+cpu.dist-info").is_dir()


def test_the_health_check_is_the_doctors_and_bounded(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$@ in $PWD"\nexit 1\n')
    python.chmod(0o755)
    result = step("health_check.sh", tmp_path)
    assert (result.returncode, result.stdout) == (1, "-m w1train.doctor --quick in /\n")
    python.write_text("#!/bin/sh\nexec sleep 30\n")
    assert step("health_check.sh", tmp_path, "0.2").returncode == 124


@pytest.mark.slow
def test_installing_w1train_builds_from_source_and_notes_the_version(tmp_path):
    """With stand-ins for uv and Python: what they are asked for."""
    prefix, source = tmp_path / "environment", tmp_path / "source"
    (source / "build").mkdir(parents=True)
    for name in ("uv", "python"):
        program = prefix / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\necho "{name} $@"\n')
        program.chmod(0o755)
    result = step("install_w1train.sh", prefix, source, "abc123")
    assert result.returncode == 0, result.stderr
    assert f"uv pip install --python {prefix}/bin/python --no-deps --no-build-isolation --compile-bytecode {source}" in result.stdout
    assert (prefix / "CODE_VERSION").read_text() == "abc123\n"
    assert not (source / "build").exists()
