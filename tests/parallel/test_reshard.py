"""A checkpoint of one layout loads under any other, optimizer included: the next losses agree."""

import pytest

from tests.parallel.layouts import train_layout
from tests.parallel.test_layouts import GRID_STREAMS, layout_config

SAVED = ({"tensor": 2, "sequence": True, "pipeline": 2}, 2)
LOADED = [
    ({}, 1),
    ({"context": 2}, 2),
    ({"pipeline": 2, "virtual_pipeline": 2}, 1),
    ({"tensor": 2}, 2),
]


@pytest.fixture(scope="module", params=GRID_STREAMS)
def saved(request, tmp_path_factory):
    """(streams, checkpoint, losses of the steps after it in the layout that wrote it)."""
    directory = tmp_path_factory.mktemp(request.param)
    parallel, data = SAVED
    config = layout_config(request.param, **parallel)
    train_layout(config, data, save=directory)
    path = directory / "step_0000000003"
    return request.param, path, train_layout(config, data, load=path)


@pytest.mark.parametrize("layout", LOADED, ids=str)
def test_next_losses_agree(saved, layout):
    streams, path, expected = saved
    parallel, data = layout
    outcome = train_layout(layout_config(streams, **parallel), data, load=path)
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-6)
    assert outcome.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
