"""The learning rate as a pure function of consumed tokens: any number of stages (Warmup-Stable-Decay and similar schedules).

LLaDA 8B's schedule (arXiv 2502.09992) is four stages: warmup to 4e-4, constant 4e-4 until 1.2T tokens, constant 1e-4
for 0.8T, and linear to 1e-5 over the last 0.3T. The schedule counts tokens, not steps: it then means the same at every batch size,
and a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math

from w1train.config.schema import DecayStyle, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, tokens: int) -> float:
    """Return the rate of the step that brings the number of consumed tokens to ``tokens``. The first step therefore does not have rate 0.

    A stage goes from the rate at the end of the previous stage (0 for the first stage) to its own rate, which its last token reaches
    exactly. A constant stage has its rate from its first token on. After the last stage the rate does not change.
    """
    name, fraction = stage_at(schedule, tokens)
    stage = schedule.stages[name]
    progress = _progress(stage.style, fraction)
    rewarmed = min(1.0, fraction * stage.tokens / stage.rewarm_tokens) if stage.rewarm_tokens else 1.0
    # This form is exact at both ends, where start + (end - start) * progress is not.
    return rewarmed * ((1 - progress) * _previous_rate(schedule, name) + progress * stage.learning_rate)


def total_tokens(schedule: ScheduleConfig) -> int:
    """Return the length of the run in tokens."""
    return sum(stage.tokens for stage in schedule.stages.values())


def stage_at(schedule: ScheduleConfig, tokens: int) -> tuple[str, float]:
    """Return the stage of the last of the consumed ``tokens``, and the share of the stage that is done, in [0, 1].

    Before the first token this is the first stage and 0.0; after the end of the schedule, the last stage and 1.0.
    """
    assert schedule.stages
    assert tokens >= 0
    stage_start = 0
    for name, stage in schedule.stages.items():
        if stage.tokens > 0 and tokens <= stage_start + stage.tokens:
            return name, (tokens - stage_start) / stage.tokens
        stage_start += stage.tokens
    return name, 1.0


def num_steps(schedule: ScheduleConfig, default: int, sequence_length: int) -> int:
    """Return the number of optimizer steps of the whole run."""
    return sum(steps for _, steps in stage_steps(schedule, default, sequence_length).values())


def stage_steps(schedule: ScheduleConfig, default: int, sequence_length: int) -> dict[str, tuple[int, int]]:
    """Return (first sample, number of optimizer steps) of each stage. A step belongs to the stage in which it begins, and may end later."""
    stages = {}
    samples = end = 0
    for name, stage in schedule.stages.items():
        end += stage.tokens
        size = default if stage.global_batch_size is None else stage.global_batch_size
        steps = max(0, -(-(end - samples * sequence_length) // (size * sequence_length)))
        stages[name] = (samples, steps)
        samples += steps * size
    return stages


def _progress(style: DecayStyle, fraction: float) -> float:
    """Return how far the rate has gone from the end of the previous stage (0) to the end of this stage (1)."""
    match style:
        case "constant":
            return 1.0
        case "linear":
            return fraction
        case "cosine":
            return (1 - math.cos(math.pi * fraction)) / 2
        case "one_minus_sqrt":  # end + (start - end) (1 - sqrt(x)), which falls fast at first (Hagele et al., arXiv 2405.18392)
            return math.sqrt(fraction)


def _previous_rate(schedule: ScheduleConfig, name: str) -> float:
    names = list(schedule.stages)
    place = names.index(name)
    return schedule.stages[names[place - 1]].learning_rate if place > 0 else 0.0
