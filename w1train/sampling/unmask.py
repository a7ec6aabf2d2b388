"""The choice of one denoising step: a token for each open position, and which of these tokens stay.

Shapes: b = rows of a batch, w = tokens of the block, n = open positions of the block in the row that has most, v = vocabulary.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from w1train.config.schema import SamplingConfig
from w1train.sampling.orders import Candidates
from w1train.sampling.rules import ORDERS, count_of


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
        self._temperature, self._mask_token_id, self._vocab_size = config.temperature, mask_token_id, vocab_size
        self._order, self._count = ORDERS[config.remasking], count_of(config)
        self._generators = [_row_generator(config.seed, row, torch.device(device)) for row in rows]

    def select_rows(self, rows: list[int]) -> None:
        """Keep some of the rows; the others have ended."""
        self._generators = [self._generators[row] for row in rows]

    def step(self, tokens: Tensor, is_open: Tensor, logits: Tensor, num_planned: int | None) -> tuple[Tensor, Tensor]:
        """Take one step in a block.

        Args:
            tokens: int64 [b, w].
            is_open: bool [b, w], positions whose token is not decided yet.
            logits: [b, w, v].
            num_planned: how many tokens of each row the plan of the block says; None = the predictions decide.

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
        num_open = counts.tolist()
        predictions = self._choose(candidates, num_open)
        # Decided positions have LLaDA's confidence of -inf.
        order = self._order.scores(Candidates(candidates, predictions, num_open, self._generators)).masked_fill(~is_real, -torch.inf)
        kept = self._count.kept(order, num_planned) & is_real
        tokens = tokens.scatter(1, places, torch.where(kept, predictions, tokens.gather(1, places)))
        return tokens, is_open.scatter(1, places, is_real & ~kept)

    def _choose(self, logits: Tensor, num_open: list[int]) -> Tensor:
        """Return a token for each open position, int64 [b, n]: the argmax at temperature 0, otherwise a sample of
        softmax(logits / temperature) by the Gumbel-max trick.

        The sample is the argmax of logits - temperature * log(E) with exponential E. This has the order of logits / temperature + Gumbel
        noise, but is finite at any temperature. A row draws numbers for its own open positions alone, so that it does not depend on other
        rows.

        Args:
            logits: float64 [b, n, v].
            num_open: open positions of each row.
        """
        if self._temperature == 0:
            return logits.argmax(dim=2)
        noise = torch.ones_like(logits)
        for row, (generator, count) in enumerate(zip(self._generators, num_open, strict=True)):
            noise[row, :count].exponential_(generator=generator)
        return noise.log_().mul_(-self._temperature).add_(logits).argmax(dim=2)


def _row_generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    """Return the generator of a row. Its seed is a hash, because the CPU generator keeps 32 bits of it and seed + row would collide."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
