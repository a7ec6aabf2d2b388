"""The comparison of a framework step with a bare loop runs, and compares like with like. Times are never asserted."""

from __future__ import annotations

import math

import pytest

from benchmarks.common import results_page
from benchmarks.step import overhead as step_overhead
from tests.distributed import run_distributed

TINY = [
    "model.num_layers=2",
    "model.vocab_size=512",
    "model.hidden_size=32",
    "model.num_attention_heads=2",
    "model.kv_channels=16",
    "model.ffn_hidden_size=48",
    "model.adaln_init=identity",
    "data.sequence_length=64",
    "data.num_workers=1",
    "training.global_batch_size=8",
    "training.micro_batch_size=2",
    "diffusion.num_strata=8",
    "diffusion.random_length_probability=0.2",
    # Full rate from the first step: a difference in the update must show in the next loss.
    "schedule.stages.warmup.tokens=512",
    "schedule.stages.warmup.learning_rate=1e-2",
    # AdamW with a small epsilon does not depend on the gradients' scale, so no loss would show how they were clipped.
    "optimizer.epsilon=1e-2",
    "optimizer.clip_grad=0.1",
    "logging.wandb=disabled",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """In a process of its own: groups and threads of this one would be in the way of every later fork."""
    from benchmarks.step.loops import compare

    config = step_overhead.benchmark_config(TINY, tmp_path_factory.mktemp("run"))
    return run_distributed(lambda _rank, _size: compare(config, num_steps=2, num_warmup=1), 1, process_group=False)[0]


def test_both_loops_train_alike(measured):
    """After the first step the losses agree only if gradients, clipping, decay and learning rate did too."""
    framework, bare = measured
    assert len(framework.losses) == 2
    assert framework.losses == pytest.approx(bare.losses, rel=1e-5)
    assert framework.losses[0] != framework.losses[1]
    assert all(0 < loss < 3 * math.log(512) for loss in bare.losses)


def test_every_part_is_timed(measured):
    framework, bare = measured
    for parts in framework.parts:
        assert parts.keys() == step_overhead.PARTS.keys()
        assert all(seconds.wall > 0 for seconds in parts.values())
    for parts, step in zip(bare.parts, bare.steps, strict=True):
        assert parts.keys() == {"forward", "loss", "backward", "gradients", "optimizer", "rest"}
        assert sum(seconds.wall for seconds in parts.values()) == pytest.approx(step.wall)


def test_report_has_the_tables_and_where_they_come_from(measured, tmp_path):
    table = step_overhead.step_table(*measured)
    path = results_page.write_report(
        "step-overhead", "Title", [table, results_page.environment("python -m x")], "Notes.", directory=tmp_path
    )
    text = path.read_text()
    assert path.name.endswith("-step-overhead.md")
    for expected in ("# Title", "Notes.", "| wall | ", "| processor | ", "`python -m x`", "| torch | "):
        assert expected in text
