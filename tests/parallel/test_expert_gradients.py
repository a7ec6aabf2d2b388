"""The gradients of a mixture of experts, against plain autograd of its equations on the whole global batch; and broken rules, which this
comparison must notice. Layouts that agree with one another cannot show a wrong scale, and AdamW hides one."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import token_dispatcher

from tests.distributed import run_distributed
from tests.model.naive_experts import naive_layer
from tests.parallel.layouts import open_gates, train_layout
from tests.parallel.test_expert_layouts import expert_config
from tests.parallel.test_gradient_scale import expected_gradients
from tests.slow import slow_except
from w1train.engine import building
from w1train.engine.building import build_trained_model
from w1train.model.experts.expert_layer import ExpertLayer
from w1train.model.initialization import EXPERTS, global_named_parameters
from w1train.runtime.distributed import distributed

LAYOUTS = {
    "ep2": (2, {"expert": 2}),
    "tp2-dp2-ep2-etp2": (2, {"tensor": 2, "expert": 2, "expert_tensor": 2}),
    "tp2-ep2": (1, {"tensor": 2, "expert": 2}),
    "dp2-etp2": (2, {"expert_tensor": 2}),
    "cp2-ep2": (1, {"context": 2, "expert": 2}),
}
_expected = {}


def _naive_gradients(_rank, _size, config):
    ExpertLayer.forward = naive_layer(config.model.experts)
    with distributed(config.parallel):
        model = build_trained_model(config)
        open_gates(model)
        return expected_gradients(config, model)


def expected(model):
    """The gradients of a model that has the naive layers, computed once."""
    if model not in _expected:
        (_expected[model],) = run_distributed(_naive_gradients, 1, expert_config(model, "two-stream"), process_group=False)
    return _expected[model]


def _assert_gradients(model, data_parallel, parallel, **broken):
    config = expert_config(model, "two-stream", data_parallel, **parallel)
    outcome, wanted = train_layout(config, data_parallel, num_steps=1, **broken), expected(model)
    assert outcome.gradients.keys() == wanted.keys()
    assert any(EXPERTS in name for name in wanted)
    for name, gradient in wanted.items():
        error = (outcome.gradients[name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"gradient of {name}: relative error {error:.1e}"
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert outcome.gradient_norms[0] == pytest.approx(float(norm), rel=1e-5), "the norm before clipping has every expert once"


@pytest.mark.parametrize("layout", slow_except(["tp2-dp2-ep2-etp2"], LAYOUTS))
@pytest.mark.parametrize("model", slow_except(["ling"], ["ling", "qwen"]))
def test_are_those_of_the_equations(model, layout):
    _assert_gradients(model, *LAYOUTS[layout])


def _times_expert_ranks(chunks, *args, **kwargs):
    _finalize(chunks, *args, **kwargs)
    for chunk in chunks:
        for name, parameter in chunk.module.named_parameters():
            if EXPERTS in name:
                parameter.main_grad.mul_(parallel_state.get_expert_model_parallel_world_size())


def _own_part_only(rows, group=None, **_kwargs):
    """A sum over the ranks that share experts, without the other ranks' parts."""
    return rows.chunk(group.size())[group.rank()]


def _drop_flag_of_router(model):
    for stage in model.stages:
        for name, parameter in global_named_parameters(stage):
            if name.endswith("router.weight"):
                assert parameter.sequence_parallel
                parameter.sequence_parallel = False


def _no_norm_of_other_experts(model):
    for optimizer in model.optimizer.chained_optimizers:
        optimizer.grad_stats_parallel_group = parallel_state.get_model_parallel_group()


_finalize = building.finalize_model_grads
GATHER = {"tensor": 2, "expert_tensor": 2, "expert_dispatcher": "all_gather"}
MUTATIONS = {
    "gradients of experts are not multiplied by the expert-parallel ranks": (
        LAYOUTS["ep2"],
        (building, "finalize_model_grads", _times_expert_ranks),
        None,
    ),
    "outputs of ranks that share experts are summed": (
        (1, GATHER),
        (token_dispatcher, "reduce_scatter_to_sequence_parallel_region", _own_part_only),
        None,
    ),
    "gradients of the router are summed over tensor-parallel ranks": (LAYOUTS["tp2-ep2"], None, _drop_flag_of_router),
    "the norm has the experts of all ranks": (LAYOUTS["ep2"], None, _no_norm_of_other_experts),
}


@pytest.mark.parametrize("rule", slow_except(["gradients of experts are not multiplied by the expert-parallel ranks"], MUTATIONS))
def test_a_broken_rule_is_noticed(rule, monkeypatch):
    (data_parallel, parallel), patch, mutate = MUTATIONS[rule]
    expected("ling")
    if patch is not None:
        monkeypatch.setattr(*patch)
    with pytest.raises(AssertionError):
        _assert_gradients("ling", data_parallel, parallel, mutate=mutate)
