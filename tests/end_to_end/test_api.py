"""``import w1train``: the numbers of the commands, in a process that is afterwards as it was before."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import w1train
from tests.checkpoint_files import whole_tensors
from tests.end_to_end.runs import NUM_STEPS, TinyRun, launch, output_to
from w1train import evaluate, sample
from w1train.config.serialization import config_from_yaml
from w1train.runtime import megatron_on_cpu

QUESTIONS = [{"prompt": "", "completion": "some text"}, {"prompt": "a b", "completion": "c"}]
SETTINGS = {"num_tokens": 8, "temperature": 0.7, "seed": 5, "remasking": "random"}


def in_guest(directory: Path, log: Path, main: Callable[[], Any]) -> Any:
    """Return what ``main`` returns in a forked process that starts in a directory, as JSON keeps it; what it prints is in the log."""

    def enter(_rank: int) -> int:
        os.chdir(directory)
        # Other tests of the parent may have redirected CUDA for good.
        while megatron_on_cpu._originals:
            setattr(*megatron_on_cpu._originals.pop())
        megatron_on_cpu._redirected = False
        with output_to(log):
            result = main()
        log.with_suffix(".json").write_text(json.dumps(result))
        return 0

    assert launch(1, enter) == [0], log.read_text()
    return json.loads(log.with_suffix(".json").read_text())


def process_state() -> dict[str, Any]:
    """Return what a call could leave changed."""
    parallel_state = sys.modules["megatron.core.parallel_state"]
    tracker = sys.modules["megatron.core.tensor_parallel.random"]
    return {
        "garbage": gc.isenabled(),
        "signals": [repr(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "variables": {name: value for name, value in os.environ.items() if not name.startswith("NVTE_")},
        "groups": torch.distributed.is_initialized(),
        "megatron": [{name: repr(value) for name, value in vars(module).items()} for module in (parallel_state, tracker)],
        "type": torch.ones(1).type(),
        "cuda": [repr(torch.cuda.synchronize), repr(torch.distributed.all_reduce), repr(torch.nn.Module.cuda)],
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes() + repr(random.getstate()).encode()).hexdigest(),
        "numpy": repr(np.random.get_state()),
        "warnings": repr(warnings.filters),
        "handlers": repr(logging.getLogger().handlers),
        "streams": [repr(sys.stdout), repr(sys.stderr)],
    }


@pytest.fixture(scope="module")
def visit(tiny_data, undisturbed, tmp_path_factory):
    """The results of a process that trains, resumes, loads, generates and scores; its run; and what it has printed."""
    runs_dir = tmp_path_factory.mktemp("guest")
    older = undisturbed(1, "fp32").path
    overrides = {"runs_dir": runs_dir}

    def main() -> dict[str, Any]:
        before, records = process_state(), []
        interrupted = catch(KeyboardInterrupt, lambda: train(overrides, at(4, press_ctrl_c)))
        stopped = w1train.open_run(runs_dir / "tiny").state
        failed = catch(
            ZeroDivisionError, lambda: train({**overrides, "name": "failed", "training": {"deterministic": True}}, at(2, lambda: 1 / 0))
        )
        run = train(overrides, lambda record: records.append(record) or at(7, lambda: w1train.load(older).generate("a"))(record))
        model = w1train.load(run, run.checkpoints[-1])
        canvases: list[w1train.Canvas] = []
        return {
            "interrupted": interrupted,
            "stopped": stopped,
            "failed": failed,
            "steps": [record["step"] for record in records if record["kind"] == "train"],
            "text": model.generate("a b", **SETTINGS, on_step=canvases.append).text,
            "canvases": [str(canvas) for canvas in canvases],
            "texts": [sampled.text for sampled in model.generate(["a", "b"], **SETTINGS)],
            "scores": [
                score.log_likelihood
                for score in (
                    model.score(QUESTIONS[0]["completion"], num_draws=16),
                    *model.score(["c"], prompt="a b", num_draws=16),
                )
            ],
            "validation": model.validate(),
            "logits": list(model.logits(torch.tensor([[20, 14]]), torch.tensor([0.5])).shape),
            "num_parameters": sum(parameter.numel() for parameter in model.model.parameters()),
            "changed": [name for name, value in process_state().items() if value != before[name]],
        }

    log = runs_dir / "log"
    result = in_guest(tiny_data, log, main)
    return result, TinyRun(tiny_data, runs_dir), log.read_text()


def train(overrides: dict[str, Any], on_record: Callable[[dict], Any]) -> w1train.Run:
    return w1train.train("tiny", overrides, config_dirs=["recipes"], on_record=on_record)


def at(step: int, action: Callable[[], Any]) -> Callable[[dict], Any]:
    """Do ``action`` when the step is recorded."""
    return lambda record: action() if (record["kind"], record["step"]) == ("train", step) else None


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def catch(kind: type[BaseException], action: Callable[[], Any]) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "no error"


def command(visit, main: Callable[..., int], *arguments: str) -> dict[str, Any]:
    """Return what a command prints as JSON about the run of the visit."""
    _, run, _ = visit
    log = run.runs_dir / "command"

    def enter(_rank: int) -> int:
        os.chdir(run.data)
        with output_to(log):
            return main([str(run.path), "--json", *arguments])

    assert launch(1, enter) == [0], log.read_text()
    return json.loads(log.read_text().splitlines()[-1])


def test_training_is_that_of_the_command_bit_for_bit(visit, undisturbed):
    """Also after Ctrl-C and a resume, and with the model of another run in use between two steps."""
    _, run, _ = visit
    expected = undisturbed(1, "fp32")
    assert run.metrics() == expected.metrics()
    assert run.samples() == expected.samples()
    tensors, expected_tensors = (whole_tensors(each.checkpoints / f"step_{NUM_STEPS:010d}") for each in (run, expected))
    assert tensors.keys() == expected_tensors.keys()
    assert all(torch.equal(tensor, expected_tensors[name]) for name, tensor in tensors.items())
    configs = [config_from_yaml(each.path / "config.yaml") for each in (run, expected)]
    configs[0].runs_dir = configs[1].runs_dir
    assert configs[0] == configs[1]


def test_ctrl_c_saves_and_is_raised(visit):
    result, run, _ = visit
    assert result["interrupted"].endswith("has saved step 5, from which the same call resumes")
    assert result["stopped"] == "stopped"
    assert result["steps"] == list(range(6, NUM_STEPS + 1))
    assert w1train.open_run(run.path).state == "finished"


def test_an_exception_of_the_callers_function_ends_the_run(visit):
    result, run, _ = visit
    assert result["failed"] == "division by zero"
    assert w1train.open_run(run.runs_dir / "failed").state == "failed"


def test_the_process_is_as_it_was(visit):
    result, _, _ = visit
    assert result["changed"] == []


def test_nothing_is_printed(visit):
    _, _, output = visit
    assert output == ""


def test_texts_are_those_of_the_command(visit):
    result, *_ = visit
    options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    alone = command(visit, sample.main, "--prompt", "a b", *options)
    assert [each["text"] for each in alone["samples"]] == [result["text"]]
    together = command(visit, sample.main, "--prompt", "a", "--prompt", "b", *options)
    assert [each["text"] for each in together["samples"]] == result["texts"]


def test_the_canvas_of_each_step_is_shown(visit):
    result, *_ = visit
    steps = [canvas.splitlines()[0].partition("  ")[0] for canvas in result["canvases"]]
    assert steps == ["step 1/2", "step 2/2"]
    assert result["canvases"][0].count("\N{LIGHT SHADE}") == 4
    assert result["canvases"][1].endswith(f"\na b{result['text']}")


def test_scores_are_those_of_the_command(visit, tmp_path):
    result, *_ = visit
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    answers = command(visit, evaluate.main, "--likelihood", str(questions), "--draws", "16")
    assert [text["log_likelihoods"] for text in answers["texts"]] == [[score] for score in result["scores"]]


def test_validation_is_that_of_the_command(visit):
    result, run, _ = visit
    expected = command(visit, evaluate.main)
    assert without_times(result["validation"]) == {
        name: value for name, value in without_times(expected).items() if name not in ("run", "checkpoint")
    }
    newest = [record for record in w1train.open_run(run.path).metrics if record["kind"] == "validation"][-1]
    assert result["validation"]["elbo"] == newest["elbo"]


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith("time/")}


def test_the_model_is_the_runs(visit):
    result, run, _ = visit
    assert result["num_parameters"] == run.summary()["num_parameters"]
    assert result["logits"] == [1, 2, 320]


def test_a_run_is_read_without_its_model(visit):
    _, tiny, _ = visit
    run = w1train.open_run(tiny.path)
    assert run.checkpoints == ["step_0000000009", "step_0000000012"]
    assert (run.config.name, run.summary["steps"], len(run.samples)) == ("tiny", NUM_STEPS, 2)
    steps, values = run.curve("elbo_bits_per_byte", "validation")
    assert (steps.tolist(), steps.dtype, values.dtype) == ([0, 4, 8, 12], np.int64, np.float64)
    assert values.tolist() == [record["elbo_bits_per_byte"] for record in run.metrics if record["kind"] == "validation"]
    with pytest.raises(w1train.UserError, match=r"no record of kind 'train' in .* has the number 'los'; there are: .*elbo, .*loss, "):
        run.curve("los")


def test_what_cannot_be_used_is_said(visit, tmp_path):
    """In a process with groups of its own, and with devices and ranks that are not there."""
    _, run, _ = visit

    def main() -> list[str]:
        messages = [catch(w1train.UserError, lambda: w1train.load(run.path, device="cuda:7"))]
        os.environ["WORLD_SIZE"] = "2"
        messages.append(catch(w1train.UserError, lambda: w1train.load(run.path)))
        os.environ["WORLD_SIZE"] = "1"
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        messages.append(catch(w1train.UserError, lambda: w1train.load(run.path)))
        assert torch.distributed.is_initialized()
        torch.distributed.destroy_process_group()
        messages.append(catch(w1train.UserError, lambda: w1train.load(run.path, 7)))
        model = w1train.load(run.path)
        messages.append(catch(w1train.UserError, lambda: model.score(["a", ""])))
        messages.append(catch(w1train.UserError, lambda: model.score(["a", "b"], prompt=["c"])))
        messages.append(catch(w1train.UserError, lambda: model.score("word " * 100)))
        messages.append(catch(w1train.UserError, lambda: model.generate("a", num_tokens=0, temperature=-1.0)))
        return messages

    device, ranks, groups, checkpoint, empty, prompts, long, settings = in_guest(run.data, tmp_path / "log", main)
    assert device == "device is 'cuda:7'; this machine has: cpu"
    assert "one of 2 ranks" in ranks
    assert "call torch.distributed.destroy_process_group() first" in groups
    assert checkpoint.endswith("has no checkpoint of step 7; it has: 9, 12")
    assert empty == "completion 1 has no tokens; there is nothing to score"
    assert prompts == "there are 1 prompts for 2 texts; give one for each text, or one for all"
    assert long.startswith("text 0 has 0 + ")
    assert "sampling.num_tokens is 0" in settings
    assert "sampling.temperature is -1.0" in settings


def test_mistakes_are_listed_before_anything_heavy_is_imported(tmp_path):
    code = """
