"""Runs that train preferences: what they record, how they resume, and what they do when the weights of their reference change."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, TinyRun
from tests.made_pairs import write_pairs

DRAWS = 2
NUM_STEPS = 4
SETTINGS = (
    *("data.train=pairs", "data.validation=held_out", "data.packing=separate", "training.precision=fp32", "sampling.interval=0"),
    *(f"diffusion.preference_draws={DRAWS}", "diffusion.random_length_probability=0"),
    *("diffusion.preference_cross_entropy_weight=0.05", "checkpoint.interval=2", "checkpoint.keep_best=1"),
    *("checkpoint.best_metric=preference_accuracy", "validation.interval=2"),
    f"schedule.stages.stable.tokens={(NUM_STEPS - 2) * BATCH * LENGTH}",
)


@pytest.fixture(scope="session")
def pairs(tiny_data: Path) -> Path:
    """Return the directory of the tiny run's data, after the datasets of pairs were written into it."""
    for name, num_pairs, seed in (("pairs", 24, 1), ("held_out", 4, 2)):
        write_pairs(tiny_data / name, tiny_data / "tokenizer.json", num_pairs, seed)
    return tiny_data


@pytest.fixture(scope="session")
def trained(pairs, undisturbed, tmp_path_factory) -> TinyRun:
    """Return the run of preferences that nothing happens to."""
    run = TinyRun(pairs, tmp_path_factory.mktemp("preferences"))
    run.train(*_settings(undisturbed)).require(0)
    return run


def _settings(undisturbed) -> tuple[str, ...]:
    return (*SETTINGS, f"training.initial_weights={undisturbed(1, 'fp32').path}")


def _manifest(run: TinyRun, step: int) -> dict:
    return json.loads((run.checkpoints / f"step_{step:010d}" / "manifest.json").read_text())


def test_a_run_begins_as_its_reference_and_learns_to_prefer(trained):
    first, *_ = trained.train_records()
    assert first["preference_loss"] == pytest.approx(math.log(2), rel=1e-12)
    assert first["preference_accuracy"] == 0.5
    assert first["loss"] == pytest.approx(math.log(2) + 0.05 * first["elbo_chosen"], rel=0.2), "a mean of replies, not of tokens"
    validations = [record for record in trained.metrics() if record["kind"] == "validation"]
    assert validations[0]["preference_accuracy"] == 0.5
    assert validations[0]["elbo_chosen_change"] == validations[0]["elbo_rejected_change"] == 0
    assert validations[-1]["preference_margin"] > 0
    assert validations[-1]["preference_loss"] < math.log(2)


def test_checkpoints_remember_the_reference(trained, undisturbed):
    first, last = (_manifest(trained, step) for step in (2, 4))
    assert first["reference"] == last["reference"]
    assert first["reference"]["weights"] == str(undisturbed(1, "fp32").checkpoints / "step_0000000012")
    assert len(first["reference"]["sha256"]) == 64
    assert last["validation"]["preference_accuracy"] >= 0.5


def test_a_killed_run_resumes_bit_for_bit(trained, undisturbed, tiny_run):
    assert tiny_run.train(*_settings(undisturbed), sabotage=traps.after_record(3)).killed
    tiny_run.train(*_settings(undisturbed)).require(0)
    assert tiny_run.metrics() == trained.metrics()
    assert {name: entry for name, entry in _manifest(tiny_run, 4)["files"].items() if name.endswith(".shards")} == {
        name: entry for name, entry in _manifest(trained, 4)["files"].items() if name.endswith(".shards")
    }


def test_other_weights_of_the_reference_are_refused(trained, undisturbed, tiny_run):
    """The run that has stopped is asked to go on with the weights of another model as its reference."""
    tiny_run.train(*_settings(undisturbed), "--max-steps", "2").require(0)
    outcome = tiny_run.train(*_settings(undisturbed), f"reference.weights={trained.path}").require(2)
    assert "have changed since the run began" in outcome.output
    assert "reference.weights" in outcome.output


def test_a_run_without_a_reference_is_refused(pairs, tiny_run):
    outcome = tiny_run.train(*SETTINGS).require(2)
    assert "reference.weights" in outcome.output
    assert "random weights prefer no reply" in outcome.output
