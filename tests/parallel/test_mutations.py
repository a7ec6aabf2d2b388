"""Break one rule on purpose: the equality of layouts must notice. A check that cannot fail proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from tests.parallel.layouts import train_layout
from tests.parallel.test_layouts import assert_equal_numbers, layout_config, reference
from w1train.attention import context_parallel
from w1train.diffusion import corruption, timesteps
from w1train.model import megatron_config, transformer
from w1train.model.initialization import global_named_parameters
from w1train.training import forward
from w1train.training import inputs as inputs_module
from w1train.training import setup as training_setup
from w1train.training.setup import TrainedModel

TENSOR = {"tensor": 2, "sequence": True, "distributed_optimizer": False}
PIPELINE = {"pipeline": 2, "distributed_optimizer": False}
CONTEXT = {"context": 2, "distributed_optimizer": False}
DATA: dict[str, Any] = {"distributed_optimizer": False}


@dataclass
class Mutation:
    """One broken rule, and a layout in which it matters."""

    rule: str
    parallel: dict[str, Any]
    data_parallel: int = 1
    streams: str = "two-stream"
    vocab_size: int | None = None
    """Another vocabulary than the reference's."""
    patch: tuple[Any, str, Any] | None = None
    """(owner, name, value) replaced before the ranks are forked."""
    mutate: Callable[[TrainedModel], None] | None = field(default=None, repr=False)
    """Applied to the built model."""


def _drop_flag(parameter_name: str, flag: str) -> Callable[[TrainedModel], None]:
    def mutate(model: TrainedModel) -> None:
        for stage in model.stages:
            for name, parameter in global_named_parameters(stage):
                if name == parameter_name:
                    if not getattr(parameter, flag):
                        raise LookupError(f"{name} had no {flag} to drop")
                    setattr(parameter, flag, False)

    return mutate


def _no_conditional_embedder(model: TrainedModel) -> None:
    model.config.has_cond_embedder = False


def _head_reduces(model: TrainedModel) -> None:
    for stage in model.stages:
        if stage.post_process:
            stage.output_layer.allreduce_dgrad = True


def _words_of_the_micro_batch(seed, indices, **kwargs):
    """Numbers by place in the micro-batch instead of by global sample index."""
    return timesteps.random_words(seed, torch.arange(len(indices)), **kwargs)


def _denominator_of_ones(_config, _noisy):
    """Every micro-batch counts alike: the mean of means."""
    return torch.ones((), dtype=torch.float64)


def _mark_without_own_bucket(self):
    for parameter in self.timestep_embedding.parameters():
        parameter.pipeline_parallel = True
        parameter.shared = not self.pre_process


def _mark_without_shared(self):
    for parameter in self.timestep_embedding.parameters():
        parameter.pipeline_parallel = True
        parameter.shared_embedding = True


def _own_slice_only(ctx, gradient):
    """A gather whose backward keeps this rank's gradient and drops what the others computed for its keys."""
    rank = torch.distributed.get_rank(ctx.group)
    return gradient.chunk(torch.distributed.get_world_size(ctx.group))[rank], None


def _positions_from_zero(*args, **kwargs):
    inputs = _assemble(*args, **kwargs)
    inputs.positions = torch.arange(inputs.positions.shape[1]).expand_as(inputs.positions)
    return inputs


def _batched_messages(*args, **kwargs):
    config = _transformer_config(*args, **kwargs)
    config.overlap_p2p_comm, config.batch_p2p_comm = False, True
    return config


_assemble = inputs_module._assemble
_transformer_config = megatron_config.transformer_config

MUTATIONS = [
    Mutation(f"sequence_parallel flag of {name}", TENSOR, mutate=_drop_flag(name, "sequence_parallel"))
    for name in (
        "timestep_embedding.linear_in.weight",
        "timestep_embedding.linear_in.bias",
        "timestep_embedding.linear_out.bias",
        "decoder.layers.1.modulation.linear.weight",
        "decoder.layers.1.modulation.linear.bias",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.3.pre_mlp_layernorm.weight",
        "final_norm.weight",
        "final_modulation.linear.bias",
    )
]
MUTATIONS += [
    Mutation(f"pipeline_parallel tag of {name}", PIPELINE, mutate=_drop_flag(name, "pipeline_parallel"))
    for name in ("timestep_embedding.linear_in.weight", "timestep_embedding.linear_out.bias")
]
MUTATIONS += [
    Mutation("config.has_cond_embedder", PIPELINE, mutate=_no_conditional_embedder),
    Mutation("head leaves partial gradients to the gather", TENSOR, mutate=_head_reduces),
    Mutation("noise by global sample index", DATA, 2, patch=(corruption, "random_words", _words_of_the_micro_batch)),
    Mutation("timesteps by global sample index", DATA, 2, patch=(corruption, "draw_fractions", None)),
    Mutation("one global denominator", DATA, 2, patch=(forward, "denominator", _denominator_of_ones)),
    Mutation(
        "timestep embedding in a bucket of its own",
        {"pipeline": 2, "distributed_optimizer": True},
        2,
        # So many rows that the first stage's slices are cut elsewhere than the last one's.
        vocab_size=1536,
        patch=(transformer.DiffusionTransformer, "_mark_replicated_over_pipeline", _mark_without_own_bucket),
    ),
    Mutation(
        "timestep embedding counted once in the gradient norm",
        PIPELINE,
        patch=(transformer.DiffusionTransformer, "_mark_replicated_over_pipeline", _mark_without_shared),
    ),
    Mutation(
        "gathered keys' gradients are summed", CONTEXT, patch=(context_parallel._AllGather, "backward", staticmethod(_own_slice_only))
    ),
    Mutation("positions follow the ownership", CONTEXT, patch=(inputs_module, "_assemble", _positions_from_zero)),
    Mutation(
        "interleaved stages send one by one",
        {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": False},
        patch=(training_setup, "transformer_config", _batched_messages),
    ),
]


def _fractions_of_the_micro_batch(config, seed, sample_indices, num_segments, draw=0):
    return timesteps.draw_fractions(config, seed, torch.arange(len(sample_indices)), num_segments, draw)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.rule)
def test_a_broken_rule_is_noticed(mutation, monkeypatch):
    config = layout_config(mutation.streams, **mutation.parallel)
    expected = reference(mutation.streams)
    if mutation.vocab_size is not None:
        single = layout_config(mutation.streams, distributed_optimizer=False)
        single.model.vocab_size = config.model.vocab_size = mutation.vocab_size
        expected = train_layout(single)
        _check(config, replace(mutation, mutate=None), expected)
    if mutation.patch is not None:
        owner, name, value = mutation.patch
        monkeypatch.setattr(owner, name, value or _fractions_of_the_micro_batch)
    with pytest.raises(AssertionError):
        _check(config, mutation, expected)


def _check(config, mutation, expected):
    outcome = train_layout(config, mutation.data_parallel, mutate=mutation.mutate)
    assert outcome.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-5)
    assert_equal_numbers(outcome, expected)
