"""The rows that a loss is taken of: each output is beside the token that it predicts, and the work of a micro-batch is counted."""

from __future__ import annotations

import torch

from tests.tiny import packed_batch, tiny_config
from w1train.runtime.megatron_on_cpu import import_megatron

import_megatron()

from w1train.diffusion.corruption import corrupt  # noqa: E402
from w1train.training.forward import _prepare  # noqa: E402

DIFFUSION = {"block_size": 4, "clean_attention": "token_causal", "autoregressive_weight": 0.5, "random_length_probability": 0.0}


def test_outputs_of_both_streams_are_beside_their_targets():
    """Masked tokens of the noisy stream come first. Behind them, each row of the clean stream predicts the token that follows it."""
    config = tiny_config(diffusion=DIFFUSION)
    noisy = corrupt(packed_batch(range(3)), config.diffusion, 0)
    inputs, _, work = _prepare(noisy, config)
    targets = inputs.targets
    places, num_masked = inputs.model.logit_positions, int(noisy.loss_mask.sum())
    seen, clean = inputs.model.input_ids.flatten(), torch.cat([noisy.tokens, noisy.tokens], dim=1).flatten()
    assert (seen[places[:num_masked]] == config.diffusion.mask_token_id).all()
    assert torch.equal(targets[:num_masked], clean[places[:num_masked]])
    assert torch.equal(targets[num_masked:], seen[places[num_masked:] + 1])
    assert len(targets) == num_masked + int(noisy.next_mask.sum())
    num_pairs = int(inputs.model.attention_plan.visibility.dense().sum())
    assert work.tolist() == [num_pairs, seen.numel(), len(targets), len(noisy.segment_timesteps) + 1, 1, 1]
