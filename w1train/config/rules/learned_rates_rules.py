"""Rules of learned rates of noise (diffusion.objective=learned_masked)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from w1train.config.errors import Problem, listing, show
from w1train.config.rules.divisibility import near
from w1train.config.rules.rule import Rule, at_every_stage
from w1train.config.schema import Config

LEARNED = "learned_masked"


class _Need(NamedTuple):
    """A value of diffusion.FIELD that learned rates need."""

    field: str
    valid: tuple[object, ...]
    reason: str


_NEEDS = (
    _Need("loss", ("per_id",), "the bound of rates that differ between tokens, and the only loss with their gradient"),
    _Need("weight", ("inverse_t", "elbo"), "with another weight the loss is not the bound, and would teach other rates"),
    _Need("weight_min", (0.0,), "a limited weight is not the bound"),
    _Need("weight_max", (None,), "a limited weight is not the bound"),
    _Need("loss_positions", ("auto", "noised"), "the bound is a sum over masked tokens"),
    _Need("normalizer", ("tokens",), "the number of masked tokens depends on the rates, and the gradient would leave this out"),
    _Need("cross_entropy_weight", (0.0,), "the gradient of the rates would leave this part of the loss out"),
    _Need("coupled_draws", (True,), "the gradient of the rates compares two draws of the same text"),
    _Need("shift", (False,), "an output must see the noise of no other segment than that of its token"),
    _Need("exclude_mask_logit", (True,), "the bound compares the rates of all tokens that the model may predict"),
    _Need("num_timesteps", (0,), "the bound is that of continuous time"),
    _Need("noise_schedule", ("linear",), "the rates are the schedule"),
)


def _learned_rates_rule(config: Config) -> Iterator[Problem]:
    if config.diffusion.objective != LEARNED:
        return
    for need in _NEEDS:
        if (found := getattr(config.diffusion, need.field)) not in need.valid:
            yield _problem(f"diffusion.{need.field}", found, listing(_text(value) for value in need.valid), need.reason, need.valid[0])
    if config.diffusion.t_min == 0:
        yield _problem("diffusion.t_min", 0, "a number above 0", "the masks that are left at this t are part of the bound", 0.001)
    if config.model.conditioning != "adaln":
        reason = "a mask says other things about its token at another t"
        yield _problem("model.conditioning", config.model.conditioning, "adaln", reason, "adaln")
    if config.training.micro_batch_size % 2:
        size = config.training.micro_batch_size
        valid = f"an even number with diffusion.objective={LEARNED}: both samples of a pair are in one micro-batch"
        yield Problem("training.micro_batch_size", show(size), valid, near(size, 2))


def _problem(key: str, found: object, valid: str, reason: str, suggestion: object) -> Problem:
    return Problem(key, _text(found), f"{valid} with diffusion.objective={LEARNED}: {reason}", f"{key}={_text(suggestion)}")


def _text(value: object) -> str:
    """Return a value as it is written on a command line."""
    return value if isinstance(value, str) else show(value)


def _parameter_rule(config: Config) -> Iterator[Problem]:
    """Report a model whose parameters are not those that every stage of the run trains."""
    model, learns = config.model, config.diffusion.objective == LEARNED
    if model.learns_noise_rates != learns:
        valid = f"{show(learns)} with diffusion.objective={config.diffusion.objective}: the rates are for {LEARNED} alone, which needs them"
        yield Problem("model.learns_noise_rates", show(model.learns_noise_rates), valid, f"model.learns_noise_rates={show(learns)}")
    for name, stage in config.schedule.stages.items():
        other = stage.diffusion.get("objective", config.diffusion.objective)
        if (other == LEARNED) != learns:
            valid = f"{LEARNED} in all stages or in no stage: the rates are parameters of the model, and every step trains all parameters"
            yield Problem(f"schedule.stages.{name}.diffusion.objective", _text(other), valid)


LEARNED_RATES_RULES: tuple[Rule, ...] = (at_every_stage(_learned_rates_rule), _parameter_rule)
