"""What a run leaves: records, summary, W&B files, samples and the report, with true values in them."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.runs import BATCH, LENGTH, NUM_STEPS, TIMEOUT, VOCAB_SIZE, TinyRun, launch, output_to
from tests.records.wandb_file import read_history, read_run
from w1train import report, sample
from w1train.data.dataset import TokenDataset
from w1train.data.packed.packing import PackedDataset
from w1train.data.tokenizer import Tokenizer
from w1train.inference.predictor import load_for_inference

TRAIN_KEYS = {
    *("kind", "step", "samples", "tokens", "loss", "elbo", "elbo_bits_per_byte", "masked_cross_entropy", "mask_ratio", "loss_by_t"),
    *(
        "grad_norm",
        "learning_rate",
        "batch_size",
        "epoch",
        "stage",
        "block_size",
        "time/step_seconds",
        "time/tokens_per_second",
        "time/tflops_per_second",
        "time/mfu",
    ),
    *("time/data_wait_seconds", "time/memory_gib", "health/skipped_steps"),
}
# Each where it is first known, which in part depends on how fast the disk is.
SAVE_KEYS = {"checkpoint/stall_seconds", "checkpoint/background_seconds", "checkpoint/background_dip"}
VALIDATION_KEYS = {
    *("kind", "step", "tokens", "elbo", "elbo_bits_per_byte", "masked_cross_entropy", "loss_by_t", "time/seconds", "stage", "block_size"),
}
SUMMARY_KEYS = {
    *(
        "name",
        "num_parameters",
        "num_active_parameters",
        "world_size",
        "device",
        "steps",
        "tokens_seen",
        "tokens_per_second",
        "wall_seconds",
        "validation",
    ),
    *("validation_elbo_bits_per_byte_start", "validation_elbo_bits_per_byte_end", "unigram_bits_per_byte", "validation_bound", "versions"),
    "average",
}


@pytest.fixture(scope="module")
def thorough(tiny_data, tmp_path_factory):
    """(run, seconds it took): all of the validation set at ten timesteps, W&B's files, on two ranks."""
    run = TinyRun(tiny_data, tmp_path_factory.mktemp("thorough"))
    begin = time.perf_counter()
    run.train(
        "validation={interval: 100, num_samples: 1000, timesteps: [0.05,0.15,0.25,0.35,0.45,0.55,0.65,0.75,0.85,0.95]}",
        "training={global_batch_size: 64, micro_batch_size: 32}",
        f"schedule.stages.stable.tokens={10 * 64 * LENGTH}",
        f"schedule.stages.warmup.tokens={2 * 64 * LENGTH}",
        "sampling={interval: 100, prompts: ['a b', '']}",
        "logging={wandb: offline, communication: false}",
        world_size=2,
    ).require(0)
    return run, time.perf_counter() - begin


def in_process(directory: Path, log: Path, main: Callable[[], int | None]) -> str:
    """What a command prints, in a forked process that starts in a directory."""

    def enter(rank: int) -> int:
        os.chdir(directory)
        with output_to(log):
            return main() or 0

    assert launch(1, enter) == [0], log.read_text()
    return log.read_text()


