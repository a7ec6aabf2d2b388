"""Rules of preferences (diffusion.preference_draws), of the run and of each stage that trains them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from w1train.config.errors import Problem, listing, show
from w1train.config.rules.divisibility import near
from w1train.config.rules.rule import Rule, at_every_stage
from w1train.config.schema import Config
from w1train.config.stages import at_stage, batch_sizes


class _Need(NamedTuple):
    """A value of diffusion.FIELD that preferences need."""

    field: str
    valid: tuple[object, ...]
    reason: str


_ESTIMATE = "the loss compares estimates of ELBOs, and this would change the estimate"
_LARGEST_T_MIN = 0.01
"""The largest t_min of an estimate of the ELBO, our choice: LLaDA has 0.001."""
_ALONE = "the loss of preferences is the only loss"
_NEEDS = (
    _Need("objective", ("diffusion",), "the weighted cross-entropy of masked tokens is the ELBO"),
    _Need("loss", ("cross_entropy",), "the weighted cross-entropy of masked tokens is the ELBO"),
    _Need("weight", ("inverse_t", "elbo"), "with another weight the sum is no estimate of the ELBO"),
    _Need("weight_min", (0.0,), _ESTIMATE),
    _Need("weight_max", (None,), _ESTIMATE),
    _Need("t_max", (1.0,), "the ELBO is an integral over all t"),
    _Need("loss_positions", ("auto", "noised"), _ESTIMATE),
    _Need("focal_gamma", (0.0,), _ESTIMATE),
    _Need("label_smoothing", (0.0,), _ESTIMATE),
    _Need("normalizer", ("tokens",), "the loss is divided by the number of pairs, whatever the normalizer is"),
    _Need("cross_entropy_weight", (0.0,), _ALONE + " (diffusion.preference_cross_entropy_weight adds the chosen reply's)"),
    _Need("autoregressive_weight", (0.0,), _ALONE),
    _Need("confidence_weight", (0.0,), _ALONE),
    _Need("coupled_draws", (False,), "the draws of a reply have timesteps of their own"),
    _Need("random_length_probability", (0.0,), "a cut reply has another likelihood"),
    _Need("mask_embedding_noise", (0.0,), "the noise is in the pass with gradients alone, which would compute other likelihoods"),
    _Need("attention_annealing", ("none",), "the reference sees the whole document"),
)


def _needs_rule(config: Config) -> Iterator[Problem]:
    if config.diffusion.preference_draws <= 0:
        return
    for need in _NEEDS:
        if (found := getattr(config.diffusion, need.field)) not in need.valid:
            valid = f"{listing(_text(value) for value in need.valid)} with diffusion.preference_draws: {need.reason}"
            yield Problem(f"diffusion.{need.field}", _text(found), valid, f"diffusion.{need.field}={_text(need.valid[0])}")


def _whole_integral_rule(config: Config) -> Iterator[Problem]:
    diffusion = config.diffusion
    if diffusion.preference_draws > 0 and diffusion.t_min > _LARGEST_T_MIN:
        valid = f"at most {_LARGEST_T_MIN} with diffusion.preference_draws: the ELBO is an integral over all t"
        yield Problem("diffusion.t_min", show(diffusion.t_min), valid, "diffusion.t_min=0.001")


def _packing_of_pairs_rule(config: Config) -> Iterator[Problem]:
    if config.diffusion.preference_draws > 0 and config.data.packing != "separate":
        valid = "separate with diffusion.preference_draws: each reply is a sample with its prompt"
        yield Problem("data.packing", config.data.packing, valid, "data.packing=separate")


def _draws_rule(config: Config) -> Iterator[Problem]:
    num_draws = config.diffusion.preference_draws
    if num_draws <= 0:
        return
    for option in ("complementary", "antithetic"):
        if getattr(config.diffusion, option) and num_draws % 2:
            valid = f"an even number with diffusion.{option}: pairs of samples are draws of one reply"
            yield Problem("diffusion.preference_draws", show(num_draws), valid, near(num_draws, 2))
    # Every batch size of the run: a stage that begins inside a pair would take the draws of one reply for those of another.
    for key, batch in batch_sizes(config).items():
        if batch % (2 * num_draws):
            valid = f"a multiple of {2 * num_draws} with diffusion.preference_draws={num_draws}: a pair of replies has as many samples"
            yield Problem(key, show(batch), valid, near(batch, 2 * num_draws))


def _reference_rule(config: Config) -> Iterator[Problem]:
    weights = config.reference.weights
    has_preferences = config.diffusion.preference_draws > 0 or any(
        stage.diffusion.get("preference_draws", 0) > 0 for stage in config.schedule.stages.values()
    )
    if has_preferences and weights is None and config.training.initial_weights is None:
        valid = "a path with diffusion.preference_draws, or training.initial_weights: random weights prefer no reply"
        yield Problem("reference.weights", "null", valid, "reference.weights=PATH")
    if config.reference.mode == "adapters_off" and not has_preferences:
        valid = "live, because no stage has diffusion.preference_draws"
        yield Problem("reference.mode", "adapters_off", valid, "reference.mode=live")
    elif config.reference.mode == "adapters_off":
        yield from _adapters_off_problems(config)
    if weights is not None and not has_preferences:
        yield Problem("reference.weights", weights, "null, because no stage has diffusion.preference_draws", "reference.weights=null")


def _adapters_off_problems(config: Config) -> Iterator[Problem]:
    mode = "with reference.mode=adapters_off"
    if config.adapters.rank == 0:
        yield Problem("adapters.rank", "0", f"a rank {mode}: the reference is the model without its adapters", "reference.mode=live")
    if config.adapters.train:
        valid = f"[] {mode}: the parameters of the reference must be frozen"
        yield Problem("adapters.train", show(config.adapters.train), valid, "reference.mode=live")
    if config.reference.weights is not None:
        yield Problem("reference.weights", config.reference.weights, f"null {mode}: the reference has the weights of the model")


def _pairs_are_whole_rule(config: Config) -> Iterator[Problem]:
    """Report a number of validation samples that would leave half of a pair."""
    num_samples = config.validation.num_samples
    if config.diffusion.preference_draws > 0 and config.data.validation is not None and num_samples % 2:
        valid = "an even number with diffusion.preference_draws: the chosen and the rejected reply of a pair are a sample each"
        yield Problem("validation.num_samples", show(num_samples), valid, near(num_samples, 2))


def _one_dataset_rule(config: Config) -> Iterator[Problem]:
    """Report a blend in a stage of preferences: samples are dealt to the corpora of a blend one by one, and both replies of a pair come
    from one dataset."""
    for name, stage in config.schedule.stages.items():
        if at_stage(config, name).diffusion.preference_draws > 0 and stage.train is None and config.data.blend:
            valid = "empty with diffusion.preference_draws, because a blend would separate the replies of a pair: join the datasets in one"
            yield Problem(f"data.blend in stage {name}", listing(config.data.blend), valid, "data.train=PREFIX without data.blend")
            return


def _text(value: object) -> str:
    """Return a value as it is written on a command line."""
    return value if isinstance(value, str) else show(value)


PREFERENCE_RULES: tuple[Rule, ...] = (
    *map(at_every_stage, (_needs_rule, _whole_integral_rule, _packing_of_pairs_rule, _draws_rule, _pairs_are_whole_rule)),
    _reference_rule,
    _one_dataset_rule,
)
