"""The outputs of exports mean what config.json says, and the exported forward gives w1train's own predictions position by position."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from tests.conversion.test_export import CAUSAL, export, loaded_logits
from tests.conversion.tiny_models import CASES, TOKENS, build, config_for, logits, make, on_ranks, save_run, transformers
from tests.distributed import run_distributed
from tests.parallel.layouts import open_gates
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train.config.schema import StageConfig
from w1train.engine.building import build_trained_model
from w1train.inference.predictor import BlockPredictor, Predictor

MASK = 14
LENGTH = 20
CLEAN = torch.randint(16, 96, (2, LENGTH), generator=torch.Generator().manual_seed(0))
NOISY = CLEAN.masked_fill(torch.rand(CLEAN.shape, generator=torch.Generator().manual_seed(1)) < 0.6, MASK)
NOISY[:, 3::4] = MASK  # no block of four tokens is without a mask token
KEYS = ("process", "prediction", "shift", "block_size", "block_index", "clean_attention", "noisy_attention")


def _save_and_predict(config, run, predict):
    """Save a run with ordinary weights and open gates, and return ``predict(predictor)``."""
    model = build_trained_model(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.stages[0].parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    open_gates(model)
    save_run(config, model, run)
    predictor = Predictor(config, list(model.chunks))
    with predictor.evaluating():
        return predict(predictor)


def _saved_and_exported(config, predict, tmp_path) -> tuple[object, Path]:
    run, output = tmp_path / "run", tmp_path / "output"
    (found,) = on_ranks(_save_and_predict, config, run, predict)
    export(run, output)
    return found, output


def _own_code(directory: Path, cache: Path, inputs: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Return the exported model's logits of several inputs, from a process that cannot import w1train."""

    def inside(_rank, _size):
        transformers.dynamic_module_utils.HF_MODULES_CACHE = str(cache)
        model = transformers.AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
        with torch.no_grad():
            return [model(**given).logits for given in inputs]

    return run_distributed(inside, 1, process_group=False)[0]


def _assert_same(found, expected):
    assert expected[expected.isfinite()].std() > 0.3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings", slow_except([(False, "adaln"), (True, "none")], itertools.product([False, True], ["adaln", "none"])), ids=str
)
def test_masked_diffusion(settings, tmp_path):
    shift, conditioning = settings
    config = tiny_config(diffusion={"shift": shift}, model={"conditioning": conditioning})
    shares = (NOISY == MASK).float().mean(dim=1)
    expected, output = _saved_and_exported(config, lambda predictor: predictor(NOISY, shares), tmp_path)
    described = json.loads((output / "config.json").read_text())
    assert [described[key] for key in KEYS] == ["masked diffusion", "full", shift, None, None, None, "bidirectional"]
    real = torch.ones(2, LENGTH + 3, dtype=torch.long)
    real[:, :3] = 0
    padded = torch.nn.functional.pad(NOISY, (3, 0), value=5)
    whole, given, after_padding = _own_code(
        output, tmp_path, [{"input_ids": NOISY}, {"input_ids": NOISY, "timesteps": shares}, {"input_ids": padded, "attention_mask": real}]
    )
    _assert_same(whole, expected)
    _assert_same(given, expected)
    _assert_same(after_padding[:, 3:], expected)


BLOCKS = {
    "tokens": {"block_size": 1},
    "blocks": {"block_size": 4},
    "blocks, shifted": {"block_size": 8, "shift": True},
    "blocks of the sample, the last short": {"block_size": 8, "block_index": "sample"},
    "causal clean tokens": {"block_size": 4, "clean_attention": "token_causal"},
    "causal, shifted": {"block_size": 4, "clean_attention": "token_causal", "noisy_attention": "causal", "shift": True},
}


_BLOCKS_IN_EACH_RUN = [("blocks", "adaln"), ("blocks of the sample, the last short", "adaln"), ("causal, shifted", "none")]


def _starts(size):
    return range(0, LENGTH, size)


