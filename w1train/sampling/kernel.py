"""The interface of a kernel: the rule by which a step of sampling goes from one canvas to the next.

A kernel says which tokens the canvas begins with, how many steps a block takes, at which t the model reads the canvas, and what a step
changes. It knows neither the model nor the order of blocks (w1train/sampling/denoise.py).

Shapes: b = rows of a batch, n = generated tokens, w = tokens of the block, v = vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import DiffusionConfig
from w1train.config.schema_sampling import SamplingConfig
from w1train.diffusion.process import NoiseProcess
from w1train.diffusion.processes import noise_process
from w1train.sampling.random_numbers import row_generators


@dataclass(frozen=True, slots=True)
class Batch:
    """The settings and the rows of one batch, for which a kernel or a reviser is made."""

    config: SamplingConfig
    diffusion: DiffusionConfig
    rows: list[int]
    """The place of each row's prompt, which seeds its random numbers."""
    vocab_size: int | None
    """Ids from this number on are never chosen; None = every id but the mask token may be chosen."""
    device: torch.device | str
    noise_rates: Tensor | None = None
    """float32 [v]: the rates of noise that the model has learned; None if it learns none."""

    def without_banned(self, logits: Tensor) -> Tensor:
        """Return logits [..., v] in float64, with -inf at the mask token and at ids that are never chosen. In float64, because several
        float32 probabilities may be equal to 1."""
        logits = logits.to(torch.float64, copy=True)
        logits[..., self.diffusion.mask_token_id] = -torch.inf
        if self.vocab_size is not None:
            logits[..., self.vocab_size :] = -torch.inf
        return logits


class Kernel(ABC):
    """The kernel of one batch, with the random numbers of each row."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.config = batch, batch.config
        self.process = noise_process(batch.diffusion, batch.noise_rates)
        self.generators = row_generators(batch.config.seed, batch.rows, batch.device)

    @classmethod
    def problems(cls, sampling: SamplingConfig, process: NoiseProcess, diffusion: DiffusionConfig, by_block: bool) -> Iterator[Problem]:
        """Yield what this kernel cannot serve, with the keys to change."""
        yield from ()

    @abstractmethod
    def plan(self, num_open: int, num_steps: int) -> Sequence[Any] | None:
        """Return the steps of a block, each as ``noised`` and ``step`` take it; None = the predictions decide how many steps there are, and
        these methods get None.

        Args:
            num_open: generated tokens of the block.
            num_steps: the block's share of sampling.num_steps.
        """

    @abstractmethod
    def first_tokens(self, num: int) -> Tensor:
        """Return the generated tokens before the first step, int64 [b, n]."""

    @abstractmethod
    def noised(self, is_open: Tensor, step: Any) -> Tensor:
        """Return the probability that each token of the block is noise before a step, float64 [b, w]. The model gets the t at which
        training noises as many tokens. ``is_open`` is as in ``step``."""

    @abstractmethod
    def step(self, tokens: Tensor, is_open: Tensor, logits: Tensor, step: Any) -> tuple[Tensor, Tensor]:
        """Take one step in a block.

        Args:
            tokens: int64 [b, w].
            is_open: bool [b, w], positions whose token is not decided yet. After the last step of a block no position is open.
            logits: [b, w, v], of the distribution of each token given all other tokens.
            step: an entry of the plan of the block, or None.

        Returns:
            ``tokens`` and ``is_open`` after the step. Only open positions change.
        """

    def select_rows(self, rows: list[int]) -> None:
        """Keep some of the rows; the others have ended."""
        self.generators = [self.generators[row] for row in rows]
