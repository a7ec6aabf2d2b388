"""Predictions and validation of every layout are the single process's."""

from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.layouts import open_gates, world_size
from tests.parallel.test_layouts import layout_config
from tests.tiny import packed_batch
from w1train.engine.building import build_trained_model
from w1train.inference.predictor import Predictor, block_predictor
from w1train.runtime.distributed import distributed
from w1train.training.validation import validate

LAYOUTS = [
    pytest.param({"pipeline": 2, "virtual_pipeline": 2}, marks=pytest.mark.slow),
    pytest.param({"tensor": 2, "sequence": True}, marks=pytest.mark.slow),
    {"context": 2},
    {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
]
ODD_LENGTH = 11
NUM_VALIDATION_SAMPLES = (1, 3)
"""With one sample a micro-batch: neither fills a group of two."""


def _on_ranks(function, parallel, streams="one-stream"):
    config = layout_config(streams, **parallel)
    config.training.micro_batch_size, config.validation.timesteps = 1, [0.25, 0.75]
    return run_distributed(function, world_size(config, 1), config, process_group=False, timeout=60)


def _predict(_rank, _size, config):
    with distributed(config.parallel):
        model = build_trained_model(config)
        open_gates(model)
        predictor = Predictor(config, list(model.chunks))
        tokens = torch.arange(2 * ODD_LENGTH).reshape(2, ODD_LENGTH)
        with predictor.evaluating():
            return predictor(tokens, torch.tensor([0.3, 0.7]))


def _predict_blocks(_rank, _size, config):
    """Logits of three cached blocks of four tokens, the first after seven prompt tokens and the last short, then of a smaller batch."""
    with distributed(config.parallel):
        model = build_trained_model(config)
        open_gates(model)
        predictor = Predictor(config, list(model.chunks))
        tokens = torch.arange(3 * ODD_LENGTH).reshape(3, ODD_LENGTH)
        t = torch.tensor([0.3, 0.7, 0.9])
        logits = []
        with predictor.evaluating():
            blocks = block_predictor(predictor)
            blocks.start(ODD_LENGTH, 4)
            blocks.append(tokens[:, :4])
            logits.append(blocks.predict_block(tokens[:, 4:8] + 40, t))
            logits.append(blocks.predict_block(tokens[:, 4:8] + 20, t))
            blocks.append(tokens[:, 4:8])
            logits.append(blocks.predict_block(tokens[:, 8:] + 20, t))
            blocks.select_rows(torch.tensor([2, 0]))
            logits.append(blocks.predict_block(tokens[[2, 0], 8:] + 50, t[[2, 0]]))
        return torch.cat([each.flatten() for each in logits])


def _validate(_rank, _size, config):
    with distributed(config.parallel):
        model = build_trained_model(config)
        open_gates(model)
        return [_without_time(validate(config, model, _data(config, count))) for count in NUM_VALIDATION_SAMPLES]


def _data(config, count):
    batches = [packed_batch(range(sample, sample + 1), config.data.sequence_length) for sample in range(count)]
    dataset = SimpleNamespace(manifest=None)
    validation = SimpleNamespace(dataset=dataset, batches=lambda: iter(batches), bits_per_byte=lambda elbo: elbo)
    return SimpleNamespace(validation=validation, validation_sets={"": validation})


def _without_time(metrics):
    return {key: value for key, value in metrics.items() if not key.startswith("time/") and value is not None}


@pytest.fixture(scope="module")
def expected_logits():
    return _on_ranks(_predict, {})[0]


@pytest.fixture(scope="module")
def expected_block_logits():
    return _on_ranks(_predict_blocks, {}, "two-stream")[0]


@pytest.fixture(scope="module")
def expected_validation():
    return _on_ranks(_validate, {})[0]


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_logits_at_an_odd_length(parallel, expected_logits):
    for logits in _on_ranks(_predict, parallel):
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_logits_of_cached_blocks(parallel, expected_block_logits):
    for logits in _on_ranks(_predict_blocks, parallel, "two-stream"):
        torch.testing.assert_close(logits, expected_block_logits, rtol=0, atol=1e-5)


def test_validation_that_fills_no_group_of_micro_batches(expected_validation):
    for metrics in _on_ranks(_validate, {"pipeline": 2, "virtual_pipeline": 2}):
        for found, wanted in zip(metrics, expected_validation, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key] == pytest.approx(value, rel=1e-5), key