def test_records(thorough):
    run, _ = thorough
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["step"]) for record in records] == [
        ("validation", 0),
        *(("train", step) for step in range(1, 13)),
        ("validation", 12),
    ]
    for record in records:
        saves = record.keys() & SAVE_KEYS if record["kind"] == "train" else set()
        assert record.keys() - saves == (TRAIN_KEYS if record["kind"] == "train" else VALIDATION_KEYS)
        assert len(record["loss_by_t"]) == 10
        assert record["tokens"] == record["step"] * 64 * LENGTH
    # The samples of an epoch: what the tokens of the file fill, the last one in part.
    num_samples = -(-os.path.getsize(run.data / "train.bin") // 2 // LENGTH)
    assert [record["epoch"] for record in records if record["kind"] == "train"] == [64 * step / num_samples for step in range(1, 13)]
    assert records[-1]["elbo"] < records[0]["elbo"] - 0.5


def test_summary(thorough, tmp_path):
    run, seconds = thorough
    summary = run.summary()
    assert summary.keys() == SUMMARY_KEYS
    assert (summary["name"], summary["world_size"], summary["device"], summary["steps"]) == ("tiny", 2, "cpu", 12)
    assert summary["tokens_seen"] == 12 * 64 * LENGTH
    records = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    step_seconds = sum(record["time/step_seconds"] for record in records if record["kind"] == "train")
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens_seen"] / step_seconds)
    assert step_seconds < summary["wall_seconds"] < seconds
    for place, record in (("start", records[0]), ("end", records[-1])):
        names = ("step", "elbo", "elbo_bits_per_byte", "masked_cross_entropy")
        assert summary["validation"][place] == {name: record[name] for name in names}
        assert summary[f"validation_elbo_bits_per_byte_{place}"] == record["elbo_bits_per_byte"]
    assert {"python", "torch", "megatron-core", "w1train", "git_commit"} == summary["versions"].keys()

    def count() -> int:
        (stage,) = load_for_inference(run.path).predict.chunks
        print("parameters:", sum(parameter.numel() for parameter in stage.parameters()))
        return 0

    assert f"parameters: {summary['num_parameters']}\n" in in_process(run.data, tmp_path / "log", count)


def test_bits_per_byte_are_true(thorough):
    """All of the validation set is scored: the bytes are those of its text."""
    run, _ = thorough
    tokens = np.fromfile(run.data / "validation.bin", dtype=np.uint16)
    require_true_bits_per_byte(run, tokens)


def test_bits_per_byte_are_those_of_the_samples_scored(undisturbed):
    """Of 8 samples, not of the validation set."""
    run = undisturbed(1, "fp32")
    validation = TokenDataset.open(run.data / "validation")
    packed = PackedDataset(validation, LENGTH, seed=0)
    assert packed.num_samples_per_epoch > 8
    require_true_bits_per_byte(
        run, np.concatenate([sample["tokens"][sample["document_ids"] >= 0] for sample in map(packed.sample, range(8))])
    )


def require_true_bits_per_byte(run: TinyRun, tokens: np.ndarray) -> None:
    """``tokens`` are the ones scored, whose text is ASCII."""
    tokenizer = Tokenizer.load(run.data / "tokenizer.json")
    text = tokenizer.decode(tokens.tolist(), skip_special=True)
    assert text.isascii(), "a sample may begin inside a character otherwise"
    frequencies = np.bincount(tokens) / len(tokens)
    entropy = -sum(frequency * math.log2(frequency) for frequency in frequencies if frequency)
    summary = run.summary()
    assert summary["unigram_bits_per_byte"] == pytest.approx(entropy * len(tokens) / len(text))
    for place in ("start", "end"):
        bits_per_token = summary["validation"][place]["elbo"] / math.log(2)
        assert summary["validation"][place]["elbo_bits_per_byte"] == pytest.approx(bits_per_token * len(tokens) / len(text))


def test_validation_begins_at_the_uniform_distribution(thorough):
    run, _ = thorough
    start = run.summary()["validation"]["start"]
    assert start["elbo"] / math.log(2) == pytest.approx(math.log2(VOCAB_SIZE), rel=0.01)
    assert start["masked_cross_entropy"] / math.log(2) == pytest.approx(math.log2(VOCAB_SIZE), rel=0.01)


def test_wandb_files_hold_the_metrics(thorough):
    run, _ = thorough
    history = read_history(run.path)
    records = {record["step"]: record for record in run.train_records()}
    assert records.keys() <= history.keys()
    for step, record in records.items():
        for name in ("loss", "elbo", "elbo_bits_per_byte", "grad_norm", "learning_rate", "mask_ratio"):
            assert history[step][name] == record[name]
    assert history[0]["validation/elbo"] == run.summary()["validation"]["start"]["elbo"]
    assert history[12]["validation/loss_by_t/0.95"] == run.metrics()[-1]["loss_by_t"][-1]
    (start,) = read_run(run.path)
    assert (start.display_name, start.project) == ("tiny", "w1train")


def test_samples_come_back_from_the_checkpoint(thorough, tmp_path):
    run, _ = thorough
    expected = [json.loads(line) for line in run.samples().splitlines()]
    assert [record["prompt"] for record in expected] == ["a b", ""]
    found, again = (sampled(run, tmp_path)["samples"] for _ in range(2))
    assert found == again
    assert [(item["prompt"], item["text"]) for item in found] == [(record["prompt"], record["text"]) for record in expected]


def sampled(run: TinyRun, directory: Path) -> dict[str, Any]:
    """What ``w1train sample RUN --json`` says."""
    return json.loads(in_process(run.data, directory / "log", lambda: sample.main([str(run.path), "--json"])).splitlines()[-1])


def test_block_diffusion_samples_by_blocks_while_training_and_from_the_checkpoint(tiny_run, tmp_path):
    """Tensor- and sequence-parallel while training, alone afterwards; three blocks, the last one short, and a prompt of three bytes."""
    overrides = ["diffusion={block_size: 8, timestep_per: block}", "sampling={num_tokens: 14, threshold: 0.02, prompts: ['a b', '']}"]
    tiny_run.train(*overrides, "parallel={tensor: 2, sequence: true}", world_size=2).require(0)
    records = [json.loads(line) for line in tiny_run.samples().splitlines()]
    result = sampled(tiny_run, tmp_path)
    assert [item["text"] for item in result["samples"]] == [record["text"] for record in records if record["step"] == NUM_STEPS]
    # A pass to encode each block but the last, and steps that each unmask one token at least.
    for item in result["samples"]:
        assert 2 <= item["num_forward_passes"] <= 14 + 2


def test_samples_are_printed_and_only_they(thorough, tmp_path):
    run, _ = thorough
    arguments = [str(run.path), "--prompt", "a b", "--num-tokens", "8", "--steps", "8", "--temperature", "1", "--seed", "3"]
    first, again, other = (
        without_speed(in_process(run.data, tmp_path / "log", lambda extra=extra: sample.main([*arguments, *extra])))
        for extra in ([], [], ["--seed", "4"])
    )
    assert first.startswith("a b")
    assert len(first.splitlines()) == 1
    assert first == again != other


def without_speed(output: str) -> str:
    """What is printed, less its last line: that goes to stderr and is of the clock."""
    *lines, speed = output.splitlines(keepends=True)
    assert "tokens per forward pass" in speed
    return "".join(lines)


def test_the_report_shows_the_run(thorough, tmp_path):
    run, _ = thorough

    def main() -> None:
        sys.argv = ["report", str(run.path)]
        report.main()

    printed = in_process(run.data, tmp_path / "log", main)
    assert printed.strip() == str(run.path / "report.html")
    page = (run.path / "report.html").read_text()
    assert "tiny" in page
    assert f"{run.summary()['validation_elbo_bits_per_byte_end']:.3f}" in page


@pytest.mark.parametrize(
    ("launcher", "world_size"),
    [
        ([], 1),
        pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], 2, marks=pytest.mark.slow),
    ],
    ids=["alone", "torchrun"],
)
def test_new_interpreters(tiny_run, undisturbed, launcher, world_size):
    """Run the real thing once: the module as a program, in processes that have imported nothing."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "NO_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "w1train.pretrain", *tiny_run.arguments()],
        cwd=tiny_run.data,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    assert tiny_run.metrics() == undisturbed(world_size, "fp32").metrics()
    assert tiny_run.samples() == undisturbed(world_size, "fp32").samples()
    # Only our own log goes to stderr: no warnings of libraries, no line twice.
    log = result.stderr.splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d [\d:,]+ INFO w1train\.", line) for line in log), result.stderr
    assert len(set(log)) == len(log)
    assert result.stdout.count(f"step {NUM_STEPS}/{NUM_STEPS}") == 1
    lines = result.stdout.splitlines()
    assert lines[0].endswith("; loading PyTorch and megatron-core")
    assert f"  batch      {BATCH} samples of {LENGTH} tokens" in lines
    assert result.stderr.count(" kernels: ") == 1
    assert f"tiny is finished: it has all its {NUM_STEPS} steps" in lines
    assert f"               w1train report {tiny_run.path}" in lines
    assert (tiny_run.path / "run.log").read_text().splitlines() == log[-len((tiny_run.path / "run.log").read_text().splitlines()) :]
