"""Bad input ends every rank with status 2 and a message, and what is there stays as it is.

Where the list of the project's first issue is covered:

    missing or empty corpus; undecodable bytes      tests/data/test_data_commands.py, tests/data/test_text.py; here once,
                                                    through the commands' exit status
    a corrupt or truncated .bin/.idx                tests/data/test_dataset.py (every kind); here through pretrain
    tokens beyond the vocabulary                    here: known beforehand, and met while reading a foreign dataset
    a dataset made with another tokenizer           here
    heads not divisible, sequence longer than
    positions, batch not divisible                  tests/config/test_config_validate.py (every rule); here through pretrain
    world size not matching the layout              here
    resuming with an incompatible change            tests/config/test_config_resume.py (every key); here through pretrain
    a run directory in use, no space left,
    damaged checkpoints                             test_failures.py
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_tools import tokenize, train_tokenizer
from tests.end_to_end import traps
from tests.end_to_end.runs import VOCAB_SIZE, TinyRun, launch, output_to
from tests.slow import slow_except
from w1train.config.errors import UserError
from w1train.runtime import distributed
from w1train.runtime.exit_status import ExitStatus
from w1train.status import describe_run
from w1train.training import run_parts

WRONG_LAYOUTS = {
    "parallel.tensor=4": r"4 x parallel.pipeline 1 = 4 ranks a replica, in a world of 2",
    "parallel={tensor: 2, pipeline: 2}": r"2 x parallel.pipeline 2 = 4 ranks a replica, in a world of 2",
    "training.micro_batch_size=8": r"training.global_batch_size\s+found: 8\s+valid: a multiple of .*8 x 2 = 16",
}
WRONG_CONFIGURATIONS = {
    "training.global_batch_size=7": r"training.global_batch_size\s+found: 7\s+valid: a multiple of training.micro_batch_size \(4\)",
    "model={num_attention_heads: 5, kv_channels: null}": r"model.num_attention_heads\s+found: 5\s+valid: a divisor of model.hidden_size",
    "data.sequence_length=65": r"data.sequence_length\s+found: 65\s+valid: at most model.max_sequence_length \(64\)",
    "training.micro_batchsize=4": r"training.micro_batchsize\s(.*\n)+?.*did you mean training.micro_batch_size\?",
}


def require_message(output: str, pattern: str) -> None:
    assert "Traceback" not in output, output
    assert re.search(pattern, output), output


@pytest.mark.parametrize("override", slow_except(list(WRONG_LAYOUTS)[:1], WRONG_LAYOUTS))
def test_a_layout_that_does_not_fit_the_world(tiny_run, override):
    outcome = tiny_run.train(override, world_size=2).require(2)
    require_message(outcome.output, WRONG_LAYOUTS[override])
    assert outcome.outputs[1] == ""
    assert not tiny_run.path.exists()


def test_wrong_configurations_are_reported_at_once(tiny_run):
    outcome = tiny_run.train(*WRONG_CONFIGURATIONS, world_size=2).require(2)
    for pattern in WRONG_CONFIGURATIONS.values():
        require_message(outcome.output, pattern)
    assert outcome.outputs[1] == ""
    assert not tiny_run.path.exists()


def other_tokenizer(data: Path) -> None:
    corpus, tokenizer = data / "corpus.jsonl", data / "tokenizer.json"
    assert (
        train_tokenizer.main(["--input", str(corpus), "--output", str(tokenizer), "--vocab-size", str(VOCAB_SIZE - 1), "--overwrite"]) == 0
    )


def other_data(data: Path) -> None:
    corpus = data / "corpus.jsonl"
    corpus.write_text("".join(corpus.read_text().splitlines(keepends=True)[1:]))
    common = ["--input", str(corpus), "--tokenizer", str(data / "tokenizer.json"), "--overwrite"]
    assert tokenize.main([*common, "--output", str(data / "train")]) == 0


def foreign_data_with_large_ids(data: Path) -> None:
    """No manifest says what the largest id is; every sample has one that the model has not."""
    (data / "train.json").unlink()
    tokens = np.memmap(data / "train.bin", dtype=np.uint16, mode="r+")
    tokens[::16] = VOCAB_SIZE
    tokens.flush()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def zero(path: Path) -> None:
    """Of the right size, as after a crash of the machine or a copy that went wrong."""
    path.write_bytes(bytes(path.stat().st_size))


WRONG_DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "no dataset": (lambda data: (data / "train.bin").unlink(), "dataset .*train is not there: .*train.bin missing"),
    "no tokenizer": (lambda data: (data / "tokenizer.json").unlink(), "tokenizer .*tokenizer.json cannot be read: No such file"),
    "truncated .bin": (lambda data: truncate(data / "train.bin"), r"train.bin is truncated: \d+ bytes, expected \d+"),
    "truncated .idx": (lambda data: truncate(data / "validation.idx"), r"validation.idx is truncated: \d+ bytes, expected \d+"),
    "zeroed .bin": (lambda data: zero(data / "train.bin"), r"train.bin is corrupt: its sha256 is \w+, the manifest has \w+"),
    "zeroed validation": (lambda data: zero(data / "validation.bin"), r"validation.bin is corrupt: its sha256 is \w+, the manifest has"),
    "another tokenizer": (other_tokenizer, r"dataset .*train was tokenized with the tokenizer of sha256 \w+ \(320 ids\)"),
    "other data": (other_data, r"dataset .*train has changed since .*step_0000000012 was saved"),
}


@pytest.fixture
def copied_run(tiny_data: Path, tmp_path: Path, undisturbed: Callable[..., TinyRun]) -> TinyRun:
    """A finished run on two ranks with data of its own, to be spoilt."""
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.copytree(undisturbed(2, "fp32").runs_dir, tmp_path / "runs")
    return TinyRun(tmp_path / "data", tmp_path / "runs")


def spoil(run: TinyRun, act: Callable[[Path], None]) -> None:
    def main(rank: int) -> int:
        with output_to(run.data / "spoil.log"):
            act(run.data)
        return 0

    assert launch(1, main) == [0], (run.data / "spoil.log").read_text()


@pytest.mark.parametrize("what", slow_except(["no dataset", "truncated .idx", "zeroed .bin", "other data"], WRONG_DATA))
def test_wrong_data(copied_run, what):
    act, pattern = WRONG_DATA[what]
    metrics, steps = copied_run.metrics(), copied_run.steps_saved()
    spoil(copied_run, act)
    outcome = copied_run.train(world_size=2).require(2)
    require_message(outcome.output, pattern)
    assert outcome.outputs[1] == ""
    assert (copied_run.metrics(), copied_run.steps_saved()) == (metrics, steps)


def test_files_too_large_to_be_compared_are_named(copied_run, monkeypatch):
    monkeypatch.setattr("w1train.training.training_data.MAX_VERIFIED_BYTES", 1000)
    outcome = copied_run.train(world_size=2).require(0)
    for name in ("train", "validation"):
        require_message(outcome.output, rf"{name}.bin\s.*(\n.*)?not compared(.*\n)*?.*w1train data verify")


def test_data_missing_on_one_rank_alone_ends_all_ranks(tiny_run, tmp_path):
    """As on a node without the mount: rank 1 sees another directory."""

    def elsewhere(rank: int) -> None:
        if rank == 1:
            os.chdir(tmp_path)

    outcome = tiny_run.train(world_size=2, sabotage=elsewhere).require(2)
    require_message(outcome.output, r"w1train train: tokenizer .*cannot be read: No such file.*\nmet by rank 1 of 2 ranks\n")
    assert outcome.outputs[1] == ""
    assert describe_run(tiny_run.path)[1] == ExitStatus.MISTAKE  # what launch/torchrun.sh ends with


def test_what_a_high_rank_meets_before_there_are_groups_is_told_by_it(tiny_run):
    """Such as a node with fewer GPUs than its processes."""

    def select(rank: int) -> None:
        def fail() -> None:
            raise UserError(f"LOCAL_RANK is {rank} but this machine has 1 GPUs")

        if rank == 1:
            distributed.select_device = fail
        else:
            # In place of torchrun, which ends the others.
            distributed.select_device = lambda: sys.exit(1)

    outcome = tiny_run.train(world_size=2, sabotage=select)
    assert outcome.statuses == [1, 2]
    assert outcome.outputs[1] == "w1train train, rank 1: LOCAL_RANK is 1 but this machine has 1 GPUs\n"


def test_an_error_of_a_library_keeps_its_traceback(tiny_run):
    def fail(rank: int) -> None:
        def build(*_: object) -> None:
            raise ValueError("not enough values to unpack")

        run_parts.build_trained_model = build

    outcome = tiny_run.train(sabotage=fail).require(1)
    assert "Traceback" in outcome.output
    assert "ValueError: not enough values to unpack" in outcome.output


def test_tokens_beyond_the_vocabulary_are_known_beforehand(tiny_run):
    outcome = tiny_run.train("model.vocab_size=300", world_size=2).require(2)
    require_message(outcome.output, r"dataset .*train holds token id 3\d\d, outside the model's vocabulary of 300 ids")


def test_tokens_beyond_the_vocabulary_are_met_in_foreign_data(copied_run):
    spoil(copied_run, foreign_data_with_large_ids)
    outcome = copied_run.train("name=new", world_size=2)
    assert 2 in outcome.statuses
    assert set(outcome.statuses) <= {1, 2}, "1 = lost the connection to the rank that ended first"
    require_message("\n".join(outcome.outputs), r"rank \d: .*train.bin: token \d+ of document \d+ is 320, outside the model's vocabulary")


def test_another_mask_token(tiny_run):
    outcome = tiny_run.train("diffusion.mask_token_id=15", world_size=2).require(2)
    require_message(outcome.output, r"diffusion.mask_token_id\n   found: 15\n   valid: 14, the mask token of .*tokenizer.json\n")


def test_an_incompatible_change_on_resume_is_refused(copied_run):
    metrics, config = copied_run.metrics(), (copied_run.path / "config.yaml").read_bytes()
    changes = ["training.seed=7", "model.init_std=0.01", "schedule.stages.warmup.learning_rate=1e-3", "checkpoint.interval=5"]
    outcome = copied_run.train(*changes, world_size=2).require(2)
    require_message(outcome.output, "3 problems in the configuration")
    require_message(outcome.output, r"training.seed\s+found: 7\s+valid: 1234, as the run began with")
    require_message(outcome.output, r"model.init_std\s+found: 0.01\s+valid: 0.02, as the run began with")
    require_message(outcome.output, r"schedule.stages.warmup\s")
    require_message(outcome.output, r"May change: name, .*checkpoint.\*")
    assert "checkpoint.interval\n" not in outcome.output
    assert outcome.outputs[1] == ""
    assert (copied_run.metrics(), (copied_run.path / "config.yaml").read_bytes()) == (metrics, config)


def test_the_checkpoints_own_configuration_counts(copied_run):
    (copied_run.path / "config.yaml").unlink()
    outcome = copied_run.train("training.seed=7", world_size=2).require(2)
    require_message(outcome.output, r"training.seed\s+found: 7\s+valid: 1234, as the run began with")


def test_an_allowed_change_on_resume_is_logged_and_changes_nothing_else(tiny_run, undisturbed):
    tiny_run.train(sabotage=traps.after_commit(2))
    changes = ["checkpoint={interval: 4, keep: 9}", "data={num_workers: 0, prefetch: 1}", "logging.interval=5"]
    outcome = tiny_run.train(*changes).require(0)
    assert "configuration changed on resume: checkpoint.interval: 3 -> 4" in outcome.output
    assert "configuration changed on resume: data.num_workers: 1 -> 0" in outcome.output
    assert tiny_run.steps_saved() == [3, 6, 8, 12]
    assert tiny_run.metrics() == undisturbed(1, "fp32").metrics()
    assert tiny_run.samples() == undisturbed(1, "fp32").samples()
    assert "changed on resume" not in tiny_run.train(*changes).require(0).output


def test_a_longer_schedule_continues_a_finished_run(tiny_data, tmp_path, undisturbed):
    shutil.copytree(undisturbed(1, "fp32").runs_dir, tmp_path / "runs")
    run = TinyRun(tiny_data, tmp_path / "runs")
    outcome = run.train("+schedule.stages.more={tokens: 512, learning_rate: 1e-3}").require(0)
    assert "schedule.stages.more.tokens: (absent) -> 512" in outcome.output
    records = run.train_records()
    assert [record["step"] for record in records] == list(range(1, 15))
    assert records[:12] == undisturbed(1, "fp32").train_records()
    assert records[-1]["learning_rate"] == 1e-3
    assert run.summary()["steps"] == 14


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist|is missing|no such|not there"), (b"", "the corpus is empty"), (b"caf\xe9", "UTF-8|utf-8|not text")],
    ids=["missing", "empty", "undecodable"],
)
def test_an_unusable_corpus(tiny_data, tmp_path, content, message):
    corpus, log = tmp_path / "corpus.txt", tmp_path / "log"
    if content is not None:
        corpus.write_bytes(content)

    def main(rank: int) -> int:
        with output_to(log):
            common = ["--input", str(corpus), "--tokenizer", str(tiny_data / "tokenizer.json")]
            return tokenize.main([*common, "--output", str(tmp_path / "out")])

    assert launch(1, main) == [1]
    require_message(log.read_text(), message)
    assert not list(tmp_path.glob("out*"))
