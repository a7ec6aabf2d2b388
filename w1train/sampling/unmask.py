"""One denoising step's choice: a token for each masked position, and which of them stay.

Shapes: b = rows of a batch, w = tokens of the block, n = masked tokens of the block (of the row that has most), v = vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from w1train.config.schema import SamplingConfig


class Unmasking:
    """The rule by which a batch's blocks are filled, with the noise of each of its rows."""

    def __init__(
        self, config: SamplingConfig, rows: list[int], *, mask_token_id: int, vocab_size: int | None, device: torch.device | str
    ) -> None:
        """rows: the place of each row's prompt, from which its noise follows; vocab_size: ids from here on are never chosen."""
        self._config, self._mask_token_id, self._vocab_size = config, mask_token_id, vocab_size
        self._generators = [_row_generator(config.seed, row, torch.device(device)) for row in rows]

    def select_rows(self, rows: list[int]) -> None:
        """Go on with some of the rows."""
        self._generators = [self._generators[row] for row in rows]

    def step(self, tokens: Tensor, logits: Tensor, num_unmasked: int | None) -> Tensor:
        """The block after one step.

        Args:
            tokens: int64 [b, w], mask tokens where nothing is decided yet.
            logits: [b, w, v].
            num_unmasked: how many each row unmasks; None = those that sampling.threshold lets through, at least one.

        Returns:
            int64 [b, w]; decided tokens are never changed.
        """
        is_mask = tokens == self._mask_token_id
        counts = is_mask.sum(dim=1)
        # Masked positions first, in order. A row with fewer than the others is filled up with decided positions, which stay.
        masked = is_mask.logical_not().byte().sort(dim=1, stable=True).indices[:, : int(counts.max())]
        is_real = torch.arange(masked.shape[1], device=tokens.device) < counts[:, None]
        # float64: float32 Gumbel noise visibly lowers the quality of samples (LLaDA's note), and float32 probabilities tie at 1.
        candidates = logits.gather(1, masked[:, :, None].expand(-1, -1, logits.shape[2])).double()  # [b, n, v]
        candidates[:, :, self._mask_token_id] = -torch.inf
        if self._vocab_size is not None:
            candidates[:, :, self._vocab_size :] = -torch.inf
        predictions = self._choose(candidates, counts)
        # Decided positions have LLaDA's confidence of -inf.
        order = self._keeping_order(candidates, predictions, counts).masked_fill(~is_real, -torch.inf)
        kept = above_threshold(order.exp(), self._threshold) if num_unmasked is None else highest(order, num_unmasked)
        return tokens.scatter(1, masked, torch.where(kept & is_real, predictions, tokens.gather(1, masked)))

    @property
    def _threshold(self) -> float:
        assert self._config.threshold is not None
        return self._config.threshold

    def _choose(self, logits: Tensor, counts: Tensor) -> Tensor:
        """Exact argmax at temperature 0, otherwise a sample of softmax(logits / temperature) by the Gumbel-max trick.

        Written as logits - temperature * log(E), E exponential: the same order as logits / temperature + Gumbel noise, but
        finite at any temperature. A row draws for its own masked positions alone, so that it does not depend on the others.

        float64 [b, n, v] and int64 [b] -> int64 [b, n].
        """
        if self._config.temperature == 0:
            return logits.argmax(dim=2)
        noise = torch.ones_like(logits)
        for row, (generator, count) in enumerate(zip(self._generators, counts.tolist(), strict=True)):
            noise[row, :count].exponential_(generator=generator)
        return noise.log_().mul_(-self._config.temperature).add_(logits).argmax(dim=2)

    def _keeping_order(self, logits: Tensor, predictions: Tensor, counts: Tensor) -> Tensor:
        """float64 [b, n], highest first: random, or the log-probability of the prediction (at temperature 1)."""
        if self._config.remasking == "low_confidence":
            return logits.gather(2, predictions[:, :, None])[:, :, 0] - logits.logsumexp(dim=2)
        scores = torch.zeros(predictions.shape, dtype=torch.float64, device=logits.device)
        for row, (generator, count) in enumerate(zip(self._generators, counts.tolist(), strict=True)):
            scores[row, :count] = torch.rand(count, generator=generator, device=logits.device, dtype=torch.float64)
        return scores


def transfer_counts(num_masked: int, num_steps: int) -> list[int]:
    """How many tokens each step unmasks: evenly, the remainder one by one to the first steps (LLaDA's generate)."""
    base, remainder = divmod(num_masked, num_steps)
    return [base + (step < remainder) for step in range(num_steps)]


def above_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """Confidence-threshold parallel decoding (Fast-dLLM, arXiv 2505.22618): all above the threshold, and always the highest.

    [b, n] -> bool [b, n].
    """
    return (confidence > threshold) | highest(confidence, 1)


def highest(order: Tensor, num: int) -> Tensor:
    """The ``num`` highest of each row, of equal ones the first: [b, n] -> bool [b, n]."""
    # A stable sort, because topk may break ties differently from one device or batch size to another.
    places = order.sort(dim=1, descending=True, stable=True).indices[:, :num]
    return torch.zeros(order.shape, dtype=torch.bool, device=order.device).scatter_(1, places, True)


def _row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """A generator for one row; hashed, because the CPU generator keeps 32 bits of its seed and seed + row would collide."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
