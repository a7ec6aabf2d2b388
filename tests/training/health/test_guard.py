"""What the guard decides, step after step; the faults themselves are in tests/end_to_end/test_health.py."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.checkpoints.manifest import CheckpointError, Progress, read_progress  # noqa: E402
from w1train.config.schema import HealthConfig  # noqa: E402
from w1train.engine.gradient_hooks import GradientHooks  # noqa: E402
from w1train.training.health import guard  # noqa: E402
from w1train.training.health.guard import ComputedStep, StepGuard  # noqa: E402

GOOD = {"loss": 2.0, "grad_norm": 1.0, "masked_cross_entropy": 2.0}
NAN = {**GOOD, "loss": math.nan}
INFINITE = {**GOOD, "grad_norm": math.inf}
HIDDEN = {**GOOD}
"""A copy's gradient is no number: neither loss nor norm tell of it."""
SPIKE = {**GOOD, "masked_cross_entropy": 9.0}


class Steps:
    """A guard, and steps that are taken or left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        self.written: list[int] = []
        monkeypatch.setattr(guard.LocalGradients, "nonfinite_ranks", lambda gradients: ["rank 1 on here"])
        monkeypatch.setattr(guard, "write_bad_batch", lambda directory, step, *rest: self.written.append(step))
        self.progress = Progress()
        model: Any = SimpleNamespace(chunks=[], hooks=GradientHooks(SimpleNamespace(finalize_model_grads_func=None), []))
        self.guard = StepGuard(HealthConfig(**settings), self.progress, model, Path("bad"))
        self.num_computed = 0

    def _computed(self, values: dict[str, float]) -> ComputedStep:
        work: Any = None
        return ComputedStep(dict(values), values["grad_norm"], values is not HIDDEN, work)

    def take(self, first: dict[str, float], second: dict[str, float] | None = None) -> bool:
        """Tell whether the step was taken. ``second`` has the values that the step gives when it is computed again."""
        computed = self._computed(first)
        self.num_computed += 1

        def again(kept: list[Any]) -> ComputedStep:
            self.num_computed += 1
            return self._computed(first if second is None else second)

        taken = self.guard.checked(computed, again, "a")
        self.values = computed.values
        self.progress.step += 1
        return taken


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch, spike_window=8)


def test_good_steps_are_computed_once(steps):
    assert all(steps.take(GOOD) for _ in range(20))
    assert (steps.num_computed, steps.guard.num_skipped) == (20, 0)


@pytest.mark.parametrize("bad", [NAN, INFINITE, HIDDEN])
def test_a_transient_fault_leaves_no_trace(steps, bad):
    steps.take(GOOD)
    before = json.dumps(steps.progress.health)
    assert steps.take(bad, GOOD)
    assert steps.values == GOOD
    after = json.loads(json.dumps(steps.progress.health))
    assert len(after["window"]["grad_norm"]) == len(json.loads(before)["window"]["grad_norm"]) + 1
    assert (steps.guard.num_skipped, steps.written) == (0, [])


def test_three_in_a_row_are_left_out_and_the_fourth_ends_it(steps):
    for _ in range(2):
        steps.take(GOOD)
        assert [steps.take(NAN) for _ in range(3)] == [False] * 3
    assert steps.values["skipped"] == "nonfinite"
    with pytest.raises(FloatingPointError, match="loss is nan at step 9; training stops before this reaches a checkpoint"):
        steps.take(NAN)
    assert steps.guard.num_skipped == 6
    assert steps.written == [2, 3, 4, 6, 7, 8, 9]


def test_a_gradient_that_only_one_rank_sees_is_left_out_and_ends_it(steps):
    assert [steps.take(HIDDEN) for _ in range(3)] == [False] * 3
    with pytest.raises(FloatingPointError, match="a gradient of some rank is nan at step 4"):
        steps.take(HIDDEN)


def test_stop_is_after_a_second_look(monkeypatch):
    steps = Steps(monkeypatch, on_nonfinite="stop")
    assert steps.take(INFINITE, GOOD)
    with pytest.raises(FloatingPointError, match="grad_norm is inf at step 2"):
        steps.take(INFINITE)
    assert steps.written == [2]


def test_spikes_are_left_out_until_they_are_the_level(steps):
    for _ in range(8):
        steps.take(GOOD)
    assert steps.take(SPIKE, GOOD), "gone the second time"
    assert [steps.take(SPIKE) for _ in range(6)] == [False] * 3 + [True] * 3
    assert steps.guard.num_skipped == 3
    assert steps.take(GOOD)


def test_what_is_left_out_does_not_move_the_window(steps):
    for _ in range(8):
        steps.take(GOOD)
    before = json.dumps(steps.progress.health["window"])
    assert not steps.take(SPIKE)
    assert not steps.take(NAN)
    assert json.dumps(steps.progress.health["window"]) == before


def test_a_checkpoint_of_before_has_no_such_state(tmp_path):
    manifest = {"step": 3, "samples": 24, "seconds": 1.0, "dataset": None, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_progress(tmp_path) == Progress(step=3, samples=24, seconds=1.0)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"health": {"skipped": 2}}))
    assert read_progress(tmp_path).health == {"skipped": 2}
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        read_progress(tmp_path)


WINDOW = {"stage": "a", "masked_cross_entropy": [2.0] * 64, "grad_norm": [1] * 64}


@pytest.mark.parametrize(
    ("health", "fault"),
    [
        ([], r"says health: \[\]"),
        ({"window": []}, r"health\.window: \[\], which is not a JSON object"),
        ({"window": None}, r"health\.window: None"),
        ({"window": {**WINDOW, "stage": 7}}, r"health\.window\.stage: 7"),
        ({"window": {"stage": "a"}}, r"health\.window\.masked_cross_entropy: None, which is not a list"),
        ({"window": {**WINDOW, "grad_norm": "1.0"}}, r"health\.window\.grad_norm: '1.0', which is not a list"),
        *(
            ({"window": {**WINDOW, name: [1.0] * 63 + [wrong]}}, rf"health\.window\.{name} holds .*, which is not a finite number")
            for name in ("masked_cross_entropy", "grad_norm")
            for wrong in ("1.0", None, True, [1.0], {}, math.nan, -math.inf, 1e101, 1e200)
        ),
        ({"skipped": "many"}, r"health\.skipped: 'many', which is not a number of steps"),
        ({"in_a_row": None}, r"health\.in_a_row: None"),
        ({"in_a_row": -1}, r"health\.in_a_row: -1"),
        ({"skipped": 1.5}, r"health\.skipped: 1\.5"),
    ],
)
def test_a_state_that_the_guard_cannot_go_on_with_is_damage(tmp_path, health, fault):
    manifest = {"step": 3, "samples": 24, "seconds": 1.0, "dataset": None, "files": {}, "health": health}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"is damaged: manifest\.json says .*{fault}" if health else fault):
        read_progress(tmp_path)


@given(
    window=st.just({})
    | st.fixed_dictionaries(
        {
            "stage": st.just("a"),
            **{name: st.lists(st.integers() | st.floats(), max_size=12) for name in ("masked_cross_entropy", "grad_norm")},
        }
    ),
    counts=st.dictionaries(st.sampled_from(["skipped", "in_a_row"]), st.integers(0, 9)),
)
def test_the_guard_goes_on_with_every_state_that_is_read(window, counts):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        manifest = {"step": 3, "samples": 24, "seconds": 1.0, "dataset": None, "files": {}, "health": {"window": window, **counts}}
        Path(directory, "manifest.json").write_text(json.dumps(manifest))
        try:
            progress = read_progress(Path(directory))
        except CheckpointError:
            return
        steps = Steps(patch, spike_window=8)
        steps.progress.health = progress.health
        for values in (GOOD, SPIKE, NAN, GOOD):
            steps.take(values)


def test_a_run_writes_only_what_a_resume_reads(tmp_path, steps):
    for values in (GOOD, {**GOOD, "masked_cross_entropy": math.nan}, {**GOOD, "masked_cross_entropy": math.inf}, NAN, SPIKE, GOOD):
        steps.take(values)
    manifest = {"step": 3, "samples": 24, "seconds": 1.0, "dataset": None, "files": {}, "health": steps.progress.health}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_progress(tmp_path).health == steps.progress.health


def test_seconds_beyond_any_float_are_damage(tmp_path):
    manifest = {"step": 3, "samples": 24, "seconds": 1e101, "dataset": None, "files": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="says seconds"):
        read_progress(tmp_path)
