"""The registration of the kernels, and the choice of the kernel of a model."""

from __future__ import annotations

from collections.abc import Iterator

from w1train.config.errors import Problem
from w1train.config.schema import DiffusionConfig
from w1train.config.schema_sampling import SamplingConfig
from w1train.diffusion.processes import noise_process
from w1train.sampling.ancestral import Ancestral
from w1train.sampling.gidd_posterior import GiddPosterior
from w1train.sampling.kernel import Kernel
from w1train.sampling.unmask import Unmask

KERNELS: dict[str, type[Kernel]] = {"unmask": Unmask, "ancestral": Ancestral, "gidd_posterior": GiddPosterior}
"""The kernel of each value of sampling.kernel."""


def kernel_name(sampling: SamplingConfig, diffusion: DiffusionConfig) -> str:
    """Return sampling.kernel, or the kernel for the process of the model if it is null: ancestral where noise puts other tokens than
    masks, which unmask would never correct, and otherwise unmask."""
    return sampling.kernel or ("ancestral" if noise_process(diffusion).bound == "kl_is" else "unmask")


def kernel_problems(sampling: SamplingConfig, diffusion: DiffusionConfig, by_block: bool) -> Iterator[Problem]:
    """Yield why the kernel, which is registered, cannot sample from a model of this process.

    Args:
        by_block: True for a model of block diffusion.
    """
    return KERNELS[kernel_name(sampling, diffusion)].problems(sampling, noise_process(diffusion), diffusion, by_block)
