"""The command ``from-hf`` writes a model section that composes to the model that it was made from."""

import pytest

from tests.conversion.tiny_models import CASES, make
from w1train import convert
from w1train.config.compose import load_config
from w1train.conversion.families import model_from_config, read_config


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_recipe_is_the_model(case, tmp_path, capsys):
    make(case, tmp_path / "original")
    output = tmp_path / "recipes/model/mine.yaml"
    assert convert.main(["from-hf", str(tmp_path / "original"), "--output", str(output)]) == 0
    config = load_config(["recipe=demo", "model=mine", "data.sequence_length=32", "sampling.interval=0"], [str(tmp_path / "recipes")])
    expected = model_from_config(read_config(tmp_path / "original"), "it")
    assert config.model == expected
    assert convert.main(["from-hf", str(tmp_path / "original")]) == 0
    assert capsys.readouterr().out == output.read_text()
    assert "diffusion.mask_token_id=96" in output.read_text()


def test_what_is_there_is_not_overwritten(tmp_path, capsys):
    make("llama", tmp_path)
    (tmp_path / "mine.yaml").write_text("precious")
    assert convert.main(["from-hf", str(tmp_path), "--output", str(tmp_path / "mine.yaml")]) == 2
    assert "exists already: remove it or choose another name" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    before = (tmp_path / "config.json").read_bytes()
    assert convert.main(["from-hf", str(tmp_path), "--output", str(tmp_path / "config.json")]) == 2
    assert "is the input" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_directory_that_is_none(tmp_path, capsys):
    assert convert.main(["from-hf", str(tmp_path / "nowhere")]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
