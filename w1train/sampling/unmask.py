"""The kernel that unmasks: each step predicts a token for each open position, and keeps some of these tokens (LLaDA, arXiv 2502.09992,
algorithms 4 and 5). Tokens that are decided never change.

Shapes: b = rows of a batch, w = tokens of the block, n = open positions of the block in the row that has most, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from w1train.config.errors import Problem, show
from w1train.config.schema import DiffusionConfig
from w1train.config.schema_sampling import SamplingConfig
from w1train.diffusion.process import NoiseProcess
from w1train.sampling.kernel import Batch, Kernel
from w1train.sampling.orders import Candidates
from w1train.sampling.rules import ORDERS, count_of


class Unmask(Kernel):
    """The kernel of masked diffusion, whose order is sampling.remasking and whose count is num_steps or the threshold."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self._order, self._count = ORDERS[batch.config.remasking], count_of(batch.config)

    @classmethod
    def problems(cls, sampling: SamplingConfig, process: NoiseProcess, diffusion: DiffusionConfig, by_block: bool) -> Iterator[Problem]:
        if not starts_from_masks(process, diffusion):
            valid = f"ancestral or null: unmask begins with mask tokens, which {process.name} (diffusion.objective) does not put"
            yield Problem("sampling.kernel", show(sampling.kernel), valid, "sampling.kernel=ancestral")

    def plan(self, num_open: int, num_steps: int) -> list[int] | None:
        """Return how many tokens each step decides. There are never more steps than tokens."""
        return self._count.planned(num_open, min(num_open, num_steps))

    def first_tokens(self, num: int) -> Tensor:
        """Return mask tokens."""
        return torch.full((len(self.generators), num), self.batch.diffusion.mask_token_id, device=self.batch.device)

    def noised(self, is_open: Tensor, step: int | None) -> Tensor:
        """Return 1 at open positions, which are masks, and 0 elsewhere."""
        return is_open.double()

    def step(self, tokens: Tensor, is_open: Tensor, logits: Tensor, step: int | None) -> tuple[Tensor, Tensor]:
        """Decide some of the open positions; ``step`` is how many of each row, or None."""
        counts = is_open.sum(dim=1)
        # Open positions first, in order. A row with fewer of them than another is filled up with decided positions, which stay.
        places = is_open.logical_not().byte().sort(dim=1, stable=True).indices[:, : int(counts.max())]
        is_real = torch.arange(places.shape[1], device=tokens.device) < counts[:, None]
        candidates = self.batch.without_banned(logits.gather(1, places[:, :, None].expand(-1, -1, logits.shape[2])))  # [b, n, v]
        num_open = counts.tolist()
        predictions = self._choose(candidates, num_open)
        # Decided positions have LLaDA's confidence of -inf.
        order = self._order.scores(Candidates(candidates, predictions, num_open, self.generators)).masked_fill(~is_real, -torch.inf)
        kept = self._count.kept(order, step) & is_real
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
        if self.config.temperature == 0:
            return logits.argmax(dim=2)
        noise = torch.ones_like(logits)
        for row, (generator, count) in enumerate(zip(self.generators, num_open, strict=True)):
            noise[row, :count].exponential_(generator=generator)
        return noise.log_().mul_(-self.config.temperature).add_(logits).argmax(dim=2)


def starts_from_masks(process: NoiseProcess, diffusion: DiffusionConfig) -> bool:
    """Tell whether most of the noise at t = 1 is on the mask token."""
    end = torch.ones((), dtype=torch.float64)
    return bool(process.noise(end, torch.tensor(diffusion.mask_token_id)) > process.noising_probability(end) / 2)
