"""Ranks built on meta tensors: each parameter is counted once, and layouts that cannot be built are refused."""

import dataclasses

import pytest

from tests.tiny import tiny_config, tiny_experts
from w1train.config.compose import load_config
from w1train.model.flops import num_parameters
from w1train.planning import meta_build
from w1train.planning.layout import Coordinates, Layout
from w1train.planning.meta_build import LayoutError, build_ranks


@pytest.mark.parametrize(
    ("layout", "num_built"),
    [
        ([], 1),
        pytest.param(["parallel.tensor=8", "parallel.sequence=true"], 8, marks=pytest.mark.slow),
        pytest.param(["parallel.tensor=2", "parallel.pipeline=4"], 8, marks=pytest.mark.slow),
        (["parallel.context=4", "parallel.pipeline=2", "parallel.virtual_pipeline=4", "diffusion.block_size=32"], 2),
    ],
    ids=["data", "tensor", "tensor and pipeline", "context and virtual stages"],
)
def test_w1_has_every_parameter_once_over_512_ranks(layout, num_built):
    build = build_ranks(load_config(["recipe=w1_4b", *layout]), 512)
    assert (build.num_ranks, build.num_built, build.num_parameters) == (512, num_built, 3_739_097_600)


QWEN = {"qk_norm": True, "qkv_bias": True, "num_query_groups": 2}


@pytest.mark.parametrize("model", [{"tie_embeddings": True, "learns_noise_rates": True}, {"conditioning": "none"}, QWEN], ids=str)
@pytest.mark.parametrize("parallel", [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2, "sequence": True}], ids=str)
def test_copies_on_several_ranks_count_once(model, parallel):
    config = tiny_config(model=model, parallel=parallel)
    assert build_ranks(config, 8).num_parameters == num_parameters(config.model)


@pytest.mark.parametrize(
    "parallel",
    [
        {"expert": 4},
        {"tensor": 2, "sequence": True, "expert": 2},
        {"tensor": 2, "sequence": True, "expert_tensor": 2, "expert": 2, "pipeline": 2},
        {"context": 2, "expert": 8, "distributed_optimizer": False},
    ],
    ids=str,
)
def test_each_expert_counts_once(parallel):
    config = tiny_config(model={"num_layers": 4, **tiny_experts()}, parallel=parallel)
    assert build_ranks(config, 16).num_parameters == num_parameters(config.model)


def test_groups_of_experts_that_are_not_the_planned_ones_are_found(monkeypatch):
    """Expert-parallel and expert-tensor-parallel ranks in the other order do not match megatron-core's groups."""
    right = Layout.expert_coordinates

    def coordinates(layout, rank):
        place = right(layout, rank)
        return dataclasses.replace(place, expert=place.expert_tensor, expert_tensor=place.expert)

    monkeypatch.setattr(Layout, "expert_coordinates", coordinates)
    parallel = {"tensor": 2, "sequence": True, "expert_tensor": 2, "expert": 2}
    with pytest.raises(RuntimeError, match="groups are not those"):
        build_ranks(tiny_config(model=tiny_experts(), parallel=parallel), 8)


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "num_gpus"), [("llada2_flash", 512), ("llada2_mini", 64), ("llada_moe_7b", 64), ("rnd1_30b", 64)])
def test_published_mixtures_of_experts_have_every_parameter_once(recipe, num_gpus):
    config = load_config([f"recipe={recipe}"])
    assert build_ranks(config, num_gpus).num_parameters == num_parameters(config.model)


def test_a_layout_that_cannot_be_built_gives_megatrons_reason():
    """The number of heads does not divide, which w1train.config.rules.validate would refuse first."""
    with pytest.raises(LayoutError, match=r"rank 0 \(tensor 0, pipeline 0\) cannot be built: num_attention_heads \(4\) must be a multiple"):
        build_ranks(tiny_config(parallel={"tensor": 3}), 3)


def test_any_failure_of_building_is_a_layout_error():
    """If both layer counts of two stages are given, there is no stage between them, and megatron-core divides by zero."""
    ends = {"num_layers_in_first_stage": 2, "num_layers_in_last_stage": 2}
    config = tiny_config(model={"num_layers": 4}, parallel={"pipeline": 2, "virtual_pipeline": 2, **ends})
    with pytest.raises(LayoutError, match="cannot be built: ZeroDivisionError"):
        build_ranks(config, 2)


def test_a_model_that_is_not_the_planned_one_is_found(monkeypatch):
    planned = meta_build.chunk_parameters
    monkeypatch.setattr(meta_build, "chunk_parameters", lambda *args: planned(*args)[1:])
    with pytest.raises(RuntimeError, match=r"not those of w1train\.planning\.parameters"):
        build_ranks(tiny_config(), 1)


def test_groups_that_are_not_the_planned_ones_are_found(monkeypatch):
    """Data and pipeline ranks in the other order do not match megatron-core's groups."""

    def coordinates(layout, rank):
        rank, tensor = divmod(rank, layout.tensor)
        data, pipeline = divmod(rank, layout.pipeline)
        return Coordinates(tensor, 0, data, pipeline)

    monkeypatch.setattr(Layout, "coordinates", coordinates)
    with pytest.raises(RuntimeError, match="groups are not those"):
        build_ranks(tiny_config(parallel={"pipeline": 2}), 8)
