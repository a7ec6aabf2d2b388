"""Ranks, chunks and micro-batches in flight, compared with megatron-core's schedules and layers."""

import pytest

from tests.distributed import run_distributed
from tests.tiny import packed_batch, tiny_config
from w1train.config.rules.validate import validate
from w1train.model.flops import num_parameters
from w1train.planning.layout import Coordinates, bubble_fraction, chunks_of, in_flight, layout_of
from w1train.planning.meta_build import build_ranks
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.engine.building import build_trained_model  # noqa: E402
from w1train.runtime.distributed import distributed  # noqa: E402
from w1train.training.forward import run_micro_batches  # noqa: E402


def _layout(world_size=4, num_micro_batches=8, num_layers=8, **parallel):
    config = tiny_config(
        parallel={"pipeline": 4, **parallel},
        model={"num_layers": num_layers},
        training={"global_batch_size": num_micro_batches, "micro_batch_size": 1},
    )
    assert validate(config, world_size) == []
    return layout_of(config, world_size)


def test_coordinates_and_ranks_are_inverse():
    layout = layout_of(tiny_config(parallel={"tensor": 2, "pipeline": 2, "context": 3}), 24)
    places = [layout.coordinates(rank) for rank in range(24)]
    assert [layout.rank(place) for place in places] == list(range(24))
    assert len(set(places)) == 24
    assert places[7] == Coordinates(tensor=1, context=0, data=1, pipeline=0)


def test_micro_batches_in_flight():
    assert [in_flight(_layout(), rank) for rank in range(4)] == [{(4,)}, {(3,)}, {(2,)}, {(1,)}]
    assert [in_flight(_layout(num_micro_batches=2), rank) for rank in range(4)] == [{(2,)}, {(2,)}, {(2,)}, {(1,)}]


def test_bubble():
    assert bubble_fraction(_layout()) == pytest.approx(3 / 11)
    assert bubble_fraction(_layout(virtual_pipeline=2)) == pytest.approx(3 / 19)
    assert bubble_fraction(_layout(pipeline=1)) == 0.0


@pytest.mark.parametrize(
    ("num_layers", "parallel"),
    [
        (8, {"pipeline": 4, "virtual_pipeline": 2}),
        (8, {"pipeline": 2, "num_layers_in_first_stage": 3}),
        (8, {"pipeline": 3, "num_layers_in_first_stage": 2, "num_layers_in_last_stage": 1}),
        (8, {"pipeline": 4, "virtual_pipeline": 2, "num_layers_in_first_stage": 2, "num_layers_in_last_stage": 2}),
        (6, {"pipeline": 4, "embedding_counts_as_layer": True, "head_counts_as_layer": True}),
        (7, {"pipeline": 2, "virtual_pipeline": 2, "head_counts_as_layer": True}),
    ],
    ids=str,
)
def test_layers_are_dealt_as_megatron_deals_them(num_layers, parallel):
    """``build_ranks`` compares names, and therefore the numbers of layers, on every rank."""
    config = tiny_config(model={"num_layers": num_layers}, parallel=parallel)
    world_size = parallel["pipeline"]
    layout = layout_of(config, world_size)
    chunks = [chunk for rank in range(world_size) for chunk in chunks_of(layout, rank)]
    layers = [layer for chunk in chunks for layer in range(chunk.first_layer, chunk.first_layer + chunk.num_layers)]
    assert sorted(layers) == list(range(num_layers))
    assert build_ranks(config, world_size).num_parameters == num_parameters(config.model)


def _count_in_flight(_rank, _world_size, config):
    """Return how many micro-batches each chunk has run forward but not backward, at the start of each backward pass."""
    with distributed(config.parallel) as ranks:
        model = build_trained_model(config)
        held, peaks = [0] * len(model.chunks), set()

        def count_forward(number):
            def hook(_module, _inputs, output):
                held[number] += 1
                # The last stage returns a tuple of terms.
                (output[0] if isinstance(output, tuple) else output).register_hook(lambda _gradient: count_backward(number))

            return hook

        def count_backward(number):
            peaks.add(tuple(held))
            held[number] -= 1

        for number, chunk in enumerate(model.chunks):
            chunk.register_forward_hook(count_forward(number))
        num_samples = config.training.global_batch_size // ranks.data_parallel_size
        batches = (corrupt(packed_batch([index]), config.diffusion, 0) for index in range(num_samples))
        run_micro_batches(config, model.chunks, batches, num_samples, training=True)
        return max(map(sum, peaks)), peaks


@pytest.mark.parametrize(
    "parallel", [{"pipeline": 4}, {"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2, "virtual_pipeline": 4}], ids=str
)
@pytest.mark.parametrize("num_micro_batches", [2, 8])
def test_in_flight_is_what_megatrons_schedule_holds(parallel, num_micro_batches):
    config = tiny_config(
        parallel=parallel,
        model={"num_layers": 8},
        training={"global_batch_size": num_micro_batches, "micro_batch_size": 1},
    )
    world_size = parallel["pipeline"]
    layout = layout_of(config, world_size)
    for rank, (most, peaks) in enumerate(run_distributed(_count_in_flight, world_size, config, timeout=60, process_group=False)):
        predicted = in_flight(layout, rank)
        assert {sum(counts) for counts in predicted} == {most}, rank
        assert predicted == {counts for counts in peaks if sum(counts) == most}, rank
