"""The tokens of a mixture of experts, as far as the router knows them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from w1train.model.experts.block_pools import RoutingBlocks
from w1train.model.experts.router_losses import RouterLosses


class TokenKind(IntEnum):
    """The kind of a token, by which loads of experts are counted."""

    PADDING = 0
    """The token belongs to no document. No count and no loss has it."""
    CLEAN = 1
    """A token of the clean stream of block diffusion."""
    NOISY = 2
    """A token of the noisy stream that is not the mask token."""
    MASKED = 3
    """The mask token."""


def first_counted_kind(streams: Literal["both", "noisy"]) -> TokenKind:
    """Return the first kind whose tokens count for the balance of experts; all later kinds count too (balance.streams)."""
    return TokenKind.CLEAN if streams == "both" else TokenKind.NOISY


@dataclass(slots=True)
class RoutedTokens:
    """The tokens of this rank, in the order of the hidden states [s, b, h]."""

    kinds: Tensor | None
    """uint8 [s, b]: a TokenKind; None = tokens are not counted."""
    losses: RouterLosses | None = None
    """The losses that the router adds; None = it adds no loss."""
    blocks: RoutingBlocks | None = None
    """The blocks that share pools of experts; None without model.experts.pool_per_block."""


def token_kinds(input_ids: Tensor, document_ids: Tensor, mask_token_id: int | None, *, has_clean_stream: bool) -> Tensor:
    """Return the kind of each token, uint8 [b, p * l], first those of the noisy stream.

    Args:
        input_ids: int64 [b, l], the tokens of the noisy stream.
        document_ids: int [b, l], -1 on padding.
    """
    kinds = torch.full_like(input_ids, TokenKind.NOISY, dtype=torch.uint8)
    if mask_token_id is not None:
        kinds[input_ids == mask_token_id] = TokenKind.MASKED
    if has_clean_stream:
        kinds, document_ids = torch.cat([kinds, torch.full_like(kinds, TokenKind.CLEAN)], 1), torch.cat([document_ids, document_ids], 1)
    return kinds.masked_fill(document_ids < 0, TokenKind.PADDING)
