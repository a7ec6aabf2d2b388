"""Adapters outside of training: merged weights, PEFT's files, and runs that begin from a run with adapters."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from tests.conversion.test_export import assert_identical, read_all
from tests.conversion.tiny_models import (
    build,
    causal_logits,
    config_for,
    imported_tensors,
    logits,
    make,
    on_ranks,
    save_run,
    transformers,
)
from tests.distributed import run_distributed
from tests.parallel.adapters import open_adapters
from tests.parallel.layouts import whole_tensors
from tests.tiny import tiny_config, tiny_experts
from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.loading import load_model_weights
from w1train.config.errors import ConfigurationError, UserError
from w1train.config.schema_adapters import AdaptersConfig, is_adapter
from w1train.config.schema_model import ParallelConfig
from w1train.conversion.export import export
from w1train.conversion.peft_files import write_adapters
from w1train.conversion.tensors import LING_NAMES, hugging_face_parameters, shapes
from w1train.engine.building import build_stage
from w1train.model.adapters import adapters_off
from w1train.model.megatron_config import transformer_config
from w1train.runtime.run_directory import RunDirectory

RANK, ALPHA = 3, 6.0


def _save(config, run: Path):
    """Save a run whose adapters have values, and return its logits with and without adapters, and its whole tensors."""
    model = build(config)
    open_adapters(model)
    save_run(config, model, run)
    whole = whole_tensors(model, lambda parameter: parameter.data)
    adapted = logits(config, model, causal=True)
    with adapters_off(model.stages):
        return adapted, logits(config, model, causal=True), whole


def _export(_rank: int, _size: int, run: Path, output: Path) -> None:
    for part in ("merged", "base", "adapters"):
        export(RunDirectory(run), step_path(run / "checkpoints", 1), output / part, "qwen2", 10**9, part)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of transformers, a run at tp2 that begins from it with adapters, and the three exports of the run."""
    place = tmp_path_factory.mktemp("adapters")
    make("qwen2", place / "original")
    config = config_for(
        place / "original", adapters={"rank": RANK, "alpha": ALPHA}, parallel={"tensor": 2, "sequence": True, "distributed_optimizer": True}
    )
    adapted, base, whole = on_ranks(_save, config, place / "run")[0]
    run_distributed(_export, 1, place / "run", place / "export", process_group=False)
    return place, config, adapted, base, whole


def test_the_base_is_exported_as_it_was_imported(saved):
    place = saved[0]
    assert_identical(read_all(place / "export" / "base"), read_all(place / "original"))


