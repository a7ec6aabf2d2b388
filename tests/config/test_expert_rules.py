"""Rules of a mixture of experts and of its layout over ranks."""

from __future__ import annotations

import pytest

from w1train.config.rules.validate import validate

EXPERTS = {f"model.experts.{name}": value for name, value in {"num_experts": 8, "num_active": 2, "ffn_hidden_size": 24}.items()}
SIGMOID = {"model.experts.score": "sigmoid", "model.experts.has_bias": True}
GROUPS = {"model.experts.num_groups": 4, "model.experts.num_active_groups": 2}
TENSOR = {"parallel.tensor": 2, "parallel.sequence": True}
BLOCKS = {"diffusion.block_size": 16}


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"model.experts.num_active": 9}, "model.experts.num_active", "at most model.experts.num_experts (8)"),
        ({**GROUPS, "model.experts.num_active": 6}, "model.experts.num_active", "at most 4, the experts of 2 of 4 groups"),
        ({"model.experts.num_groups": 3}, "model.experts.num_groups", "1, 2, 4, 8"),
        ({"model.experts.num_active_groups": 2}, "model.experts.num_active_groups", "at most model.experts.num_groups (1)"),
        ({**GROUPS, "model.experts.num_active": 3}, "model.experts.num_active_groups", "a divisor of model.experts.num_active (3)"),
        ({"model.experts.has_bias": True}, "model.experts.has_bias", "false with model.experts.score=softmax"),
        ({"model.experts.score": "sigmoid", "model.experts.normalize": False}, "model.experts.normalize", "always normalised"),
        ({"model.experts.num_dense_layers": 4}, "model.experts.num_dense_layers", "below model.num_layers (4)"),
        ({"parallel.expert": 3}, "parallel.expert", "1, 2, 4, 8"),
        ({**TENSOR, "parallel.expert_tensor": 5}, "parallel.expert_tensor", "1, 2, 3, 4, 6, 8, 12, 24"),
        ({**TENSOR, "model.experts.shared_ffn_hidden_size": 3}, "model.experts.shared_ffn_hidden_size", "multiple of parallel.tensor (2)"),
        ({"parallel.tensor": 2}, "parallel.sequence", "true if a model with experts"),
        ({**BLOCKS, "model.experts.pool_per_block": 1}, "model.experts.pool_per_block", "from model.experts.num_active (2)"),
        ({**BLOCKS, "model.experts.pool_per_block": 9}, "model.experts.pool_per_block", "to model.experts.num_experts (8)"),
        ({**BLOCKS, **GROUPS, "model.experts.pool_per_block": 4}, "model.experts.pool_per_block", "0 with groups"),
        ({"model.experts.pool_per_block": 4}, "model.experts.pool_per_block", "0 without diffusion.block_size"),
        ({"model.experts.num_experts": 0, "parallel.expert": 2}, "parallel.expert", "1 for a dense model"),
        ({"model.experts.num_experts": 0, "parallel.expert_tensor": 2}, "parallel.expert_tensor", "1 for a dense model"),
        ({"parallel.recompute_experts": True}, "parallel.recompute_experts", "parallel.recompute=none, which recomputes nothing"),
        ({"parallel.recompute_experts": True, "parallel.recompute": "full"}, "parallel.recompute_experts", "recomputes whole layers"),
        ({"model.experts.num_experts": 0, "parallel.recompute_experts": True}, "parallel.recompute_experts", "for a dense model"),
        ({"model.rotary_channels": 5}, "model.rotary_channels", "an even number up to the 12 channels"),
        ({"model.rotary_channels": 14}, "model.rotary_channels", "an even number up to the 12 channels"),
    ],
)
def test_is_refused(make_config, changes, key, words):
    (problem,) = validate(make_config({**EXPERTS, **changes}))
    assert problem.key == key
    assert words in problem.valid


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**SIGMOID, **GROUPS, "model.experts.num_active": 4},
        {"model.experts.normalize": False, "model.experts.num_dense_layers": 3},
        {"model.experts.num_active": 8},
        {**TENSOR, "parallel.expert": 8, "parallel.expert_tensor": 2, "model.experts.shared_ffn_hidden_size": 4},
        {**BLOCKS, "model.experts.pool_per_block": 4},
        {"model.experts.num_experts": 0, "model.experts.num_active": 99, "parallel.tensor": 2},
        {"parallel.recompute_experts": True, "parallel.recompute": "selective"},
        {"model.rotary_channels": 6},
        {"model.rotary_channels": 12},
    ],
)
def test_is_allowed(make_config, changes):
    assert validate(make_config({**EXPERTS, **changes})) == []


