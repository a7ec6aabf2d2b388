"""Every layout of a mixture of experts gives the single process's numbers, and the very same decisions of the routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parallel import layouts
from tests.parallel.layouts import NUM_STEPS, Outcome, train_layout, train_layouts
from tests.parallel.routing import open_router
from tests.parallel.test_layouts import STREAMS, assert_equal_numbers
from tests.slow import slow_except
from tests.tiny import tiny_config
from w1train.config.schema import Config
from w1train.engine import buckets
from w1train.engine.building import TrainedModel
from w1train.model.experts.router import ExpertRouter
from w1train.model.initialization import EXPERTS

LING = {
    "score": "sigmoid",
    "scale": 2.5,
    "num_groups": 4,
    "num_active_groups": 2,
    "has_bias": True,
    "shared_ffn_hidden_size": 24,
}
MODELS: dict[str, dict[str, Any]] = {"ling": LING, "qwen": {"num_active": 3, "shared_ffn_hidden_size": 0}}
SIZES = {"num_experts": 8, "num_active": 2, "ffn_hidden_size": 16, "num_dense_layers": 1}


def expert_config(model: str, streams: str, data_parallel: int = 1, *, experts: dict | None = None, **parallel: Any) -> Config:
    """Three layers, of which the first is dense, and four samples in two micro-batches on each rank (if there are as many). With a pipeline
    there are four layers, and eight samples in four micro-batches."""
    is_pipeline = parallel.get("pipeline", 1) > 1
    num_layers, num_samples, num_micro_batches = (4, 8, 4) if is_pipeline else (3, 4, 2)
    config = tiny_config(
        model={"num_layers": num_layers, "qk_norm": True, "rotary_channels": 8},
        parallel={"context_chunk_size": 4, "sequence": parallel.get("tensor", 1) > 1, "distributed_optimizer": False, **parallel},
        diffusion=STREAMS[streams],
        # An expert with few tokens has gradients near zero, and Adam would divide their rounding errors by themselves.
        optimizer={"epsilon": 1e-3},
        training={"global_batch_size": num_samples, "micro_batch_size": max(1, num_samples // (data_parallel * num_micro_batches))},
    )
    for name, value in {**SIZES, **MODELS[model], **(experts or {})}.items():
        setattr(config.model.experts, name, value)
    return config


CASES = (("ling", "two-stream"), ("qwen", "one-stream"))
_references: dict[bool, list[Outcome]] = {}


def references(*, is_pipeline: bool = False) -> list[Outcome]:
    """The single process with the layers and samples of a pipeline or without, computed once."""
    if is_pipeline not in _references:
        configs = [expert_config(*case) for case in CASES]
        for config in configs if is_pipeline else []:
            config.model.num_layers, config.training.global_batch_size = 4, 8
        _references[is_pipeline] = train_layouts(configs)
    return _references[is_pipeline]


def assert_equal_routing(outcome: Outcome, expected: Outcome) -> None:
    differing = sum(row != wanted for row, wanted in zip(outcome.routing.rows, expected.routing.rows, strict=True))
    assert differing == 0, f"{differing} of {len(expected.routing.rows)} decisions differ"
    assert outcome.routing.counts.keys() == expected.routing.counts.keys()
    for layer, counts in expected.routing.counts.items():
        assert torch.equal(outcome.routing.counts[layer], counts), f"counts of layer {layer}"


def _assert_equal_to_the_single_process(data_parallel: int, *parallel: dict[str, Any]) -> None:
    """Train Ling's router with two streams, and Qwen's with one stream, each with its own options of one layout."""
    configs = [expert_config(*case, data_parallel, **options) for case, options in zip(CASES, parallel, strict=True)]
    expected = references(is_pipeline=parallel[0].get("pipeline", 1) > 1)
    for outcome, wanted in zip(train_layouts(configs, data_parallel), expected, strict=True):
        assert_equal_routing(outcome, wanted)
        assert_equal_numbers(outcome, wanted)


POOL = {"num_groups": 1, "num_active_groups": 1, "pool_per_block": 4}


@pytest.mark.parametrize("layout", slow_except(["cp2-tp2"], ["cp2", "tp2", "cp2-tp2", "pp2", "recompute"]))
def test_pools_of_blocks_that_ranks_share(layout):
    """Chunks of two tokens cut blocks of four over context-parallel ranks."""
    parallel: dict[str, Any] = {
        "cp2": {"context": 2},
        "tp2": {"tensor": 2, "expert": 2},
        "cp2-tp2": {"context": 2, "tensor": 2, "expert": 2, "recompute": "selective", "recompute_experts": True},
        "pp2": {"pipeline": 2},
        "recompute": {"recompute": "full"},
    }[layout]
    config = expert_config("ling", "two-stream", experts=POOL, context_chunk_size=2, **parallel)
    single = expert_config("ling", "two-stream", experts=POOL)
    single.model.num_layers, single.training = config.model.num_layers, config.training
    _assert_equal(config, 1, single)


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2-ep2": (2, {"expert": 2}),
    "dp2-ep2-gather": (2, {"expert": 2, "expert_dispatcher": "all_gather"}),
    "dp4-ep2": (4, {"expert": 2}),
    "dp4-ep4": (4, {"expert": 4}),
    "tp2": (1, {"tensor": 2}),
    "tp2-etp2": (1, {"tensor": 2, "expert_tensor": 2}),
    "tp2-ep2": (1, {"tensor": 2, "expert": 2}),
    "tp2-dp2-ep2": (2, {"tensor": 2, "expert": 2}),
    "tp2-dp2-ep4": (2, {"tensor": 2, "expert": 4}),
    "tp2-dp2-ep2-etp2": (2, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "tp2-dp2-ep2-etp2-gather": (2, {"tensor": 2, "expert": 2, "expert_tensor": 2, "expert_dispatcher": "all_gather"}),
    "dp2-etp2": (2, {"expert_tensor": 2}),
    "cp2": (1, {"context": 2}),
    "cp2-ep2": (1, {"context": 2, "expert": 2}),
    "cp2-ep2-heads": (1, {"context": 2, "expert": 2, "context_method": "all_to_all"}),
    "cp2-dp2-ep4": (2, {"context": 2, "expert": 4}),
    "cp2-tp2-ep2-etp2": (1, {"context": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}),
    "pp2": (1, {"pipeline": 2}),
    "pp2-vpp2": (1, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2-dp2-ep2": (2, {"pipeline": 2, "expert": 2}),
    "pp2-vpp2-dp2-ep2": (2, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}),
    "pp2-tp2-etp2": (1, {"pipeline": 2, "tensor": 2, "expert_tensor": 2}),
    "pp2-tp2-dp2-ep2-etp2": (2, {"pipeline": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}),
}


@pytest.mark.parametrize("layout", slow_except([], LAYOUTS))
def test_equals_the_single_process(layout):
    data_parallel, parallel = LAYOUTS[layout]
    _assert_equal_to_the_single_process(data_parallel, parallel, parallel)


def test_counts_are_those_of_the_decisions():
    for expected in references():
        for layer, counts in expected.routing.counts.items():
            counted = torch.zeros_like(counts)
            for step, of_layer, _, _, kind, chosen in expected.routing.rows:
                if (step, of_layer) == (NUM_STEPS - 1, layer):
                    counted[kind] += torch.tensor([chosen >> expert & 1 for expert in range(counts.shape[1])])
            assert torch.equal(counts, counted)


DISTRIBUTED = {"distributed_optimizer": True}
OVERLAP = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
FULL = {"recompute": "full"}
EVERYTHING = {"tensor": 2, "expert": 2, "expert_tensor": 2}
OPTIONS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2-dp2-ep2-etp2": (2, EVERYTHING, {**EVERYTHING, **OVERLAP, **FULL}),
    "cp2-ep2": (1, {"context": 2, "expert": 2, **FULL}, {"context": 2, "expert": 2, "expert_dispatcher": "all_gather"}),
    "dp2-ep2": (2, {"expert": 2, **DISTRIBUTED}, {"expert": 2, "overlap_grad_reduce": True}),
    "dp4-ep2": (4, {"expert": 2, **OVERLAP}, {"expert": 2, "recompute": "selective"}),
    "tp2-dp2-ep4": (2, {"tensor": 2, "expert": 4, **OVERLAP}, {"tensor": 2, "expert": 4, **FULL, "recompute_num_layers": 2}),
    "pp2-dp2-ep2": (2, {"pipeline": 2, "expert": 2, **OVERLAP, **FULL}, {"pipeline": 2, "expert": 2, **DISTRIBUTED}),
    "pp2-vpp2-dp2-ep2": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, **OVERLAP},
        {"pipeline": 2, "virtual_pipeline": 2, "expert": 2, **DISTRIBUTED, **FULL},
    ),
}


@pytest.mark.parametrize("layout", slow_except(["tp2-dp2-ep2-etp2"], OPTIONS))
def test_options_keep_the_numbers(layout, monkeypatch):
    """Buckets of a few parameters each, so that weights of experts arrive while earlier layers run. Full recomputation counts tokens
    once."""
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE", 4000)
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE_PER_RANK", 1)
    _assert_equal_to_the_single_process(*OPTIONS[layout])


@pytest.mark.slow
def test_a_stage_without_experts():
    """The first of two stages has only dense layers."""
    config = expert_config("ling", "two-stream", 2, experts={"num_dense_layers": 2}, pipeline=2, expert=2)
    single = expert_config("ling", "two-stream", experts={"num_dense_layers": 2})
    single.model.num_layers, single.training = 4, config.training
    _assert_equal(config, 2, single)


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["all_to_all", "all_gather"])
def test_experts_and_ranks_without_tokens(dispatcher, monkeypatch):
    """The bias keeps all tokens away from the experts of the second rank."""
    monkeypatch.setattr(layouts, "open_router", _leave_half_idle)
    experts = {"num_groups": 1, "num_active_groups": 1}
    config = expert_config("ling", "two-stream", 2, experts=experts, expert=2, expert_dispatcher=dispatcher)
    outcome = _assert_equal(config, 2, expert_config("ling", "two-stream", experts=experts))
    assert all(counts[:, 4:].sum() == 0 for counts in outcome.routing.counts.values())


def _leave_half_idle(router: ExpertRouter) -> None:
    open_router(router)
    router.expert_bias[len(router.expert_bias) // 2 :] = -10.0


def _assert_equal(config: Config, data_parallel: int, single: Config) -> Outcome:
    outcome, expected = train_layout(config, data_parallel), train_layout(single)
    assert_equal_routing(outcome, expected)
    assert_equal_numbers(outcome, expected)
    return outcome


@pytest.mark.slow
def test_a_model_without_conditioning():
    """LLaDA2 reads no timestep: its layers have no gates."""
    config = expert_config("ling", "two-stream", 2, tensor=2, expert=2)
    single = expert_config("ling", "two-stream")
    config.model.conditioning = single.model.conditioning = "none"
    _assert_equal(config, 2, single)


@pytest.mark.slow
def test_bf16_is_near():
    """Not exact, because bf16 rounds partial sums differently, and a rounded score may choose another expert. Gradients of experts arrive
    in fp32 and have the scale of the single process."""
    outcomes = []
    for data_parallel, parallel in ((1, {}), (2, {"expert": 2})):
        config = expert_config("ling", "two-stream", data_parallel, **parallel)
        config.training.precision = "bf16"
        outcomes.append(train_layout(config, data_parallel, mutate=_assert_fp32_where_it_matters))
    single, layout = outcomes
    assert layout.losses == pytest.approx(single.losses, rel=5e-3)
    for name, gradient in single.gradients.items():
        assert (layout.gradients[name] - gradient).norm() <= 0.1 * gradient.norm(), name
    for layer, bias in single.biases.items():
        assert bias.dtype == torch.float32
        # A count that differs may turn one move around.
        assert (layout.biases[layer] - bias).abs().max() <= NUM_STEPS * 2.1 * config.balance.bias_rate


def _assert_fp32_where_it_matters(model: TrainedModel) -> None:
    experts = [parameter for stage in model.stages for name, parameter in stage.named_parameters() if EXPERTS in name]
    assert {parameter.dtype for parameter in experts} == {torch.bfloat16}
    assert {parameter.main_grad.dtype for parameter in experts} == {torch.float32}
