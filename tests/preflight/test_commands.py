"""The commands that check a machine before they start ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import check, slurm
from w1train import pretrain
from w1train.config.command_line import parse_command_line
from w1train.config.errors import ConfigurationError
from w1train.preflight.start_rules import run_rules

REPOSITORY = Path(__file__).resolve().parents[2]
# torch or megatron-core would take seconds to import.
SCRIPT = """\
import sys
from w1train import pretrain
try:
    status = pretrain.main(sys.argv[1:])
except SystemExit as error:
    status = error.code
heavy = {"torch", "megatron", "wandb", "transformers"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else status)
"""


def test_three_missing_files_are_one_list_before_torch_is_imported(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, "recipe=w1_4b", "training.bogus=1", "parallel.tensor=2", "checkpoint.keep=1"],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    listed = re.findall(r"^\d+\. (\S+)$", result.stderr, re.MULTILINE)
    files = ["data.tokenizer", "data.train", "data.validation"]
    assert [key for key in listed if key != "runs_dir"] == ["training.bogus", "parallel.tensor", *files]  # this disk may be too small
    for name in ("tokenizer.json", "train.bin", "validation.bin"):
        assert f"{tmp_path}/data/{name}" in result.stderr
    assert "w1train train --nproc 2 ... starts 2 ranks" in result.stderr
    assert result.stderr.count("w1train data tokenize --input CORPUS") == 2
    assert not list(tmp_path.iterdir())


def test_a_printed_configuration_needs_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_command_line(["recipe=demo", "--cfg", "job"], run_rules=lambda _counts: run_rules(3, 3)).action == "print_config"


@pytest.mark.parametrize(
    ("variables", "early"),
    [
        ({}, True),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, True),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, False),
        ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False),
    ],
)
def test_rank_0_refuses_early_only_if_no_rank_would_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], early: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "run", lambda config, max_steps: 0)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    outcomes = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        try:
            outcomes.append(pretrain.main(["recipe=demo", "training.micro_batch_size=4"]))
        except SystemExit as error:
            outcomes.append(error.code)
    assert outcomes == ([2, 0] if early else [0, 0])
    assert capsys.readouterr().err.count("data.tokenizer") == early


def test_the_check_of_launchers_looks_at_this_machine_if_all_ranks_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check.main(["--ranks", "2", "--", "recipe=demo"]) == 0
    assert check.main(["--ranks", "2", "--ranks-here", "2", "--", "recipe=demo"]) == 2
    assert f"tokenizer {tmp_path}/runs/demo-data/tokenizer.json cannot be read" in capsys.readouterr().err


def test_a_flag_that_only_prints_is_named_behind_other_flags() -> None:
    with pytest.raises(ConfigurationError, match=r"1\. --list\n   found: a flag that only prints") as error:
        check.checked_config(["--max-steps", "3", "recipe=demo", "--list"], None)
    assert "try:   w1train train --max-steps 3 recipe=demo --list" in str(error.value)


def test_a_submission_warns_of_what_only_the_nodes_may_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert slurm.main(["--gpus-per-node=0", "--dry-run", "--", "recipe=demo"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("#!/bin/bash\n")
    assert "data.tokenizer" not in output.out
    assert output.err.startswith(
        "launch.slurm: warning: the job will fail unless its nodes have what this machine lacks:\n1. data.tokenizer\n"
    )
