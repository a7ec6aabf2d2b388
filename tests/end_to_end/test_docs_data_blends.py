"""The commands and configurations of docs/data_blends.md, as they are printed."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.runs import BATCH, LENGTH, TinyRun
from w1train.config.compose import load_config
from w1train.data import build_packing

PAGE = (Path(__file__).parents[2] / "docs/data_blends.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def corpora(tiny_data, tmp_path_factory):
    """The datasets that the page names."""
    directory = tmp_path_factory.mktemp("docs")
    shutil.copytree(tiny_data, directory, dirs_exist_ok=True)
    for name in ("code", "held_out"):
        for suffix in ("bin", "idx", "json"):
            shutil.copy(directory / f"validation.{suffix}", directory / f"{name}.{suffix}")
    return directory


def test_the_command(corpora, monkeypatch, capsys):
    (command,) = blocks("bash")
    words = command.split()
    assert words[:3] == ["w1train", "data", "build-packing"]
    monkeypatch.chdir(corpora)
    assert build_packing.main(words[3:]) == 0
    assert os.path.exists(capsys.readouterr().out.strip())


def test_the_configurations(corpora, tmp_path):
    """The blend, its stages and the validation sets are one run."""
    blend, stages, validation, remote = blocks("yaml")
    recipe = yaml.safe_load((corpora / "recipes/recipe/tiny.yaml").read_text())
    for text in (blend, stages, validation):
        for section, values in yaml.safe_load(text).items():
            recipe[section] |= values
    # The text that is validated on is the second corpus's here: what the page keeps apart.
    recipe["data"]["blend"]["code"]["prefix"] = "train"
    recipe["data"]["blend"]["web"]["prefix"] = "train2"
    for suffix in ("bin", "idx", "json"):
        shutil.copy(corpora / f"train.{suffix}", corpora / f"train2.{suffix}")
    (corpora / "recipes/recipe/page.yaml").write_text("# @package _global_\n# The page's.\n" + yaml.safe_dump(recipe, sort_keys=False))
    run = TinyRun(corpora, tmp_path / "runs")
    run.train("recipe=page").require(0)
    records = run.train_records()
    assert records[-1]["tokens"] == 2048 + 1024
    code = [record["corpus_tokens/code"] for record in records]
    assert abs(code[2048 // (BATCH * LENGTH) - 1] - 204.8) <= 2 * LENGTH
    assert code[-1] - code[2048 // (BATCH * LENGTH) - 1] == 1024
    assert any("elbo/held_out" in record for record in run.metrics())
    overrides = [f"data.{key}={value}" for key, value in yaml.safe_load(remote)["data"].items()]
    assert load_config(["recipe=demo", *overrides]).data.cache_directory == "/local/cache"
