"""Rules of the layout over ranks: tensor, sequence, pipeline, context and data parallelism."""

from __future__ import annotations

import math
from collections.abc import Iterator

from w1train.config.errors import Problem, listing, show
from w1train.config.rules.divisibility import divisors, does_not_divide, near
from w1train.config.rules.expert_rules import expert_world_size_problems
from w1train.config.rules.rule import Rule
from w1train.config.schema import Config
from w1train.config.stages import batch_sizes


def _tensor_parallel_rule(config: Config) -> Iterator[Problem]:
    tensor = config.parallel.tensor
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    sizes = {name: size for name in names if (size := getattr(config.model, name, None)) is not None}
    for name, size in sizes.items():
        if does_not_divide(tensor, size):
            suggestion = f"a divisor of every size that it splits: {divisors(math.gcd(*sizes.values()))}"
            yield Problem("parallel.tensor", show(tensor), f"a divisor of model.{name} ({size})", suggestion)


def _sequence_parallel_rule(config: Config) -> Iterator[Problem]:
    if not config.parallel.sequence:
        return
    tensor, length = config.parallel.tensor, config.data.sequence_length
    if tensor == 1:
        yield Problem("parallel.sequence", "true", "false when parallel.tensor is 1: there is nothing to share", "parallel.tensor=2")
    elif does_not_divide(tensor * config.parallel.context, length):
        unit = tensor * config.parallel.context
        valid = f"a multiple of parallel.tensor x parallel.context ({unit}) when parallel.sequence is true"
        yield Problem("data.sequence_length", show(length), valid, near(length, unit))


