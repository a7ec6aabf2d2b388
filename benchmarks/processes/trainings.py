"""The trainings that `make processes` compares: what each trains with, and the result that was published for text8."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from w1train.config.compose import load_config

FAMILIES = ("autoregression", "masked noise", "hybrid noise", "uniform noise")
"""The families of processes in the published order of their bits per character, the best first."""
NUM_EPOCHS = 30
"""Epochs of the small corpus."""
JUDGE = "autoregression"
"""The training whose model measures the quality of text."""
CORRECTION = "correction.json"
"""The file, beside the runs, with the result of self-correction."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A model that corrects texts by a reviser."""

    run: str
    title: str
    reviser: str
    improves: bool
    """True: the claim is that the texts become better. False: the claim is that they do not."""


CORRECTIONS = tuple(
    Correction(run, f"{noise}, {rule}", reviser, run != "mdlm")
    for reviser, rule in (("conditional_modes", "conditional modes"), ("self_correction", "GIDD's rule"))
    for run, noise in (("gidd_0.2", "p_u = 0.2"), ("gidd_0.1", "p_u = 0.1"), ("mdlm", "p_u = 0"))
)
"""Every model that corrects texts, by every reviser."""
ASSUMED_NOISE = "gidd_0.2"
"""The training whose noise the texts are assumed to have in all corrections. With its own noise, a model of masks would change nothing."""


@dataclass(frozen=True, slots=True)
class Training:
    """One training of the comparison."""

    name: str
    """The name of its run directory."""
    title: str
    family: str
    overrides: tuple[str, ...]
    published: float | None = None
    """Bits per character of text8 (MD4, arXiv 2406.04329, table 2; for uniform noise D3PM, arXiv 2107.03006); None = not published."""


PROCESSES = (
    Training("autoregression", "autoregression", FAMILIES[0], ("diffusion=autoregressive",), 1.23),
    Training("genmd4", "GenMD4", FAMILIES[1], ("diffusion=genmd4", "model.learns_noise_rates=true"), 1.34),
    Training("mdlm", "MD4 and MDLM", FAMILIES[1], ("diffusion=mdlm",), 1.37),
    Training("sedd", "SEDD, absorbing", FAMILIES[1], ("diffusion=sedd",), 1.39),
    Training("d3pm", "D3PM, absorbing", FAMILIES[1], ("diffusion=d3pm",), 1.45),
    Training("gidd_0.1", "GIDD, p_u = 0.1", FAMILIES[2], ("diffusion=gidd", "diffusion.uniform_share=0.1")),
    Training("gidd_0.2", "GIDD, p_u = 0.2", FAMILIES[2], ("diffusion=gidd", "diffusion.uniform_share=0.2")),
    Training("udlm", "UDLM, uniform", FAMILIES[3], ("diffusion=udlm",), 1.61),
)
"""The trainings that read no text twice."""


def repeated(data: Path, overrides: Sequence[str]) -> tuple[Training, ...]:
    """Return the trainings on the small corpus, for 1 and for NUM_EPOCHS epochs.

    Args:
        data: the directory of the datasets.
        overrides: the user's overrides of the recipe, which may change the schedule.
    """
    small = f"data.train={small_corpus(data)}"
    once = [small, *_one_epoch(overrides)]
    by_title = {training.name: training for training in PROCESSES if training.name in (JUDGE, "mdlm")}
    return tuple(
        Training(repeated_name(name, num_epochs), training.title, training.family, (*training.overrides, *more))
        for name, training in by_title.items()
        for num_epochs, more in ((1, once), (NUM_EPOCHS, [small]))
    )


def repeated_name(name: str, num_epochs: int) -> str:
    """Return the name of the run that trains as the training ``name`` does, on the small corpus."""
    return f"{name}_epochs_{num_epochs}"


def small_corpus(data: Path) -> Path:
    """Return the prefix of the small corpus's dataset."""
    return data / "small"


def num_tokens(overrides: Sequence[str]) -> int:
    """Return the tokens of a whole training."""
    return sum(stage.tokens for stage in load_config(["recipe=processes", *overrides]).schedule.stages.values())


def _one_epoch(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that make all stages shorter by NUM_EPOCHS."""
    stages = load_config(["recipe=processes", *overrides]).schedule.stages
    return [
        f"schedule.stages.{name}.{field}={getattr(stage, field) // NUM_EPOCHS}"
        for name, stage in stages.items()
        for field in ("tokens", "rewarm_tokens")
    ]
