"""Which checkpoints stay: the newest and the best of all so far, whenever it is asked."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.manifest import complete_steps
from w1train.checkpoints.retention import best_steps, remove_old
from w1train.config.schema_operation import CheckpointConfig


def save(directory: Path, step: int, score: float | None, metric: str = "elbo") -> None:
    path = step_path(directory, step)
    path.mkdir()
    validation = {} if score is None else {metric: score}
    manifest = {"step": step, "samples": 0, "seconds": 0.0, "dataset": None, "files": {}, "validation": validation}
    (path / "manifest.json").write_text(json.dumps(manifest))


def expected(scores: list[float | None], keep: int, keep_best: int) -> list[int]:
    """Of all checkpoints ever saved."""
    ranked = sorted((score, -step) for step, score in enumerate(scores, start=1) if score is not None and math.isfinite(score))
    newest = range(len(scores) - keep + 1, len(scores) + 1)
    return sorted({step for step in newest if step > 0} | {-step for _, step in ranked[:keep_best]})


SCORES = st.lists(st.one_of(st.none(), st.just(math.nan), st.integers(0, 6).map(float)), min_size=1, max_size=12)


@given(scores=SCORES, keep=st.integers(1, 3), keep_best=st.integers(0, 4), seed=st.integers(0, 1000))
def test_what_stays_does_not_depend_on_when_it_is_removed(tmp_path_factory, scores, keep, keep_best, seed):
    directory = tmp_path_factory.mktemp("checkpoints")
    was_killed = random.Random(seed)
    for step, score in enumerate(scores, start=1):
        save(directory, step, score)
        if was_killed.random() < 0.5 or step == len(scores):
            remove_old(directory, CheckpointConfig(keep=keep, keep_best=keep_best), 0)
    assert complete_steps(directory) == expected(scores, keep, keep_best)


def test_the_best_come_first_the_newer_of_equals(tmp_path):
    for step, score in [(1, 2.0), (2, 1.0), (3, 3.0), (4, 1.0), (5, None)]:
        save(tmp_path, step, score)
    assert best_steps(tmp_path, 3, "elbo") == [4, 2, 1]
    assert best_steps(tmp_path, 9, "elbo") == [4, 2, 1, 3]
    assert best_steps(tmp_path, 3, "elbo", after=2) == [4, 3]
    assert best_steps(tmp_path, 3, "masked_cross_entropy") == []
    assert best_steps(tmp_path, 0, "elbo") == []


def test_a_manifest_that_cannot_be_read_has_no_score(tmp_path, caplog):
    save(tmp_path, 1, 1.0)
    save(tmp_path, 2, 2.0)
    (step_path(tmp_path, 1) / "manifest.json").write_text("{")
    assert best_steps(tmp_path, 2, "elbo") == [2]
    assert "counts as a checkpoint without a score" in caplog.text


@pytest.mark.parametrize("keep_best", [0, 1])
def test_directories_of_other_names_are_left_alone(tmp_path, keep_best):
    for step in (1, 2, 3):
        save(tmp_path, step, float(step))
    (tmp_path / "average_0000000003_00000000").mkdir()
    remove_old(tmp_path, CheckpointConfig(keep=1, keep_best=keep_best), 0)
    assert (tmp_path / "average_0000000003_00000000").is_dir()
    assert complete_steps(tmp_path) == ([1, 3] if keep_best else [3])
