"""A run that starts from another run's weights."""

from __future__ import annotations

import shutil

from tests.end_to_end import traps
from tests.end_to_end.runs import TinyRun


def test_starts_where_the_other_ended_and_resumes_without_it(tiny_run, undisturbed, tmp_path):
    """The first validation is the other's last, bit for bit; once there is a checkpoint, the source is not read again."""
    source = tmp_path / "source"
    shutil.copytree(undisturbed(1, "fp32").path, source)
    arguments = ("training.precision=fp32", f"training.initial_weights={source}")
    outcome = tiny_run.train(*arguments, sabotage=traps.after_commit(1))
    assert outcome.killed
    assert f"initial weights from {source}/checkpoints/step_0000000012" in outcome.output
    expected = undisturbed(1, "fp32").metrics()
    scores = [[record for record in metrics if record["kind"] == "validation"] for metrics in (tiny_run.metrics(), expected)]
    assert scores[0][0]["elbo"] == scores[1][-1]["elbo"] != scores[1][0]["elbo"]
    shutil.rmtree(source)
    outcome = tiny_run.train(*arguments).require(0)
    assert "initial weights" not in outcome.output


def test_two_ranks_say_once_what_is_wrong(tiny_run: TinyRun, tmp_path):
    outcome = tiny_run.train(f"training.initial_weights={tmp_path}", world_size=2).require(2)
    assert outcome.output.count("has neither config.json (Hugging Face)") == 1
    assert "has neither" not in outcome.outputs[1]


def test_another_model_is_an_error_of_configuration(tiny_run, undisturbed):
    outcome = tiny_run.train("model.num_layers=1", f"training.initial_weights={undisturbed(1, 'fp32').path}").require(2)
    assert "model.num_layers" in outcome.output
    assert "valid: 2, as in" in outcome.output
