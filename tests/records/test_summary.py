from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import w1train
from tests.reports.fake_run import write_fake_run
from w1train.records.summary import REQUIRED_FIELDS, _git_commit, versions, write_summary

REPOSITORY = Path(__file__).parents[2]


def test_the_keys_scripts_rely_on(tmp_path):
    summary = json.loads((write_fake_run(tmp_path / "run", 8) / "summary.json").read_text())
    assert summary["validation_elbo_bits_per_byte_start"] == summary["validation"]["start"]["elbo_bits_per_byte"]
    assert summary["validation_elbo_bits_per_byte_end"] == summary["validation"]["end"]["elbo_bits_per_byte"]
    assert summary["steps"] == 8
    assert summary["versions"] == versions()


def test_no_validation_and_nothing_finite(tmp_path):
    path = write_summary(tmp_path, dict.fromkeys(REQUIRED_FIELDS, math.nan) | {"validation": None, "versions": {"torch": "1"}})
    summary = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert summary["validation_elbo_bits_per_byte_end"] is None
    assert summary["tokens_per_second"] is None
    assert summary["versions"] == {"torch": "1"}


def test_a_forgotten_field_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="num_parameters"):
        write_summary(tmp_path, {"name": "x"})


def test_versions_name_what_ran():
    found = versions()
    assert found["w1train"] == w1train.__version__
    assert found["torch"]
    assert found["megatron-core"].startswith("0.19")


@pytest.mark.slow
def test_a_directory_that_passes_for_the_package():
    """If a command starts in the directory that contains a checkout named w1train, the ``__init__.py`` of the package does not run."""
    script = (
        f"import sys, types; package = types.ModuleType('w1train'); package.__path__ = [{str(REPOSITORY / 'w1train')!r}];"
        "sys.modules['w1train'] = package; import data_tools.tokenize, w1train.data.writer, w1train.diagnosis.packages;"
        "from w1train.config.recipe_files import packaged_directory; from w1train.records.summary import versions;"
        "print(versions()['w1train'], packaged_directory().name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [w1train.__version__, "recipes"]


def test_the_commit_is_that_of_this_checkout_only(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True).stdout.strip()

    monkeypatch.delenv("W1TRAIN_CODE_VERSION", raising=False)
    assert _git_commit(tmp_path) is None
    monkeypatch.setenv("W1TRAIN_CODE_VERSION", "v1-3-gabc")
    assert _git_commit(tmp_path) == "v1-3-gabc", "what an image says it was built from"
    monkeypatch.delenv("W1TRAIN_CODE_VERSION")
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "m")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert _git_commit(tmp_path) == head
    (tmp_path / "file").write_text("2")
    assert _git_commit(tmp_path) == f"{head}-dirty"
    inside = tmp_path / "site-packages"
    Path(inside).mkdir()
    assert _git_commit(inside) is None
