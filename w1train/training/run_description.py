"""The texts about a run that its console shows once: at its start, and at its end."""

from __future__ import annotations

import logging
import shlex
from itertools import groupby
from typing import Any

from w1train.checkpoints.checkpoint_names import step_path
from w1train.checkpoints.manifest import Progress, complete_steps, describe_next_start
from w1train.config.errors import UserError
from w1train.config.schema import Config
from w1train.config.stages import at_stage
from w1train.diffusion.processes import noise_process
from w1train.model.flops import num_active_parameters, num_parameters
from w1train.objectives.description import describe_objective
from w1train.planning.parameters import num_trained_parameters
from w1train.records.console import print_block
from w1train.records.summary import tokens_per_second, validation_summary
from w1train.runtime.device import device_name
from w1train.runtime.distributed import Ranks
from w1train.runtime.kernel_choices import describe_kernels
from w1train.runtime.quantities import duration, quantity
from w1train.runtime.record_files import read_metrics
from w1train.runtime.run_directory import RunDirectory
from w1train.runtime.stop_signals import signal_name
from w1train.training.schedule_position import SchedulePosition
from w1train.training.training_data import TrainingData

logger = logging.getLogger(__name__)


def describe_run(
    config: Config, ranks: Ranks, run: RunDirectory, data: TrainingData, progress: Progress, position: SchedulePosition
) -> dict[str, str]:
    """Return titles and values for people."""
    parallel, model = config.parallel, config.model
    layout = f"data {ranks.data_parallel_size}, tensor {parallel.tensor}, pipeline {parallel.pipeline}, context {parallel.context}"
    if parallel.expert > 1:
        layout += f", expert {parallel.expert}"
    return {
        "model": f"{_parameters(config)} in {model.num_layers} layers of width {model.hidden_size}",
        "objective": _objectives(config),
        "data": f"{data.num_tokens:,} tokens for training; {_passes(position.num_tokens / data.num_tokens)}",
        "batch": f"{config.training.global_batch_size} samples of {config.data.sequence_length} tokens",
        "steps": f"{position.num_steps:,}, which are {position.num_tokens:,} tokens",
        "device": f"{_counted(ranks.world_size, 'rank')} on {device_name(ranks.device)}, {config.training.precision} ({layout})",
        "kernels": describe_kernels(),
        "begins": _beginning(config, run, progress),
        "directory": str(run.path),
        "watch": f"w1train status {_quoted(run)} (Ctrl-C saves and stops)",
    }


def _parameters(config: Config) -> str:
    """Return the number of parameters, and how many of them compute a token in a mixture of experts or are trained with adapters."""
    model, adapters = config.model, config.adapters
    parts = [f"{num_parameters(model, adapters):,} parameters"]
    if model.experts.num_experts:
        parts.append(f"{num_active_parameters(model, adapters):,} of which compute a token")
    if adapters.rank:
        parts.append(f"{num_trained_parameters(model, adapters):,} of which are trained (adapters of rank {adapters.rank})")
    return ", ".join(parts) + ("," if len(parts) > 1 else "")


def _objectives(config: Config) -> str:
    """Return the objectives of the schedule's stages in their order, each once in a row."""
    objectives = [describe_objective(at_stage(config, name)) for name in config.schedule.stages]
    return ", then ".join(objective for objective, _ in groupby(objectives))


def _passes(epochs: float) -> str:
    return f"the run reads them {epochs:.3g} times" if epochs >= 1 else f"the run reads {epochs:.2%} of them"


def _beginning(config: Config, run: RunDirectory, progress: Progress) -> str:
    if progress.step > 0:
        return f"resumes from step {progress.step:,}, {step_path(run.checkpoints, progress.step)}"
    weights = config.training.initial_weights
    return "at step 0, from random weights" if weights is None else f"at step 0, from the weights of {weights}"


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _quoted(run: RunDirectory) -> str:
    """Return the path of the run as a word of a shell's command."""
    return shlex.quote(str(run.path))


def print_end(
    config: Config, run: RunDirectory, progress: Progress, position: SchedulePosition, *, stop_signal: int, is_stopped: bool
) -> None:
    """Print how the run has ended, and what to do next. Nothing depends on this text, so records that cannot be read are a warning. Only
    rank 0 calls this.

    Args:
        stop_signal: the number of the signal that has stopped the run, or 0.
        is_stopped: the run has not all its steps.
    """
    title = f"{config.name} is finished: it has all its {position.num_steps:,} steps"
    if is_stopped:
        step = f"step {progress.step:,} of {position.num_steps:,}"
        reason = f"was stopped by {signal_name(stop_signal)} after" if stop_signal else "was stopped by --max-steps at"
        next_start = describe_next_start(run.checkpoints)
        if not stop_signal:  # with the option, the same command would find nothing to do
            next_start = next_start.replace("the same command", "the same command without --max-steps")
        title = f"{config.name} {reason} {step}; {next_start}"
    try:
        print_block(title, describe_end(config, run, progress, position))
    except (OSError, UserError) as error:
        logger.warning("%s. Its records cannot be read: %s", title, error)


def describe_end(config: Config, run: RunDirectory, progress: Progress, position: SchedulePosition) -> dict[str, str]:
    """Return titles and values for people about a run that has ended.

    Raises:
        OSError, UserError: the records cannot be read.
    """
    speed = tokens_per_second(read_metrics(run.metrics, kind="train"))
    tokens = f"{progress.samples * config.data.sequence_length:,} tokens in {duration(progress.seconds)}"
    validation = validation_summary(read_metrics(run.metrics, kind="validation"))
    skipped = progress.health.get("skipped", 0)
    commands = [f"w1train report {_quoted(run)}"]
    if not noise_process(position.stage.diffusion).is_causal:
        commands.insert(0, f"w1train sample {_quoted(run)}")
    return {
        "trained": tokens if speed is None else f"{tokens}, {quantity(speed)} tokens/s",
        **({} if validation is None else {"validation": _change(validation)}),
        "skipped": _counted(skipped, "step") + (f", see {run.bad_batches}" if skipped else ""),
        "checkpoints": f"{', '.join(map(str, complete_steps(run.checkpoints)))} in {run.checkpoints}",
        "next": "\n".join(commands),
    }


def _change(validation: dict[str, Any]) -> str:
    """Describe the first and the last validation of a run."""
    start, end = validation["start"], validation["end"]
    name, unit = ("elbo", "nats per token") if end["elbo_bits_per_byte"] is None else ("elbo_bits_per_byte", "bits per byte")
    text = f"{end[name]:.4f} {unit} at step {end['step']:,}"
    return text if start is None or start["step"] == end["step"] else f"{start[name]:.4f} -> {text}"
