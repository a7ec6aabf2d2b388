"""Rules of the forward process and the objective, for the run and for every stage of the schedule that changes them."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.divisibility import does_not_divide, near
from w1train.config.rules.rule import Rule, at_every_stage, of_own_processes
from w1train.config.schema import Config
from w1train.config.stages import batch_sizes

_THE_SAME_THROUGHOUT = ("mask_token_id", "exclude_mask_logit")
_PAIRS = {
    "coupled_draws": "both samples of a coupled pair are at the same t",
    "complementary": "complementary pairs have the timesteps t and 1 - t",
    "antithetic": "antithetic pairs have the timesteps of u and 1 - u",
}
"""The options of pairs of samples, and the timesteps of such a pair."""


def _mask_token_rule(config: Config) -> Iterator[Problem]:
    mask, vocab_size = config.diffusion.mask_token_id, config.model.vocab_size
    if mask >= vocab_size > 0:
        yield Problem("diffusion.mask_token_id", show(mask), f"the id of the tokenizer's mask token, below model.vocab_size ({vocab_size})")


def _timesteps_rule(config: Config) -> Iterator[Problem]:
    diffusion = config.diffusion
    if diffusion.weight in ("inverse_t", "elbo") and diffusion.t_min == 0 == diffusion.num_timesteps and diffusion.mask_count == "random":
        valid = f"a number > 0, because diffusion.weight={diffusion.weight} divides by t"
        yield Problem("diffusion.t_min", show(diffusion.t_min), valid, "0.001 (LLaDA)")
    # t_min = t_max = 1 is valid: every token is masked (at block size 1 this is the autoregressive likelihood).
    if diffusion.t_min > diffusion.t_max or diffusion.t_min == diffusion.t_max != 1:
        yield Problem("diffusion.t_min", show(diffusion.t_min), f"a number below diffusion.t_max ({show(diffusion.t_max)})")


def _strata_rule(config: Config) -> Iterator[Problem]:
    strata = config.diffusion.num_strata
    if strata >= 1 and strata & (strata - 1):
        below = 1 << (strata.bit_length() - 1)
        yield Problem("diffusion.num_strata", show(strata), "a power of two (1 = independent draws)", f"{below} or {2 * below}")


def _block_rule(config: Config) -> Iterator[Problem]:
    block_size, length = config.diffusion.block_size, config.data.sequence_length
    if config.diffusion.timestep_per == "block" and block_size is None:
        yield Problem("diffusion.block_size", "null", "a number of tokens, because diffusion.timestep_per is block")
    if block_size is not None and block_size < length and does_not_divide(block_size, length):
        valid = f"a divisor of data.sequence_length ({length}), or at least as long"
        yield Problem("diffusion.block_size", show(block_size), valid, near(block_size, 1) if block_size < 2 else None)


def autoregressive_rule(config: Config, is_causal: bool) -> Iterator[Problem]:
    """Report a joint autoregressive loss without what it needs. A causal process has no use for the loss, and ignores it."""
    diffusion = config.diffusion
    if diffusion.autoregressive_weight == 0 or is_causal:
        return
    if diffusion.block_size is None or diffusion.block_size >= config.data.sequence_length:
        found = f"{show(diffusion.autoregressive_weight)} without a clean stream"
        yield Problem("diffusion.autoregressive_weight", found, "0, or a diffusion.block_size below data.sequence_length")
    if diffusion.normalizer in ("samples", "documents"):
        valid = (
            f"tokens or masked_tokens: with diffusion.autoregressive_weight > 0, not all losses can be divided in {diffusion.normalizer}"
        )
        yield Problem("diffusion.normalizer", diffusion.normalizer, valid)
    if diffusion.clean_attention != "token_causal":
        valid = (
            "token_causal, because diffusion.autoregressive_weight is not 0: a clean token would otherwise see the token that it predicts"
        )
        yield Problem("diffusion.clean_attention", diffusion.clean_attention, valid, "diffusion.clean_attention=token_causal")


def causal_block_rule(config: Config, is_causal: bool) -> Iterator[Problem]:
    """Report causal noisy blocks of the whole sequence. A causal process has no noisy blocks."""
    diffusion, length = config.diffusion, config.data.sequence_length
    if diffusion.noisy_attention == "bidirectional" or is_causal:
        return
    whole = diffusion.block_size is None or diffusion.block_size >= length
    if whole or length in config.validation.block_sizes:
        where = "diffusion.block_size" if whole else "validation.block_sizes"
        valid = (
            f"bidirectional, or block sizes below data.sequence_length ({length}): masked diffusion of a whole sequence is bidirectional"
        )
        yield Problem("diffusion.noisy_attention", f"causal with {where} of the whole sequence", valid)


def _annealing_lasts_rule(config: Config) -> Iterator[Problem]:
    if config.diffusion.attention_annealing != "none":
        valid = "none for the run, because annealing would begin anew in every stage: set it in the stage that anneals"
        yield Problem("diffusion.attention_annealing", config.diffusion.attention_annealing, valid, "schedule.stages.NAME.diffusion")
    for name, stage in config.schedule.stages.items():
        tokens = stage.diffusion.get("annealing_tokens", 0)
        if 0 < stage.tokens < tokens:
            key = f"schedule.stages.{name}.diffusion.annealing_tokens"
            yield Problem(key, show(tokens), f"at most the stage's {stage.tokens} tokens, or the mask would jump at its end")


def _annealing_rule(config: Config) -> Iterator[Problem]:
    diffusion = config.diffusion
    if diffusion.attention_annealing == "none":
        return
    if diffusion.annealing_tokens == 0:
        yield Problem("diffusion.annealing_tokens", "0", "a number of tokens, because diffusion.attention_annealing is not none")
    if diffusion.block_size is not None and diffusion.block_size < config.data.sequence_length:
        found = f"{diffusion.attention_annealing} with a block size of {diffusion.block_size}"
        yield Problem("diffusion.attention_annealing", found, "none: block diffusion goes from causal to bidirectional by growing blocks")
    if diffusion.attention_annealing == "random" and config.parallel.context > 1:
        valid = "none or extent with parallel.context > 1: ranks exchange intervals of keys, and random pairs are no intervals"
        yield Problem("diffusion.attention_annealing", "random", valid)


def _pairs_rule(config: Config) -> Iterator[Problem]:
    diffusion = config.diffusion
    options = [name for name in _PAIRS if getattr(diffusion, name)]
    if not options:
        return
    for option in options[1:]:
        found, valid = f"true with diffusion.{options[0]}", f"false: {_PAIRS[options[0]]}"
        yield Problem(f"diffusion.{option}", found, valid, f"diffusion.{option}=false")
    # Every batch size of the run must be even: a stage that begins at an odd sample would separate the samples of a pair.
    for key, batch in batch_sizes(config).items():
        if batch % 2:
            yield Problem(key, show(batch), f"an even number with diffusion.{options[0]}: samples come in pairs", near(batch, 2))


def _complementary_rule(config: Config) -> Iterator[Problem]:
    if not config.diffusion.complementary:
        return
    if config.diffusion.num_timesteps > 0:
        valid = "0 with diffusion.complementary, because the paired sample's t is 1 - t, and the last step has no such t"
        yield Problem("diffusion.num_timesteps", show(config.diffusion.num_timesteps), valid)
    if config.diffusion.is_band_of_pairs:
        return
    if config.diffusion.t_min + config.diffusion.t_max < 1:
        found = f"{show(config.diffusion.t_max)} with diffusion.complementary"
        valid = f"at least 1 - diffusion.t_min ({show(1 - config.diffusion.t_min)}): the paired sample's t is 1 - t and has the same bounds"
        yield Problem("diffusion.t_max", found, valid, "diffusion.weight=constant, which has no such bound")
    if config.diffusion.t_min >= 0.5:
        found = f"{show(config.diffusion.t_min)} with diffusion.complementary"
        yield Problem("diffusion.t_min", found, "a number below 0.5: the paired sample's t is 1 - t")


def _mask_count_rule(config: Config) -> Iterator[Problem]:
    diffusion = config.diffusion
    if diffusion.mask_count == "random" or diffusion.objective == "autoregressive":
        return
    if diffusion.objective != "diffusion" or diffusion.noise_schedule != "linear":
        valid = "random, or diffusion.objective=diffusion with diffusion.noise_schedule=linear, where t is the share of masked tokens"
        yield Problem("diffusion.mask_count", "exact", valid, "diffusion.mask_count=random")
    if diffusion.complementary:
        valid = "random with diffusion.complementary: where all tokens of a sample are masked, its pair would have no masked token"
        yield Problem("diffusion.mask_count", "exact", valid, "diffusion.mask_count=random")
    if diffusion.num_timesteps > 0:
        valid = "0 with diffusion.mask_count=exact: the share of masked tokens is t, and need not be a step"
        yield Problem("diffusion.num_timesteps", show(diffusion.num_timesteps), valid, "diffusion.num_timesteps=0")


def _same_throughout_rule(config: Config) -> Iterator[Problem]:
    for name, stage in config.schedule.stages.items():
        for field in _THE_SAME_THROUGHOUT:
            if field in stage.diffusion:
                key = f"schedule.stages.{name}.diffusion.{field}"
                yield Problem(key, show(stage.diffusion[field]), f"no value in a stage: diffusion.{field} holds for the whole run")


DIFFUSION_RULES: tuple[Rule, ...] = (
    *map(
        at_every_stage,
        (
            _mask_token_rule,
            _timesteps_rule,
            _strata_rule,
            _block_rule,
            of_own_processes(causal_block_rule),
            of_own_processes(autoregressive_rule),
            _annealing_rule,
            _pairs_rule,
            _complementary_rule,
            _mask_count_rule,
        ),
    ),
    _annealing_lasts_rule,
    _same_throughout_rule,
)
