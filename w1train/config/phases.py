"""Phases: consecutive stages of one objective, whose losses compare with one another and with no other phase's."""

from __future__ import annotations

from w1train.config.schedule import stage_steps
from w1train.config.schema import Config
from w1train.config.stages import at_stage


def phase_ends(config: Config) -> list[int]:
    """The last step of each phase, ascending; the run's end is the last of them."""
    steps = stage_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
    ends: list[int] = []
    done, before = 0, None
    for name, (_, num_steps) in steps.items():
        if num_steps == 0:
            continue
        objective = at_stage(config, name).diffusion
        if before == objective:
            ends.pop()
        done, before = done + num_steps, objective
        ends.append(done)
    return ends


def phase_start(config: Config, step: int) -> int:
    """Steps done when the phase of a step's update began; a phase's last step is its own."""
    return max((end for end in phase_ends(config) if end < step), default=0)


def stage_of_step(config: Config, step: int) -> str:
    """The stage of the update that brought the count of steps to ``step`` (0: the stage of the first one)."""
    steps = stage_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
    done = 0
    for name, (_, num_steps) in steps.items():
        done += num_steps
        if num_steps > 0 and step <= done:
            return name
    return name
