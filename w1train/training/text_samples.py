"""Text that the model writes while it is trained."""

from __future__ import annotations

import dataclasses

import torch

from w1train.config.schema import Config
from w1train.data.conversations.chat_prompts import ChatPrompts
from w1train.diffusion.processes import noise_process
from w1train.engine.building import TrainedModel
from w1train.inference.predictor import Predictor, block_predictor, ranks_share_experts
from w1train.runtime.distributed import Ranks
from w1train.sampling.text import TextTokenizer, sample_texts


def takes_part(config: Config, ranks: Ranks) -> bool:
    """Tell whether this rank completes prompts: the ranks of the first model replica do, and all ranks if ranks share experts."""
    return ranks.data_parallel_rank == 0 or ranks_share_experts(config.parallel)


def complete_prompts(
    config: Config, model: TrainedModel, tokenizer: TextTokenizer, device: torch.device, chat: ChatPrompts | None = None
) -> list[tuple[str, str]]:
    """Complete ``sampling.prompts``. The ranks that take part call this.

    Args:
        chat: as in :func:`sample_texts`.

    Returns:
        (prompt, text) pairs.
    """
    config = _as_diffusion(config)
    predictor = Predictor(config, list(model.chunks))
    with predictor.evaluating():
        predict = block_predictor(predictor) or predictor
        samples = sample_texts(predict, tokenizer, config.sampling.prompts, config, device=device, chat=chat)
    return [(sample.prompt, sample.text) for sample in samples]


def _as_diffusion(config: Config) -> Config:
    """Return the configuration of block diffusion that generates in the same way as the stage's model.

    An autoregressive model is block diffusion with blocks of one token and a shift: the pass that encodes a token predicts the next token,
    and its output for a mask is not used. Other models are not changed.
    """
    if not noise_process(config.diffusion).is_causal:
        return config
    diffusion = dataclasses.replace(config.diffusion, objective="diffusion", noise_schedule="linear", block_size=1, shift=True)
    sampling = dataclasses.replace(config.sampling, block_size=None, kernel="unmask", reviser=None)
    return dataclasses.replace(config, diffusion=diffusion, sampling=sampling)
