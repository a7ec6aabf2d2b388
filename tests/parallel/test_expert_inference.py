"""Predictions, cached blocks, validation and text samples of a mixture of experts in layouts whose ranks share experts: no rank waits for a
rank that has no work, and the results are those of the single process."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from tests.distributed import run_distributed
from tests.parallel.expert_models import expert_config, unbalance
from tests.parallel.layouts import open_gates, world_size
from tests.slow import slow_except
from tests.tiny import packed_batch
from tests.training.test_text_samples import ByteTokenizer
from w1train.config.schema import SamplingConfig
from w1train.data.batch import PackedBatch
from w1train.data.loader import validation_batches
from w1train.engine.building import build_trained_model
from w1train.inference.predictor import Predictor, block_predictor
from w1train.runtime.distributed import distributed
from w1train.training.text_samples import complete_prompts
from w1train.training.validation import validate

# Layout and data-parallel ranks.
LAYOUTS = {
    "ep2": ({"expert": 2}, 2),
    "dp4-ep2, all_gather": ({"expert": 2, "expert_dispatcher": "all_gather"}, 4),
    # Without sequence parallelism, tensor-parallel ranks have the same tokens, and both send them to the experts.
    "tp2-ep2 without sequence": ({"tensor": 2, "expert": 2}, 1),
    "tp2-etp2 without sequence": ({"tensor": 2, "expert_tensor": 2}, 1),
    "tp2-ep2": ({"tensor": 2, "sequence": True, "expert": 2}, 1),
    "cp2-ep2": ({"context": 2, "expert": 2}, 1),
    "pp2-vpp2-dp2-ep2": ({"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, 2),
}
ODD_LENGTH = 11
NUM_VALIDATION_SAMPLES = (1, 3)
"""With one sample in a micro-batch: fewer than ranks, and no multiple of the ranks."""
SAMPLING = SamplingConfig(prompts=["ab", "a longer prompt"], num_tokens=10, threshold=0.02, temperature=0.7)


def _config(parallel):
    config = dataclasses.replace(expert_config(1, **parallel), sampling=SAMPLING)
    config.validation.timesteps = [0.25, 0.75]
    return config


def _on_ranks(parallel, data, function):
    config = _config(parallel)
    return run_distributed(function, world_size(config, data), config, process_group=False, timeout=120)


def _everything(_rank, _size, config):
    with distributed(config.parallel) as ranks:
        model = build_trained_model(config)
        open_gates(model)
        unbalance(model)
        predictor = Predictor(config, list(model.chunks))
        with predictor.evaluating():
            logits = [_logits(predictor), *_logits_of_blocks(block_predictor(predictor))]
        scores = [_scores(config, model, ranks, count) for count in NUM_VALIDATION_SAMPLES]
        texts = complete_prompts(config, model, ByteTokenizer(), torch.device("cpu"))
        return torch.cat([each.flatten() for each in logits]), scores, texts


def _logits(predictor):
    tokens = torch.arange(2 * ODD_LENGTH).reshape(2, ODD_LENGTH)
    return predictor(tokens, torch.tensor([0.3, 0.7]))


def _logits_of_blocks(blocks):
    """Logits of a block after a cached block, and of a short block of fewer rows."""
    tokens = torch.arange(3 * ODD_LENGTH).reshape(3, ODD_LENGTH)
    t = torch.tensor([0.3, 0.7, 0.9])
    blocks.start(ODD_LENGTH, 4)
    blocks.append(tokens[:, :4])
    first = blocks.predict_block(tokens[:, 4:8] + 40, t)
    blocks.append(tokens[:, 4:8])
    blocks.select_rows(torch.tensor([2, 0]))
    return first, blocks.predict_block(tokens[[2, 0], 8:] + 50, t[[2, 0]])


def _scores(config, model, ranks, count):
    packed = SimpleNamespace(sequence_length=config.data.sequence_length, num_samples_per_epoch=count, sample=_sample)

    def batches():
        return validation_batches(packed, count, 1, ranks.data_parallel_rank, ranks.data_parallel_size)

    validation = SimpleNamespace(batches=batches, bits_per_byte=lambda elbo: elbo)
    found = validate(config, model, SimpleNamespace(validation=validation, validation_sets={"": validation}))
    return {key: value for key, value in found.items() if not key.startswith("time/") and value is not None}


def _sample(index):
    batch = packed_batch([index])
    return {field.name: getattr(batch, field.name)[0].numpy() for field in PackedBatch.fields() if field.per == "token"}


@pytest.fixture(scope="module")
def expected():
    return _on_ranks({}, 1, _everything)[0]


@pytest.mark.parametrize("layout", slow_except(["ep2", "tp2-ep2 without sequence"], LAYOUTS))
def test_results_are_those_of_the_single_process(layout, expected):
    logits, scores, texts = expected
    for found_logits, found_scores, found_texts in _on_ranks(*LAYOUTS[layout], _everything):
        torch.testing.assert_close(found_logits, logits, rtol=0, atol=1e-5)
        for found, wanted in zip(found_scores, scores, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                assert found[key] == pytest.approx(value, rel=1e-5), key
        assert found_texts == texts


def _predict_with_ranks_apart(rank, _size, config):
    with distributed(config.parallel):
        model = build_trained_model(config)
        with torch.no_grad():
            model.stages[0].output_layer.weight.add_(rank)
        return _logits(Predictor(config, list(model.chunks)))


def test_all_ranks_that_share_experts_get_the_same_logits():
    """A last bit that differs between ranks would lead to different texts, and these to different numbers of passes."""
    first, second = _on_ranks(*LAYOUTS["ep2"], _predict_with_ranks_apart)
    assert torch.equal(first, second)
