"""What the types cannot say: ranges, and rules between keys. All problems are found, none stops the search."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from w1train.config.convert import Conversion, join
from w1train.config.errors import Problem, listing, show
from w1train.config.ranges import (
    AT_LEAST_ONE,
    BELOW_ONE,
    FRACTION,
    LARGEST_INTEGER,
    LENGTH,
    NOT_NEGATIVE,
    POSITIVE,
    SECONDS,
    SIZE,
    TOKENS,
    Range,
)
from w1train.config.rules.attention_limits import attention_case, limit
from w1train.config.rules.checkpoint import CHECKPOINT_RULES
from w1train.config.rules.data import DATA_RULES
from w1train.config.rules.diffusion import DIFFUSION_RULES, at_every_stage
from w1train.config.rules.divisibility import divisors, does_not_divide, near
from w1train.config.rules.health import HEALTH_RANGES, HEALTH_RULES
from w1train.config.rules.speed import SPEED_RULES
from w1train.config.schema import Config, SamplingConfig
from w1train.config.stages import batch_sizes

_NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]+")
_STAGE_NAME_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
# What a path cannot be: NUL ends it, and a lone surrogate (Python's form of a byte that is not UTF-8) cannot be written to a file.
_NO_PATH_PATTERN = re.compile("[\0\ud800-\udfff]")
_MIDPOINT_TOLERANCE = 1e-6
_PATHS = {
    "runs_dir": "a path",
    "data.train": "a path or null",
    "data.blend.*.prefix": "a path",
    "data.validation": "a path or null",
    "data.validation_sets.*": "a path",
    "data.tokenizer": "a path",
    "data.cache_directory": "a path or null",
    "schedule.stages.*.train": "a path or null",
    "training.initial_weights": "a path or null",
    "checkpoint.upload": "a URL that fsspec knows, such as s3://bucket/runs/NAME; or null",
}


# Every numeric field of the schema is here (a test holds the two together). Null is left to the types.
RANGES: dict[str, Range] = {
    "model.vocab_size": Range(2, 1 << 24),
    # Each costs milliseconds and memory before it has a weight, even in a plan; the deepest Transformers have a thousand.
    "model.num_layers": Range(1, 4096),
    "model.hidden_size": SIZE,
    "model.num_attention_heads": SIZE,
    "model.ffn_hidden_size": SIZE,
    "model.num_query_groups": SIZE,
    "model.kv_channels": SIZE,
    "model.max_sequence_length": LENGTH,
    "model.rope_base": POSITIVE,
    "model.rope_scaling_factor": AT_LEAST_ONE,
    "model.rope_low_frequency_factor": POSITIVE,
    "model.rope_high_frequency_factor": POSITIVE,
    "model.rope_original_length": LENGTH,
    "model.norm_epsilon": POSITIVE,
    "model.condition_size": SIZE,
    "model.timestep_frequency_size": SIZE,
    "model.timestep_scale": POSITIVE,
    "model.init_std": POSITIVE,
    "data.sequence_length": LENGTH,
    "data.blend.*.weight": NOT_NEGATIVE,
    "data.blend.*.max_epochs": POSITIVE,
    "data.align": LENGTH,
    "data.packing_seed": Range(0, LARGEST_INTEGER),
    "data.num_workers": Range(0, 1024),
    "data.prefetch": Range(1, 10_000),
    "data.read_timeout": SECONDS,
    "diffusion.mask_token_id": NOT_NEGATIVE,
    "diffusion.t_min": FRACTION,
    "diffusion.t_max": Range(0, 1, includes_low=False),
    "diffusion.block_size": LENGTH,
    "diffusion.num_strata": Range(1, 1 << 20),
    "diffusion.random_length_probability": FRACTION,
    "diffusion.autoregressive_weight": NOT_NEGATIVE,
    "diffusion.annealing_tokens": NOT_NEGATIVE,
    "diffusion.mask_embedding_noise": NOT_NEGATIVE,
    "parallel.tensor": SIZE,
    "parallel.pipeline": SIZE,
    "parallel.virtual_pipeline": SIZE,
    "parallel.num_layers_in_first_stage": SIZE,
    "parallel.num_layers_in_last_stage": SIZE,
    "parallel.context": SIZE,
    "parallel.context_chunk_size": LENGTH,
    "parallel.recompute_num_layers": SIZE,
    "optimizer.beta1": BELOW_ONE,
    "optimizer.beta2": BELOW_ONE,
    "optimizer.epsilon": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_grad": NOT_NEGATIVE,
    "optimizer.rate_multipliers.*": NOT_NEGATIVE,
    "schedule.stages.*.tokens": TOKENS,
    "schedule.stages.*.learning_rate": NOT_NEGATIVE,
    "schedule.stages.*.global_batch_size": LENGTH,
    "schedule.stages.*.rewarm_tokens": NOT_NEGATIVE,
    "schedule.stages.*.blend.*": NOT_NEGATIVE,
    "training.global_batch_size": LENGTH,
    "training.micro_batch_size": SIZE,
    "training.loss_chunk_size": LENGTH,
    "training.seed": Range(0, LARGEST_INTEGER),
    "validation.interval": AT_LEAST_ONE,
    "validation.num_samples": AT_LEAST_ONE,
    "validation.timesteps[*]": Range(0, 1, includes_low=False),
    "validation.block_sizes[*]": LENGTH,
    "sampling.interval": NOT_NEGATIVE,
    "sampling.num_tokens": LENGTH,
    "sampling.num_steps": LENGTH,
    "sampling.threshold": Range(0, 1, includes_low=False),
    "sampling.block_size": LENGTH,
    "sampling.temperature": NOT_NEGATIVE,
    "sampling.seed": NOT_NEGATIVE,
    "checkpoint.interval": AT_LEAST_ONE,
    "checkpoint.keep": AT_LEAST_ONE,
    "checkpoint.keep_every": NOT_NEGATIVE,
    "checkpoint.keep_best": NOT_NEGATIVE,
    "checkpoint.resume_step": AT_LEAST_ONE,
    "logging.interval": AT_LEAST_ONE,
    "logging.num_t_bins": Range(1, 10_000),
    "logging.peak_tflops": POSITIVE,
    **HEALTH_RANGES,
    "profiling.steps[*]": AT_LEAST_ONE,
    "profiling.ranks[*]": NOT_NEGATIVE,
}


def validate(config: Config, world_size: int | None = None) -> list[Problem]:
    """Every problem of a configuration; with ``world_size`` (ranks) the layout over ranks is checked too."""
    return [problem for rule in RULES for problem in rule(config)] + list(_world_size_rule(config, world_size))


def validate_conversion(conversion: Conversion) -> list[Problem]:
    """``validate`` for a configuration some of whose fields may be unset: rules that need such a field are left out."""
    if conversion.complete:
        return validate(conversion.config)
    return [problem for rule in RULES for problem in _until_unset(rule(conversion.config))]


def _until_unset(problems: Iterator[Problem]) -> Iterator[Problem]:
    try:
        yield from problems
    except AttributeError as error:
        # Only a schema field that conversion left unset may end a rule; anything else is a mistake in the rule.
        if not (dataclasses.is_dataclass(error.obj) and error.name in {field.name for field in dataclasses.fields(error.obj)}):
            raise


def _ranges(pattern: str, valid: Range) -> Callable[[Config], Iterator[Problem]]:
    def rule(config: Config) -> Iterator[Problem]:
        for key, value in _matching(config, pattern):
            if value is not None and value not in valid:
                yield Problem(key, show(value), valid.words(value))

    return rule


def _matching(config: Config, pattern: str) -> Iterator[tuple[str, Any]]:
    """The values at a key, unset ones left out; ``*`` stands for every name of a mapping, ``[*]`` for every index of a list."""
    found: list[tuple[str, Any]] = [("", config)]
    for part in pattern.removesuffix("[*]").split("."):
        if part == "*":
            found = [(join(key, name), child) for key, mapping in found for name, child in mapping.items()]
        else:
            found = [(join(key, part), getattr(parent, part)) for key, parent in found if hasattr(parent, part)]
    if pattern.endswith("[*]"):
        found = [(f"{key}[{index}]", item) for key, items in found for index, item in enumerate(items)]
    yield from found


def _run_rule(config: Config) -> Iterator[Problem]:
    if not _NAME_PATTERN.fullmatch(config.name) or config.name in (".", ".."):
        yield Problem("name", show(config.name), "a directory name of letters, digits, '.', '_' and '-'")


def _paths_rule(config: Config) -> Iterator[Problem]:
    for pattern, valid in _PATHS.items():
        for key, path in _matching(config, pattern):
            if path == "":
                yield Problem(key, "''", valid)
            elif path is not None and _NO_PATH_PATTERN.search(path):
                yield Problem(key, show(path), f"{valid}, in UTF-8 and without the character NUL")


def _query_groups_rule(config: Config) -> Iterator[Problem]:
    heads, groups = config.model.num_attention_heads, config.model.num_query_groups
    if groups is not None and does_not_divide(groups, heads):
        valid = f"a divisor of model.num_attention_heads ({heads}): {divisors(heads)}; or null"
        yield Problem("model.num_query_groups", show(groups), valid)


def _head_width_rule(config: Config) -> Iterator[Problem]:
    hidden, heads, channels = config.model.hidden_size, config.model.num_attention_heads, config.model.kv_channels
    even = "an even number: the rotary embedding turns pairs"
    if channels is not None:
        if channels > 0 and channels % 2:
            yield Problem("model.kv_channels", show(channels), even, f"{channels + 1}")
    elif does_not_divide(heads, hidden):
        valid = f"a divisor of model.hidden_size ({hidden}): {divisors(hidden)}; or any number if model.kv_channels is set"
        yield Problem("model.num_attention_heads", show(heads), valid)
    elif heads > 0 and hidden // heads % 2:
        found = f"null, so hidden_size / num_attention_heads = {hidden} / {heads} = {hidden // heads}"
        yield Problem("model.kv_channels", found, even, f"{hidden // heads + 1}")


def _rope_scaling_rule(config: Config) -> Iterator[Problem]:
    model = config.model
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    if model.rope_scaling == "llama3" and high <= low:
        yield Problem("model.rope_high_frequency_factor", show(high), f"a number above model.rope_low_frequency_factor ({show(low)})")


def _timestep_frequency_rule(config: Config) -> Iterator[Problem]:
    size = config.model.timestep_frequency_size
    if size % 2:
        yield Problem("model.timestep_frequency_size", show(size), "an even number: half sines, half cosines", f"{size + 1}")


def _sequence_length_rule(config: Config) -> Iterator[Problem]:
    length, longest = config.data.sequence_length, config.model.max_sequence_length
    if length > longest:
        yield Problem("data.sequence_length", show(length), f"at most model.max_sequence_length ({longest})")


def _stages_rule(config: Config) -> Iterator[Problem]:
    stages = config.schedule.stages
    if not stages:
        yield Problem("schedule.stages", "{}", "at least one stage", "schedule.stages.NAME={tokens: 1e9, learning_rate: 3e-4}")
    for name, stage in stages.items():
        if not _STAGE_NAME_PATTERN.fullmatch(name):
            yield Problem(f"schedule.stages.{name}", f"the name {show(name)}", "a name of letters, digits, '_' and '-'")
        if 0 < stage.tokens < stage.rewarm_tokens:
            valid = f"at most the stage's {stage.tokens} tokens"
            yield Problem(f"schedule.stages.{name}.rewarm_tokens", show(stage.rewarm_tokens), valid)


def _validation_rule(config: Config) -> Iterator[Problem]:
    if not config.validation.timesteps:
        yield Problem("validation.timesteps", "[]", "at least one t, 0 < t <= 1", "remove the key: the default is ten midpoints")
        return
    # The ELBO is the plain mean over them, which is a quadrature at these points only.
    timesteps = config.validation.timesteps
    midpoints = [(index + 0.5) / len(timesteps) for index in range(len(timesteps))]
    if not all(abs(t - midpoint) <= _MIDPOINT_TOLERANCE for t, midpoint in zip(sorted(timesteps), midpoints, strict=True)):
        valid = f"the midpoints of {len(timesteps)} equal bins of (0, 1], in any order: their mean is the ELBO"
        yield Problem("validation.timesteps", show(timesteps), valid, show([round(midpoint, 8) for midpoint in midpoints]))


def _validation_blocks_rule(config: Config) -> Iterator[Problem]:
    length = config.data.sequence_length
    for index, size in enumerate(config.validation.block_sizes):
        if size != length and (size > length or does_not_divide(size, length)):
            yield Problem(f"validation.block_sizes[{index}]", show(size), f"a divisor of data.sequence_length ({length})")


def _sampling_rule(config: Config) -> Iterator[Problem]:
    sampling = config.sampling
    if sampling.interval > 0 and not sampling.prompts:
        yield Problem("sampling.prompts", "[]", "at least one prompt, or sampling.interval=0", 'the empty prompt: [""]')
    if sampling.interval > 0 and sampling.num_tokens > config.model.max_sequence_length:
        valid = f"at most model.max_sequence_length ({config.model.max_sequence_length}), or sampling.interval=0"
        yield Problem("sampling.num_tokens", show(sampling.num_tokens), valid)


def _denoising_rule(config: Config) -> Iterator[Problem]:
    block_size = config.diffusion.block_size
    if config.diffusion.objective == "diffusion":
        yield from denoising_problems(config.sampling, by_block=block_size is not None and block_size < config.data.sequence_length)


def denoising_problems(sampling: SamplingConfig, by_block: bool) -> Iterator[Problem]:
    """Whether the ways of unmasking agree, tokens divide into blocks and steps over these; w1train.sampling.denoise relies on it.

    ``by_block``: block diffusion, whose blocks are counted from the start of the text and may be short at both ends.
    """
    if sampling.threshold is not None and sampling.remasking == "random":
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
            valid = f"a multiple of the {num_blocks} blocks of {block_size} tokens, each of which takes the same number of steps"
            yield Problem("sampling.num_steps", show(sampling.num_steps), valid, near(sampling.num_steps, num_blocks))


def _tensor_parallel_rule(config: Config) -> Iterator[Problem]:
    tensor = config.parallel.tensor
    names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    sizes = {name: size for name in names if (size := getattr(config.model, name, None)) is not None}
    for name, size in sizes.items():
        if does_not_divide(tensor, size):
            suggestion = f"a divisor of all that it splits: {divisors(math.gcd(*sizes.values()))}"
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
    """Every stage's layers must divide into chunks, and megatron-core needs a stage whose layers it may count itself."""
    virtual = config.parallel.virtual_pipeline
    if virtual > 1 and not has_middle:
        valid = "1 when the layers of both of two stages are given: megatron-core divides by the number of stages between"
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


