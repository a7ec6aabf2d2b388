"""The learned rates of noise as every rank needs them: to corrupt text and to sample, on all pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor

from w1train.model.noise_rates import NoiseRates


def rates_with_gradients(chunks: Sequence[torch.nn.Module]) -> NoiseRates | None:
    """Return the module whose call gives the rates with a graph; None if this rank has no rates.

    Args:
        chunks: the model's chunks on this rank.
    """
    return unwrap_model(chunks[-1]).noise_rates


@torch.no_grad()
def current_noise_rates(chunks: Sequence[torch.nn.Module]) -> Tensor | None:
    """Return the rates of the model, float32 [vocabulary], which are equal to the last bit on all ranks; None if it does not learn rates.
    Every rank of a model replica calls this.

    The stages of a pipeline must draw the same masks, so all of them get the numbers that the last stage has computed.

    Args:
        chunks: the model's chunks on this rank, whose parameters are those of the last optimizer step.
    """
    model = unwrap_model(chunks[-1]).model
    if not model.learns_noise_rates:
        return None
    if (live := rates_with_gradients(chunks)) is not None:
        rates = live()
    else:
        rates = torch.empty(model.vocab_size, dtype=torch.float32, device=torch.cuda.current_device())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(rates, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
    return rates
