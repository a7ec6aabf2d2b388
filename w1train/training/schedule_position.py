"""The place of a run in its schedule: the stage of its current step, and the settings of that stage."""

from __future__ import annotations

import logging
from typing import Any

from w1train.checkpoints.manifest import Progress
from w1train.config.phases import phase_ends, phase_start, stage_of_step
from w1train.config.schedule import learning_rate, num_steps, stage_at, total_tokens
from w1train.config.schema import Config
from w1train.config.stages import at_stage
from w1train.diffusion.processes import noise_process
from w1train.objectives.description import block_size, describe_objective

logger = logging.getLogger(__name__)


class SchedulePosition:
    """The place of a run in its schedule. It follows the run's progress, which the training loop changes."""

    def __init__(self, config: Config, progress: Progress) -> None:
        self._config, self._progress = config, progress
        self.num_steps = num_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
        self.num_tokens = total_tokens(config.schedule)
        self._phase_ends = phase_ends(config)
        self.stage_name = ""
        self.stage = config
        """The configuration with the values of the current stage."""
        self.annealed = 1.0
        """The share of the stage's annealing that is done, in [0, 1]."""
        self._set_stage(stage_of_step(config, progress.step))

    @property
    def is_over(self) -> bool:
        """Tell whether all steps of the schedule are done."""
        return self._progress.step >= self.num_steps

    @property
    def is_phase_end(self) -> bool:
        """Tell whether the step that was done last is the last step of its phase."""
        return self._progress.step in self._phase_ends

    @property
    def phase_start(self) -> int:
        """The number of steps that were done when the current phase began. A phase's last step belongs to that phase."""
        return phase_start(self._config, self._progress.step)

    @property
    def noise_fingerprint(self) -> str | None:
        """The fingerprint of the noise of the step that was done last."""
        return noise_fingerprint(self._config, self._progress.step)

    @property
    def learning_rate(self) -> float:
        """The learning rate of the step that begins now."""
        samples = self._progress.samples + self.stage.training.global_batch_size
        return learning_rate(self._config.schedule, samples * self._config.data.sequence_length)

    def is_due(self, interval: int) -> bool:
        """Return whether something that happens every ``interval`` steps, and at the end of each phase, is due now. 0 = it never
        happens."""
        return interval > 0 and (self._progress.step % interval == 0 or self.is_phase_end)

    def enter_stage(self) -> None:
        """Set the stage of the step that begins now, and how far its annealing is."""
        tokens = self._progress.samples * self._config.data.sequence_length
        name, fraction = stage_at(self._config.schedule, tokens + 1)
        if name != self.stage_name:
            self._set_stage(name)
        annealing_tokens = self.stage.diffusion.annealing_tokens
        self.annealed = min(1.0, fraction * self._config.schedule.stages[name].tokens / annealing_tokens) if annealing_tokens else 1.0

    def names(self) -> dict[str, Any]:
        """Return stage and block size, for the records."""
        return {"stage": self.stage_name, "block_size": block_size(self.stage)}

    def _set_stage(self, name: str) -> None:
        self.stage_name, self.stage = name, at_stage(self._config, name)
        logger.info("stage %s: %s", name, describe_objective(self.stage))


def noise_fingerprint(config: Config, step: int) -> str | None:
    """Return the fingerprint of the noise process of a step, counted from 1."""
    return noise_process(at_stage(config, stage_of_step(config, step)).diffusion).fingerprint