def _predict_blocks(predictor):
    """Return the logits of every block, [b, l, v], after clean blocks."""
    blocks, found = BlockPredictor(predictor), []
    size = blocks.block_size
    blocks.start(LENGTH, size)
    for start in _starts(size):
        noisy = NOISY[:, start : start + size]
        found.append(blocks.predict_block(noisy, (noisy == MASK).float().mean(dim=1)))
        if start + size < LENGTH:
            blocks.append(CLEAN[:, start : start + size])
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("settings", slow_except(_BLOCKS_IN_EACH_RUN, itertools.product(BLOCKS, ["adaln", "none"])), ids=str)
def test_block_diffusion(settings, tmp_path):
    """Each block after clean blocks, with anything behind it: later blocks change nothing."""
    name, conditioning = settings
    given = BLOCKS[name]
    config = tiny_config(diffusion={"timestep_per": "block", **given}, model={"conditioning": conditioning})
    expected, output = _saved_and_exported(config, _predict_blocks, tmp_path)
    described = json.loads((output / "config.json").read_text())
    assert {key: described[key] for key in given} == given
    size = given["block_size"]
    canvases = [torch.cat([CLEAN[:, :start], NOISY[:, start : start + size], NOISY[:, start + size :]], dim=1) for start in _starts(size)]
    inputs = [{"input_ids": canvas[:, : start + size]} for canvas, start in zip(canvases, _starts(size), strict=True)]
    inputs += [{"input_ids": canvas} for canvas in canvases]
    found = _own_code(output, tmp_path, inputs)
    for part in (found[: len(canvases)], found[len(canvases) :]):
        _assert_same(torch.cat([whole[:, s : s + size] for whole, s in zip(part, _starts(size), strict=True)], dim=1), expected)


def test_block_diffusion_after_padding_and_at_given_timesteps(tmp_path):
    """One t for each sample is that of its noisy block alone; blocks are counted from the first real token."""
    config = tiny_config(diffusion={"timestep_per": "block", "block_size": 8, "shift": True})
    expected, output = _saved_and_exported(config, _predict_blocks, tmp_path)
    canvas = torch.cat([CLEAN[:, :8], NOISY[:, 8:16]], dim=1)
    t = (canvas[:, 8:] == MASK).float().mean(dim=1)
    per_token = torch.cat([torch.zeros(2, 8), t[:, None].expand(-1, 8)], dim=1)
    real = torch.ones(2, 19, dtype=torch.long)
    real[:, :3] = 0
    padded = torch.nn.functional.pad(canvas, (3, 0), value=MASK)
    first, second, third = _own_code(
        output,
        tmp_path,
        [
            {"input_ids": canvas, "timesteps": t},
            {"input_ids": canvas, "timesteps": per_token},
            {"input_ids": padded, "attention_mask": real},
        ],
    )
    for found in (first, second, third[:, 3:]):
        _assert_same(found[:, 8:], expected[:, 8:16])


