"""GIDD's self-correction (arXiv 2503.04482, and the code of its authors): a finished text is changed token by token to what the model finds
more probable, until it does not change any more.

In each step the model reads the text at a small t. A token is drawn for each position from the model's prediction at a low temperature. Of
the positions whose drawn token differs from the token of the text, those whose drawn token is most probable take it. The steps of a row end
if no drawn token differs, or if the share of tokens that are the model's most probable tokens has not grown for a number of steps. A model
corrects only what it has learned from noise: it must have been trained on texts in which noise puts other tokens in the place of tokens.

The rule does not ask how probable the present token is. It moves a text towards what the model finds most probable, and replaces right
tokens too: even with the exact distribution of the data. w1train/sampling/conditional_modes.py is for texts that are to keep what is right.

Shapes: b = rows of a batch, w = tokens of the part of the text that is revised, v = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from w1train.diffusion.processes import noise_process
from w1train.sampling.counts import highest
from w1train.sampling.kernel import Batch
from w1train.sampling.random_numbers import draw, row_generators
from w1train.sampling.revision import PredictPart, Revision, warn_of_masked_noise


class SelfCorrection:
    """The reviser of one batch, with the random numbers of each row."""

    def __init__(self, batch: Batch) -> None:
        self._batch, self._config = batch, batch.config
        self._generators = row_generators(batch.config.seed, batch.rows, batch.device, ":self_correction")
        warn_of_masked_noise(noise_process(batch.diffusion))

    def select_rows(self, rows: list[int]) -> None:
        """Keep some of the rows; the others have ended."""
        self._generators = [self._generators[row] for row in rows]

    def revise(self, tokens: Tensor, may_change: Tensor, predict: PredictPart) -> Iterator[Revision]:
        """Revise a part of a text.

        Args:
            tokens: int64 [b, w].
            may_change: bool [b, w].
        """
        timesteps = torch.full((len(tokens),), self._config.correction_timestep, device=tokens.device)
        runs = may_change.any(dim=1)
        most_agreeing = torch.full((len(tokens),), -1, device=tokens.device)
        num_without_gain = torch.zeros_like(most_agreeing)
        for _ in range(self._config.correction_steps):
            if not runs.any():
                return
            logits = self._batch.without_banned(predict(tokens, timesteps))
            agreeing = ((logits.argmax(dim=2) == tokens) & may_change).sum(dim=1)
            corrected = self._step(tokens, logits, may_change & runs[:, None])
            has_changed = (corrected != tokens).any(dim=1)
            num_without_gain = torch.where(agreeing > most_agreeing, 0, num_without_gain + 1)
            most_agreeing = torch.maximum(agreeing, most_agreeing)
            tokens, needed = corrected, runs
            runs = runs & has_changed & (num_without_gain < self._config.correction_patience)
            yield Revision(tokens, needed, self._config.correction_timestep)

    def _step(self, tokens: Tensor, logits: Tensor, may_change: Tensor) -> Tensor:
        """Return the tokens after one step, int64 [b, w].

        Args:
            logits: float64 [b, w, v].
        """
        probabilities = (logits[may_change] / self._config.correction_temperature).softmax(dim=1)
        drawn = draw(probabilities, may_change.sum(dim=1).tolist(), self._generators)
        candidates = tokens.masked_scatter(may_change, drawn)
        chances = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        chances = chances.masked_scatter(may_change, probabilities.gather(1, drawn[:, None])[:, 0])
        scores = chances * (candidates != tokens)
        replaced = highest(scores, self._config.correction_tokens) & (scores > 0)
        return torch.where(replaced, candidates, tokens)
