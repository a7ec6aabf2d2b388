"""Rules of sampling: prompts, lengths, and how blocks and steps divide."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.divisibility import divisors, does_not_divide, near
from w1train.config.rules.rule import Rule, at_every_stage, is_causal_here, of_own_processes
from w1train.config.schema import Config
from w1train.config.schema_sampling import SamplingConfig

OWN_ORDERS = {"low_confidence": True, "random": False}
"""The orders of sampling.remasking that come with w1train, and whether their scores are log-probabilities. The table of the package
w1train.sampling has this too, but its import takes seconds."""
OWN_KERNELS = ("unmask", "ancestral", "gidd_posterior")
"""The kernels of sampling.kernel that come with w1train."""


def _sampling_rule(config: Config) -> Iterator[Problem]:
    sampling = config.sampling
    if sampling.interval > 0 and not sampling.prompts:
        yield Problem("sampling.prompts", "[]", "at least one prompt, or sampling.interval=0", 'the empty prompt: [""]')
    if sampling.interval > 0 and sampling.chat_template is not None and not all(prompt.strip() for prompt in sampling.prompts):
        valid = "prompts with a text, because sampling.chat_template makes each prompt the message of a user; or sampling.interval=0"
        yield Problem("sampling.prompts", show(sampling.prompts), valid, "sampling.prompts=['Sort the words: pear, apple, fig']")
    if sampling.interval > 0 and sampling.num_tokens > config.model.max_sequence_length:
        valid = f"at most model.max_sequence_length ({config.model.max_sequence_length}), or sampling.interval=0"
        yield Problem("sampling.num_tokens", show(sampling.num_tokens), valid)


def denoising_rule(config: Config, is_causal: bool) -> Iterator[Problem]:
    """Yield the problems of unmasking, which a causal process does not do."""
    block_size = config.diffusion.block_size
    if not is_causal:
        yield from denoising_problems(config.sampling, by_block=block_size is not None and block_size < config.data.sequence_length)


def _threshold_rule(config: Config) -> Iterator[Problem]:
    are_log_probabilities = OWN_ORDERS.get(config.sampling.remasking, True)
    if not is_causal_here(config.diffusion):
        yield from threshold_problems(config.sampling, are_log_probabilities)


def threshold_problems(sampling: SamplingConfig, are_log_probabilities: bool) -> Iterator[Problem]:
    """Yield the problem of a threshold whose order gives scores that are not log-probabilities."""
    if sampling.threshold is not None and not are_log_probabilities:
        valid = "an order of probabilities, such as low_confidence, because sampling.threshold is compared with the scores"
        yield Problem("sampling.remasking", show(sampling.remasking), valid, "sampling.threshold=null")


def denoising_problems(sampling: SamplingConfig, by_block: bool) -> Iterator[Problem]:
    """Yield the problems of unmasking: tokens that do not divide into blocks, steps that do not divide over blocks.

    w1train.sampling.denoise relies on this check.

    Args:
        by_block: True for a model of block diffusion. Its blocks are counted from the start of the text, so the first and the last block
            may be shorter.
    """
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


SAMPLING_RULES: tuple[Rule, ...] = (
    _sampling_rule,
    at_every_stage(of_own_processes(denoising_rule)),
    at_every_stage(_threshold_rule),
)