def test_merged_weights_are_the_base_and_the_adapters_that_peft_would_add(saved):
    place = saved[0]
    base, merged = (read_all(place / "export" / part) for part in ("base", "merged"))
    files = place / "export" / "adapters"
    described = json.loads((files / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"], described["base_model_name_or_path"]) == (RANK, ALPHA, str(place / "original"))
    adapters = safetensors.torch.load_file(files / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in adapters if ".lora_A." in name}
    assert all(any(name.endswith("." + target) for target in described["target_modules"]) for name in adapted)
    assert len(adapted) == 7 * described_layers(place)
    for name, weight in merged.items():
        expected = base[name]
        if (linear := name.removesuffix(".weight")) in adapted:
            first, last = (adapters[f"base_model.model.{linear}.lora_{which}.weight"] for which in "AB")
            expected = expected + ALPHA / RANK * last @ first
            assert not torch.allclose(weight, base[name])
        assert torch.allclose(weight, expected, atol=1e-6), name


def described_layers(place: Path) -> int:
    return json.loads((place / "original" / "config.json").read_text())["num_hidden_layers"]


def test_the_merged_export_computes_what_the_run_computes(saved):
    """The stock class, whose code is not this project's, gives the logits of the run; with the adapters off the run gives the base's."""
    place, _, adapted, base, _ = saved
    for part, expected in (("merged", adapted), ("base", base)):
        found = causal_logits(transformers.Qwen2ForCausalLM.from_pretrained(place / "export" / part).eval())
        assert torch.allclose(found, expected, atol=2e-5), part
    assert (adapted - base).abs().max() > 1e-2


@pytest.mark.slow
def test_peft_computes_what_the_run_computes(saved):
    peft = pytest.importorskip("peft")
    place, _, adapted, _, _ = saved

    def inside(_rank: int, _size: int) -> torch.Tensor:
        model = transformers.Qwen2ForCausalLM.from_pretrained(place / "export" / "base")
        return causal_logits(peft.PeftModel.from_pretrained(model, place / "export" / "adapters").eval())

    assert torch.allclose(run_distributed(inside, 1, process_group=False)[0], adapted, atol=2e-5)


def test_a_run_begins_from_a_run_with_adapters(saved):
    """A run without adapters gets the merged weights, and a run with the same adapters gets all tensors as they are."""
    place, config, _, _, whole = saved
    begin = dataclasses.replace(config, training=dataclasses.replace(config.training, initial_weights=str(place / "run")))
    without = dataclasses.replace(begin, adapters=AdaptersConfig())
    original = config_for(place / "export" / "merged", parallel={"tensor": 2, "sequence": True})
    assert_identical(on_ranks(imported_tensors, without)[0], on_ranks(imported_tensors, original)[0])
    found = on_ranks(imported_tensors, begin)[0]
    assert_identical(found, whole)
    assert any(is_adapter(name) for name in found)


def test_other_adapters_than_the_stored_ones_are_refused(saved):
    place, config, *_ = saved
    begin = dataclasses.replace(
        config, training=dataclasses.replace(config.training, initial_weights=str(place / "run")), adapters=AdaptersConfig(rank=RANK + 1)
    )
    with pytest.raises(ConfigurationError, match=r"adapters\.rank(.|\n)*adapters\.alpha"):
        on_ranks(imported_tensors, begin)


def _loaded(config, path: Path) -> torch.Tensor:
    """Return the logits of the model that sampling and evaluation load: its weights alone, in one process."""
    stage = build_stage(config, transformer_config(config.model, config.parallel, config.training.precision))
    load_model_weights(path, [stage])
    return logits(config, SimpleNamespace(chunks=[stage]), causal=True)


def test_inference_computes_what_the_run_computes(saved):
    place, config, adapted, *_ = saved
    found = on_ranks(_loaded, dataclasses.replace(config, parallel=ParallelConfig()), step_path(place / "run" / "checkpoints", 1))[0]
    assert torch.allclose(found, adapted, atol=2e-5)


class _RowNumbers:
    """A source whose tensors have the number of the row in each element."""

    def __init__(self, tensors):
        self.tensors = tensors

    def read(self, name, box):
        rows, columns = box
        return torch.arange(rows.start, rows.stop).float()[:, None].expand(-1, columns.stop - columns.start)


def test_peft_adapts_shared_experts_and_fused_queries_and_no_routed_experts(tmp_path):
    """Ling's file has queries, keys and values in one tensor, in this order, and the model has them by groups: two queries, key, value."""
    model = tiny_config(model={"num_query_groups": 2, "kv_channels": 1, "hidden_size": 8, "conditioning": "none", **tiny_experts()}).model
    config = tiny_config(adapters={"rank": 2})
    source = _RowNumbers(shapes(model, config.adapters))
    write_adapters(tmp_path, config, source, list(hugging_face_parameters(model, LING_NAMES)), is_causal=False)
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    assert described["target_modules"] == [
        "attention.dense",
        "attention.query_key_value",
        *[f"mlp.{name}_proj" for name in ("down", "gate")],
        *[f"mlp.shared_experts.{name}_proj" for name in ("down", "gate", "up")],
        "mlp.up_proj",
    ]
    written = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    rows = written["base_model.model.model.layers.1.attention.query_key_value.lora_B.weight"][:, 0]
    assert rows.tolist() == [0, 1, 4, 5, 2, 6, 3, 7]
    assert written["base_model.model.model.layers.1.mlp.shared_experts.up_proj.lora_B.weight"][:, 0].tolist() == [*range(16, 32)]


def test_adapters_that_are_not_all_that_was_trained_are_not_exported_alone(tmp_path):
    for adapters, words in ((AdaptersConfig(), "adapters.rank is 0"), (AdaptersConfig(rank=1, train=["*norm.weight"]), "adapters.train")):
        with pytest.raises(UserError, match=words):
            write_adapters(tmp_path, dataclasses.replace(tiny_config(), adapters=adapters), _RowNumbers({}), [], is_causal=False)
