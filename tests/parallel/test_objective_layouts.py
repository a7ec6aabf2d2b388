"""Every loss under noise of every kind gives the single process's numbers in every layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.parallel.layouts import Outcome, train_layouts
from tests.parallel.test_layouts import VIRTUAL, assert_equal_numbers
from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.config.schema import Config

CASES = {
    "uniform-kl": {"objective": "uniform", "loss": "kl_is", "block_size": 4, "timestep_per": "block", "antithetic": True},
    "hybrid-steps": {
        "objective": "hybrid",
        "loss": "finite_kl",
        "num_timesteps": 8,
        "cross_entropy_weight": 0.1,
        "timestep_per": "document",
    },
    "cart": {"weight": "cart", "shift": True, "label_smoothing": 0.1, "focal_gamma": 2.0},
    "hybrid-joint": {
        "objective": "hybrid",
        "uniform_share": 0.2,
        "loss": "kl_is",
        "weight": "gidd_dynamic",
        "block_size": 4,
        "shift": True,
        "clean_attention": "token_causal",
        "autoregressive_weight": 0.5,
    },
    "mixture": {"objective": "log_snr", "loss": "kl_is", "weight": "log_snr", "normalizer": "samples", "random_length_probability": 0.5},
    "full": {"objective": "uniform", "weight": "constant", "loss_positions": "all", "prediction": "full"},
    "changed": {"objective": "token_to_token", "weight": "one_minus_t", "loss_positions": "changed", "num_timesteps": 8},
    "scores": {"loss": "score_entropy", "noise_schedule": "cosine"},
    "uniform-scores": {"objective": "uniform", "loss": "score_entropy", "block_size": 4},
    "reconstruction": {"objective": "hybrid", "loss": "reconstruction", "weight": "constant", "normalizer": "masked_tokens"},
}
IN_EACH_RUN = ("uniform-kl", "hybrid-steps", "cart")
TENSOR_AND_CONTEXT = {"tensor": 2, "sequence": True, "context": 2}
_references: dict[str, Outcome] = {}


def _config(name: str, data_parallel: int, **parallel: object) -> Config:
    micro_batches = 4 if parallel.get("pipeline", 1) > 1 else 2
    return tiny_config(
        model={"num_layers": 4 if "virtual_pipeline" in parallel else 2, "qk_norm": True},
        parallel={"context_chunk_size": 4, "distributed_optimizer": False, **parallel},
        diffusion={"num_noise_ids": VOCAB_SIZE, "t_min": 0.01, "t_max": 0.99, **CASES[name]},
        training={"global_batch_size": 4, "micro_batch_size": max(1, 4 // (data_parallel * micro_batches)), "loss_chunk_size": 20},
    )


def _assert_single_process_numbers(names: Sequence[str], parallel: dict, data: int) -> None:
    configs = [_config(name, data, **parallel) for name in names]
    num_layers = configs[0].model.num_layers
    missing = [name for name in names if f"{name}{num_layers}" not in _references]
    if missing:
        single = [_config(name, 1) for name in missing]
        for config in single:
            config.model.num_layers, config.training.loss_chunk_size = num_layers, None
        _references.update(zip([f"{name}{num_layers}" for name in missing], train_layouts(single), strict=True))
    for name, outcome in zip(names, train_layouts(configs, data), strict=True):
        assert_equal_numbers(outcome, _references[f"{name}{num_layers}"], name)


def test_some_objectives_keep_the_numbers():
    """Two ranks share the vocabulary and the positions here, in chunks of rows."""
    _assert_single_process_numbers(IN_EACH_RUN, TENSOR_AND_CONTEXT, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "data"),
    [
        (TENSOR_AND_CONTEXT, 1),
        ({**VIRTUAL}, 1),
        ({"context": 2, "context_method": "all_to_all"}, 2),
        ({"tensor": 2, "sequence": True, "pipeline": 2}, 1),
        ({"tensor": 4}, 1),
    ],
    ids=["tp2-cp2", "tp2-pp2-vpp2", "cp2-dp2", "tp2-pp2", "tp4"],
)
def test_objectives_keep_the_numbers(parallel, data):
    _assert_single_process_numbers(list(CASES), parallel, data)
