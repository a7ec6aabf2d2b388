"""Rules of a mixture of experts (model.experts) and of its layout over ranks (parallel.expert, parallel.expert_tensor)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from w1train.config.errors import Problem, show
from w1train.config.rules.divisibility import divisors, does_not_divide, near
from w1train.config.rules.rule import Rule, at_every_stage
from w1train.config.schema import Config


def _dense_rule(config: Config) -> Iterator[Problem]:
    """Report a layout of experts for a model that has no experts. The other fields of experts are ignored there, as their section says."""
    if config.model.experts.num_experts:
        return
    for name in ("expert", "expert_tensor"):
        if (ranks := getattr(config.parallel, name)) > 1:
            key = f"parallel.{name}"
            yield Problem(key, show(ranks), "1 for a dense model (model.experts.num_experts=0)", f"{key}=1")


def _recompute_rule(config: Config) -> Iterator[Problem]:
    parallel, key = config.parallel, "parallel.recompute_experts"
    if not parallel.recompute_experts:
        return
    if not config.model.experts.num_experts:
        yield Problem(key, "true", "false for a dense model (model.experts.num_experts=0)", f"{key}=false")
    elif parallel.recompute != "selective":
        why = "recomputes whole layers" if parallel.recompute == "full" else "recomputes nothing"
        valid = f"false with parallel.recompute={parallel.recompute}, which {why}"
        yield Problem(key, "true", valid, "parallel.recompute=selective")


def _groups_rule(config: Config) -> Iterator[Problem]:
    experts = config.model.experts
    if not experts.num_experts:
        return
    if does_not_divide(experts.num_groups, experts.num_experts):
        valid = f"a divisor of model.experts.num_experts ({experts.num_experts}): {divisors(experts.num_experts)}"
        yield Problem("model.experts.num_groups", show(experts.num_groups), valid)
    if experts.num_active_groups > experts.num_groups:
        valid = f"at most model.experts.num_groups ({experts.num_groups})"
        yield Problem("model.experts.num_active_groups", show(experts.num_active_groups), valid)
    elif does_not_divide(experts.num_active_groups, experts.num_active):
        valid = (
            f"a divisor of model.experts.num_active ({experts.num_active}): a group's score is the sum of its best "
            "num_active / num_active_groups experts"
        )
        yield Problem("model.experts.num_active_groups", show(experts.num_active_groups), valid, divisors(experts.num_active))


def _choice_rule(config: Config) -> Iterator[Problem]:
    experts = config.model.experts
    if not experts.num_experts or experts.num_groups < 1:
        return
    num_allowed = experts.num_active_groups * experts.num_experts // experts.num_groups
    if experts.num_active > min(num_allowed, experts.num_experts):
        valid = f"at most model.experts.num_experts ({experts.num_experts})"
        if num_allowed < experts.num_experts:
            valid = f"at most {num_allowed}, the experts of {experts.num_active_groups} of {experts.num_groups} groups"
        yield Problem("model.experts.num_active", show(experts.num_active), valid)


def _score_rule(config: Config) -> Iterator[Problem]:
    experts = config.model.experts
    if not experts.num_experts:
        return
    if experts.has_bias and experts.score != "sigmoid":
        valid = f"false with model.experts.score={experts.score}: the bias is added to scores that do not depend on other experts"
        yield Problem("model.experts.has_bias", "true", valid, "model.experts.score=sigmoid")
    if not experts.normalize and experts.score == "sigmoid":
        valid = "true with model.experts.score=sigmoid, which is always normalised"
        yield Problem("model.experts.normalize", "false", valid, "model.experts.score=softmax")


def _dense_layers_rule(config: Config) -> Iterator[Problem]:
    experts, num_layers = config.model.experts, config.model.num_layers
    if experts.num_experts and experts.num_dense_layers >= num_layers:
        valid = f"below model.num_layers ({num_layers}), or no layer has experts"
        yield Problem("model.experts.num_dense_layers", show(experts.num_dense_layers), valid, "model.experts.num_experts=0")


def _pool_rule(config: Config) -> Iterator[Problem]:
    experts, key = config.model.experts, "model.experts.pool_per_block"
    if not experts.num_experts or not experts.pool_per_block:
        return
    if not experts.num_active <= experts.pool_per_block <= experts.num_experts:
        valid = f"0, or from model.experts.num_active ({experts.num_active}) to model.experts.num_experts ({experts.num_experts})"
        yield Problem(key, show(experts.pool_per_block), valid)
    if experts.num_groups > 1:
        valid = "0 with groups of experts: a pool is chosen among all experts"
        yield Problem(key, show(experts.pool_per_block), valid, "model.experts.num_groups=1 model.experts.num_active_groups=1")
    if config.diffusion.block_size is None:
        yield Problem(key, show(experts.pool_per_block), "0 without diffusion.block_size: a pool belongs to a block", f"{key}=0")


def _expert_parallel_rule(config: Config) -> Iterator[Problem]:
    experts, parallel = config.model.experts, config.parallel
    if not experts.num_experts:
        return
    if does_not_divide(parallel.expert, experts.num_experts):
        valid = f"a divisor of model.experts.num_experts ({experts.num_experts}): {divisors(experts.num_experts)}"
        yield Problem("parallel.expert", show(parallel.expert), valid)
    if does_not_divide(parallel.expert_tensor, experts.ffn_hidden_size):
        valid = f"a divisor of model.experts.ffn_hidden_size ({experts.ffn_hidden_size}): {divisors(experts.ffn_hidden_size)}"
        yield Problem("parallel.expert_tensor", show(parallel.expert_tensor), valid)
    if does_not_divide(parallel.tensor, experts.shared_ffn_hidden_size):
        valid = f"a multiple of parallel.tensor ({parallel.tensor}), whose ranks share the expert"
        suggestion = near(experts.shared_ffn_hidden_size, parallel.tensor)
        yield Problem("model.experts.shared_ffn_hidden_size", show(experts.shared_ffn_hidden_size), valid, suggestion)
    if parallel.tensor > 1 and not parallel.sequence:
        valid = "true if a model with experts has parallel.tensor above 1: otherwise each tensor-parallel rank would send the same tokens"
        yield Problem("parallel.sequence", "false", valid, "parallel.sequence=true")


def expert_world_size_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """Yield the problem of the experts' layout over a number of ranks that fits the other layout."""
    parallel = config.parallel
    sizes = {"expert": parallel.expert, "expert_tensor": parallel.expert_tensor, "pipeline": parallel.pipeline}
    unit = math.prod(sizes.values())
    if not config.model.experts.num_experts or not does_not_divide(unit, world_size):
        return
    product = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items())
    found = f"{product.removeprefix('parallel.expert ')} = {unit} ranks, in a world of {world_size}"
    valid = f"a number that divides the {world_size // parallel.pipeline} ranks of a pipeline stage"
    if parallel.expert_tensor > 1:
        valid += f" together with parallel.expert_tensor ({parallel.expert_tensor})"
    yield Problem("parallel.expert", found, valid, _expert_layout_that_fits(config, world_size // parallel.pipeline))


def _expert_layout_that_fits(config: Config, num_ranks: int) -> str:
    """Return the largest number of expert-parallel ranks, not above the configured number, that fits the ranks of a pipeline stage. If the
    ranks of each expert do not fit there, each expert gets one rank."""
    parallel = config.parallel
    too_many = does_not_divide(parallel.expert_tensor, num_ranks)
    both = math.gcd(config.model.experts.num_experts, num_ranks if too_many else num_ranks // parallel.expert_tensor)
    expert = next(size for size in range(min(parallel.expert, both), 0, -1) if both % size == 0)
    return f"parallel.expert={expert}" + (" parallel.expert_tensor=1" if too_many else "")


EXPERT_RULES: tuple[Rule, ...] = (
    _dense_rule,
    _recompute_rule,
    _groups_rule,
    _choice_rule,
    _score_rule,
    _dense_layers_rule,
    at_every_stage(_pool_rule),
    _expert_parallel_rule,
)
