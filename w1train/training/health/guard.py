"""Looks at each step's loss and gradient norm before the optimizer moves the weights, and decides whether it may.

Both are sums over all ranks, the same on each, so all ranks decide alike. A step that is not good is computed once more from the same
batch, which costs a step and tells a fault of the machine from one of the data: what is gone the second time was transient, and the run
goes on as if it had not been. What is still there belongs to batch or weights: the batch is written aside and the step left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from w1train.checkpoints.checkpoint import Progress
from w1train.config.schema import HealthConfig
from w1train.diffusion.corruption import NoisyBatch
from w1train.engine.building import TrainedModel
from w1train.engine.gradients import LocalGradients, nonfinite_parameters
from w1train.training.forward import StepWork
from w1train.training.health.bad_batches import step_directory, write_bad_batch
from w1train.training.health.finite import require_finite
from w1train.training.health.spikes import SpikeWindow

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ComputedStep:
    """Everything of a step but its update."""

    values: dict[str, Any]
    """For the record."""
    grad_norm: Any
    """As the optimizer gave it, and wants it back."""
    gradients_are_finite: bool
    """Every rank's own: the norm does not count all of them."""
    work: StepWork


@dataclass(slots=True, frozen=True)
class Problem:
    """Why a step is not good."""

    kind: Literal["nonfinite", "spike"]
    text: str


class StepGuard:
    """Its state (the window of spikes, the counts of what was left out) is the run's progress: a resumed run goes on with it."""

    def __init__(self, settings: HealthConfig, progress: Progress, model: TrainedModel, bad_batches: Path) -> None:
        self._settings, self._progress, self._model, self._bad_batches = settings, progress, model, bad_batches
        self.local_gradients = LocalGradients(model.chunks)

    @property
    def num_skipped(self) -> int:
        """Steps that were left out, since the beginning of the run."""
        return self._progress.health.get("skipped", 0)

    def checked(self, computed: ComputedStep, compute_again: Callable[[list[NoisyBatch]], ComputedStep], stage: str) -> bool:
        """Whether the weights may move by a step, of which ``computed`` then has the good numbers. Called on every rank.

        Args:
            compute_again: computes the step from the same batch, which it adds to the list.

        Raises:
            FloatingPointError: on every rank; the step, and too many before it, are not finite.
        """
        problem = self._problem(computed, stage)
        if problem is not None:
            problem = self._second_look(computed, problem, compute_again, stage)
        if problem is None:
            self._accept(computed.values, stage)
            return True
        self._leave_out(computed, problem)
        return False

    def require_finite_parameters(self) -> None:
        """Raise an error if a parameter is NaN or infinite. Called on every rank.

        Raises:
            FloatingPointError: on every rank.
        """
        require_finite(self._progress.step, {"the largest parameter": self._model.largest_parameter()})

    def _problem(self, computed: ComputedStep, stage: str) -> Problem | None:
        bad = [f"{name} is {value}" for name, value in _looked_at(computed).items() if not math.isfinite(value)]
        if bad:
            return Problem("nonfinite", ", ".join(bad))
        spike = self._window().spike(computed.values, stage)
        return None if spike is None else Problem("spike", spike)

    def _window(self) -> SpikeWindow:
        settings = self._settings
        sigmas = {"masked_cross_entropy": settings.spike_sigma, "grad_norm": settings.spike_gradient_sigma}
        return SpikeWindow(self._progress.health.setdefault("window", {}), settings.spike_window, sigmas)

    def _second_look(
        self, computed: ComputedStep, problem: Problem, compute_again: Callable[[list[NoisyBatch]], ComputedStep], stage: str
    ) -> Problem | None:
        """What is wrong with the step when it is computed once more, whose numbers take the place of the first ones'."""
        step = self._progress.step + 1
        where = self._where(problem)
        logger.warning("step %d: %s%s; computing it once more", step, problem.text, where)
        batches: list[NoisyBatch] = []
        again = compute_again(batches)
        still = self._problem(again, stage)
        for field in fields(ComputedStep):
            setattr(computed, field.name, getattr(again, field.name))
        if still is None:
            logger.warning(
                "step %d: a transient fault%s: the second time all is well, and the run goes on as if nothing had been", step, where
            )
            return None
        parameters = nonfinite_parameters(self._model.chunks)
        write_bad_batch(self._bad_batches, step, still.text, again.values, batches, parameters)
        return still

    def _where(self, problem: Problem) -> str:
        """The ranks that a non-finite value came from."""
        if problem.kind == "spike":
            return ""
        ranks = self.local_gradients.nonfinite_ranks()
        return f" (the gradients of {', '.join(ranks)})" if ranks else " (each rank's own gradients are finite, not their sum)"

    def _accept(self, values: dict[str, Any], stage: str) -> None:
        self._window().add(values, stage)
        self._progress.health["in_a_row"] = 0

    def _leave_out(self, computed: ComputedStep, problem: Problem) -> None:
        state, step = self._progress.health, self._progress.step + 1
        in_a_row = state.get("in_a_row", 0)
        if problem.kind == "nonfinite" and (self._settings.on_nonfinite == "stop" or in_a_row >= self._settings.max_skips):
            require_finite(step, _looked_at(computed))
        state["in_a_row"] = in_a_row + 1
        state["skipped"] = self.num_skipped + 1
        computed.values["skipped"] = problem.kind
        logger.warning("step %d is left out: %s again; its batch is in %s", step, problem.text, step_directory(self._bad_batches, step))
        if problem.kind == "spike" and state["in_a_row"] >= self._settings.max_skips:
            logger.warning(
                "so many spikes in a row are a new level: no step is a spike until %d have been seen", self._settings.spike_window // 2
            )
            self._window().clear()


def _looked_at(computed: ComputedStep) -> dict[str, float]:
    """What must be finite; a gradient alone where nothing else tells of it."""
    values = {name: computed.values[name] for name in ("loss", "grad_norm")}
    if not computed.gradients_are_finite and all(map(math.isfinite, values.values())):
        values["a gradient of some rank"] = math.nan
    return values
