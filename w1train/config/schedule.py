"""The learning rate as a pure function of consumed tokens: any number of stages (Warmup-Stable-Decay and its kin).

LLaDA 8B's schedule (arXiv 2502.09992) is five stages: warmup to 4e-4, constant 4e-4 until 1.2T tokens, constant 1e-4
for 0.8T, and linear to 1e-5 over the last 0.3T. Tokens, not steps: the schedule then means the same at every batch size,
and a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math

from w1train.config.schema import DecayStyle, ScheduleConfig


def learning_rate(schedule: ScheduleConfig, tokens: int) -> float:
    """The rate after ``tokens`` consumed; the step that brings the count to ``tokens`` uses it, so none is wasted on rate 0.

    A stage goes from the previous stage's end (0 for the first) to its own rate, and reaches it exactly with its last
    token. A constant stage jumps with its first. After the last stage the rate stays.
    """
    name, fraction = stage_at(schedule, tokens)
    stage = schedule.stages[name]
    progress = _progress(stage.style, fraction)
    rewarmed = min(1.0, fraction * stage.tokens / stage.rewarm_tokens) if stage.rewarm_tokens else 1.0
    # This form is exact at both ends, where start + (end - start) * progress is not.
    return rewarmed * ((1 - progress) * _previous_rate(schedule, name) + progress * stage.learning_rate)


def total_tokens(schedule: ScheduleConfig) -> int:
    """Length of the run in tokens."""
    return sum(stage.tokens for stage in schedule.stages.values())


def stage_at(schedule: ScheduleConfig, tokens: int) -> tuple[str, float]:
    """The stage that the last of ``tokens`` consumed belongs to, and the share of the stage that is done, in [0, 1].

    Before the first token: the first stage and 0.0; after the end of the schedule: the last stage and 1.0.
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
    """Optimizer steps of the whole run."""
    return sum(steps for _, steps in stage_steps(schedule, default, sequence_length).values())


def stage_steps(schedule: ScheduleConfig, default: int, sequence_length: int) -> dict[str, tuple[int, int]]:
    """(first sample, optimizer steps) of each stage. A step that begins inside a stage is that stage's, and may end beyond it."""
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
    """How far the rate has gone from the previous stage's end (0) to this stage's (1)."""
    match style:
        case "constant":
            return 1.0
        case "linear":
            return fraction
        case "cosine":
            return (1 - math.cos(math.pi * fraction)) / 2
        case "one_minus_sqrt":  # end + (start - end) (1 - sqrt(x)): falls fast first (Hagele et al., arXiv 2405.18392)
            return math.sqrt(fraction)


def _previous_rate(schedule: ScheduleConfig, name: str) -> float:
    names = list(schedule.stages)
    place = names.index(name)
    return schedule.stages[names[place - 1]].learning_rate if place > 0 else 0.0
