"""The choice of one denoising step: a token for each open position, and which of these tokens stay.

Shapes: b = rows of a batch, w = tokens of the block, n = open positions of the block in the row that has most, v = vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from w1train.config.schema import SamplingConfig


class Unmasking:
    """The rule by which the blocks of a batch are filled, with the random numbers of each row."""

    def __init__(
        self, config: SamplingConfig, rows: list[int], *, mask_token_id: int, vocab_size: int | None, device: torch.device | str
    ) -> None:
        """
        Args:
            rows: the place of each row's prompt, which seeds its random numbers.
            vocab_size: ids from this number on are never chosen; None = every id except the mask token may be chosen.
        """
        self._config, self._mask_token_id, self._vocab_size = config, mask_token_id, vocab_size
        self._generators = [_row_generator(config.seed, row, torch.device(device)) for row in rows]

    def select_rows(self, rows: list[int]) -> None:
        """Keep some of the rows; the others have ended."""
        self._generators = [self._generators[row] for row in rows]

    def step(self, tokens: Tensor, is_open: Tensor, logits: Tensor, num_unmasked: int | None) -> tuple[Tensor, Tensor]:
        """Take one step in a block.

        Args:
            tokens: int64 [b, w].
            is_open: bool [b, w], positions whose token is not decided yet.
            logits: [b, w, v].
            num_unmasked: how many tokens of each row are decided; None = all tokens above sampling.threshold, and at least one token.

        Returns:
            ``tokens`` and ``is_open`` after the step. Decided tokens are never changed.
        """
        counts = is_open.sum(dim=1)
        # Open positions first, in order. A row with fewer of them than another is filled up with decided positions, which stay.
        places = is_open.logical_not().byte().sort(dim=1, stable=True).indices[:, : int(counts.max())]
        is_real = torch.arange(places.shape[1], device=tokens.device) < counts[:, None]
        # In float64, because float32 Gumbel noise visibly lowers the quality of samples (arXiv 2409.02908), and several float32
        # probabilities may be equal to 1.
        candidates = logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[2])).double()  # [b, n, v]
        candidates[:, :, self._mask_token_id] = -torch.inf
        if self._vocab_size is not None:
            candidates[:, :, self._vocab_size :] = -torch.inf
        predictions = self._choose(candidates, counts)
        # Decided positions have LLaDA's confidence of -inf.
        order = self._keeping_order(candidates, predictions, counts).masked_fill(~is_real, -torch.inf)
        kept = above_threshold(order.exp(), self._threshold) if num_unmasked is None else highest(order, num_unmasked)
        kept &= is_real
        tokens = tokens.scatter(1, places, torch.where(kept, predictions, tokens.gather(1, places)))
        return tokens, is_open.scatter(1, places, is_real & ~kept)

    @property
    def _threshold(self) -> float:
        assert self._config.threshold is not None
        return self._config.threshold

    def _choose(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Return a token for each open position, int64 [b, n]: the argmax at temperature 0, otherwise a sample of
        softmax(logits / temperature) by the Gumbel-max trick.

        The sample is the argmax of logits - temperature * log(E) with exponential E. This has the order of logits / temperature + Gumbel
        noise, but is finite at any temperature. A row draws numbers for its own open positions alone, so that it does not depend on other
        rows.

        Args:
            logits: float64 [b, n, v].
            counts: int64 [b], open positions of each row.
        """
        if self._config.temperature == 0:
            return logits.argmax(dim=2)
        noise = torch.ones_like(logits)
        for row, (generator, count) in enumerate(zip(self._generators, counts.tolist(), strict=True)):
            noise[row, :count].exponential_(generator=generator)
        return noise.log_().mul_(-self._config.temperature).add_(logits).argmax(dim=2)

    def _keeping_order(self, logits: Tensor, predictions: Tensor, counts: Tensor) -> Tensor:
        """Return a score by which predictions are kept, highest first, float64 [b, n]: a random number, or the log-probability of the
        prediction (at temperature 1)."""
        if self._config.remasking == "low_confidence":
            return logits.gather(2, predictions[:, :, None])[:, :, 0] - logits.logsumexp(dim=2)
        scores = torch.zeros(predictions.shape, dtype=torch.float64, device=logits.device)
        for row, (generator, count) in enumerate(zip(self._generators, counts.tolist(), strict=True)):
            scores[row, :count] = torch.rand(count, generator=generator, device=logits.device, dtype=torch.float64)
        return scores


def transfer_counts(num_masked: int, num_steps: int) -> list[int]:
    """Return how many tokens each step decides: equally many, and one more in the first steps for the remainder (LLaDA's generate)."""
    base, remainder = divmod(num_masked, num_steps)
    return [base + (step < remainder) for step in range(num_steps)]


def above_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """Return which confidences [b, n] are above the threshold, bool [b, n]; the highest of a row always counts (Fast-dLLM, arXiv
    2505.22618)."""
    return (confidence > threshold) | highest(confidence, 1)


def highest(order: Tensor, num: int) -> Tensor:
    """Return True for the ``num`` highest numbers of each row of [b, n], bool [b, n]. Of equal numbers, the first are chosen."""
    # The sort is stable, because topk may order equal numbers differently on another device or in another batch size.
    places = order.sort(dim=1, descending=True, stable=True).indices[:, :num]
    return torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, places, True)


def _row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """Return the generator of a row. Its seed is a hash, because the CPU generator keeps 32 bits of it and seed + row would collide."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
