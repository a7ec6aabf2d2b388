"""The bound of a process in continuous time, for noise that puts ordinary tokens in the places of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from w1train.config.errors import Problem
from w1train.config.schema import Config
from w1train.diffusion.prediction import evidence
from w1train.diffusion.process import NoiseProcess
from w1train.model.row_terms import KlIs, RowTerm
from w1train.objectives.loss_rows import LossRows
from w1train.objectives.row_loss import RowLoss, timesteps_and_inputs


class KlIsLoss(RowLoss):
    """KL(q_t(. | x) || q_t(. | prediction)) + rho - log rho - 1 with rho = q_t(z | x) / q_t(z | prediction) (GIDD, arXiv 2503.04482, eq.
    9). UDLM (arXiv 2412.10193) and Duo (arXiv 2506.10892) train the same number under uniform noise."""

    def row_terms(self, rows: LossRows) -> dict[str, RowTerm]:
        timesteps, inputs = timesteps_and_inputs(rows)
        return {
            "kl_is": KlIs(
                targets=rows.targets,
                inputs=inputs,
                alpha=self.process.alpha(timesteps),
                word_noise=self.process.word_noise(timesteps),
                input_noise=self.process.noise(timesteps, inputs),
                observed=evidence(self.process, timesteps, inputs) if self.config.prediction == "full" else None,
            )
        }

    def value(self, values: Mapping[str, Tensor], rows: LossRows) -> Tensor:
        return rows.of_noisy_stream(values["kl_is"])

    def elbo_weight(self, timesteps: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.process.bound_weight(timesteps, inputs, targets)

    @classmethod
    def problems(cls, config: Config, process: NoiseProcess) -> Iterator[Problem]:
        if process.bound != "kl_is":
            valid = f"{process.bound}, which is the bound of {process.name}"
            yield Problem("diffusion.loss", config.diffusion.loss, valid, f"diffusion.loss={process.bound}")
        elif config.diffusion.num_timesteps > 0:
            valid = "finite_kl, because diffusion.num_timesteps is not 0: kl_is is the bound in continuous time"
            yield Problem("diffusion.loss", "kl_is", valid, "diffusion.loss=finite_kl, or diffusion.num_timesteps=0")
