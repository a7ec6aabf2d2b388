"""The weight by context of Dream (arXiv 2508.15487): a masked token counts as much as visible tokens are near it.

Shapes: b = samples, l = sequence_length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.diffusion.corruption import NoisyBatch
from w1train.objectives.row_loss import RowLoss


def cart_weight(noisy: NoisyBatch, loss: RowLoss) -> Tensor:
    """Return the sum over the visible tokens j of the document of p (1 - p)^(|i - j| - 1) / 2 for the target i of each output, [b, l]."""
    config = loss.config
    documents = noisy.document_ids
    visible = (noisy.input_ids != config.mask_token_id) & (documents >= 0)
    # float64: a long document adds up thousands of terms, and every device has to get the same weights.
    before = _decayed_sums(visible.double(), documents, config.cart_probability)
    after = _decayed_sums(visible.double().flip(1), documents.flip(1), config.cart_probability).flip(1)
    weights = config.cart_probability / 2 * (before + after)
    return torch.cat([weights[:, 1:], weights[:, -1:]], dim=1) if config.shift else weights


def _decayed_sums(values: Tensor, documents: Tensor, probability: float) -> Tensor:
    """Return the sum over the earlier positions j of the same document of values_j (1 - p)^(i - j - 1), [b, l].

    It is the recurrence S_i = (1 - p) S_(i - 1) + values_(i - 1), computed in log2(l) passes that double the distance.
    """
    continues = documents == _moved(documents, 1, -1)
    factors, sums = (1 - probability) * continues, _moved(values, 1, 0) * continues
    distance = 1
    while distance < values.shape[1]:
        factors, sums = factors * _moved(factors, distance, 0), sums + factors * _moved(sums, distance, 0)
        distance *= 2
    return sums


def _moved(tensor: Tensor, distance: int, fill: int) -> Tensor:
    """Return for each position the value ``distance`` positions before it, [b, l]; the first positions get ``fill``."""
    return torch.cat([torch.full_like(tensor[:, :distance], fill), tensor[:, :-distance]], dim=1)
