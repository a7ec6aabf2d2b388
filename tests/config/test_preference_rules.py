"""Rules of preferences: what would change the estimates of ELBOs, separate the draws of a pair, or leave the run without a reference."""

from __future__ import annotations

from typing import Any

import pytest

from tests.config.test_config_validate import MakeConfig
from w1train.config.resume import check_resume
from w1train.config.rules.validate import validate
from w1train.config.schema import CorpusConfig

PREFERENCES = {
    "diffusion.preference_draws": 4,
    "diffusion.random_length_probability": 0,
    "data.packing": "separate",
    "training.global_batch_size": 32,
    "training.initial_weights": "sft",
}


def _problems(make_config: MakeConfig, changes: dict[str, Any]) -> dict[str, str]:
    return {problem.key: problem.valid for problem in validate(make_config({**PREFERENCES, **changes}))}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"diffusion.block_size": 16, "diffusion.complementary": True, "diffusion.shift": True},
        {"diffusion.antithetic": True, "diffusion.mask_count": "exact", "diffusion.num_strata": 4},
        {"training.initial_weights": None, "reference.weights": "sft"},
        {"reference.mode": "adapters_off", "adapters.rank": 4},
    ],
)
def test_what_is_sound_is_valid(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    assert _problems(make_config, changes) == {}


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"diffusion.weight": "constant"}, "diffusion.weight", "no estimate of the ELBO"),
        ({"diffusion.t_max": 0.8}, "diffusion.t_max", "an integral over all t"),
        ({"diffusion.t_min": 0.4}, "diffusion.t_min", "an integral over all t"),
        ({"diffusion.preference_draws": 0, "reference.mode": "adapters_off"}, "reference.mode", "live, because no stage"),
        ({"diffusion.weight_max": 10.0}, "diffusion.weight_max", "would change the estimate"),
        ({"diffusion.focal_gamma": 1.0}, "diffusion.focal_gamma", "would change the estimate"),
        ({"diffusion.normalizer": "samples"}, "diffusion.normalizer", "the number of pairs"),
        ({"diffusion.random_length_probability": 0.01}, "diffusion.random_length_probability", "another likelihood"),
        ({"diffusion.mask_embedding_noise": 0.1}, "diffusion.mask_embedding_noise", "the pass with gradients alone"),
        ({"diffusion.coupled_draws": True}, "diffusion.coupled_draws", "timesteps of their own"),
        ({"data.packing": "best_fit"}, "data.packing", "separate"),
        ({"training.global_batch_size": 36}, "training.global_batch_size", "a multiple of 8"),
        ({"schedule.stages.stable.global_batch_size": 36}, "schedule.stages.stable.global_batch_size", "a multiple of 8"),
        ({"training.initial_weights": None}, "reference.weights", "random weights prefer no reply"),
        ({"diffusion.preference_draws": 0, "reference.weights": "x"}, "reference.weights", "null, because no stage"),
        ({"reference.mode": "adapters_off"}, "adapters.rank", "the model without its adapters"),
        ({"reference.mode": "adapters_off", "adapters.rank": 4, "adapters.train": ["*norm.weight"]}, "adapters.train", "must be frozen"),
        ({"reference.mode": "adapters_off", "adapters.rank": 4, "reference.weights": "x"}, "reference.weights", "of the model"),
        ({"data.validation": "pairs", "validation.num_samples": 7}, "validation.num_samples", "an even number"),
        (
            {"data.train": None, "data.blend": {"a": CorpusConfig(prefix="a"), "b": CorpusConfig(prefix="b")}},
            "data.blend in stage warmup",
            "would separate the replies of a pair",
        ),
    ],
)
def test_what_is_not_sound_is_refused(make_config: MakeConfig, changes: dict[str, Any], key: str, words: str) -> None:
    problems = _problems(make_config, changes)
    assert key in problems
    assert words in problems[key]


def test_draws_in_pairs_are_even(make_config: MakeConfig) -> None:
    changes = {"diffusion.preference_draws": 3, "diffusion.antithetic": True, "training.global_batch_size": 24}
    assert "an even number" in _problems(make_config, changes)["diffusion.preference_draws"]


def test_a_stage_may_train_preferences_alone(make_config: MakeConfig) -> None:
    """The rules hold for the stage, and the run needs a reference."""
    changes = {"diffusion.preference_draws": 0, "schedule.stages.decay.diffusion": {"preference_draws": 4, "weight": "constant"}}
    assert list(_problems(make_config, changes)) == ["schedule.stages.decay.diffusion.weight"]
    assert "reference.weights" in _problems(make_config, {**changes, "training.initial_weights": None})


def test_the_reference_may_move_on_resume(make_config: MakeConfig) -> None:
    """Its weights are compared with the hash in the checkpoint."""
    old, moved = (make_config({**PREFERENCES, "reference.weights": weights}) for weights in ("a", "b"))
    assert check_resume(old, moved, 10) == []
