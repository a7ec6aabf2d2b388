"""The ancestral kernel: a step from t to s draws every token from the reverse kernel of the process (D3PM, arXiv 2107.03006, eq. 4; GIDD,
arXiv 2503.04482), with the model's prediction in the place of the text. It works for every process, and a token may change more than once.

The steps go from t = 1, where the tokens are drawn from the process's noise, to the text in equal steps of t. The last step draws each
token from its distribution given the canvas, so that neither masks nor other noise remain, also with a schedule whose noise at t = 0 is not
zero.

The prediction at temperature T is the full prediction, p(token | canvas), to the power of 1 / T. At temperature 0 it is the most probable
token. What a step draws then is still random, because the process decides when a token changes. (If the leave-one-out prediction were
sharpened, a token that the rest of the text allows, but does not make the most probable, would always be replaced in the last step. Papers
sample at temperature 1, where there is no difference.)

Shapes: b = rows of a batch, w = tokens of the block, n = positions of all rows together, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from w1train.config.errors import Problem, show
from w1train.config.schema import DiffusionConfig
from w1train.config.schema_sampling import SamplingConfig
from w1train.diffusion.prediction import evidence, full_from_leave_one_out, leave_one_out_from_full
from w1train.diffusion.process import NoiseProcess
from w1train.sampling.kernel import Kernel
from w1train.sampling.random_numbers import draw


@dataclass(frozen=True, slots=True)
class Interval:
    """A step of the kernel."""

    t: float
    s: float | None
    """The earlier timestep; None = the step ends with the text."""


class Ancestral(Kernel):
    """The reverse kernel of the process over equal steps of t."""

    @classmethod
    def problems(cls, sampling: SamplingConfig, process: NoiseProcess, diffusion: DiffusionConfig, by_block: bool) -> Iterator[Problem]:
        if sampling.threshold is not None:
            valid = "null, because this kernel decides by timesteps and not by confidence"
            yield Problem("sampling.threshold", show(sampling.threshold), valid, "sampling.threshold=null")
        if diffusion.prediction == "full" and diffusion.shift and by_block and process.bound == "kl_is":
            valid = (
                "leave_one_out: with diffusion.shift, the output for the first token of a block does not see this token, and the others do"
            )
            yield Problem("diffusion.prediction", "full with blocks and diffusion.shift", valid, "diffusion.shift=false")

    def plan(self, num_open: int, num_steps: int) -> list[Interval]:
        """Return equal steps of t from 1 to the text. There may be more steps than tokens."""
        grid = [1 - step / num_steps for step in range(num_steps)]
        return [Interval(t, s) for t, s in zip(grid, [*grid[1:], None], strict=True)]

    def first_tokens(self, num: int) -> Tensor:
        """Return tokens of the process's noise at t = 1."""
        diffusion = self.batch.diffusion
        ids = torch.arange(max(diffusion.num_noise_ids, diffusion.mask_token_id + 1))
        cumulative = self.process.noise(torch.ones((), dtype=torch.float64), ids).cumsum(dim=0)
        cumulative = (cumulative / cumulative[-1]).to(self.batch.device)
        numbers = [torch.rand(num, generator=each, device=self.batch.device, dtype=torch.float64) for each in self.generators]
        # An id without noise has the cumulative probability of the id before it, so no number finds it.
        return torch.searchsorted(cumulative, torch.stack(numbers), right=True)

    def noised(self, is_open: Tensor, step: Interval) -> Tensor:
        return is_open.double() * self.process.noising_probability(torch.tensor(step.t, dtype=torch.float64))

    def step(self, tokens: Tensor, is_open: Tensor, logits: Tensor, step: Interval) -> tuple[Tensor, Tensor]:
        # What noise cannot have put is a token of the text.
        t = torch.tensor(step.t, dtype=torch.float64, device=tokens.device)
        changes = is_open & (self.process.noise(t, tokens) > 0)
        probabilities = self.probabilities(tokens[changes], logits[changes], step)
        drawn = draw(probabilities, changes.sum(dim=1).tolist(), self.generators)
        still_open = is_open if step.s is not None else torch.zeros_like(is_open)
        return tokens.masked_scatter(changes, drawn), still_open

    def probabilities(self, ids: Tensor, logits: Tensor, step: Interval) -> Tensor:
        """Return the probabilities of the ids after a step, float64 [n, v].

        Args:
            ids: int64 [n], the tokens before the step.
            logits: [n, v], of the distribution of each token given all other tokens.
        """
        t = torch.full(ids.shape, step.t, dtype=torch.float64, device=ids.device)
        predictions = self._predictions(ids, logits, t)
        if step.s is not None:
            return self.process.reverse_probabilities(ids, predictions, t, torch.full_like(t, step.s))
        return full_from_leave_one_out(predictions.log(), ids, evidence(self.process, t, ids)).softmax(dim=1)

    def _predictions(self, ids: Tensor, logits: Tensor, t: Tensor) -> Tensor:
        """Return the leave-one-out probabilities at the temperature of sampling, float64 [n, v]."""
        logits, temperature = self.batch.without_banned(logits), self.config.temperature
        if temperature == 1:
            return logits.softmax(dim=1)
        observed = evidence(self.process, t, ids)
        full = full_from_leave_one_out(logits, ids, observed)
        if temperature == 0:
            return torch.nn.functional.one_hot(full.argmax(dim=1), full.shape[1]).double()
        return leave_one_out_from_full(full / temperature, ids, observed).softmax(dim=1)
