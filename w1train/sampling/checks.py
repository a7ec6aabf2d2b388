"""The checks of what a user gives to the sampler, and what the sampler says before it starts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import cache

from w1train.config.errors import UserError
from w1train.config.rules.sampling_rules import denoising_problems, threshold_problems
from w1train.config.schema import DiffusionConfig
from w1train.config.schema_sampling import SamplingConfig
from w1train.sampling.canvas import PlannedBlock, num_planned_steps
from w1train.sampling.kernels import KERNELS, kernel_problems
from w1train.sampling.revisers import REVISERS
from w1train.sampling.rules import ORDERS

logger = logging.getLogger(__name__)


def check_given(prompts: list[list[int]], others: list[list[int]], names: tuple[str, str], mask_token_id: int) -> None:
    """Raise UserError if there is no prompt, if a prompt lacks its text, or if a prompt or text has mask tokens.

    Args:
        others: a text for each prompt.
        names: what one of these texts and several of them are called.
    """
    if not prompts:
        raise UserError("no prompt given; an empty prompt ([]) generates from nothing")
    if len(others) != len(prompts):
        raise UserError(f"there are {len(others)} {names[1]} for {len(prompts)} prompts; each prompt needs its own")
    for what, texts in (("prompt", prompts), (names[0], others)):
        for row, text in enumerate(texts):
            if mask_token_id in text:
                place = text.index(mask_token_id)
                raise UserError(f"{what} {row} has the mask token ({mask_token_id}) at position {place}; it must have clean tokens alone")


def refuse_suffixes_of_blocks(suffixes: list[list[int]], trained_block_size: int | None) -> None:
    """Raise UserError if a model of block diffusion is given a suffix."""
    if trained_block_size is not None and any(suffixes):
        raise UserError(
            f"the model denoises blocks of {trained_block_size} tokens, and a block does not see the blocks after it: no text can be "
            "filled in before a suffix. A checkpoint of a stage of masked diffusion (diffusion.block_size=null) can fill it in"
        )


def check_settings(config: SamplingConfig, diffusion: DiffusionConfig, *, by_block: bool, fewest_tokens: int) -> None:
    """Raise one UserError that lists every setting that cannot work, with the values that would."""
    smallest = {"num_tokens": fewest_tokens, "num_steps": 1, "block_size": 1}
    problems = [
        f"sampling.{name} is {value}; it must be at least {least}"
        for name, least in smallest.items()
        if (value := getattr(config, name)) is not None and value < least
    ]
    if not 0 <= config.temperature < float("inf"):
        problems.append(f"sampling.temperature is {config.temperature}; it must be 0 (greedy) or a positive number")
    if config.threshold is not None and not 0 < config.threshold <= 1:
        problems.append(f"sampling.threshold is {config.threshold}; it must be a probability above 0, or null")
    for name, table in (("remasking", ORDERS), ("kernel", KERNELS), ("reviser", REVISERS)):
        if (value := getattr(config, name)) is not None and value not in table:
            problems.append(f"sampling.{name} is {value!r}; valid: {', '.join(table)}")
    if not problems and config.num_tokens > 0:
        problems = list(_what_does_not_fit(config, diffusion, by_block))
    if problems:
        raise UserError("; ".join(problems))


def _what_does_not_fit(config: SamplingConfig, diffusion: DiffusionConfig, by_block: bool) -> Iterator[str]:
    found = (
        *threshold_problems(config, ORDERS[config.remasking].are_log_probabilities),
        *denoising_problems(config, by_block),
        *kernel_problems(config, diffusion, by_block),
    )
    for problem in found:
        yield f"{problem.key} is {problem.found}; it must be {problem.valid}"


def say_what_differs(config: SamplingConfig, plans: Sequence[Sequence[PlannedBlock]], trained_block_size: int | None) -> None:
    """Log where the plan differs from the settings, or from training."""
    if trained_block_size is not None and config.block_size not in (None, trained_block_size):
        _say_that_block_sizes_differ(config.block_size, trained_block_size)
    for total in sorted({total for plan in plans if (total := num_planned_steps(plan)) is not None}):
        if total < config.num_steps:
            logger.info("%d of %d denoising steps have no token left to unmask and are skipped", config.num_steps - total, config.num_steps)
        elif total > config.num_steps:
            logger.info("%d denoising steps instead of %d: steps are rounded up in blocks that are cut short", total, config.num_steps)


@cache
def _say_that_block_sizes_differ(block_size: int | None, trained: int) -> None:
    logger.warning("sampling.block_size is %s, but the model was trained with blocks of %d tokens: expect other text", block_size, trained)
