"""GIDD's sampler (arXiv 2503.04482, and the code of its authors): the ancestral kernel on a grid that leaves out both ends of the process.

The grid has the num_steps + 1 equidistant timesteps from sampling.gidd_epsilon to 1 - sampling.gidd_epsilon. The model reads the canvas at
all of them but the last, from the largest down. GIDD's last step goes from the smallest timestep to itself, and so changes nothing; here it
draws the text, so that no mask remains.

W1 publishes the names of three options of its own GIDD sampler (gidd_eps, gidd_min_p, posterior_temperature), but neither values nor code.
What they do here follows GIDD's code for the first two. The temperature of the reverse kernel is this project's reading of the third name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from w1train.sampling.ancestral import Ancestral, Interval


class GiddPosterior(Ancestral):
    """The ancestral kernel on GIDD's grid, with options for the probabilities of each step."""

    def plan(self, num_open: int, num_steps: int) -> list[Interval]:
        """Return the steps of GIDD's grid, the last of which ends with the text."""
        epsilon = self.config.gidd_epsilon
        grid = [epsilon + (1 - 2 * epsilon) * step / num_steps for step in reversed(range(num_steps))]
        return [Interval(t, s) for t, s in zip(grid, [*grid[1:], None], strict=True)]

    def probabilities(self, ids: Tensor, logits: Tensor, step: Interval) -> Tensor:
        """Return the probabilities of Ancestral.probabilities to the power of 1 / sampling.posterior_temperature, and 0 where they are then
        below sampling.gidd_min_p. The largest stays."""
        probabilities = super().probabilities(ids, logits, step)
        if self.config.posterior_temperature != 1:
            probabilities = (probabilities.log() / self.config.posterior_temperature).softmax(dim=1)
        # The largest is compared with itself, so that at least one id is left.
        least = probabilities.amax(dim=1, keepdim=True).clamp_max(self.config.gidd_min_p)
        kept = torch.where(probabilities >= least, probabilities, 0)
        return kept / kept.sum(dim=1, keepdim=True)
