"""Text that the model writes while it is trained."""

from __future__ import annotations

import torch

from w1train.config.schema import Config
from w1train.engine.building import TrainedModel
from w1train.inference.predictor import Predictor, block_predictor
from w1train.sampling.text import TextTokenizer, sample_texts


def complete_prompts(config: Config, model: TrainedModel, tokenizer: TextTokenizer, device: torch.device) -> list[tuple[str, str]]:
    """Complete ``sampling.prompts``. The ranks of one model replica call this.

    Returns:
        (prompt, text) pairs.
    """
    predictor = Predictor(config, list(model.chunks))
    with predictor.evaluating():
        predict = block_predictor(predictor) or predictor
        samples = sample_texts(predict, tokenizer, config.sampling.prompts, config, device=device)
    return [(sample.prompt, sample.text) for sample in samples]
