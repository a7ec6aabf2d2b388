"""Conditional modes: the revision of a text by the most probable tokens, given the whole text and the noise of the process.

In each step the text z counts as a text after noise at a small t (sampling.correction_timestep), which has put other tokens in the place of
a few tokens. By Bayes' rule the token at a position has, given all of z, the distribution

    p(x_i | z) = softmax(logits of the prediction without z_i + log(1 + alpha_t / c_t(z_i)) at the token z_i)

(w1train/diffusion/prediction.py): the token that stands there has evidence for itself, because noise is rare. Those tokens change whose
replacement by the most probable token gains most, p(most probable token) - p(present token). If the distribution is right, the gain is the
number of tokens that the change makes right in the mean. A text is finished when no change gains anything. A change makes the text at least
1 + alpha / c times as probable, so with a consistent model no text returns.

Changing variables one after another to their most probable values, given the others, is known as iterated conditional modes (J. Besag, On
the statistical analysis of dirty pictures, 1986). GIDD's follow-up (arXiv 2512.10858) ranks the tokens of its sampler by a similar gain.
The use of the evidence to revise a finished text is ours.

Shapes: b = rows of a batch, w = tokens of the part of the text that is revised, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from w1train.diffusion.prediction import evidence, full_from_leave_one_out
from w1train.diffusion.processes import noise_process
from w1train.sampling.counts import highest
from w1train.sampling.kernel import Batch
from w1train.sampling.revision import PredictPart, Revision, warn_of_masked_noise


class ConditionalModes:
    """The reviser of one batch. It draws no random numbers."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._config = batch, batch.config
        self._process = noise_process(batch.diffusion)
        warn_of_masked_noise(self._process)

    def select_rows(self, _rows: list[int]) -> None:
        """Keep some of the rows, which have no state here."""

    def revise(self, tokens: Tensor, may_change: Tensor, predict: PredictPart) -> Iterator[Revision]:
        """Revise a part of a text.

        Args:
            tokens: int64 [b, w].
            may_change: bool [b, w].
        """
        timesteps = torch.full((len(tokens),), self._config.correction_timestep, device=tokens.device)
        runs = may_change.any(dim=1)
        for _ in range(self._config.correction_steps):
            if not runs.any():
                return
            probabilities = self._posterior(tokens, predict(tokens, timesteps), timesteps)
            corrected = self._step(tokens, probabilities, may_change & runs[:, None])
            needed, runs = runs, (corrected != tokens).any(dim=1)
            tokens = corrected
            yield Revision(tokens, needed, self._config.correction_timestep)

    def _posterior(self, tokens: Tensor, logits: Tensor, timesteps: Tensor) -> Tensor:
        """Return the probabilities of the token of each position given the whole text, float64 [b, w, v]."""
        observed = evidence(self._process, timesteps[:, None], tokens)
        allowed = self._batch.without_banned(logits).flatten(0, 1)
        return full_from_leave_one_out(allowed, tokens.flatten(), observed.flatten()).softmax(dim=1).unflatten(0, tokens.shape)

    def _step(self, tokens: Tensor, probabilities: Tensor, may_change: Tensor) -> Tensor:
        """Return the tokens after one step, int64 [b, w]."""
        modes = probabilities.max(dim=2)
        gains = (modes.values - probabilities.gather(2, tokens[:, :, None])[:, :, 0]).masked_fill(~may_change, 0)
        replaced = highest(gains, self._config.correction_tokens) & (gains > 0)
        return torch.where(replaced, modes.indices, tokens)
