"""The conditional likelihood of a completion r of L tokens after a prompt p, by LLaDA's exact-count estimator (arXiv 2502.09992, eq. 6):

    -log p(r | p) <= E over l ~ U{1..L}, S of l of the L places [ L / l * sum over i in S of -log p(r_i | p, r outside S) ]

Exactly l tokens of the completion are masked, drawn without replacement. This has much less variance than masking each token with
probability t. Three things lower the variance further and do not change the expectation. The counts l of a completion's draws are
stratified (one random offset, equal steps). Draws of the same l hide (or, beyond L / 2, show) consecutive pieces of one random order of the
tokens, so that no token is in two of these pieces. And if there are at most as many masks, 2^L - 1, as draws, each mask is taken once,
with its probability: a single token costs one forward pass, and short answers are exact.

The noise is a function of the tokens, and depends neither on the order of the texts, nor on batches, nor on the device.

The t given to the model has as its noising probability the share of masked tokens in the whole sequence; w1train/sampling/denoise.py has
the reason.

Shapes: b = rows of one batch, s = tokens of prompt and completion, L = tokens of the completion, n = masks of a completion,
v = vocabulary, m = masked tokens of a batch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import batched

import torch
from torch import Tensor

from w1train.config.errors import UserError
from w1train.diffusion.philox import Purpose, random_words
from w1train.evaluation.draws import DEFAULT_DRAWS, MAX_DRAWS
from w1train.model.row_terms import CrossEntropy, value_of
from w1train.sampling.model_passes import Predict, TimestepAt

_MAX_LOGITS = 1 << 28
"""Logits of one batch: 1 GiB of them in float32."""
_TWO_32 = 1 << 32
# The noise is the same for runs of every seed, so that runs can be compared.
_SEED = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt (which may be empty) and its completion, token ids without mask tokens."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.completion


@torch.no_grad()
def log_likelihoods(
    predict: Predict,
    pairs: Sequence[Pair],
    *,
    mask_token_id: int,
    vocab_size: int,
    num_draws: int = DEFAULT_DRAWS,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    timestep_at: TimestepAt | None = None,
) -> list[float]:
    """Return estimates of log p(completion | prompt) in nats, in the order of the pairs. Their expectation is a lower bound.

    Args:
        predict: the model, as the sampler calls it.
        vocab_size: number of logits of a token. It limits the rows of a batch, as ``batch_size`` does.
        num_draws: masks of a completion; a short completion has fewer masks.
        timestep_at: of the model's noise process; None = t is the noising probability, as in linear masked diffusion.

    Raises:
        UserError: a completion is empty, or a pair has mask tokens.
    """
    _check(pairs, mask_token_id, num_draws)
    totals = torch.zeros(len(pairs), dtype=torch.float64)
    lengths = sorted({len(pair.tokens) for pair in pairs})
    for length in lengths:
        places = [place for place, pair in enumerate(pairs) if len(pair.tokens) == length]
        num_rows = max(1, min(batch_size, _MAX_LOGITS // (length * vocab_size)))
        for rows in batched(_rows(pairs, places, num_draws), num_rows):
            owners = torch.tensor([row.place for row in rows])
            tokens = torch.tensor([pairs[row.place].tokens for row in rows])  # [b, s]
            masked = torch.stack([row.masked for row in rows])  # [b, s]
            shares = masked.sum(dim=1, dtype=torch.float32) / length
            timesteps = shares if timestep_at is None else timestep_at(shares)
            logits = predict(tokens.masked_fill(masked, mask_token_id).to(device), timesteps.to(device))
            cross_entropy = _cross_entropy(logits, tokens.to(device), masked.to(device)).double().cpu()  # [m]
            weights = torch.tensor([row.weight for row in rows], dtype=torch.float64)
            owner = masked.nonzero()[:, 0]
            totals.index_add_(0, owners[owner], -weights[owner] * cross_entropy)
    return totals.tolist()


@dataclass(frozen=True, slots=True)
class _Row:
    place: int
    """Index of the pair."""
    masked: Tensor
    """bool [s]: masked tokens."""
    weight: float


def _rows(pairs: Sequence[Pair], places: Sequence[int], num_draws: int) -> Iterator[_Row]:
    for place in places:
        pair = pairs[place]
        masks, weights = completion_masks(pair, num_draws)
        masks = torch.nn.functional.pad(masks, (len(pair.prompt), 0))
        yield from (_Row(place, masked, weight) for masked, weight in zip(masks, weights.tolist(), strict=True))


def completion_masks(pair: Pair, num_draws: int) -> tuple[Tensor, Tensor]:
    """Return which tokens of the completion each mask hides, bool [n, L], and the weight of its sum of cross-entropies, float64 [n]."""
    length = len(pair.completion)
    # The first condition avoids 1 << length, a number of L bits.
    if length <= num_draws.bit_length() and (1 << length) - 1 <= num_draws:
        return _all_masks(length)
    return _drawn_masks(pair, num_draws)


def _all_masks(length: int) -> tuple[Tensor, Tensor]:
    """Return every mask, with its probability 1 / (L * (L over l)) times L / l as its weight."""
    codes = torch.arange(1, 1 << length)
    masks = (codes[:, None] >> torch.arange(length)) & 1 == 1
    weights = [1 / (count * math.comb(length, count)) for count in masks.sum(dim=1).tolist()]
    return masks, torch.tensor(weights, dtype=torch.float64)


def _drawn_masks(pair: Pair, num_draws: int) -> tuple[Tensor, Tensor]:
    length = len(pair.completion)
    index = torch.tensor([_index(pair)])
    offset = random_words(_SEED, index, draw=0, purpose=Purpose.LIKELIHOOD, num=1).item()
    # l = 1 + floor(u L) with u = (draw + offset) / draws, in integers. Each u is uniform, and all of them are evenly spaced.
    counts = torch.tensor([1 + (draw * _TWO_32 + int(offset)) * length // (num_draws * _TWO_32) for draw in range(num_draws)])
    words = random_words(_SEED, index, draw=1, purpose=Purpose.LIKELIHOOD, num=num_draws * length).reshape(num_draws, length)
    ranks = words.argsort(dim=1, stable=True).argsort(dim=1)
    # Counts ascend, so draws of one count are neighbours. The draws of one count share the random order of the first of them, as many as
    # the order has whole pieces.
    size = torch.minimum(counts, length - counts)
    draw = torch.arange(num_draws)
    piece = (draw - torch.searchsorted(counts, counts)) % (length // size.clamp_min(1))
    start = (piece * size)[:, None]
    ranks = ranks[draw - piece]
    chosen = (ranks >= start) & (ranks < start + size[:, None])
    return chosen ^ (counts > size)[:, None], length / (num_draws * counts.double())


def _index(pair: Pair) -> int:
    """Return a 64-bit hash of the tokens."""
    text = f"{pair.prompt}{pair.completion}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def _cross_entropy(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """Return the cross-entropies of masked tokens, float32 [m], from logits [b, s, v], tokens [b, s] and masked, bool [b, s]."""
    return value_of(CrossEntropy(tokens[masked]), logits[masked].float())


def _check(pairs: Sequence[Pair], mask_token_id: int, num_draws: int) -> None:
    if not 1 <= num_draws <= MAX_DRAWS:
        raise UserError(f"the number of draws is {num_draws}; it must be between 1 and {MAX_DRAWS}")
    for place, pair in enumerate(pairs):
        if not pair.completion:
            raise UserError(f"completion {place} has no tokens; there is nothing to score")
        if mask_token_id in pair.tokens:
            raise UserError(f"text {place} has the mask token ({mask_token_id}); prompt and completion must be clean tokens")
