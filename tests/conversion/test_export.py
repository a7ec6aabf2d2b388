"""Exports for transformers: weights equal the imported ones bit for bit, and stock classes and the exported code load them."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoint_files import vouch
from tests.conversion.tiny_models import (
    CASES,
    LLAMA3,
    TOKENS,
    build,
    causal_logits,
    config_for,
    import_and_save,
    imported_tensors,
    logits,
    make,
    on_ranks,
    save_run,
    transformers,
)
from tests.distributed import run_distributed
from tests.parallel.layouts import open_gates, whole_tensors
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train import convert
from w1train.checkpoints.manifest import CheckpointError
from w1train.config.errors import UserError
from w1train.conversion.export import export as export_checkpoint
from w1train.conversion.exported_tokenizer import copy_companion
from w1train.conversion.sources import SafetensorsDirectory
from w1train.data.tokenizer import train_tokenizer
from w1train.engine.building import build_trained_model
from w1train.runtime.run_directory import RunDirectory

SAVED = {"tensor": 2, "pipeline": 2, "sequence": True}
CAUSAL = torch.ones(TOKENS.shape[1], TOKENS.shape[1], dtype=torch.bool).tril().expand(len(TOKENS), -1, -1)


def export(run: Path, output: Path, *arguments: str) -> None:
    """Run the command in another process."""
    command = ["to-hf", str(run), str(output), "--max-shard-size", "20KB", *arguments]
    assert run_distributed(lambda _rank, _size: convert.main(command), 1, process_group=False) == [0]


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    source = SafetensorsDirectory(directory)
    return {name: source.read(name, tuple(slice(0, extent) for extent in shape)) for name, shape in source.tensors.items()}


def assert_identical(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def loaded_logits(auto: str, directory: Path, cache: Path, **inputs: torch.Tensor) -> torch.Tensor:
    """Run ``auto.from_pretrained`` in another process, in which the model's code cannot import w1train."""

    def inside(_rank: int, _size: int) -> torch.Tensor:
        transformers.dynamic_module_utils.HF_MODULES_CACHE = str(cache)
        model, report = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        with torch.no_grad():
            return model.eval()(TOKENS, **inputs).logits

    return run_distributed(inside, 1, process_group=False)[0]


@pytest.mark.parametrize("case", slow_except(["llama3", "qwen2"], sorted(CASES)))
def test_what_comes_in_goes_out(case, tmp_path):
    """The stock class gives the same logits bit for bit, and the export can be imported again."""
    original, run, output = (tmp_path / name for name in ("original", "run", "output"))
    model = make(case, original)
    config = config_for(original, parallel=SAVED)
    on_ranks(import_and_save, config, run)
    export(run, output, "--format", "stock")
    assert_identical(read_all(output), read_all(original))
    assert json.loads((output / "config.json").read_text())["architectures"] == [type(model).__name__]
    assert torch.equal(loaded_logits("AutoModelForCausalLM", output, tmp_path), causal_logits(model))
    again = on_ranks(imported_tensors, config_for(output))[0]
    assert_identical(again, on_ranks(imported_tensors, config_for(original))[0])


@pytest.mark.parametrize("case", slow_except(["qwen3"], ["llama3", "qwen2", "qwen3"]))
def test_own_code_is_the_same_model_causally(case, tmp_path):
    original, run, output = (tmp_path / name for name in ("original", "run", "output"))
    model = make(case, original)
    on_ranks(import_and_save, config_for(original), run)
    export(run, output)
    assert_identical(read_all(output), read_all(original))
    found = loaded_logits("AutoModel", output, tmp_path, attention_mask=CAUSAL)
    torch.testing.assert_close(found, causal_logits(model), rtol=0, atol=1e-5)
    # Names and keys are those of Llama, so the stock class also loads the files if it is requested by name.
    found = loaded_logits(type(model).__name__, output, tmp_path)
    assert torch.equal(found, causal_logits(model))


