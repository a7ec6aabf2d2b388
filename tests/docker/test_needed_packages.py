"""Which pins an image still needs: what the base has stays wherever it will do, and what must stay is never replaced."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from launch.needed_packages import PackageError, main, needed, project_requirements, read_pins
from tests.docker.fake_packages import install


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder that alone says what is installed."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


def needs(texts, pins, protected=()):
    return needed([Requirement(text) for text in texts], pins, protected)


def test_what_is_absent_is_needed_and_what_will_do_stays(base):
    install(base, "torch", "2.13.0a0+9186a08b2c.nv26.07")
    install(base, "rich", "13.1")
    pins = {"torch": "2.15.0", "rich": "15.0.0", "wandb": "0.31.0"}
    assert needs(["torch>=2.11", "rich>=13", "wandb>=0.18"], pins, ["torch"]) == ["wandb==0.31.0"]


def test_what_is_too_old_is_replaced_unless_it_is_protected(base):
    install(base, "numpy", "1.26.4")
    install(base, "torch", "2.10.0a0+x.nv25.12")
    assert needs(["numpy>=2"], {"numpy": "2.5.5"}) == ["numpy==2.5.5"]
    with pytest.raises(PackageError, match=r"w1train requires torch>=2\.11, which only the base image may provide; it has 2\.10"):
        needs(["torch>=2.11"], {"torch": "2.15.0"}, ["torch"])
    with pytest.raises(PackageError, match="it has none"):
        needs(["transformer_engine"], {}, ["transformer-engine"])


def test_requirements_are_followed_through_what_is_installed(base):
    install(base, "megatron-core", "0.19.2", ["torch>=2", "einops", "Weird.Name>=1; extra == 'dev'", "old; python_version < '3'"])
    install(base, "torch", "2.13.0", ["filelock>=3"])
    pins = {"einops": "0.8", "filelock": "4.2"}
    assert needs(["megatron-core"], pins) == ["einops==0.8", "filelock==4.2"]
    pins["weird-name"] = "1.5"
    assert needs(["megatron-core[dev]"], pins) == ["einops==0.8", "filelock==4.2", "weird-name==1.5"]


def test_circles_end(base):
    install(base, "one", "1", ["other"])
    install(base, "other", "1", ["one"])
    assert needs(["one"], {}) == []


@pytest.mark.parametrize(("pins", "complaint"), [({}, "has no pin"), ({"rich": "12"}, "is pinned to 12")])
def test_a_pin_that_is_missing_or_out_of_range_says_what_to_run(base, pins, complaint):
    with pytest.raises(PackageError, match=rf"w1train requires rich>=13, which {complaint}: run docker/compile_constraints\.sh"):
        needs(["rich>=13"], pins)


def test_the_command(base, tmp_path, capsys):
    pyproject, constraints = tmp_path / "pyproject.toml", tmp_path / "constraints.txt"
    pyproject.write_text('[project]\ndependencies = ["rich>=13"]\n[project.optional-dependencies]\ndali = ["dali-cuda>=2"]\n')
    constraints.write_text("# header\nrich==15.0.0\nDali_Cuda==2.4.0  # why\n")
    assert main([str(pyproject), "", str(constraints)]) == 0
    assert capsys.readouterr().out == "rich==15.0.0\n"
    assert main([str(pyproject), "dali", str(constraints)]) == 0
    assert capsys.readouterr().out == "dali-cuda==2.4.0\nrich==15.0.0\n"
    install(base, "rich", "15.0.0")
    install(base, "dali-cuda", "1.9")
    assert main([str(pyproject), "dali", str(constraints), "dali-cuda"]) == 1
    assert "it has 1.9" in capsys.readouterr().err


@pytest.mark.parametrize(("image", "extras"), [("gpu", ["cudnn", "dali", "data", "hf"]), ("cpu", ["data", "hf"])])
def test_the_pins_meet_pyproject(image, extras):
    repository = Path(__file__).resolve().parents[2]
    pins = read_pins(repository / "docker" / f"constraints-{image}.txt")
    wrong = []
    for requirement in project_requirements(repository / "pyproject.toml", extras):
        pin = pins.get(canonicalize_name(requirement.name))
        if (image, requirement.name) != ("gpu", "torch") and (pin is None or not requirement.specifier.contains(pin)):
            wrong.append(f"{requirement}: pinned {pin}")
    assert wrong == [], "run docker/compile_constraints.sh"
    from_the_base = {"torch", "triton", "transformer-engine", "apex", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"}
    assert not from_the_base & pins.keys() if image == "gpu" else "torch" in pins
