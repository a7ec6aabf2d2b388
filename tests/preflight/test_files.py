"""The tokenizer and the datasets."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from data_tools import count_tokens, train_tokenizer
from w1train.config.errors import Problem
from w1train.config.schema import Config, CorpusConfig, StageConfig
from w1train.diffusion.process_checks import process_problems
from w1train.preflight.input_files import counts_rule, files_rule, training_datasets
from w1train.runtime.object_storage import ObjectStorage
from w1train.training.training_data import training_prefixes


def problems_of(config: Config) -> dict[str, Problem]:
    return {problem.key: problem for problem in files_rule(config)}


def test_nothing_is_wrong_with_files_that_are_right(config: Config) -> None:
    assert problems_of(config) == {}


def test_the_datasets_that_are_checked_are_those_that_the_run_reads(config: Config) -> None:
    """A blend, a corpus that no stage wants, a stage with a dataset of its own, and a stage without a step."""
    assert list(training_datasets(config).values()) == training_prefixes(config)
    config.data.train = None
    config.data.blend = {name: CorpusConfig(prefix=f"/data/{name}", weight=weight) for name, weight in (("a", 1.0), ("b", 2.0), ("c", 0.0))}
    tokens = config.training.global_batch_size * config.data.sequence_length
    config.schedule.stages = {
        "all": StageConfig(tokens=tokens, learning_rate=1e-3),
        "own": StageConfig(tokens=tokens, learning_rate=1e-3, train="/data/own"),
        "other": StageConfig(tokens=tokens, learning_rate=1e-3, blend={"b": 1.0, "a": 0.0}),
        "empty": StageConfig(tokens=0, learning_rate=1e-3, train="/data/never"),
    }
    assert {*training_datasets(config).values()} == {*training_prefixes(config)} == {"/data/a", "/data/b", "/data/own"}


def test_all_missing_files_are_named_with_the_commands_that_make_them(config: Config, directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    found = problems_of(config)
    assert list(found) == ["data.tokenizer", "data.train", "data.validation"]
    for problem, name in zip(found.values(), ("tokenizer.json", "train.bin", "validation.bin"), strict=True):
        assert f"{directory}/{name}" in problem.found
    make = f"w1train data tokenize --input CORPUS --tokenizer {directory}/tokenizer.json --output {directory}/train"
    both = f"{make} --validation-output {directory}/validation --validation-fraction 0.001"
    tokenizer = f"w1train data train-tokenizer --input CORPUS --output {directory}/tokenizer.json --vocab-size 272"
    assert [problem.suggestion for problem in found.values()] == [tokenizer, both, both]


def test_a_validation_dataset_that_is_missing_alone_has_its_own_command(config: Config, directory: Path) -> None:
    (directory / "validation.idx").unlink()
    (problem,) = problems_of(config).values()
    assert (problem.suggestion or "").endswith(f"--output {directory}/validation --overwrite")


def test_the_files_of_the_demo_are_made_by_make(config: Config) -> None:
    config.data.train = config.data.validation = "runs/demo-data/train"
    config.data.tokenizer = "runs/demo-data/tokenizer.json"
    assert {problem.suggestion for problem in problems_of(config).values()} == {"make demo"}


def test_counts_of_tokens_are_made_by_a_command(config: Config, directory: Path) -> None:
    """The command is named only where the noise of a stage depends on the counts."""
    config.diffusion.token_counts = "counts.npy"
    assert list(counts_rule(config)) == []
    config.diffusion.objective = "per_id_masked"
    (problem,) = counts_rule(config)
    assert problem.key == "diffusion.token_counts"
    command = f"w1train data count-tokens {directory}/train --vocab-size {config.model.vocab_size} --output {directory}/counts.npy"
    assert problem.suggestion == command
    assert count_tokens.main(command.split()[3:]) == 0
    assert list(counts_rule(config)) == []
    assert list(process_problems(config)) == []


def test_every_corpus_that_a_stage_reads_is_checked_and_no_other(config: Config) -> None:
    config.data.train = None
    config.data.blend = {
        "good": CorpusConfig(prefix="train"),
        "gone": CorpusConfig(prefix="gone"),
        "unused": CorpusConfig(prefix="unused", weight=0.0),
        "late": CorpusConfig(prefix="late", weight=0.0),
    }
    config.data.validation_sets = {"more": "more"}
    config.schedule.stages["late"] = StageConfig(tokens=1000, learning_rate=1e-3, blend={"late": 1.0})
    config.schedule.stages["own"] = StageConfig(tokens=1000, learning_rate=1e-3, train="own")
    config.schedule.stages["empty"] = StageConfig(tokens=0, learning_rate=1e-3, train="empty")
    wrong = ["data.blend.gone.prefix", "data.blend.late.prefix", "schedule.stages.own.train", "data.validation_sets.more"]
    assert list(problems_of(config)) == wrong


def test_the_mask_token_is_the_tokenizers(config: Config, directory: Path) -> None:
    config.diffusion.mask_token_id = 15
    (problem,) = problems_of(config).values()
    assert (problem.key, problem.found) == ("diffusion.mask_token_id", "15")
    assert problem.valid == f"14, the mask token of {directory}/tokenizer.json"
    assert (problem.suggestion or "").startswith("diffusion.mask_token_id=14, ")


def test_a_tokenizer_of_another_mask_id_is_made_with_the_right_one(config: Config, directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    config.diffusion.mask_token_id = 9
    assert (problems_of(config)["data.tokenizer"].suggestion or "").endswith("--mask-token-id 9")


def test_a_tokenizer_without_a_mask_is_imported(config: Config, directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}')
    problem = problems_of(config)["data.tokenizer"]
    assert "has no <pad> token" in problem.found
    assert (problem.suggestion or "").startswith(f"w1train data import-tokenizer --input {directory}/tokenizer.json --output ")


def test_a_dataset_of_another_tokenizer(config: Config, directory: Path) -> None:
    words = ["--input", str(directory / "corpus.txt"), "--output", str(directory / "tokenizer.json"), "--vocab-size", "275", "--overwrite"]
    assert train_tokenizer.main(words) == 0
    found = problems_of(config)
    assert list(found) == ["data.train", "data.validation"]
    assert "was tokenized with the tokenizer of sha256" in found["data.train"].found
    assert (found["data.train"].suggestion or "").endswith(f"--output {directory}/train --overwrite")


@pytest.mark.parametrize(
    ("prefix", "suggestion"),
    [
        ("train.bin", "train, without the ending .bin: the key takes the prefix of the files"),
        ("corpus.txt", "w1train data tokenize --input {0}/corpus.txt --tokenizer {0}/tokenizer.json --output {0}/corpus-tokens"),
    ],
)
def test_what_is_not_a_prefix_is_understood(config: Config, directory: Path, prefix: str, suggestion: str) -> None:
    config.data.train = prefix
    assert problems_of(config)["data.train"].suggestion == suggestion.format(directory)


def test_a_truncated_file_is_found_by_its_size(config: Config, directory: Path) -> None:
    os.truncate(directory / "train.bin", 10)
    assert f"{directory}/train.bin is truncated: 10 bytes" in problems_of(config)["data.train"].found


def test_a_dataset_needs_one_sample(config: Config) -> None:
    config.data.sequence_length = 1 << 20
    assert "at least one sample of data.sequence_length (1048576)" in problems_of(config)["data.train"].valid


def test_validation_is_not_training(config: Config, directory: Path) -> None:
    for ending in ("bin", "idx", "json"):
        shutil.copy(directory / f"train.{ending}", directory / f"copy.{ending}")
    config.data.validation = "copy"
    (problem,) = problems_of(config).values()
    assert (problem.key, problem.found) == ("data.validation", f"{directory}/copy: the same tokens as data.train, by their hash")


def test_a_vocabulary_that_is_too_small(config: Config) -> None:
    config.model.vocab_size = 20
    assert "outside the model's vocabulary of 20 ids" in problems_of(config)["data.train"].found


def test_object_storage_is_not_asked(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ObjectStorage, "_opened", property(lambda _: pytest.fail("the network was used")))
    config.data.train, config.data.validation = "memory://bucket/train", "s4://bucket/validation"
    (problem,) = problems_of(config).values()
    assert problem.key == "data.validation"
    assert "s4" in problem.found


def test_a_chat_template_and_its_prompts_are_checked_before_the_run_would_use_them(config: Config, directory: Path) -> None:
    config.sampling.prompts, config.sampling.num_tokens = ["one two"], 32
    config.sampling.chat_template = "built_in"
    config.sampling.interval = 1
    assert problems_of(config) == {}
    num_tokens = len("user:\none two") + 1 + len("assistant:\n")  # each byte is a token
    config.sampling.num_tokens = config.model.max_sequence_length - num_tokens
    assert problems_of(config) == {}
    config.sampling.num_tokens += 1
    assert problems_of(config)["sampling.prompts"].found.startswith(f"{num_tokens} tokens of the longest prompt")
    config.sampling.prompts = [" "]
    assert "prompt 0 is empty" in problems_of(config)["sampling.prompts"].found
    config.sampling.interval = 0
    assert problems_of(config) == {}, "no prompt is sampled"
    (directory / "chat.jinja").write_text("{% if %}")
    config.sampling.chat_template = "chat.jinja"
    assert problems_of(config)["sampling.chat_template"].found.startswith("chat.jinja:1 is no chat template")