import sys, w1train
assert {"train", "load"} <= set(dir(w1train))
try:
    w1train.train("demo", {"training.bogus": 1, "model.hidden_size": -4, "training.seed": object()})
except ValueError as error:
    print(error)
try:
    w1train.load("nowhere")
except FileNotFoundError as error:
    print(error)
print([name for name in ("torch", "megatron", "transformers", "wandb") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(w1train.__file__).parents[1])}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", check=True, timeout=60
    )
    lines = process.stdout.splitlines()
    assert lines[0] == "6 problems in the configuration:"
    keys = {"training.seed", "training.bogus", "model.hidden_size", "data.tokenizer", "data.train", "data.validation"}
    assert {line.partition(". ")[2] for line in lines if line[1:3] == ". "} == keys
    assert lines[-2:] == ["nowhere is not a run directory: it has no config.yaml", "[]"]
    assert process.stderr == ""


def test_texts_become_a_dataset(tiny_data, tmp_path):
    tokenizer = w1train.Tokenizer.load(tiny_data / "tokenizer.json")
    dataset = w1train.write_dataset(tmp_path / "some", ["one text", "", "\u00fcber"], tokenizer)
    assert [dataset.document_tokens(document).tolist() for document in range(dataset.num_documents)] == [
        [*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("one text", "\u00fcber")
    ]
    assert dataset.manifest is not None
    assert dataset.manifest.num_bytes == 13
    with pytest.raises(w1train.UserError, match="exists already"):
        w1train.write_dataset(tmp_path / "some", ["x"], tokenizer)
    assert w1train.open_dataset(tmp_path / "some").num_tokens == dataset.num_tokens


def test_a_score_says_what_it_means():
    score = w1train.Score("abcd", "", -8 * np.log(2), 2, 4)
    assert score.bits_per_byte == pytest.approx(2)
    assert score.nats_per_token == pytest.approx(4 * np.log(2))
    assert str(score).startswith("at most 2.0000 bits per byte, 2.7726 nats per token (2 tokens, 4 bytes; the bound of")
