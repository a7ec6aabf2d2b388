"""A checkpoint of one layout loads under any other, optimizer included: the next losses are those of the run that never stopped."""

from functools import cache

import pytest

from tests.parallel.layouts import NUM_STEPS, train_layout
from tests.parallel.test_layouts import layout_config
from w1train.config.errors import ConfigurationError
from w1train.engine import buckets

SAVED = ({"tensor": 2, "sequence": True, "pipeline": 2}, 2)
LOADED = [
    pytest.param(SAVED, marks=pytest.mark.slow),
    ({}, 1),
    pytest.param(({"context": 2}, 2), marks=pytest.mark.slow),
    ({"pipeline": 2, "virtual_pipeline": 2}, 1),
    pytest.param(({"tensor": 2}, 2), marks=pytest.mark.slow),
]
VIRTUAL = {"pipeline": 2, "virtual_pipeline": 2}


@cache
def _uninterrupted(streams):
    return train_layout(layout_config(streams, distributed_optimizer=False), num_steps=2 * NUM_STEPS)


@pytest.fixture(scope="module", params=[pytest.param("one-stream", marks=pytest.mark.slow), "two-stream"])
def saved(request, tmp_path_factory):
    """(streams, checkpoint, the uninterrupted run of a single process)."""
    directory = tmp_path_factory.mktemp(request.param)
    parallel, data = SAVED
    train_layout(layout_config(request.param, data, **parallel), data, save=directory)
    return request.param, directory / f"step_{NUM_STEPS:010d}", _uninterrupted(request.param)


def _assert_goes_on(path, streams, layout, expected, **options):
    parallel, data = layout
    outcome = train_layout(layout_config(streams, data, **parallel, **options), data, load=path, timeout=60)
    assert outcome.losses == pytest.approx(expected.losses[NUM_STEPS:], rel=1e-6)
    assert outcome.gradient_norms == pytest.approx(expected.gradient_norms[NUM_STEPS:], rel=1e-5)


@pytest.mark.parametrize("layout", LOADED, ids=str)
def test_next_losses_are_the_uninterrupted_ones(saved, layout):
    streams, path, expected = saved
    _assert_goes_on(path, streams, layout, expected)


@pytest.mark.slow
@pytest.mark.parametrize("distributed_optimizer", [True, False])
@pytest.mark.parametrize("layout", [(VIRTUAL, 2), ({**VIRTUAL, "context": 2}, 1)], ids=str)
def test_virtual_stages_that_share_the_timestep_embedding(layout, distributed_optimizer, tmp_path):
    """Each chunk of a rank has a copy of it: saved once, loaded into both, which then go on apart."""
    parallel, data = layout
    options = {"distributed_optimizer": distributed_optimizer}
    train_layout(layout_config("one-stream", data, **parallel, **options), data, save=tmp_path, timeout=60)
    expected = _uninterrupted("one-stream")
    for loaded in (layout, ({}, 1)):
        _assert_goes_on(tmp_path / f"step_{NUM_STEPS:010d}", "one-stream", loaded, expected, **options)


@pytest.mark.slow
def test_checkpoint_of_buckets_in_flight(tmp_path, monkeypatch):
    """Parameters that were never gathered by a forward pass are saved as updated; states are cut at the borders of several buckets."""
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE", 4000)
    monkeypatch.setattr(buckets, "MIN_BUCKET_SIZE_PER_RANK", 1)
    overlapped = layout_config("one-stream", pipeline=2, overlap_grad_reduce=True, overlap_param_gather=True)
    train_layout(overlapped, 2, save=tmp_path, timeout=60)
    _assert_goes_on(tmp_path / f"step_{NUM_STEPS:010d}", "one-stream", ({}, 1), _uninterrupted("one-stream"))


@pytest.mark.slow
def test_frozen_layers_and_kinds_save_and_load(tmp_path):
    """Some layers of a kind frozen, all of another kind, and the embedding: no hole in the stacked states of the layers."""
    rates = {"embedding.*": 0.0, "decoder.layers.2.*": 0.0, "*.mlp.linear_fc1.*": 0.0}

    def config(**parallel):
        made = layout_config("one-stream", **parallel)
        made.optimizer.rate_multipliers = rates
        return made

    straight = train_layout(config(), num_steps=4)
    train_layout(config(tensor=2, sequence=True, pipeline=2), save=tmp_path, num_steps=2)
    after = train_layout(config(context=2), load=tmp_path / "step_0000000002", num_steps=2)
    assert after.losses == pytest.approx(straight.losses[2:], rel=1e-6)


@pytest.mark.parametrize(
    ("rates", "message"), [({"*": 0.0}, "nothing would be trained"), ({"*.mpl.*": 0.5}, "a pattern that fits no parameter")]
)
def test_rates_that_cannot_be_meant_are_refused(rates, message):
    config = layout_config("one-stream")
    config.optimizer.rate_multipliers = rates
    with pytest.raises(ConfigurationError, match=message):
        train_layout(config, num_steps=0)