def _pipeline_rule(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    ends = ("num_layers_in_first_stage", "num_layers_in_last_stage")
    uneven: dict[str, int] = {name: count for name in ends if (count := getattr(parallel, name)) is not None}
    counted = [name for name in ("embedding_counts_as_layer", "head_counts_as_layer") if getattr(parallel, name)]
    if parallel.pipeline == 1:
        for name in (*uneven, *counted, *(["virtual_pipeline"] if parallel.virtual_pipeline > 1 else [])):
            key = f"parallel.{name}"
            yield Problem(key, show(getattr(parallel, name)), "only with parallel.pipeline > 1: one stage has all layers")
        return
    if uneven and counted:
        found = listing((*uneven, *counted))
        yield Problem(
            "parallel.num_layers_in_first_stage",
            found,
            "either layer counts of the first and last stage, or embedding and head counted as layers",
        )
        return
    middle_stages = parallel.pipeline - len(uneven)
    middle_layers = layers + len(counted) - sum(uneven.values())
    per_stage = list(uneven.values())
    if middle_stages == 0 and middle_layers != 0:
        valid = f"numbers that add up to model.num_layers ({layers}) with two stages"
        yield Problem("parallel.num_layers_in_last_stage", show(parallel.num_layers_in_last_stage), valid)
    elif middle_stages and (middle_layers < middle_stages or does_not_divide(middle_stages, middle_layers)):
        kind = "layers left for the stages between" if uneven else "model.num_layers" + (" and what counts as a layer" if counted else "")
        valid = f"a divisor of the {middle_layers} {kind}: {divisors(middle_layers)}" if middle_layers > 0 else "fewer layers at the ends"
        yield Problem("parallel.pipeline", show(parallel.pipeline), valid)
    elif middle_stages:
        per_stage.append(middle_layers // middle_stages)
    yield from _virtual_pipeline_problems(config, per_stage, has_middle=middle_stages > 0)


def _virtual_pipeline_problems(config: Config, per_stage: list[int], *, has_middle: bool) -> Iterator[Problem]:
    """Check that every stage's layers divide into chunks, and that megatron-core may count the layers of at least one stage itself."""
    virtual = config.parallel.virtual_pipeline
    if virtual > 1 and not has_middle:
        valid = "1 when the layers of both stages are given: megatron-core divides by the number of stages between them"
        suggestion = "give num_layers_in_first_stage or num_layers_in_last_stage alone: the other stage gets the rest"
        yield Problem("parallel.virtual_pipeline", show(virtual), valid, suggestion)
    for count in sorted(set(per_stage)):
        if does_not_divide(virtual, count):
            valid = f"a divisor of the {count} layers of a pipeline stage: {divisors(count)}"
            yield Problem("parallel.virtual_pipeline", show(virtual), valid)


def _context_rule(config: Config) -> Iterator[Problem]:
    parallel, length = config.parallel, config.data.sequence_length
    if parallel.context == 1:
        return
    if parallel.context_method == "all_gather":
        unit = parallel.context * parallel.context_chunk_size
        if does_not_divide(unit, length):
            valid = f"a multiple of parallel.context x parallel.context_chunk_size ({unit})"
            yield Problem("data.sequence_length", show(length), valid, near(length, unit))
        return
    if does_not_divide(parallel.context, length):
        valid = f"a multiple of parallel.context ({parallel.context})"
        yield Problem("data.sequence_length", show(length), valid, near(length, parallel.context))
    model, ranks = config.model, parallel.context * parallel.tensor
    groups = model.num_query_groups or model.num_attention_heads
    if does_not_divide(ranks, groups):
        valid = f"with all_to_all, a number that with parallel.tensor ({parallel.tensor}) divides the {groups} key/value heads"
        yield Problem("parallel.context", show(parallel.context), valid, "parallel.context_method=all_gather")


def _recompute_rule(config: Config) -> Iterator[Problem]:
    parallel, layers = config.parallel, config.model.num_layers
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.recompute != "full" or does_not_divide(chunks, layers):
        return
    per_chunk = layers // chunks
    if parallel.recompute_num_layers > per_chunk:
        valid = f"1 to {per_chunk}, the layers of a pipeline stage or chunk ({layers} / {chunks})"
        yield Problem("parallel.recompute_num_layers", show(parallel.recompute_num_layers), valid)


def _batch_rule(config: Config) -> Iterator[Problem]:
    micro = config.training.micro_batch_size
    for key, batch in batch_sizes(config).items():
        if does_not_divide(micro, batch):
            yield Problem(key, show(batch), f"a multiple of training.micro_batch_size ({micro})", near(batch, micro))


def world_size_problems(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Yield the problems of the layout over a known number of ranks; no problems if ``world_size`` is None."""
    parallel, micro = config.parallel, config.training.micro_batch_size
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    if world_size is None or min(sizes.values()) < 1:
        return
    replica = math.prod(sizes.values())
    if world_size % replica:
        product = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size > 1 or name != "context")
        found = f"{product.removeprefix('parallel.tensor ')} = {replica} ranks a replica, in a world of {world_size}"
        valid = f"a product that divides the world size {world_size}: {divisors(world_size)}"
        # A single rank is usually a mistake: no launcher started the others.
        start = f"w1train train --nproc {replica} ... starts {replica} ranks; the dots stand for the same recipe and overrides"
        yield Problem("parallel.tensor", found, valid, start if world_size == 1 else None)
        return
    yield from expert_world_size_problems(config, world_size)
    data_parallel = world_size // replica
    for key, batch in batch_sizes(config).items():
        # _batch_rule has reported a micro-batch that does not divide the batch.
        if does_not_divide(micro, batch):
            continue
        unit = micro * data_parallel
        if does_not_divide(unit, batch):
            valid = f"a multiple of training.micro_batch_size x data-parallel ranks ({micro} x {data_parallel} = {unit})"
            yield Problem(key, show(batch), valid, near(batch, unit))
        elif parallel.virtual_pipeline > 1 and does_not_divide(parallel.pipeline, batch // unit):
            unit *= parallel.pipeline
            valid = f"with virtual pipeline stages, a multiple of {unit}: micro-batches come in groups of {parallel.pipeline}"
            yield Problem(key, show(batch), valid, near(batch, unit))


PARALLEL_RULES: tuple[Rule, ...] = (
    _tensor_parallel_rule,
    _sequence_parallel_rule,
    _pipeline_rule,
    _context_rule,
    _recompute_rule,
    _batch_rule,
)
