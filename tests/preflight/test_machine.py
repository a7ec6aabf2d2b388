"""Directories, disks, devices and initial weights."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.manifest import MANIFEST
from w1train.config.errors import Problem
from w1train.config.schema import Config
from w1train.config.schema_operation import CheckpointConfig
from w1train.config.serialization import config_to_yaml
from w1train.planning.checkpoint_sizes import checkpoint_bytes, most_checkpoints
from w1train.preflight import disks, visible_gpus
from w1train.preflight.start_rules import machine_problems
from w1train.preflight.start_weights import weights_rule

Usage = namedtuple("Usage", "total used free")


def keys(problems: list[Problem]) -> list[str]:
    return [problem.key for problem in problems]


def begin(config: Config) -> Path:
    """Make a complete checkpoint of the run, as far as its name and manifest say it."""
    checkpoint = step_path(Path(config.runs_dir) / config.name / "checkpoints", 3)
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).touch()
    return checkpoint


def test_nothing_is_wrong_with_a_machine_that_has_everything(config: Config) -> None:
    assert machine_problems(config) == []


def test_a_run_directory_below_a_file(config: Config, directory: Path) -> None:
    config.runs_dir = "corpus.txt/runs"
    (problem,) = machine_problems(config)
    assert problem.key == "runs_dir"
    assert problem.found == f"{directory}/corpus.txt/runs/tiny, but {directory}/corpus.txt is not a directory"


def test_a_directory_without_permission(config: Config, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, to whom every directory is open."""
    config.data.cache_directory = "cache/of/data"
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and path == directory))
    first, second = disks.directories_rule(config)
    assert (first.key, first.found) == ("runs_dir", f"{directory}/runs/tiny, but this user may not write to {directory}")
    assert (second.key, second.suggestion) == ("data.cache_directory", "data.cache_directory=/another/directory")
    assert not (directory / "runs").exists()


def test_space_for_the_checkpoints_of_a_new_run(config: Config, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.checkpoint = CheckpointConfig(interval=10, keep=2)
    need = 3 * checkpoint_bytes(config)
    free = [need]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free[0]) if path == directory else pytest.fail(str(path)))
    assert list(disks.space_rule(config)) == []
    free[0] = need - 1
    (problem,) = disks.space_rule(config)
    assert problem.key == "runs_dir"
    assert f"GiB free in {directory}" in problem.found
    assert "up to 3 checkpoints of" in problem.valid
    free[0] = checkpoint_bytes(config)
    assert list(disks.space_rule(config, max_steps=10)) == [], "a trial of ten steps has one checkpoint"
    (problem,) = machine_problems(config, max_steps=11)
    assert "up to 2 checkpoints of" in problem.valid
    begin(config)
    assert list(disks.space_rule(config)) == []


@pytest.mark.parametrize(
    ("settings", "num_steps", "expected"),
    [
        (CheckpointConfig(interval=10, keep=2), 5, 1),
        (CheckpointConfig(interval=10, keep=2), 15, 2),
        (CheckpointConfig(interval=10, keep=2), 100, 3),
        (CheckpointConfig(interval=10, keep=2, keep_every=50), 100, 2 + 1 + 1),  # 50 and 100 for ever, 90, and the one being written
        (CheckpointConfig(interval=10, keep=2, keep_every=10), 100, 10),
        (CheckpointConfig(interval=10, keep=50), 100, 10),
        (CheckpointConfig(interval=1, keep=3), 10**9, 4),
    ],
)
def test_the_number_of_checkpoints(settings: CheckpointConfig, num_steps: int, expected: int) -> None:
    assert most_checkpoints(settings, num_steps) == expected


def test_invalid_sizes_are_left_to_their_own_rule(config: Config) -> None:
    config.model.num_attention_heads = 0
    config.training.global_batch_size = 0
    config.training.initial_weights = "nowhere"
    assert keys(machine_problems(config)) == ["training.initial_weights"]


def test_initial_weights_that_are_not_there(config: Config, directory: Path) -> None:
    config.training.initial_weights = "Qwen/Qwen3-0.6B"
    (problem,) = weights_rule(config)
    assert problem.found == f"{directory}/Qwen/Qwen3-0.6B is no directory"
    assert (problem.suggestion or "").endswith(f"hf download Qwen/Qwen3-0.6B --local-dir {directory}/Qwen/Qwen3-0.6B")
    begin(config)
    assert list(weights_rule(config)) == []


def test_initial_weights_of_another_model(config: Config, directory: Path) -> None:
    checkpoint = begin(config)
    (checkpoint / "config.yaml").write_text(config_to_yaml(config))
    config.name, config.training.initial_weights = "second", str(checkpoint)
    assert list(weights_rule(config)) == []
    config.model.num_layers, config.model.ffn_hidden_size = 3, 64
    assert keys(list(weights_rule(config))) == ["model.num_layers", "model.ffn_hidden_size"]


def test_a_hugging_face_directory_without_weights(config: Config, directory: Path) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 272}
    (directory / "hf").mkdir()
    (directory / "hf/config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes}))
    config.training.initial_weights = "hf"
    (problem,) = weights_rule(config)
    assert problem.found == f"{directory}/hf has no *.safetensors"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The device files of a machine, and a torch with CUDA."""
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(visible_gpus, "_DEVICES", tmp_path / "dev")
    monkeypatch.setattr(visible_gpus, "_torch_is_for_cpus", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "dev"


@pytest.mark.parametrize(
    ("files", "visible", "expected"),
    [
        ((), None, 0),
        (("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"), None, 2),
        (("nvidia0", "nvidia1"), "1", 1),
        (("nvidia0", "nvidia1"), "", 0),
        (("nvidia0", "nvidia1"), "-1", 0),
        (("nvidia0",), "0,1", 1),
        (("nvidia0",), "MIG-89c850dc", None),
        (("kfd",), None, None),
        (("dxg",), None, None),
    ],
)
def test_the_number_of_gpus(
    machine: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], visible: str | None, expected: int
) -> None:
    for name in files:
        (machine / name).touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus.num_gpus() == expected


def test_a_torch_without_cuda_uses_no_gpu(machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").touch()
    spec = type("Spec", (), {"origin": str(package / "__init__.py")})
    monkeypatch.setattr(visible_gpus, "find_spec", lambda name: spec)
    for line, expected in {"cuda: Optional[str] = None": True, "cuda: Optional[str] = '12.8'": False}.items():
        (package / "version.py").write_text(f"debug = False\n{line}\nhip: Optional[str] = None\n")
        assert visible_gpus._torch_is_for_cpus() == expected


def test_more_ranks_than_gpus(config: Config, machine: Path) -> None:
    for name in ("nvidia0", "nvidia1"):
        (machine / name).touch()
    assert list(visible_gpus.device_rule(2)(config)) == []
    (problem,) = visible_gpus.device_rule(4)(config)
    assert (problem.key, problem.found) == ("the GPUs of this machine", "2")
    assert problem.suggestion == "start 2 ranks, or CUDA_VISIBLE_DEVICES= to train on the CPU"


def test_options_that_need_a_gpu(config: Config, machine: Path) -> None:
    assert list(visible_gpus.device_rule(4)(config)) == []
    config.attention.backend, config.training.fp8 = "cudnn", "blockwise"
    assert keys(list(visible_gpus.device_rule(1)(config))) == ["attention.backend", "training.fp8"]
