"""What a loss, a weight, positions, a prediction and a process cannot serve together is refused at the start, with the key to change."""

from __future__ import annotations

import pytest

from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.config.schema import StageConfig
from w1train.objectives.compatibility import objective_problems
from w1train.registered_names import NAME_RULES

UNIFORM = {"objective": "uniform", "num_noise_ids": VOCAB_SIZE, "t_max": 0.99}
SCORES = {"loss": "score_entropy", "num_noise_ids": VOCAB_SIZE, "t_max": 0.99}
HYBRID = {**UNIFORM, "objective": "hybrid"}
REFUSED = [
    ({**UNIFORM}, "diffusion.weight", "diffusion.loss=kl_is"),
    ({**UNIFORM, "weight": "elbo"}, "diffusion.weight", "diffusion.loss=kl_is"),
    ({"loss": "kl_is"}, "diffusion.loss", "diffusion.loss=cross_entropy"),
    ({"loss": "finite_kl"}, "diffusion.num_timesteps", "1000"),
    ({"loss": "finite_kl", "num_timesteps": 4}, "validation.timesteps", "a multiple of"),
    ({**SCORES, "exclude_mask_logit": False}, "diffusion.exclude_mask_logit", "=true"),
    ({**SCORES, "num_noise_ids": 0}, "diffusion.num_noise_ids", f"={VOCAB_SIZE}"),
    ({**SCORES, "num_noise_ids": VOCAB_SIZE + 1}, "diffusion.num_noise_ids", f"={VOCAB_SIZE}"),
    ({**SCORES, "num_timesteps": 10}, "diffusion.num_timesteps", "=0"),
    ({**UNIFORM, "loss": "score_entropy", "num_timesteps": 10}, "diffusion.num_timesteps", "=0"),
    ({**SCORES, "t_max": 1.0}, "diffusion.t_max", "log_linear"),
    ({**UNIFORM, "loss": "kl_is", "num_timesteps": 8}, "diffusion.loss", "finite_kl"),
    ({**HYBRID, "loss": "score_entropy"}, "diffusion.loss", "kl_is"),
    ({**UNIFORM, "loss": "per_id"}, "diffusion.loss", "kl_is"),
    ({**UNIFORM, "loss": "kl_is", "prediction": "full"}, "diffusion.prediction", "leave_one_out"),
    ({**UNIFORM, "weight": "constant", "prediction": "full"}, "diffusion.prediction", "leave_one_out"),
    ({**UNIFORM, "weight": "constant", "loss_positions": "all"}, "diffusion.prediction", "full"),
    (
        {**UNIFORM, "weight": "constant", "loss_positions": "all", "prediction": "full", "num_timesteps": 50},
        "diffusion.num_timesteps",
        "=0",
    ),
    ({**UNIFORM, "loss": "kl_is", "loss_positions": "noised"}, "diffusion.loss_positions", "auto"),
    ({**UNIFORM, "loss": "kl_is", "focal_gamma": 2.0}, "diffusion.focal_gamma", "=0"),
    ({**UNIFORM, "loss": "kl_is", "label_smoothing": 0.1}, "diffusion.label_smoothing", "cross_entropy"),
    ({**UNIFORM, "loss": "kl_is", "confidence_weight": 2.0}, "diffusion.confidence_weight", "cross_entropy"),
    ({"confidence_weight": 2.0, "mask_embedding_noise": 0.1}, "diffusion.mask_embedding_noise", "=0"),
    ({**UNIFORM, "loss": "kl_is", "weight": "cart"}, "diffusion.weight", "constant"),
    ({"weight": "cart", "block_size": 4}, "diffusion.weight", "constant"),
    ({"weight": "gidd_dynamic"}, "diffusion.weight", "constant"),
    (
        {**UNIFORM, "objective": "log_snr", "log_snr_shift": -1000.0, "loss": "kl_is", "weight": "gidd_dynamic"},
        "diffusion.weight",
        "log_snr",
    ),
    ({"loss": "reconstruction"}, "diffusion.weight", "constant"),
    ({"weight_min": 2.0, "weight_max": 1.0}, "diffusion.weight_min", "at most"),
]
ACCEPTED = [
    {},
    {"objective": "autoregressive", "loss": "kl_is", "weight": "gidd_dynamic"},
    {"weight": "cart", "weight_max": 2.0, "focal_gamma": 2.0, "label_smoothing": 0.1, "prediction": "full"},
    {"loss": "finite_kl", "num_timesteps": 5, "cross_entropy_weight": 0.01},
    {**UNIFORM, "weight": "constant", "confidence_weight": 2.0, "label_smoothing": 0.1},
    {"objective": "autoregressive", "loss": "kl_is", "confidence_weight": 2.0},
    {**UNIFORM, "loss": "kl_is", "weight": "log_snr"},
    {**UNIFORM, "weight": "constant", "loss_positions": "all", "prediction": "full"},
    {**UNIFORM, "weight": "constant", "loss_positions": "changed", "prediction": "full"},
    SCORES,
    {**SCORES, "noise_schedule": "log_linear", "schedule_epsilon": 1e-3, "t_max": 1.0},
    {**UNIFORM, "loss": "score_entropy"},
    {**UNIFORM, "weight": "one_minus_t", "num_timesteps": 50, "t_max": 1.0, "loss_positions": "changed"},
    {**HYBRID, "loss": "kl_is", "weight": "gidd_dynamic"},
    {**HYBRID, "loss": "finite_kl", "num_timesteps": 1000},
]


def _problems(config) -> list:
    return [problem for rule in NAME_RULES for problem in rule(config)]


@pytest.mark.parametrize(("given", "key", "hint"), REFUSED, ids=str)
def test_is_refused(given, key, hint):
    (problem,) = _problems(tiny_config(diffusion=given))
    assert problem.key == key
    assert hint in str(problem)


@pytest.mark.parametrize("given", ACCEPTED, ids=str)
def test_is_accepted(given):
    config = tiny_config(diffusion=given)
    assert not _problems(config)
    assert not list(objective_problems(config)), "also where the rules are left out, because all is usual"


def test_a_stage_is_checked_by_itself():
    config = tiny_config()
    config.schedule.stages["later"] = StageConfig(
        tokens=1000, learning_rate=1e-3, diffusion={**UNIFORM, "loss": "kl_is", "prediction": "full"}
    )
    (problem,) = _problems(config)
    assert problem.key == "schedule.stages.later.diffusion.prediction"


def test_all_problems_are_reported_together():
    given = {**UNIFORM, "loss": "score_entropy", "exclude_mask_logit": False, "prediction": "full", "weight_min": 2.0, "weight_max": 1.0}
    assert len(_problems(tiny_config(diffusion=given))) == 3
