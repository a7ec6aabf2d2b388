"""Rules of options that make a step faster: overlap of communication with computation, FP8, and the kernels of optimizers."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem
from w1train.config.rules.attention_limits import attention_case
from w1train.config.rules.rule import OWN_PROCESSES, Rule
from w1train.config.schema import Config
from w1train.config.stages import at_stage


def _overlap_rule(config: Config) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.overlap_param_gather:
        for name in ("distributed_optimizer", "overlap_grad_reduce"):
            if not getattr(parallel, name):
                yield Problem("parallel.overlap_param_gather", "true", f"only with parallel.{name}", f"parallel.{name}=true")
    if parallel.tp_comm_overlap:
        if not parallel.sequence:
            valid = "only with parallel.sequence: it overlaps the collectives of sequence parallelism"
            yield Problem("parallel.tp_comm_overlap", "true", valid, "parallel.tensor=2 parallel.sequence=true")
        if config.model.transformer_impl != "te":
            yield Problem("parallel.tp_comm_overlap", "true", "only with transformer-engine's linear layers", "model.transformer_impl=te")


def _fp8_rule(config: Config) -> Iterator[Problem]:
    """Check that the sizes of both factors of every FP8 product are multiples of 16, which transformer-engine requires."""
    training, model, parallel = config.training, config.model, config.parallel
    if training.fp8 == "none":
        return
    if model.transformer_impl != "te":
        yield Problem("training.fp8", training.fp8, "none without transformer-engine's linear layers", "model.transformer_impl=te")
    if training.precision != "bf16":
        yield Problem("training.fp8", training.fp8, f"none with training.precision={training.precision}", "training.precision=bf16")
    channels = model.kv_channels or (model.hidden_size // model.num_attention_heads if model.num_attention_heads > 0 else 0)
    groups = model.num_query_groups or model.num_attention_heads
    ranks = parallel.tensor
    positions = _fewest_streams(config) * config.data.sequence_length * training.micro_batch_size
    sizes = {
        "model.hidden_size": (model.hidden_size, 1),
        "model.ffn_hidden_size": (model.ffn_hidden_size, ranks),
        "model.kv_channels": (channels * model.num_attention_heads, ranks),
        "model.num_query_groups": (channels * (model.num_attention_heads + 2 * groups), ranks),
        "model.experts.shared_ffn_hidden_size": (model.experts.shared_ffn_hidden_size if model.experts.num_experts else 0, ranks),
        "data.sequence_length": (positions, parallel.context * (ranks if parallel.sequence else 1)),
    }
    for key, (size, split) in sizes.items():
        if split > 0 and size % (16 * split):
            found = f"a product of size {size}{f' over {split} ranks' if split > 1 else ''}"
            yield Problem(key, found, f"a multiple of 16 on every rank with training.fp8={training.fp8}", "training.fp8=none")


def _fewest_streams(config: Config) -> int:
    """Return the smallest number of streams of all stages: a size that divides one stream divides two streams as well."""
    stages = [at_stage(config, name) for name in config.schedule.stages]
    # A process that does not come with w1train counts as one of noise here: with two streams, fewer sizes are refused.
    kinds = {attention_case(stage, OWN_PROCESSES.get(stage.diffusion.objective, False)).kind for stage in stages}
    return 2 if kinds == {"blocks"} else 1


def _muon_rule(config: Config) -> Iterator[Problem]:
    """Check that the AdamW beside Muon is torch's: the libraries' AdamW would update the matrices too."""
    if config.optimizer.name == "muon" and config.kernels.adamw in ("te", "apex"):
        yield Problem("kernels.adamw", config.kernels.adamw, "auto or torch with optimizer.name=muon", "kernels.adamw=torch")


SPEED_RULES: tuple[Rule, ...] = (_overlap_rule, _fp8_rule, _muon_rule)