def _trained(config, run):
    """Return a run with ordinary weights, modulations and biases, and its logits."""
    model = build_trained_model(config)
    with torch.no_grad():
        for parameter in model.stages[0].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    open_gates(model)
    save_run(config, model, run)
    return logits(config, model, causal=False, timesteps=0.3), whole_tensors(model, lambda parameter: parameter.data)


SCALED = {
    "rope_base": 50.0,
    "rope_scaling": "llama3",
    "rope_original_length": LLAMA3["original_max_position_embeddings"],
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_query_groups": 2, "qk_norm": True, "qkv_bias": True, "tie_embeddings": True, **SCALED},
        pytest.param({"conditioning": "none", "qkv_bias": True, "qk_norm": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_own_code_equals_the_trained_model(fields, tmp_path):
    """A model with adaLN and random modulations has the same weights bit for bit after export and import."""
    run, output = tmp_path / "run", tmp_path / "output"
    config = tiny_config(model=fields)
    ((expected, tensors),) = on_ranks(_trained, config, run)
    assert expected.isinf().any()
    assert expected[~expected.isinf()].std() > 0.5
    export(run, output)
    for timesteps in (torch.full((2,), 0.3), torch.full(TOKENS.shape, 0.3)):
        found = loaded_logits("AutoModel", output, tmp_path, timesteps=timesteps)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    if config.model.conditioning == "adaln":
        other = loaded_logits("AutoModel", output, tmp_path, timesteps=torch.full((2,), 0.6))
        assert not torch.allclose(other, expected, atol=1e-2)
    again = config_for(output)
    assert again.model.conditioning == config.model.conditioning
    for parallel in ({}, {"tensor": 2, "pipeline": 2}):
        again = config_for(output, parallel=parallel)
        assert_identical(on_ranks(imported_tensors, again)[0], tensors)


def test_own_code_knows_padding_and_the_share_of_masks(tmp_path):
    """A padded sample has the logits of the sample alone; without timesteps, t is the share of mask tokens among real ones."""
    run, output = tmp_path / "run", tmp_path / "output"
    config = tiny_config(diffusion={"mask_token_id": int(TOKENS[0, 1])})
    on_ranks(_trained, config, run)
    export(run, output)
    real = torch.ones_like(TOKENS)
    real[0, 15:] = 0
    padded = loaded_logits("AutoModel", output, tmp_path, attention_mask=real)
    given = loaded_logits("AutoModel", output, tmp_path, attention_mask=real, timesteps=torch.tensor([1 / 15, 0.0]))
    assert torch.equal(padded, given)
    cut = real.bool()[:, None, :] & real.bool()[:, :, None]
    alone = loaded_logits("AutoModel", output, tmp_path, attention_mask=cut, timesteps=torch.tensor([1 / 15, 0.0]))
    torch.testing.assert_close(padded[real.bool()], alone[real.bool()], rtol=0, atol=1e-5)
    assert not alone.isnan().any()


def test_exported_code_needs_nothing_of_w1train():
    for name in ("configuration_w1.py", "modeling_w1.py"):
        text = (Path(convert.__file__).parent / "conversion/remote_code" / name).read_text()
        assert not [line for line in text.splitlines() if line.startswith(("import", "from")) and ("w1train" in line or "megatron" in line)]


@pytest.mark.parametrize("place", slow_except(["copy, and another original"], ["original", "copy", "copy, and another original"]))
def test_the_tokenizer_goes_along(tmp_path, place):
    """The export has the run's tokenizer on a machine without the original file, and where another tokenizer has replaced it."""
    run, output, path, text = tmp_path / "run", tmp_path / "output", tmp_path / "tokenizer.json", "some text to train on"
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")

    # Tokenizers start threads, and this process could then fork no ranks.
    def encode_here(_rank, _size):
        tokenizer = train_tokenizer([text] * 9, 290)
        tokenizer.save(path)
        return tokenizer.encode(text), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id

    def encode_there(_rank, _size):
        found = transformers.AutoTokenizer.from_pretrained(output)
        return found(text).input_ids, found.eos_token_id, found.pad_token_id, found.mask_token_id

    expected = run_distributed(encode_here, 1, process_group=False)
    on_ranks(_trained, tiny_config(data={"tokenizer": str(path)}), run)
    if place != "original":
        path.rename(run / "tokenizer.json")
    if place == "copy, and another original":
        run_distributed(lambda _rank, _size: train_tokenizer(["another text"] * 9, 280).save(path), 1, process_group=False)
    export(run, output)
    assert (output / "chat_template.jinja").read_text() == "{{ messages }}"
    assert run_distributed(encode_there, 1, process_group=False) == expected
    hugging_face = json.loads((output / "config.json").read_text())
    assert [hugging_face[name] for name in ("eos_token_id", "pad_token_id", "mask_token_id")] == list(expected[0][1:])


@pytest.fixture(scope="module")
def conditioned_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("conditioned") / "run"
    on_ranks(_trained, tiny_config(), run)
    return run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--format", "stock"], "no stock class computes this model"),
        (["--format", "llama"], "model.conditioning is adaln"),
        (["--format", "qwen2"], "model.qkv_bias is false, and true in qwen2"),
        (["--checkpoint", "7"], "no checkpoint of step 7; it has: 1"),
        (["--checkpoint", "average"], "no checkpoint average; it has: 1"),
    ],
    ids=str,
)
def test_what_cannot_be_exported(conditioned_run, tmp_path, capfd, arguments, complaint):
    command = ["to-hf", str(conditioned_run), str(tmp_path / "output"), *arguments]
    assert run_distributed(lambda _rank, _size: convert.main(command), 1, process_group=False) == [2]
    assert complaint in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_wrong(conditioned_run, tmp_path, capsys):
    assert convert.main(["to-hf", str(tmp_path), str(tmp_path / "output")]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    assert convert.main(["to-hf", str(conditioned_run), str(tmp_path / "full")]) == 2
    assert "is there already and not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main(["to-hf", "a", "b", "--max-shard-size", "many"])
    assert "is no size such as 500MB or 5GB" in capsys.readouterr().err


@pytest.mark.parametrize("place", [".", "link", "dangling"])
def test_odd_names_of_the_output(conditioned_run, tmp_path, place):
    """The current directory, and links to a directory that is empty or not there, get a whole export. A link stays a link."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("new")
    leftover = tmp_path / ("new.partial" if place == "dangling" else "empty.partial")
    leftover.mkdir()
    for name in ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.partial"):
        (leftover / name).touch()

    def inside(_rank, _size):
        os.chdir(tmp_path / "empty" if place == "." else tmp_path)
        return convert.main(["to-hf", str(conditioned_run), place])

    assert run_distributed(inside, 1, process_group=False) == [0]
    output = tmp_path / ("new" if place == "dangling" else "empty")
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "configuration_w1.py", "model.safetensors", "modeling_w1.py"]
    assert (tmp_path / "link").is_symlink()
    assert not leftover.exists()


@pytest.mark.parametrize("kind", ["notes", "directory", "link", "file", "mount point"])
def test_places_of_others(conditioned_run, tmp_path, monkeypatch, kind):
    """What somebody else has put at the name of the directory in which an export is prepared is never removed."""
    partial = tmp_path / "output.partial"
    if kind in ("notes", "directory"):
        (partial / "config.json").mkdir(parents=True)
    if kind == "notes":
        (partial / "config.json").rmdir()
        (partial / "notes.txt").touch()
    elif kind == "link":
        (tmp_path / "data").mkdir()
        partial.symlink_to("data")
    elif kind == "file":
        partial.touch()
    elif kind == "mount point":
        (tmp_path / "output").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "output")
    before = sorted(tmp_path.rglob("*"))
    checkpoint = conditioned_run / "checkpoints/step_0000000001"
    with pytest.raises(UserError, match="mount point" if kind == "mount point" else "has other files: remove it"):
        export_checkpoint(RunDirectory(conditioned_run), checkpoint, tmp_path / "output", "w1", 1 << 30)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_not_exported(tmp_path, capfd):
    run = tmp_path / "run"
    on_ranks(_trained, tiny_config(), run)
    shard = next(run.glob("checkpoints/*/*.shards"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run_distributed(lambda _rank, _size: convert.main(["to-hf", str(run), str(tmp_path / "o")]), 1, process_group=False) == [2]
    assert "is damaged" in capfd.readouterr().err


def test_bf16_weights_stay_bf16(tmp_path):
    original, run, output = (tmp_path / name for name in ("original", "run", "output"))
    make("qwen3", original)
    config = config_for(original, training={"precision": "bf16"})
    on_ranks(lambda config: save_run(config, build(config), run), config)
    export(run, output)
    assert_identical(read_all(output), {name: tensor.bfloat16() for name, tensor in read_all(original).items()})
    assert json.loads((output / "config.json").read_text())["torch_dtype"] == "bfloat16"


NORM = "final_norm.weight"
WRONG_TENSORS = {
    "fewer layers": (lambda tensors: None, "unexpected: decoder.layers.1.input_layernorm.weight"),
    "a tensor less": (lambda tensors: tensors.pop(NORM), f"missing: {NORM}"),
    "a tensor more": (
        lambda tensors: tensors.update(more=tensors.pop(next(key for key in tensors if "exp_avg" in key))),
        "unexpected: more",
    ),
    "a dimension more": (
        lambda tensors: tensors[NORM].update(sizes=[32, 1], shards=[[*tensors[NORM]["shards"][0][:2], [0, 0], [32, 1]]]),
        f"{NORM} is [32, 1], not [32] as its configuration says",
    ),
    "a smaller tensor": (
        lambda tensors: tensors[NORM].update(sizes=[16], shards=[[*tensors[NORM]["shards"][0][:2], [0], [16]]]),
        f"{NORM} is [16], not [32] as its configuration says",
    ),
    "another type": (lambda tensors: tensors[NORM].update(dtype="float16"), f"{NORM} is torch.float16"),
    "whole numbers": (
        lambda tensors: [tensors[key].update(dtype="int32") for key in tensors if not key.startswith("optimizer.")],
        "is of type torch.int32; weights are of torch.float32, torch.bfloat16, torch.float16",
    ),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_are_not_those_of_the_configuration(conditioned_run, tmp_path, name):
    change, words = WRONG_TENSORS[name]
    checkpoint = shutil.copytree(conditioned_run / "checkpoints/step_0000000001", tmp_path / "checkpoint")
    index = json.loads((checkpoint / "shards.json").read_bytes())
    assert index["tensors"][NORM]["sizes"] == [32]
    change(index["tensors"])
    (checkpoint / "shards.json").write_text(json.dumps(index))
    if name == "fewer layers":
        text = (checkpoint / "config.yaml").read_text()
        assert "num_layers: 2\n" in text
        (checkpoint / "config.yaml").write_text(text.replace("num_layers: 2\n", "num_layers: 1\n"))
    vouch(checkpoint)
    with pytest.raises((UserError, CheckpointError)) as error:
        export_checkpoint(RunDirectory(conditioned_run), checkpoint, tmp_path / "output", "w1", 1 << 30)
    assert words in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_run_with_unknown_names_is_refused(conditioned_run, tmp_path, capsys):
    """Before anything is written, with the message of every command."""
    run = tmp_path / "run"
    shutil.copytree(conditioned_run, run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    text = (checkpoint / "config.yaml").read_text()
    assert "objective: diffusion\n" in text
    (checkpoint / "config.yaml").write_text(text.replace("objective: diffusion\n", "objective: bogus\n"))
    vouch(checkpoint)
    assert convert.main(["to-hf", str(run), str(tmp_path / "output"), "--format", "stock"]) == 2
    assert "diffusion.objective\n   found: 'bogus'\n   valid: one of: diffusion, autoregressive" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_to_itself_is_left_out(tmp_path, caplog):
    (tmp_path / "chat_template.jinja").symlink_to("chat_template.jinja")
    (tmp_path / "output").mkdir()
    copy_companion(tmp_path, "chat_template.jinja", tmp_path / "output", {}, {})
    assert "chat_template.jinja is left out of the export: it is a link" in caplog.text
    assert not list((tmp_path / "output").iterdir())
