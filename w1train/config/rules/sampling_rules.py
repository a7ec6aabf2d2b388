"""Rules of sampling: prompts, lengths, and how blocks and steps divide."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.divisibility import divisors, does_not_divide, near
from w1train.config.rules.rule import Rule, at_every_stage
from w1train.config.schema import Config, SamplingConfig


def _sampling_rule(config: Config) -> Iterator[Problem]:
    sampling = config.sampling
    if sampling.interval > 0 and not sampling.prompts:
        yield Problem("sampling.prompts", "[]", "at least one prompt, or sampling.interval=0", 'the empty prompt: [""]')
    if sampling.interval > 0 and sampling.num_tokens > config.model.max_sequence_length:
        valid = f"at most model.max_sequence_length ({config.model.max_sequence_length}), or sampling.interval=0"
        yield Problem("sampling.num_tokens", show(sampling.num_tokens), valid)


def _denoising_rule(config: Config) -> Iterator[Problem]:
    block_size = config.diffusion.block_size
    if config.diffusion.objective != "autoregressive":
        yield from denoising_problems(config.sampling, by_block=block_size is not None and block_size < config.data.sequence_length)


def denoising_problems(sampling: SamplingConfig, by_block: bool) -> Iterator[Problem]:
    """Yield the problems of unmasking: options that contradict each other, tokens that do not divide into blocks, steps that do not divide
    over blocks. w1train.sampling.denoise relies on this check.

    Args:
        by_block: True for a model of block diffusion. Its blocks are counted from the start of the text, so the first and the last block
            may be shorter.
    """
    if sampling.threshold is not None and sampling.remasking != "low_confidence":
        valid = "low_confidence when sampling.threshold is set: it keeps predictions by their confidence"
        yield Problem("sampling.remasking", show(sampling.remasking), valid, "sampling.threshold=null")
    if by_block:
        return
    block_size = sampling.num_tokens if sampling.block_size is None else sampling.block_size
    if does_not_divide(block_size, sampling.num_tokens):
        valid = f"a divisor of sampling.num_tokens ({sampling.num_tokens}): {divisors(sampling.num_tokens)}; or null"
        yield Problem("sampling.block_size", show(block_size), valid)
    elif block_size > 0 and sampling.threshold is None:
        num_blocks = sampling.num_tokens // block_size
        if does_not_divide(num_blocks, sampling.num_steps):
            valid = f"a multiple of {num_blocks}, the number of blocks of {block_size} tokens: each block takes the same number of steps"
            yield Problem("sampling.num_steps", show(sampling.num_steps), valid, near(sampling.num_steps, num_blocks))


SAMPLING_RULES: tuple[Rule, ...] = (_sampling_rule, at_every_stage(_denoising_rule))
