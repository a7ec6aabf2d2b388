"""Break one rule on purpose: the equality of layouts must notice. A check that cannot fail proves nothing.

The mutations that are not `slow` are of a layer's weight, of a gradient that ranks share, of the loss, and of the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from tests.parallel.layouts import train_layout
from tests.parallel.test_layouts import assert_equal_numbers, layout_config, reference
from tests.slow import slow_except
from w1train.attention import context_parallel
from w1train.diffusion import corruption, philox, process, timesteps
from w1train.engine import building as training_setup
from w1train.engine.building import TrainedModel
from w1train.model import megatron_config, transformer
from w1train.model.initialization import global_named_parameters
from w1train.training import forward
from w1train.training import inputs as inputs_module

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


def _indices_on_rank_0(indices):
    """Places among this rank's samples instead of global indices: all data-parallel ranks count like rank 0."""
    return indices - parallel_state.get_data_parallel_rank() * len(indices)


def _words_by_place(seed, indices, **kwargs):
    return philox.random_words(seed, _indices_on_rank_0(indices), **kwargs)


def _fractions_by_place(config, seed, sample_indices, num_segments, draw=0):
    return timesteps.draw_fractions(config, seed, _indices_on_rank_0(sample_indices), num_segments, draw)


def _mean_of_means(chunks, num_tokens, *args, **kwargs):
    """Every data-parallel rank's mean counts alike, whatever it is a mean of."""
    group = parallel_state.get_data_parallel_group()
    total = num_tokens.clone()
    torch.distributed.all_reduce(total, group=group)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.mul_(total.item() / (num_tokens.item() * group.size()))
    _finalize_model_grads(chunks, num_tokens, *args, **kwargs)


def _slice_noise_per_context_rank(noisy, config):
    """Masks drawn again with the context-parallel rank in the seed: queries of one rank, keys of another noise."""
    rank = parallel_state.get_context_parallel_rank()
    if rank > 0:
        samples, length = noisy.targets.shape
        words = philox.random_words(config.training.seed + rank, torch.arange(samples), draw=0, purpose=philox.Purpose.NOISE, num=length)
        masked = (words < timesteps.word_thresholds(noisy.target_timesteps)) & (noisy.document_ids >= 0)
        input_ids = noisy.tokens.masked_fill(masked, config.diffusion.mask_token_id)
        noisy = replace(noisy, input_ids=input_ids, loss_mask=masked)
    return inputs_module.rank_inputs(noisy, config)


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


def _gradient_buffer_with_strides(ctx, gradient):
    """The strides of a transposed gradient on memory that was received in order."""
    output = torch.empty_like(gradient)
    torch.distributed.all_to_all_single(output, gradient.contiguous(), group=ctx.group)
    return output, None


def _first_positions(noisy, positions):
    own = _at(noisy, positions)
    own.positions = noisy.positions[:, : positions.shape[1]]
    return own


def _batched_messages(*args, **kwargs):
    config = _transformer_config(*args, **kwargs)
    config.overlap_p2p_comm, config.batch_p2p_comm = False, True
    return config


_at = corruption.NoisyBatch.at
_finalize_model_grads = training_setup.finalize_model_grads
_transformer_config = megatron_config.transformer_config

_MUTATIONS = [
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
_MUTATIONS += [
    Mutation(f"pipeline_parallel tag of {name}", PIPELINE, mutate=_drop_flag(name, "pipeline_parallel"))
    for name in ("timestep_embedding.linear_in.weight", "timestep_embedding.linear_out.bias")
]
_MUTATIONS += [
    Mutation("config.has_cond_embedder", PIPELINE, mutate=_no_conditional_embedder),
    Mutation("head leaves partial gradients to the gather", TENSOR, mutate=_head_reduces),
    Mutation("noise by global sample index", DATA, 2, patch=(process, "random_words", _words_by_place)),
    Mutation("timesteps by global sample index", DATA, 2, patch=(process, "draw_fractions", _fractions_by_place)),
    Mutation("one global denominator", DATA, 2, patch=(training_setup, "finalize_model_grads", _mean_of_means)),
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
    Mutation(
        "exchanged heads' gradients arrive in contiguous memory",
        {"context_method": "all_to_all", **CONTEXT},
        patch=(context_parallel._AllToAll, "backward", staticmethod(_gradient_buffer_with_strides)),
    ),
    Mutation("positions follow the ownership", CONTEXT, patch=(corruption.NoisyBatch, "at", _first_positions)),
    Mutation("one noise for all context-parallel ranks", CONTEXT, patch=(forward, "rank_inputs", _slice_noise_per_context_rank)),
    Mutation(
        "interleaved stages send one by one",
        {"pipeline": 2, "virtual_pipeline": 2, "distributed_optimizer": False},
        patch=(training_setup, "transformer_config", _batched_messages),
    ),
]

MUTATIONS = {mutation.rule: mutation for mutation in _MUTATIONS}
_IN_EACH_RUN = {
    "sequence_parallel flag of final_norm.weight",
    "one global denominator",
    "noise by global sample index",
}


@pytest.mark.parametrize("rule", slow_except(_IN_EACH_RUN, MUTATIONS))
def test_a_broken_rule_is_noticed(rule, monkeypatch):
    mutation = MUTATIONS[rule]
    config = _with_vocabulary(layout_config(mutation.streams, mutation.data_parallel, **mutation.parallel), mutation)
    single = _with_vocabulary(layout_config(mutation.streams, distributed_optimizer=False), mutation)
    expected = reference(mutation.streams)
    if mutation.vocab_size is not None:
        expected = train_layout(single)
        assert_equal_numbers(train_layout(config, mutation.data_parallel), expected)
    if mutation.patch is not None:
        monkeypatch.setattr(*mutation.patch)
        # What also breaks a single process would be noticed whatever the layout, and prove nothing about it.
        assert_equal_numbers(train_layout(single), expected)
    with pytest.raises(AssertionError):
        assert_equal_numbers(train_layout(config, mutation.data_parallel, mutate=mutation.mutate), expected)


def _with_vocabulary(config, mutation):
    config.model.vocab_size = mutation.vocab_size or config.model.vocab_size
    return config