def test_a_pool_needs_blocks_at_every_stage(make_config):
    stage = {"schedule.stages.decay.diffusion": {"block_size": None}}
    (problem,) = validate(make_config({**EXPERTS, **BLOCKS, **stage, "model.experts.pool_per_block": 4}))
    assert problem.key == "model.experts.pool_per_block in stage decay"


@pytest.mark.parametrize(
    ("changes", "world_size", "words"),
    [
        ({"parallel.expert": 8}, 4, "= 8 ranks, in a world of 4"),
        ({**TENSOR, "parallel.expert": 2, "parallel.expert_tensor": 2}, 2, "2 x parallel.expert_tensor 2 x parallel.pipeline 1 = 4 ranks"),
        ({"parallel.pipeline": 2, "parallel.expert": 4}, 4, "4 x parallel.expert_tensor 1 x parallel.pipeline 2 = 8 ranks"),
        ({"parallel.expert": 8}, 8, None),
        ({**TENSOR, "parallel.expert": 2, "parallel.expert_tensor": 2}, 4, None),
        ({**TENSOR, "parallel.expert": 4}, 4, None),
    ],
)
def test_the_world_has_ranks_for_experts(make_config, changes, world_size, words):
    config = make_config({**EXPERTS, "training.global_batch_size": 32, **changes})
    problems = validate(config, world_size)
    assert [problem.key for problem in problems] == ([] if words is None else ["parallel.expert"])
    assert words is None or words in problems[0].found


@pytest.mark.parametrize(
    ("changes", "world_size", "suggestion"),
    [
        ({"model.experts.num_experts": 12, "parallel.expert": 3}, 2, "parallel.expert=2"),
        ({"parallel.expert": 8}, 6, "parallel.expert=2"),
        ({**TENSOR, "parallel.expert": 4, "parallel.expert_tensor": 2}, 4, "parallel.expert=2"),
        ({"parallel.pipeline": 2, "parallel.expert": 4}, 4, "parallel.expert=2"),
        ({**TENSOR, "parallel.expert": 1, "parallel.expert_tensor": 4}, 2, "parallel.expert=1 parallel.expert_tensor=1"),
    ],
)
def test_the_suggested_layout_of_experts_fits(make_config, changes, world_size, suggestion):
    """The suggestion is the largest layout that fits, and has no problem itself."""
    changes = {**EXPERTS, "training.global_batch_size": 96, **changes}
    (problem,) = validate(make_config(changes), world_size)
    assert problem.suggestion == suggestion
    better = dict(pair.split("=") for pair in suggestion.split())
    assert validate(make_config({**changes, **{key: int(value) for key, value in better.items()}}), world_size) == []


def test_a_shared_expert_is_computed_in_fp8(make_config):
    sizes = {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 128, "transformer_impl": "te"}
    changes = {f"model.{name}": value for name, value in sizes.items()} | {"training.fp8": "tensorwise"}
    assert validate(make_config({**changes, **EXPERTS, "model.experts.shared_ffn_hidden_size": 32})) == []
    (problem,) = validate(make_config({**changes, **EXPERTS, "model.experts.shared_ffn_hidden_size": 24}))
    assert problem.key == "model.experts.shared_ffn_hidden_size"