def _attention_rule(config: Config) -> Iterator[Problem]:
    """What no machine could do. What this one cannot is found when the run starts on it."""
    backend = config.attention.backend
    if backend == "auto":
        return
    reason = limit(backend, attention_case(config))
    if reason is not None:
        yield Problem("attention.backend", backend, f"auto, or a backend that can serve this run: {reason}", "attention.backend=auto")


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


def _world_size_rule(config: Config, world_size: int | None) -> Iterator[Problem]:
    """The layout over a known number of ranks."""
    parallel, micro = config.parallel, config.training.micro_batch_size
    sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    if world_size is None or min(sizes.values()) < 1:
        return
    replica = math.prod(sizes.values())
    if world_size % replica:
        product = " x ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size > 1 or name != "context")
        found = f"{product.removeprefix('parallel.tensor ')} = {replica} ranks a replica, in a world of {world_size}"
        valid = f"a product that divides the world size {world_size}: {divisors(world_size)}"
        yield Problem("parallel.tensor", found, valid)
        return
    data_parallel = world_size // replica
    for key, batch in batch_sizes(config).items():
        # When the micro-batch alone does not divide, the rule without a world has said so.
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


RULES: Iterable[Callable[[Config], Iterator[Problem]]] = (
    *(
        at_every_stage(_ranges(pattern, valid)) if pattern.startswith("diffusion.") else _ranges(pattern, valid)
        for pattern, valid in RANGES.items()
    ),
    _run_rule,
    _paths_rule,
    _query_groups_rule,
    _head_width_rule,
    _rope_scaling_rule,
    _timestep_frequency_rule,
    _sequence_length_rule,
    *DATA_RULES,
    *DIFFUSION_RULES,
    _stages_rule,
    _validation_rule,
    _validation_blocks_rule,
    _sampling_rule,
    at_every_stage(_denoising_rule),
    *CHECKPOINT_RULES,
    _tensor_parallel_rule,
    _sequence_parallel_rule,
    _pipeline_rule,
    _context_rule,
    at_every_stage(_attention_rule),
    _recompute_rule,
    *SPEED_RULES,
    *HEALTH_RULES,
    _batch_rule,
)
