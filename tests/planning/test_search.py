"""The layouts that --search finds, and how predictions move with the layout."""

import dataclasses

import pytest

from w1train.config.compose import load_config
from w1train.config.validate import validate
from w1train.planning.assumptions import DEVICES, Assumptions, replace_assumptions
from w1train.planning.layout import Layout, bubble_fraction, chunks_of, in_flight
from w1train.planning.prediction import predict
from w1train.planning.search import search_layouts

H100 = DEVICES["h100"]


@pytest.fixture(scope="module")
def w1():
    return load_config(["recipe=w1_4b"])


@pytest.fixture(scope="module")
def found():
    return search_layouts(load_config(["recipe=llada_8b", "training.global_batch_size=64"]), 16, H100, Assumptions())


def test_only_valid_layouts_that_fit_fastest_first(found):
    assert found.plans
    for plan in found.plans:
        assert validate(plan.config, 16) == []
        assert plan.fits
        assert plan.layout.world_size == plan.layout.tensor * plan.layout.pipeline * plan.layout.data
        assert plan.layout.num_micro_batches * plan.layout.micro_batch_size * plan.layout.data == 64
    speeds = [plan.mfu for plan in found.plans]
    assert speeds == sorted(speeds, reverse=True)
    assert found.num_tried > found.num_valid > len(found.plans)


def test_every_kind_of_layout_is_tried(found):
    """8B fits on 16 devices only with some help, and there is more than one kind of help."""
    layouts = [plan.layout for plan in found.plans]
    assert {layout.tensor for layout in layouts} >= {2, 4, 8}
    assert {layout.pipeline for layout in layouts} >= {1, 2, 4}
    assert {layout.recompute for layout in layouts} == {"none", "selective", "full"}
    assert {layout.sequence for layout in layouts} == {False, True}


def test_search_leaves_the_recipe_alone(w1):
    before = dataclasses.asdict(w1)
    search_layouts(w1, 512, H100, Assumptions())
    assert dataclasses.asdict(w1) == before


def test_a_layout_that_does_not_fit(w1):
    config = dataclasses.replace(w1, training=dataclasses.replace(w1.training, micro_batch_size=64))
    plan = predict(config, 8, H100, Assumptions())
    assert not plan.fits
    assert plan.needed_bytes > H100.memory_bytes
    assert predict(config, 8, dataclasses.replace(H100, memory_bytes=plan.needed_bytes), Assumptions()).fits


def test_more_efficient_devices_are_faster_and_more_memory_changes_no_speed(w1):
    plan = predict(w1, 512, H100, Assumptions())
    better, problems = replace_assumptions(Assumptions(), ["matmul_efficiency=0.9"])
    assert problems == []
    assert predict(w1, 512, H100, better).mfu > plan.mfu
    assert predict(w1, 512, DEVICES["h200"], Assumptions()).mfu > plan.mfu  # faster memory
    assert predict(w1, 512, dataclasses.replace(H100, memory_bytes=10**12), Assumptions()).step_seconds == plan.step_seconds


def test_less_nvlink_slows_tensor_parallelism_down_only(w1):
    tensor = dataclasses.replace(w1, parallel=dataclasses.replace(w1.parallel, tensor=4, sequence=True))
    stages = [predict(tensor, 512, DEVICES[name], Assumptions()).stages[0].seconds for name in ("h100", "h800")]
    assert stages[1].tensor_parallel > 1.5 * stages[0].tensor_parallel
    assert stages[1].matmul == stages[0].matmul


def test_packed_documents_need_fewer_model_flops_but_not_less_time(w1):
    """A dense mask computes every pair, so packing lowers MFU until a kernel skips what is masked."""
    whole, packed = (predict(w1, 512, H100, Assumptions(), documents) for documents in (None, 512))
    assert packed.work.visible_pairs == 8 * 512**2
    assert packed.flops_per_token["attention_core"] == whole.flops_per_token["attention_core"] / 8
    assert packed.step_seconds > whole.step_seconds
    assert packed.mfu < whole.mfu


def _layout(**fields):
    defaults = {
        "world_size": 4, "tensor": 1, "sequence": False, "pipeline": 4, "data": 1, "micro_batch_size": 1, "num_micro_batches": 8,
        "distributed_optimizer": True, "recompute": "none", "recompute_num_layers": 1,
    }  # fmt: skip
    return Layout(**{**defaults, **fields})


def test_micro_batches_in_flight():
    assert [in_flight(_layout(), rank) for rank in range(4)] == [[4], [3], [2], [1]]
    assert [in_flight(_layout(num_micro_batches=2), rank) for rank in range(4)] == [[2], [2], [2], [1]]


def test_interleaved_micro_batches_in_flight():
    """P = 2, V = 2: rank 0 warms up with 2 (2 - 1) + (2 - 1) 2 = 4 passes and holds one more."""
    layout = _layout(pipeline=2, virtual_pipeline=2)
    assert [sum(in_flight(layout, rank)) for rank in range(2)] == [5, 3]
    assert in_flight(layout, 0) == [3, 2]


def test_bubble():
    assert bubble_fraction(_layout()) == pytest.approx(3 / 11)
    assert bubble_fraction(_layout(virtual_pipeline=2)) == pytest.approx(3 / 19)
    assert bubble_fraction(_layout(pipeline=1)) == 0.0


def test_chunks_deal_every_layer_once(w1):
    layout = _layout(virtual_pipeline=3)
    chunks = [chunk for rank in range(4) for chunk in chunks_of(layout, w1.model, rank)]
    layers = sorted(layer for chunk in chunks for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers))
    assert layers == list(range(w1.model.num_layers))
    assert [chunk.has_embedding for chunk in chunks].count(True) == 1
    assert [(chunk.pipeline_rank, chunk.virtual_stage) for chunk in chunks if chunk.has_head] == [(3, 2)]
