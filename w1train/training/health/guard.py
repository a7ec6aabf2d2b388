"""The guard of training steps: it looks at each step's loss and gradient norm, and decides whether the optimizer may update the weights.

Both numbers are sums over all ranks, the same on each rank, so that all ranks decide alike. A bad step is computed once more from the same
batch, which distinguishes a fault of the machine from a fault of the data. If the second result is good, the fault was transient, and the
run continues as if it had not happened. If it is bad too, the batch or the weights are the cause: the batch is written to a file, and the
step is skipped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from w1train.checkpoints.manifest import Progress
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
    """A step without its update."""

    values: dict[str, Any]
    """The values of the step's record."""
    grad_norm: Any
    """The gradient norm in the type that the optimizer returned, because the optimizer later gets it back."""
    gradients_are_finite: bool
    """This flag tells whether the gradients of each rank are finite. The norm cannot tell this, because it leaves some gradients out."""
    work: StepWork


@dataclass(slots=True, frozen=True)
class Problem:
    """The reason why a step is bad."""

    kind: Literal["nonfinite", "spike"]
    text: str


class StepGuard:
    """The guard of one run. Its state (the values of the last steps, the counts of skipped steps) is part of the run's progress, so that a
    resumed run continues with it."""

    def __init__(self, settings: HealthConfig, progress: Progress, model: TrainedModel, bad_batches: Path) -> None:
        self._settings, self._progress, self._model, self._bad_batches = settings, progress, model, bad_batches
        self.local_gradients = LocalGradients(model.hooks)

    @property
    def num_skipped(self) -> int:
        """The number of skipped steps since the beginning of the run."""
        return self._progress.health.get("skipped", 0)

    def checked(self, computed: ComputedStep, compute_again: Callable[[list[NoisyBatch]], ComputedStep], stage: str) -> bool:
        """Return whether the optimizer may take a step. Every rank calls this.

        Args:
            computed: the step; the values of its second computation, if there was one, replace those of the first.
            compute_again: computes the step from the same batch, whose micro-batches it adds to the list.

        Raises:
            FloatingPointError: on every rank; the step is NaN or infinite, and the settings do not allow to skip it.
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
        """Raise an error if a parameter is NaN or infinite. Every rank calls this.

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
        """Compute the step once more, and return what is still wrong with it. The new values replace the first values."""
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
                "step %d: a transient fault%s: the second result is good, and the run goes on as if nothing had happened", step, where
            )
            return None
        parameters = nonfinite_parameters(self._model.chunks)
        write_bad_batch(self._bad_batches, step, still.text, again.values, batches, parameters)
        return still

    def _where(self, problem: Problem) -> str:
        """Return the ranks that NaN or infinite gradients came from, as a part of a message."""
        if problem.kind == "spike":
            return ""
        ranks = self.local_gradients.nonfinite_ranks()
        return f" (the gradients of {', '.join(ranks)})" if ranks else " (the gradients of each rank are finite, but their sum is not)"

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
        logger.warning("step %d is skipped: %s again; its batch is in %s", step, problem.text, step_directory(self._bad_batches, step))
        if problem.kind == "spike" and state["in_a_row"] >= self._settings.max_skips:
            logger.warning(
                "so many spikes in a row are a new level: no step counts as a spike until %d steps have been seen",
                self._settings.spike_window // 2,
            )
            self._window().clear()


def _looked_at(computed: ComputedStep) -> dict[str, float]:
    """Return the values that must be finite, by name; a gradient is one of them only if loss and norm do not show that it is not finite."""
    values = {name: computed.values[name] for name in ("loss", "grad_norm")}
    if not computed.gradients_are_finite and all(map(math.isfinite, values.values())):
        values["a gradient of some rank"] = math.nan
    return values
