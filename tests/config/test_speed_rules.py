"""Rules of overlap and FP8, and the range of the loss's chunks."""

from __future__ import annotations

import pytest

from w1train.config.compose import load_config
from w1train.config.errors import ConfigurationError
from w1train.config.rules.validate import validate

TE = {"model.transformer_impl": "te"}
# 16 divides every size of a product: 64 = 4 heads x 16.
DIVISIBLE = {
    "model.hidden_size": 64,
    "model.num_attention_heads": 4,
    "model.kv_channels": 16,
    "model.ffn_hidden_size": 128,
    "model.num_query_groups": None,
    "data.sequence_length": 64,
    "training.precision": "bf16",
    "training.fp8": "tensorwise",
    **TE,
}
# Two streams have 80 positions, one stream has 40.
TWO_STREAMS = {"data.sequence_length": 40, "training.micro_batch_size": 1, "diffusion.block_size": 8}
ONE_STREAM_AT_LAST = {"schedule.stages.decay.diffusion": {"block_size": None}}


def _keys(config):
    return {problem.key for problem in validate(config)}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"parallel.overlap_param_gather": True}, "parallel.overlap_param_gather"),
        (
            {"parallel.overlap_param_gather": True, "parallel.overlap_grad_reduce": True, "parallel.distributed_optimizer": False},
            "parallel.overlap_param_gather",
        ),
        ({"parallel.tp_comm_overlap": True, **TE}, "parallel.tp_comm_overlap"),
        ({"parallel.tp_comm_overlap": True, "parallel.tensor": 2, "parallel.sequence": True}, "parallel.tp_comm_overlap"),
        ({"training.loss_chunk_size": 0}, "training.loss_chunk_size"),
        ({"optimizer.name": "muon", "kernels.adamw": "te"}, "kernels.adamw"),
        ({"optimizer.momentum": 1.0}, "optimizer.momentum"),
        ({**DIVISIBLE, "model.transformer_impl": "local"}, "training.fp8"),
        ({**DIVISIBLE, "training.precision": "fp32"}, "training.fp8"),
        ({**DIVISIBLE, "model.ffn_hidden_size": 120}, "model.ffn_hidden_size"),
        ({**DIVISIBLE, "model.kv_channels": 10}, "model.kv_channels"),
        ({**DIVISIBLE, "data.sequence_length": 40, "training.micro_batch_size": 1}, "data.sequence_length"),
        ({**DIVISIBLE, **TWO_STREAMS, **ONE_STREAM_AT_LAST}, "data.sequence_length"),
        ({**DIVISIBLE, **TWO_STREAMS, "diffusion.block_size": 40}, "data.sequence_length"),
    ],
    ids=str,
)
def test_is_refused(make_config, changes, key):
    assert key in _keys(make_config(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel.overlap_grad_reduce": True, "parallel.overlap_param_gather": True},
        {"parallel.overlap_grad_reduce": True, "parallel.distributed_optimizer": False},
        {"parallel.tp_comm_overlap": True, "parallel.tensor": 2, "parallel.sequence": True, **TE},
        {"training.loss_chunk_size": 1},
        DIVISIBLE,
        {**DIVISIBLE, "training.fp8": "blockwise"},
        {**DIVISIBLE, **TWO_STREAMS},
    ],
    ids=str,
)
def test_is_allowed(make_config, changes):
    speed_keys = {"parallel.overlap_param_gather", "parallel.tp_comm_overlap", "training.loss_chunk_size", "training.fp8"}
    assert not _keys(make_config(changes)) & (speed_keys | set(DIVISIBLE))


def test_all_overlaps_ask_for_transformer_engine():
    """The command in docs/performance.md needs transformer-engine and is valid with it."""
    overrides = ["recipe=llada_8b", "parallel=tensor_4", "parallel.tp_comm_overlap=true"]
    with pytest.raises(ConfigurationError, match=r"parallel\.tp_comm_overlap") as refusal:
        load_config(overrides)
    assert {problem.key for problem in refusal.value.problems} == {"parallel.tp_comm_overlap"}
    config = load_config([*overrides, "model.transformer_impl=te"])
    assert not _keys(config)
    parallel = config.parallel
    assert (parallel.tensor, parallel.sequence) == (4, True)
    assert all([parallel.overlap_grad_reduce, parallel.overlap_param_gather, parallel.tp_comm_overlap])
