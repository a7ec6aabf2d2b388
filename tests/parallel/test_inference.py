"""Predictions and validation of every layout are the single process's."""

from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import open_gates, world_size
from tests.parallel.test_layouts import layout_config
from tests.tiny import packed_batch
from w1train.runtime.distributed import distributed
from w1train.training.inference import Predictor
from w1train.training.setup import build_trained_model
from w1train.training.validation import validate

LAYOUTS = [
    {"pipeline": 2, "virtual_pipeline": 2},
    {"tensor": 2, "sequence": True},
    {"context": 2},
    {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
]
ODD_LENGTH = 11
NUM_VALIDATION_SAMPLES = (1, 3)
"""With one sample a micro-batch: neither fills a group of two."""


def _on_ranks(function, parallel):
    config = layout_config("one-stream", **parallel)
    config.validation.timesteps = [0.25, 0.75]
    return run_distributed(function, world_size(config, 1), config, process_group=False, timeout=60)


def _predict(_rank, _size, config):
    with distributed(config.parallel):
        model = build_trained_model(config)
        open_gates(model)
        predictor = Predictor(config, list(model.chunks))
        tokens = torch.arange(2 * ODD_LENGTH).reshape(2, ODD_LENGTH)
        with predictor.evaluating():
            return predictor(tokens, torch.tensor([0.3, 0.7]))


def _validate(_rank, _size, config):
    with distributed(config.parallel):
        model = build_trained_model(config)
        open_gates(model)
        return [_without_time(validate(config, model, _data(config, count))) for count in NUM_VALIDATION_SAMPLES]


def _data(config, count):
    batches = [packed_batch(range(sample, sample + 1), config.data.sequence_length) for sample in range(count)]
    dataset = SimpleNamespace(manifest=None)
    return SimpleNamespace(validation=dataset, validation_batches=lambda: iter(batches), validation_bits_per_byte=lambda elbo: elbo)


def _without_time(metrics):
    return {key: value for key, value in metrics.items() if not key.startswith("time/") and value is not None}


@pytest.fixture(scope="module")
def expected_logits():
    return _on_ranks(_predict, {})[0]


@pytest.fixture(scope="module")
def expected_validation():
    return _on_ranks(_validate, {})[0]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_logits_at_an_odd_length(parallel, expected_logits):
    for logits in _on_ranks(_predict, parallel):
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


def test_validation_that_fills_no_group_of_micro_batches(expected_validation):
    for metrics in _on_ranks(_validate, {"pipeline": 2, "virtual_pipeline": 2}):
        for found, wanted in zip(metrics, expected_validation, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key] == pytest.approx(value, rel=1e-5), key