def test_documents_of_a_row_are_apart(tmp_path):
    """Blocks of two documents have a t of their own, and see no other document, where ``position_ids`` restart."""
    config = tiny_config(diffusion={"timestep_per": "block", "block_size": 8})
    _, output = _saved_and_exported(config, lambda _predictor: None, tmp_path)
    row = torch.cat([NOISY[:1, :11], CLEAN[:1, 11:]], dim=1)
    positions = torch.cat([torch.arange(11), torch.arange(LENGTH - 11)])[None]
    inside = torch.block_diag(torch.ones(11, 11), torch.ones(LENGTH - 11, LENGTH - 11)).bool()
    blocks = (inside & (positions[0] // 8 <= positions[0][:, None] // 8))[None]
    inputs = [{"input_ids": row[:, :11]}, {"input_ids": row[:, 11:]}, {"input_ids": row, "position_ids": positions}]
    first, second, *rows = _own_code(output, tmp_path, [*inputs, {**inputs[2], "attention_mask": blocks}])
    for found in rows:
        _assert_same(found, torch.cat([first, second], dim=1))


def test_what_one_copy_of_the_tokens_cannot_give_is_refused(tmp_path):
    """The output that predicts a block's first token is of a noisy copy of the block before, which sees more than the clean block does."""
    config = tiny_config(diffusion={"block_size": 4, "clean_attention": "token_causal", "shift": True})
    _, output = _saved_and_exported(config, lambda _predictor: None, tmp_path)
    with pytest.raises(ValueError, match=r"give attention_mask of shape \[b, l, l\]"):
        _own_code(output, tmp_path, [{"input_ids": NOISY}])
    mask = torch.ones(2, LENGTH, LENGTH, dtype=torch.bool)
    assert _own_code(output, tmp_path, [{"input_ids": NOISY, "attention_mask": mask}])[0].shape == (2, LENGTH, 96)


def test_an_autoregressive_stage(tmp_path):
    """Its logits at a position are of the position's own token too, from the tokens before it."""
    config = tiny_config(diffusion={"objective": "autoregressive"})
    expected, output = _saved_and_exported(config, lambda predictor: logits(config, predictor, causal=True, timesteps=0.0), tmp_path)
    assert (TOKENS == MASK).any(), "a mask token in the text is no noise"
    described = json.loads((output / "config.json").read_text())
    assert [described[key] for key in ("process", "prediction", "shift", "block_size")] == ["autoregressive", "next_token", True, 1]
    (found,) = _own_code(output, tmp_path, [{"input_ids": TOKENS}])
    _assert_same(found[:, 1:], expected[:, :-1])


def test_the_keys_are_those_of_the_checkpoint_s_stage(tmp_path):
    config = tiny_config(diffusion={"timestep_per": "sequence"})
    stages = {"blocks": {"block_size": 4, "shift": True}, "whole": {"block_size": 32}}
    config.schedule.stages = {name: StageConfig(tokens=1024, learning_rate=1e-3, diffusion=given) for name, given in stages.items()}
    _, output = _saved_and_exported(config, lambda _predictor: None, tmp_path)
    described = json.loads((output / "config.json").read_text())
    assert [described[key] for key in KEYS[2:]] == [True, 4, "document", "block_causal", "bidirectional"]


@pytest.mark.parametrize(
    "settings", slow_except([("llama3", False), ("qwen3", True)], itertools.product(sorted(CASES), [False, True])), ids=str
)
def test_stock_classes_say_it_too(settings, tmp_path):
    """A stock class gives the network's outputs as they are, and the project's own code those of each position's token."""
    case, shift = settings
    original, run = tmp_path / "original", tmp_path / "run"
    make(case, original)
    config = config_for(original, diffusion={"shift": shift, "mask_token_id": 95})
    on_ranks(lambda config: save_run(config, build(config), run), config)
    export(run, tmp_path / "stock", "--format", "stock")
    export(run, tmp_path / "own")
    described = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "own")]
    assert [config["shift"] for config in described] == [shift, shift]
    assert all(config[key] == described[0][key] for config in described for key in KEYS)
    stock = loaded_logits("AutoModelForCausalLM", tmp_path / "stock", tmp_path)
    own = loaded_logits("AutoModel", tmp_path / "own", tmp_path, attention_mask=CAUSAL)
    before = torch.cat([stock[:, :1], stock[:, :-1]], dim=1) if shift else stock
    torch.testing.assert_close(own, before, rtol=0, atol=1e-5)


def test_an_export_of_before_keeps_its_meaning(tmp_path):
    """Its config.json has none of the keys: no shift, and every token sees all tokens."""
    expected, output = _saved_and_exported(tiny_config(), lambda predictor: predictor(NOISY, torch.full((2,), 0.5)), tmp_path)
    path = output / "config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key not in KEYS}))
    _assert_same(_own_code(output, tmp_path, [{"input_ids": NOISY, "timesteps": torch.full((2,), 0.5)}])[0], expected)
