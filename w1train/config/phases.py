"""Phases: consecutive stages of one objective. Losses are comparable inside a phase, and not between phases."""

from __future__ import annotations

from w1train.config.schedule import stage_steps
from w1train.config.schema import Config
from w1train.config.stages import at_stage


def phase_ends(config: Config) -> list[int]:
    """Return the last step of each phase, in ascending order; the last entry is the end of the run."""
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
    """Return the number of steps before the phase that a step belongs to. The last step of a phase belongs to that phase."""
    return max((end for end in phase_ends(config) if end < step), default=0)


def stage_of_step(config: Config, step: int) -> str:
    """Return the stage of a step, counted from 1; for 0, the stage of the first step."""
    steps = stage_steps(config.schedule, config.training.global_batch_size, config.data.sequence_length)
    done = 0
    for name, (_, num_steps) in steps.items():
        done += num_steps
        if num_steps > 0 and step <= done:
            return name
    return name
