"""Masked diffusion in which rare tokens are masked before frequent tokens (DiffusionBERT, arXiv 2211.15029, eq. 9: the spindle schedule).

Token v with the information H_v = -log(its share of the corpus) is masked at t with the probability

    t + lambda sin(pi t) (1 - mean of H / H_v), clipped to [0, 1].

The paper takes the mean over the tokens of a sentence, so that the noise of a token depends on the other tokens. Here it is the mean over
all ids that occur in the corpus (our choice), so that the process is one of independent tokens, whose bound is known.

Shapes: b = samples, l = sequence_length, n = positions, v = vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from w1train.config.errors import Problem, UserError, show
from w1train.config.schema import Config
from w1train.diffusion.masked import MaskedProcess
from w1train.diffusion.process import Bound
from w1train.diffusion.timesteps import word_thresholds

_SMALLEST_PROBABILITY = 1e-6
"""The rate of an id, the derivative of the log-probability to be masked, is finite with this floor. Only where masks of the id are much
rarer does the floor change the rate."""


@dataclass(frozen=True, slots=True)
class Spindle:
    """The spindle schedule. A call returns the rates of ids, -alpha'_v / (1 - alpha_v)."""

    scale: float
    """lambda."""

    def noising_probability(self, numbers: Tensor, timesteps: Tensor) -> Tensor:
        """Return the probability to be masked, float64 in the broadcast shape of both arguments. ``numbers``: 1 - mean of H / H_v."""
        return self._unclipped(numbers, timesteps).clamp(0, 1)

    def __call__(self, numbers: Tensor, timesteps: Tensor) -> Tensor:
        probability = self._unclipped(numbers, timesteps)
        slope = 1 + self.scale * math.pi * torch.cos(math.pi * timesteps) * numbers
        # An id that cannot be masked yet has no rate, although the unclipped probability has a slope.
        return torch.where(probability > 0, slope / probability.clamp_min(_SMALLEST_PROBABILITY), 0.0)

    def _unclipped(self, numbers: Tensor, timesteps: Tensor) -> Tensor:
        return timesteps + self.scale * torch.sin(math.pi * timesteps) * numbers


@dataclass(frozen=True, slots=True)
class PerIdMaskedProcess(MaskedProcess):
    """Masked diffusion with a spindle. alpha, the noising probability and the t of a sampler are those of a token of average information,
    which is masked with probability t."""

    spindle: Spindle = field(kw_only=True)
    token_counts: str | None = field(kw_only=True)
    """The file with the count of each id, which is read when the noise of an id is asked for. A program that only generates text can do
    without it."""
    name: ClassVar[str] = "masked diffusion by information"
    bound: ClassVar[Bound] = "per_id"
    schedules: ClassVar[tuple[str, ...]] = ("linear",)
    has_complements: ClassVar[bool] = False

    @property
    def table(self) -> Tensor:
        """1 - mean of H / H_v of every id, float64 [v].

        Raises:
            UserError: the file cannot be read, or is not such a file.
        """
        return relative_information(str(self.token_counts))

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(read_counts(str(self.token_counts)).tobytes()).hexdigest()

    def noised_tokens(self, tokens: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        return words < word_thresholds(self.spindle.noising_probability(self.table_on(tokens.device)[tokens], timesteps))

    def bound_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        times, numbers = timesteps.double(), self.table_on(targets.device)[targets]
        weight = self.spindle(numbers, times) / (1 - self.spindle.noising_probability(numbers, times))
        return torch.where(self.is_noised(inputs), weight, torch.zeros_like(weight))

    def reverse_probabilities(self, ids: Tensor, predictions: Tensor, timesteps: Tensor, earlier: Tensor) -> Tensor:
        """Return the probabilities of NoiseProcess.reverse_probabilities: a mask becomes v with the probability of v times 1 - (the
        probability that v is masked at s) / (that at t), and otherwise stays a mask. It becomes no id that cannot be masked at t."""
        table = self.table_on(ids.device)
        now, before = (self.spindle.noising_probability(table, times.double()[:, None]) for times in (timesteps, earlier))
        stay = torch.where(now > 0, before / now, 1.0).to(predictions.dtype)
        every_id = torch.arange(predictions.shape[1], device=ids.device)
        of_mask = torch.where(every_id == self.mask_token_id, (stay * predictions).sum(dim=1, keepdim=True), (1 - stay) * predictions)
        return torch.where(self.is_noised(ids)[:, None], of_mask, (ids[:, None] == every_id).to(predictions.dtype))

    def problems(self, config: Config) -> Iterator[Problem]:
        yield from self._count_problems(config.model.vocab_size)
        if self.spindle.scale * math.pi > 1:
            valid = "at most 0.318 (1 / pi), or noise on rare tokens would be taken back near t = 1"
            yield Problem("diffusion.spindle_scale", show(self.spindle.scale), valid, "diffusion.spindle_scale=0.3 (DiffusionBERT)")

    def _count_problems(self, vocab_size: int) -> Iterator[Problem]:
        valid = f"a file of `w1train data count-tokens` with counts of model.vocab_size ({vocab_size}) ids"
        if self.token_counts is None:
            yield Problem("diffusion.token_counts", "null", valid)
            return
        if not Path(self.token_counts).exists():
            return  # w1train.preflight reports it where the run is to start, as for all of its files
        try:
            num_ids = len(self.table)
        except UserError as error:
            yield Problem("diffusion.token_counts", show(self.token_counts), f"{valid}: {error}")
            return
        if num_ids != vocab_size:
            found = f"{self.token_counts}, with counts of {num_ids} ids"
            yield Problem("diffusion.token_counts", found, valid, f"the option --vocab-size {vocab_size} of that command")

    def table_on(self, device: torch.device) -> Tensor:
        """Return the table on a device."""
        return _table_on(self.table, device)


@lru_cache(maxsize=8)
def _table_on(table: Tensor, device: torch.device) -> Tensor:
    """Return a copy on the device, which is made once: a copy in every step would wait for the device."""
    return table.to(device)


@lru_cache(maxsize=8)
def relative_information(path: str) -> Tensor:
    """Return 1 - mean of H / H_v of every id, float64 [v]. An id that does not occur gets the limit 1.

    Args:
        path: a file of `w1train data count-tokens`, with the count of each id.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    counts = torch.from_numpy(read_counts(path)).double()
    information = -torch.log(counts / counts.sum())
    return 1 - information[counts > 0].mean() / information


@lru_cache(maxsize=8)
def read_counts(path: str) -> np.ndarray:
    """Return the count of each id, int64 [v]. A file is read once: the fingerprint in a checkpoint is that of the counts in use, although
    the file may have changed since.

    Raises:
        UserError: the file cannot be read, or is not such a file.
    """
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}. `w1train data count-tokens` writes files of token counts") from error
    valid = isinstance(counts, np.ndarray) and counts.ndim == 1 and np.issubdtype(counts.dtype, np.integer)
    if not valid or (counts < 0).any() or (counts > 0).sum() < 2:
        raise UserError(f"{path} has no counts of at least two ids. `w1train data count-tokens` writes files of token counts")
    return counts.astype(np.int64)
