"""The dashboard of a W&B project as plain data: its charts, their metrics and their order. :func:`workspace` turns it into W&B's form."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

NAME = "w1train"
_BY_TOKENS, _BY_STEP = "tokens", "Step"


@dataclass(slots=True, frozen=True, kw_only=True)
class Panel:
    """A chart of ``metrics`` by their W&B names, or of all metrics whose names match ``pattern``."""

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    x: str = _BY_TOKENS
    log: bool = False
    """This flag tells whether the vertical axis is logarithmic."""


@dataclass(slots=True, frozen=True, kw_only=True)
class Section:
    """A group of charts with a heading."""

    name: str
    panels: tuple[Panel, ...]


SECTIONS = (
    Section(
        name="Learning",
        panels=(
            Panel(title="Loss", metrics=("loss",)),
            Panel(title="ELBO, nats per token", metrics=("elbo",)),
            Panel(title="ELBO, bits per byte", metrics=("elbo_bits_per_byte",)),
            Panel(title="Masked cross-entropy, nats", metrics=("masked_cross_entropy",)),
            Panel(title="Loss by noise level t", pattern="^loss_by_t/"),
            Panel(title="Mask ratio", metrics=("mask_ratio",)),
        ),
    ),
    # The axis is the step, because W&B does not know the number of tokens at the validation of step 0.
    Section(
        name="Validation",
        panels=(
            Panel(title="Validation ELBO, nats per token", metrics=("validation/elbo",), x=_BY_STEP),
            Panel(title="Validation ELBO, bits per byte", metrics=("validation/elbo_bits_per_byte",), x=_BY_STEP),
            Panel(title="Validation loss by noise level t", pattern="^validation/loss_by_t/", x=_BY_STEP),
        ),
    ),
    Section(
        name="Optimisation",
        panels=(
            Panel(title="Gradient norm", metrics=("grad_norm",), log=True),
            Panel(title="Learning rate", metrics=("learning_rate",)),
            Panel(title="Phase: stage of the schedule", metrics=("phase",)),
            Panel(title="Block size", metrics=("block_size",), log=True),
            Panel(title="Batch size, samples", metrics=("batch_size",)),
            Panel(title="Epoch", metrics=("epoch",)),
        ),
    ),
    Section(
        name="Experts",
        panels=(
            Panel(
                title="Most tokens of an expert / mean, by kind of token",
                metrics=("experts/load", "experts/load_masked", "experts/load_noisy", "experts/load_clean"),
            ),
            Panel(title="Most tokens of an expert / mean, in the worst layer", metrics=("experts/load_worst_layer",)),
            Panel(title="Most tokens of an expert-parallel rank / mean", metrics=("experts/rank_load",)),
            Panel(title="Share of experts without a token", metrics=("experts/unused",)),
            Panel(title="Largest bias of an expert minus the smallest", metrics=("experts/bias_range",)),
            Panel(title="Losses of routers, without their coefficients", metrics=("experts/auxiliary_loss", "experts/router_z_loss")),
        ),
    ),
    Section(
        name="Speed",
        panels=(
            Panel(title="Tokens per second", metrics=("tokens_per_second",)),
            Panel(title="Model FLOPs utilisation", metrics=("mfu",)),
            Panel(title="Model TFLOP/s per device", metrics=("tflops",)),
            Panel(title="Seconds a step", metrics=("step_seconds",)),
            Panel(title="Seconds waiting for data and communication", metrics=("data_wait_seconds", "communication_seconds")),
            Panel(title="Peak memory, GiB", metrics=("memory_gib",)),
            Panel(title="Balance over context-parallel ranks, max / mean", metrics=("context_balance",)),
        ),
    ),
    Section(
        name="Health",
        panels=(
            Panel(title="Skipped steps", metrics=("health/skipped_steps",)),
            Panel(title="Slowest rank", metrics=("health/slowest_rank",), x=_BY_STEP),
            Panel(title="Seconds that other ranks wait for the slowest", metrics=("health/rank_spread",), x=_BY_STEP),
            Panel(title="Seconds that training waited for a checkpoint", metrics=("checkpoint/stall_seconds",), x=_BY_STEP),
            Panel(title="Seconds of a save in the background", metrics=("checkpoint/background_seconds",), x=_BY_STEP),
            Panel(title="Steps during a save: how much longer", metrics=("checkpoint/background_dip",), x=_BY_STEP),
            Panel(title="Seconds of a restart", metrics=("checkpoint/restart_seconds",), x=_BY_STEP),
        ),
    ),
)


def definition(project: str) -> dict[str, Any]:
    """Return the dashboard as JSON values."""
    return {"name": NAME, "project": project, "sections": [asdict(section) for section in SECTIONS]}


def workspace(entity: str, project: str) -> Any:
    """Return the dashboard as a Workspace of wandb-workspaces, whose ``save()`` creates it in the project. Raise ImportError without that
    package."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=section.name,
            is_open=True,
            panels=[
                reports.LinePlot(title=panel.title, x=panel.x, y=list(panel.metrics), metric_regex=panel.pattern, log_y=panel.log or None)
                for panel in section.panels
            ],
        )
        for section in SECTIONS
    ]
    return workspaces.Workspace(entity=entity, project=project, name=NAME, sections=sections)
