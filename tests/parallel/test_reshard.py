"""A checkpoint of one layout loads under any other, optimizer included: the next losses are those of the run that never stopped."""

import pytest

from tests.parallel.layouts import NUM_STEPS, train_layout
from tests.parallel.test_layouts import GRID_STREAMS, layout_config

SAVED = ({"tensor": 2, "sequence": True, "pipeline": 2}, 2)
LOADED = [
    SAVED,
    ({}, 1),
    ({"context": 2}, 2),
    ({"pipeline": 2, "virtual_pipeline": 2}, 1),
    ({"tensor": 2}, 2),
]
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}


def _uninterrupted(streams):
    return train_layout(layout_config(streams, distributed_optimizer=False), num_steps=2 * NUM_STEPS)


@pytest.fixture(scope="module", params=GRID_STREAMS)
def saved(request, tmp_path_factory):
    """(streams, checkpoint, the uninterrupted run of a single process)."""
    directory = tmp_path_factory.mktemp(request.param)
    parallel, data = SAVED
    train_layout(layout_config(request.param, **parallel), data, save=directory)
    return request.param, directory / f"step_{NUM_STEPS:010d}", _uninterrupted(request.param)


def _assert_goes_on(path, streams, layout, expected, **options):
    parallel, data = layout
    outcome = train_layout(layout_config(streams, **parallel, **options), data, load=path, timeout=60)
    assert outcome.losses == pytest.approx(expected.losses[NUM_STEPS:], rel=1e-6)
    assert outcome.gradient_norms == pytest.approx(expected.gradient_norms[NUM_STEPS:], rel=1e-5)


@pytest.mark.parametrize("layout", LOADED, ids=str)
def test_next_losses_are_the_uninterrupted_ones(saved, layout):
    streams, path, expected = saved
    _assert_goes_on(path, streams, layout, expected)


@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("layout", [(VIRTUAL, 2), ({**VIRTUAL, "context": 2}, 1)], ids=str)
def test_virtual_stages_that_share_the_timestep_embedding(layout, distributed_optimizer, tmp_path):
    """Each chunk of a rank has a copy of it: saved once, loaded into both, which then go on apart."""
    parallel, data = layout
    options = {"distributed_optimizer": distributed_optimizer}
    train_layout(layout_config("one-stream", **parallel, **options), data, save=tmp_path, timeout=60)
    expected = _uninterrupted("one-stream")
    for loaded in (layout, ({}, 1)):
        _assert_goes_on(tmp_path / f"step_{NUM_STEPS:010d}", "one-stream", loaded, expected, **options)
