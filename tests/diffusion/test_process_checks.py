"""Mistakes in the fields of a noise process: each is reported with the key to change, and what works is not reported."""

import numpy as np
import pytest

from tests.test_registered_names import name_problems
from tests.tiny import VOCAB_SIZE, tiny_config
from w1train.diffusion.process_checks import process_problems

IDS = {"num_noise_ids": VOCAB_SIZE}
ENDS = {**IDS, "t_max": 0.9999}
VALID = [
    {"noise_schedule": "cosine", "schedule_epsilon": 1e-4},
    {"noise_schedule": "polynomial"},
    {"noise_schedule": "log_linear", "schedule_epsilon": 1e-3, "t_min": 0.0, "weight": "constant"},
    {"objective": "uniform", "noise_schedule": "geometric", **IDS},
    {"objective": "uniform", "noise_schedule": "gaussian_argmax", **IDS},
    {"objective": "uniform", "complementary": True, **ENDS},
    {"objective": "uniform", "exclude_mask_logit": False, **ENDS},
    {"objective": "hybrid", **ENDS},
    {"objective": "hybrid", "hybrid_gamma": 2.0, **ENDS, "num_noise_ids": VOCAB_SIZE - 1, "mask_token_id": VOCAB_SIZE - 1},
    {"objective": "log_snr", "log_snr_shift": -1000.0, "complementary": True, **IDS},
    {"objective": "token_to_token", **ENDS},
    {"objective": "edits", "num_noise_ids": 40},
]
MISTAKES = [
    ({"noise_schedule": "sine"}, "noise_schedule"),
    ({"noise_schedule": "gaussian_argmax"}, "noise_schedule"),
    ({"noise_schedule": "cosine", "objective": "hybrid", **ENDS}, "noise_schedule"),
    ({"schedule_epsilon": 1e-4, "objective": "hybrid", **ENDS}, "schedule_epsilon"),
    ({"schedule_epsilon": 1e-4, "noise_schedule": "geometric"}, "schedule_epsilon"),
    ({"noise_schedule": "cosine", "complementary": True}, "complementary"),
    ({"noise_schedule": "geometric", "schedule_sigma_min": 30.0}, "schedule_sigma_min"),
    ({"objective": "uniform", "noise_schedule": "gaussian_argmax", "schedule_gamma_max": -4.0, **IDS}, "schedule_gamma_min"),
    ({"objective": "uniform", "t_max": 0.9}, "num_noise_ids"),
    ({"objective": "edits"}, "num_noise_ids"),
    ({"objective": "uniform", "num_noise_ids": VOCAB_SIZE + 1, "t_max": 0.9}, "num_noise_ids"),
    ({"objective": "uniform", "num_noise_ids": VOCAB_SIZE - 1, "t_max": 0.9}, "num_noise_ids"),
    ({"objective": "edits", "num_noise_ids": VOCAB_SIZE + 1}, "num_noise_ids"),
    ({"objective": "uniform", "mask_embedding_noise": 0.1, **ENDS}, "mask_embedding_noise"),
    ({"objective": "hybrid", "exclude_mask_logit": False, **ENDS}, "exclude_mask_logit"),
    ({"objective": "hybrid", **IDS}, "t_max"),
    ({"objective": "hybrid", **ENDS, "t_max": 1 - 1e-9}, "t_max"),
    ({"objective": "hybrid", **ENDS, "t_min": 0.0, "weight": "constant"}, "t_min"),
    ({"objective": "hybrid", **ENDS, "hybrid_gamma": 2.5}, "hybrid_gamma"),
    ({"objective": "hybrid", **ENDS, "complementary": True}, "complementary"),
    ({"objective": "log_snr", **IDS, "log_snr_slope": 1.5}, "log_snr_slope"),
    ({"objective": "log_snr", **IDS, "log_snr_slope": 3.0, "log_snr_shift": -2.0}, "log_snr_slope"),
    ({"objective": "edits", **IDS, "complementary": True}, "complementary"),
    ({"objective": "edits", **IDS, "weight": "one_minus_t"}, "weight"),
    ({"objective": "edits", **IDS, "loss": "finite_kl", "num_timesteps": 10}, "loss"),
    ({"objective": "edits", **IDS, "loss": "reconstruction"}, "loss"),
    ({"objective": "per_id_masked"}, "token_counts"),
]


@pytest.mark.parametrize("fields", VALID, ids=str)
def test_what_works_is_not_reported(fields):
    assert list(process_problems(tiny_config(diffusion=fields))) == []


@pytest.mark.parametrize(("fields", "key"), MISTAKES, ids=str)
def test_mistakes_are_reported_with_the_key_to_change(fields, key):
    (problem,) = process_problems(tiny_config(diffusion=fields))
    assert problem.key == f"diffusion.{key}"


def test_mistakes_are_reported_together_and_in_stages():
    """Also where the run itself has the usual process."""
    config = tiny_config()
    config.schedule.stages["all"].diffusion = {"objective": "log_snr", "log_snr_slope": 1.5, "mask_embedding_noise": 0.0}
    keys = {problem.key for problem in name_problems(config)}
    assert {"diffusion.num_noise_ids in stage all", "schedule.stages.all.diffusion.log_snr_slope"} <= keys


def test_counts_of_another_vocabulary_and_a_wide_spindle(tmp_path):
    np.save(tmp_path / "counts.npy", np.arange(10))
    fields = {"objective": "per_id_masked", "token_counts": str(tmp_path / "counts.npy"), "spindle_scale": 0.4, "complementary": True}
    keys = [problem.key for problem in process_problems(tiny_config(diffusion=fields))]
    assert keys == ["diffusion.token_counts", "diffusion.spindle_scale", "diffusion.complementary"]
    (tmp_path / "no.npy").write_text("no counts")
    for name, expected in (("no.npy", 1), ("missing.npy", 0)):  # a missing file is reported where the run starts
        problems = list(process_problems(tiny_config(diffusion={"objective": "per_id_masked", "token_counts": str(tmp_path / name)})))
        assert len(problems) == expected
