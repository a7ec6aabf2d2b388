"""The cheapest recomputation that fits, for devices with less and less memory."""

import dataclasses

import pytest

from w1train.config.compose import load_config
from w1train.planning.assumptions import DEVICES, Assumptions
from w1train.planning.plan_prediction import predict
from w1train.planning.plan_tables import expert_suggestion
from w1train.planning.suggestion import suggest_expert_parallelism, suggest_recomputation

H100 = DEVICES["h100"]


def _plan(memory_bytes=H100.memory_bytes, **parallel):
    config = load_config(
        ["recipe=w1_4b", "training.micro_batch_size=2", "training.global_batch_size=16", "diffusion.timestep_per=document"]
    )
    config.parallel = dataclasses.replace(config.parallel, **parallel)
    return predict(config, 8, dataclasses.replace(H100, memory_bytes=memory_bytes), Assumptions(), 512)


def test_less_memory_asks_for_more_recomputation():
    needed = {choice: _plan(recompute=choice) for choice in ("none", "selective", "full")}
    seconds = [plan.step_seconds for plan in needed.values()]
    assert seconds == sorted(seconds)
    for choice, plan in needed.items():
        suggested = suggest_recomputation(_plan(plan.needed_bytes))
        assert suggested.layout.recompute == choice
        assert suggested.needed_bytes <= plan.needed_bytes


def test_groups_of_layers_are_chosen_for_memory():
    """Groups of one layer keep 48 inputs; the best size keeps fewer inputs and recomputes few layers at once."""
    best = suggest_recomputation(_plan(_plan(recompute="full").needed_bytes))
    least = min(_plan(recompute="full", recompute_num_layers=size).needed_bytes for size in (1, 2, 3, 4, 6, 8, 12))
    assert best.needed_bytes <= least
    assert suggest_recomputation(_plan(best.needed_bytes - 1)) is None


@pytest.mark.parametrize("chunk", [512, 2048])
def test_a_loss_in_chunks_needs_less_memory(chunk):
    whole, chunked = _plan(), _plan()
    whole.run.training.loss_chunk_size, chunked.run.training.loss_chunk_size = None, chunk
    plans = [predict(plan.run, 8, H100, Assumptions(), 512) for plan in (whole, chunked)]
    vocabulary, rows = whole.run.model.vocab_size, 2 * 4096
    saved = plans[0].needed_bytes - plans[1].needed_bytes
    # Compared are fp32 probabilities and bf16 logits of all rows with bf16 logits of a chunk and the gradient of the head's input.
    expected = rows * vocabulary * 6 - (chunk * vocabulary + rows * whole.run.model.hidden_size) * 2
    assert saved == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("recipe", "num_gpus"), [("llada2_mini", 64), ("llada2_flash", 512)])
def test_experts_that_are_spread_over_nodes_are_called_inside(recipe, num_gpus):
    spread, planned = (
        predict(load_config([f"recipe={recipe}", *words]), num_gpus, H100, Assumptions()) for words in (["parallel.expert=64"], [])
    )
    best = suggest_expert_parallelism(spread)
    assert 1 < best.layout.num_expert_slices <= H100.devices_per_node
    assert best.step_seconds < 0.7 * spread.step_seconds
    text = expert_suggestion(spread)
    assert "their ranks are on 8 nodes" in text
    assert f"parallel.expert={best.layout.expert} (" in text
    assert text.endswith("% faster than as planned)")
    assert "nodes" not in expert_suggestion(planned)
    assert expert_suggestion(best).endswith("; as planned)")


def test_no_expert_parallelism_inside_a_node_fits():
    plan = predict(load_config(["recipe=llada2_flash", "parallel.pipeline=1", "parallel.expert=64"]), 512, H100, Assumptions())
    assert suggest_expert_parallelism(plan) is None
    assert "no expert parallelism inside a node fits here: parallel.pipeline" in expert_suggestion(plan)
