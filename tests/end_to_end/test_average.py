"""The best checkpoints are kept, averaged at the end and from outside, and compared; a kill changes none of it."""

from __future__ import annotations

import io
import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.end_to_end import traps
from tests.end_to_end.runs import BATCH, LENGTH, NUM_STEPS, TinyRun
from tests.end_to_end.test_resume import require_equal
from w1train import average, convert, evaluate, sample
from w1train.checkpoints.manifest import read_scores
from w1train.inference.predictor import load_for_inference
from w1train.reports.run_report import write_report

OPTIONS = ("validation.interval=3", "checkpoint.keep=1", "checkpoint.keep_best=2", "checkpoint.average_at_end=true")
# So much that the loss jumps about: the best checkpoints, 3 and 9, are not the newest.
TOO_FAST = ("schedule.stages.stable.learning_rate=0.1", "training.seed=5")


def in_a_process(run: TinyRun, command, *arguments: str, directory: Path | None = None) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command, in a forked process as its process group cannot be left.

    Args:
        directory: where it is typed; None = where the run was started.
    """

    def call(_rank: int, _size: int) -> tuple[int, str, str]:
        os.chdir(directory or run.data)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = command.main([str(run.path), *arguments])
        return status, out.getvalue(), err.getvalue()

    return run_distributed(call, 1, process_group=False)[0]


@pytest.fixture(scope="module")
def averaged(tiny_data, tmp_path_factory) -> TinyRun:
    """A run of two ranks that nothing happened to."""
    run = TinyRun(tiny_data, tmp_path_factory.mktemp("averaged"))
    run.train(*OPTIONS, *TOO_FAST, world_size=2).require(0)
    return run


def copy_of(run: TinyRun, directory: Path) -> TinyRun:
    """For a test that changes it."""
    shutil.copytree(run.runs_dir, directory / "copy")
    return TinyRun(run.data, directory / "copy")


def records(run: TinyRun, kind: str) -> list[dict]:
    return [record for record in run.metrics() if record["kind"] == kind]


def averages(run: TinyRun) -> list[Path]:
    return sorted(run.checkpoints.glob("average_*"))


def test_the_best_stay_beside_the_newest(averaged):
    scores = {record["step"]: record["elbo"] for record in records(averaged, "validation") if record["step"] > 0}
    assert list(scores) == [3, 6, 9, 12]
    best = sorted(scores, key=lambda step: scores[step])[:2]
    assert 12 not in best, "the newest is among the best: the test shows nothing"
    assert averaged.steps_saved() == sorted({*best, 12})
    for step in averaged.steps_saved():
        assert read_scores(averaged.checkpoints / f"step_{step:010d}")["elbo"] == scores[step]


def test_the_average_is_compared_with_its_members(averaged):
    (record,) = records(averaged, "average")
    (path,) = averages(averaged)
    scores = {line["step"]: line["elbo"] for line in records(averaged, "validation")}
    assert record["checkpoint"] == path.name
    assert record["step"] == NUM_STEPS
    assert record["members"] == [step for step in averaged.steps_saved() if step != 12]
    assert record["member_elbo"] == [scores[step] for step in record["members"]]
    assert record["is_better"] == (record["elbo"] < min(record["member_elbo"]))
    assert averaged.summary()["average"]["elbo"] == record["elbo"]
    assert averaged.summary()["steps"] == NUM_STEPS
    page = write_report(averaged.path).read_text()
    assert "Average of checkpoints" in page
    assert f"{record['elbo']:.4f}" in page


KILLS = {
    "step 9 saved, step 6 not removed": traps.after_commit(3),
    "step 12 saved, none removed": traps.after_commit(4),
    "torn record": traps.torn_line("average", NUM_STEPS),
    "no summary": traps.before_summary(),
    "average not renamed": traps.at_average_commit(),
}


@pytest.mark.slow  # test_stages.py kills a run whose phases end with averages
@pytest.mark.parametrize("kill", KILLS)
def test_a_kill_changes_nothing(averaged, tiny_run, kill):
    assert tiny_run.train(*OPTIONS, *TOO_FAST, world_size=2, sabotage=KILLS[kill]).killed
    tiny_run.train(*OPTIONS, *TOO_FAST, world_size=2).require(0)
    require_equal(tiny_run, averaged)
    assert [path.name for path in averages(tiny_run)] == [path.name for path in averages(averaged)]
    assert not list(tiny_run.checkpoints.glob(".*"))


@pytest.mark.slow
def test_training_goes_on_from_the_step_and_not_from_the_average(averaged, tiny_data, tmp_path):
    run = copy_of(averaged, tmp_path)
    longer = (f"schedule.stages.stable.tokens={(NUM_STEPS - 1) * BATCH * LENGTH}",)  # one more step
    outcome = run.train(*OPTIONS, *TOO_FAST, *longer, world_size=2).require(0)
    assert f"resuming from {run.checkpoints}/step_{NUM_STEPS:010d}" in outcome.output
    straight = TinyRun(tiny_data, tmp_path / "straight")
    straight.train(*OPTIONS, *TOO_FAST, *longer, world_size=2).require(0)
    assert len(straight.train_records()) == NUM_STEPS + 1
    assert run.train_records() == straight.train_records()


def test_the_command_averages_evaluates_and_records(averaged, tmp_path):
    averaged = copy_of(averaged, tmp_path)
    status, out, err = in_a_process(averaged, average, "--top-k", "3", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["members"] == averaged.steps_saved()
    assert averaged.metrics()[-1]["checkpoint"] == Path(result["path"]).name
    assert averaged.summary()["average"]["members"] == result["members"]
    # On one process as on two ranks, but for the rounding.
    recorded = {record["step"]: record["elbo"] for record in records(averaged, "validation")}
    assert result["member_elbo"] == pytest.approx([recorded[step] for step in result["members"]], rel=1e-5)
    status, out, err = in_a_process(averaged, evaluate, "--checkpoint", "average", "--json")
    assert status == 0, err
    evaluated = json.loads(out)
    assert evaluated["checkpoint"] == Path(result["path"]).name
    assert evaluated["elbo"] == result["elbo"]
    assert evaluated["loss_by_t"] == result["loss_by_t"]
    assert in_a_process(averaged, average, "--top-k", "3")[0] == 0
    assert [record["checkpoint"] for record in records(averaged, "average")].count(evaluated["checkpoint"]) == 1
    status, out, err = in_a_process(averaged, evaluate, "--checkpoint", "6")
    assert (status, out) == (2, "")
    assert "has no checkpoint of step 6; it has: 3, 9, 12, average_" in err
    assert in_a_process(averaged, sample, "--checkpoint", "average")[0] == 0


def test_an_output_elsewhere_leaves_the_run_alone(averaged, tmp_path):
    before = {path: path.read_bytes() for path in averaged.path.rglob("*") if path.is_file()}
    target = tmp_path / "checkpoints/step_0000000012"
    steps = ",".join(map(str, averaged.steps_saved()))
    status, out, err = in_a_process(averaged, average, "--steps", steps, "--output", str(target), "--no-evaluate")
    assert (status, out.strip()) == (0, str(target)), err
    assert {path: path.read_bytes() for path in averaged.path.rglob("*") if path.is_file()} == before
    status, _, err = in_a_process(averaged, average, "--top-k", "2", "--output", str(target), "--no-evaluate")
    assert status == 2
    assert "exists and is not the average of these checkpoints" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "12,77"], "has no checkpoint of step 77; it has:"),
        (["--steps", "9,12", "--output", "again/step_0000000009"], "is of step 12, as its newest member: call it step_0000000012"),
        (["--steps", "9,12", "--output", "RUN/checkpoints/step_0000000009/x"], "are not apart"),
    ],
)
def test_what_cannot_be_averaged_is_said(averaged, arguments, message):
    arguments = [argument.replace("RUN", str(averaged.path)) for argument in arguments]
    status, _, err = in_a_process(averaged, average, *arguments)
    assert status == 2
    assert message in err


def test_likelihoods_of_texts(averaged, tmp_path):
    path = tmp_path / "questions.jsonl"
    texts = [
        {"prompt": "abc", "completion": "d"},
        {"prompt": "", "completion": "some longer words here"},
        {"prompt": "a word", "choices": [".", " zz", " q"], "answer": 0},
    ]
    path.write_text("".join(json.dumps(text) + "\n" for text in texts))
    status, out, err = in_a_process(averaged, evaluate, "--likelihood", str(path), "--checkpoint", "9", "--draws", "32", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert (result["checkpoint"], result["draws"], result["num_questions"]) == ("step_0000000009", 32, 1)
    assert result["texts"][0]["log_likelihoods"] == pytest.approx(
        [run_distributed(one_token, 1, averaged, process_group=False)[0]], rel=1e-5
    )
    assert all(value < 0 for text in result["texts"] for value in text["log_likelihoods"])
    status, out, _ = in_a_process(averaged, evaluate, "--likelihood", str(path), "--draws", "8", "--batch-size", "3")
    assert status == 0
    assert "accuracy" in out
    assert len(out.splitlines()) == 9


def one_token(_rank: int, _size: int, run: TinyRun) -> float:
    """log p("d" | "abc") of the model at step 9, by hand."""
    os.chdir(run.data)
    os.environ.pop("RANK")
    model = load_for_inference(run.path, 9)
    tokens = torch.tensor([[*model.tokenizer.encode("abc"), model.config.diffusion.mask_token_id]])
    logits = model.predict(tokens, torch.tensor([1 / tokens.shape[1]]))
    return logits[0, -1].log_softmax(dim=0)[model.tokenizer.encode("d")[0]].item()


def test_kernels_of_the_training_machine_are_not_asked_for(averaged, tmp_path):
    run = TinyRun(averaged.data, tmp_path)
    shutil.copytree(averaged.path, run.path)
    config = run.path / "config.yaml"
    settings = config.read_text()
    config.write_text(settings.replace("rope: auto", "rope: fused"))
    assert "rope: fused" in config.read_text()
    status, _, err = in_a_process(run, evaluate, "--json")
    assert status == 0, err


def test_from_another_directory_with_the_runs_own_tokenizer(averaged, tmp_path):
    status, out, err = in_a_process(averaged, evaluate, "--validation", str(averaged.data / "validation"), "--json", directory=tmp_path)
    assert status == 0, err
    assert json.loads(out)["elbo"] == pytest.approx(records(averaged, "validation")[-1]["elbo"], rel=1e-5)


def test_another_validation_set(averaged):
    status, out, err = in_a_process(averaged, evaluate, "--validation", "train", "--json")
    assert status == 0, err
    assert json.loads(out)["elbo"] != records(averaged, "validation")[-1]["elbo"]
    status, out, _ = in_a_process(averaged, evaluate)
    assert status == 0
    assert f"{records(averaged, 'validation')[-1]['elbo']:.4f} nats per token" in out
    status, out, err = in_a_process(averaged, evaluate, "--validation", "absent")
    assert (status, out) == (2, "")
    assert "absent" in err


def test_the_average_is_exported(averaged, tmp_path):
    """By the command that docs/conversion.md shows."""
    weights = []
    for checkpoint in ("average", "12"):
        output = tmp_path / checkpoint
        status, out, err = in_a_process(averaged, _ToHuggingFace, str(output), "--checkpoint", checkpoint)
        assert status == 0, err
        assert f"{'average_' if checkpoint == 'average' else 'step_'}0000000" in out
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


class _ToHuggingFace:
    """w1train convert to-hf, as a command whose first argument is the run."""

    @staticmethod
    def main(arguments: list[str]) -> int:
        return convert.main(["to-hf", *arguments])
